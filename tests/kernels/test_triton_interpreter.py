# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, on the CPU, in processes of their own: the generic
tests on small cases, and what only these kernels can get wrong.

The interpreter does not notice a store out of bounds, so outputs are padded with canaries here. It
truncates float32 to bfloat16 where a GPU rounds: bfloat16 gradients are left to the GPU.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from oracle import case, check, error, run, same_bits

import klq_kernels
from klq_kernels._dispatch import INTERPRET
from klq_kernels._registry import SPECS

HERE = Path(__file__).parent
SLOW = (
    "not linear and not more_rows and not one_percent and not case_73 and not float16_does_not "
    "and not never_above_zero and not dtype1"  # dtype1 is bfloat16
)
FEW = "plain or strided or unaligned or packed"
MANY = (
    "plain or strided or deep or no_rows or one_active or vocabulary_1 or vocabulary_4099 or "
    "banned or only_chosen or peaked or extreme or cold or capped_low"
)
ROWS = f"truth and triton-float32 and (token_ or q_values) and ({MANY})"
OTHERS = (
    "truth and triton-float32 and not token_ and not q_values and not linear and not hot "
    "and not minus_1000 and not tau_100"
)
FLOAT16 = f"truth and triton-float16 and not linear and ({FEW} or banned)"
LINEAR = "truth and linear and triton-float32 and (plain or compacted)"
RULES = (
    "triton-float32 and not linear and (plain or packed or all_masked) and (nan or nothing or "
    "bad_token or alone or (upstream_scale and 65536) or two_backwards or through_targets)"
)
TORCH = (
    "not linear and ((opcheck and (token_logprobs or gae or klq_loss)) or "
    "(compile_fullgraph and (token_logprobs or lambda_returns or klq_loss)))"
)
GROUPS = {  # few processes: each spends seconds on its start
    "rows": (["test_ops.py"], f"({ROWS}) or ({LINEAR})"),
    "others": (["test_ops.py"], f"({OTHERS}) or ({FLOAT16}) or ({RULES})"),
    "named": (
        ["test_klq_loss.py", "test_token_logprobs.py", "test_identities.py"],
        f"triton and {SLOW}",
    ),
    "torch": (["test_torch.py"], TORCH),
    "itself": ([Path(__file__).name], ""),
}


LOOP = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(n):
    for _ in range(0, tl.load(n)):
        pass
kernel[(1,)](torch.ones(1, dtype=torch.int32))
"""


@cache
def cannot_loop(folder: Path) -> str | None:
    """Triton 3.6's interpreter cannot run a loop of dynamic length under NumPy 2.4; 3.9's can."""
    file = folder / "loop.py"
    file.write_text(LOOP)
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    return None if done.returncode == 0 else done.stderr[-300:]


@pytest.mark.skipif(INTERPRET, reason="this is the process it starts")
@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group, tmp_path_factory):
    if reason := cannot_loop(tmp_path_factory.getbasetemp()):
        pytest.skip(f"this Triton's interpreter does not work here: {reason}")
    names, chosen = GROUPS[group]
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
            ),
            *("--timeout", "120", "--import-mode=importlib", "-W", "ignore", "-k", chosen),
            *(str(HERE / name) for name in names),
        ],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "KLQ_BACKEND": "triton",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-500:]


inside = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
CANARY = -1234.5
PAD = 40  # elements; a multiple of 8 keeps the alignment


class Padded:
    """Hands out outputs in the middle of a larger buffer, and looks at the rims afterwards."""

    def __init__(self):
        self.buffers = []

    def empty(self, x, shape, dtype=torch.float32):
        buffer = x.new_full((torch.Size((shape,) if isinstance(shape, int) else shape).numel()
                             + 2 * PAD,), CANARY, dtype=dtype)  # fmt: skip
        self.buffers.append(buffer)
        middle = buffer[PAD:-PAD]
        middle.fill_(torch.nan)
        return middle.view(shape)

    def intact(self) -> bool:
        rims = [torch.cat([b[:PAD], b[-PAD:]]) for b in self.buffers]
        return all((r == torch.full_like(r, CANARY)).all() for r in rims)


@inside
@pytest.mark.parametrize("name", ["plain", "strided", "packed", "vocabulary_4099", "capped_low"])
@pytest.mark.parametrize("op", [name for name in SPECS if not name.startswith("linear")])
def test_nothing_is_written_outside(monkeypatch, op, name):
    from klq_kernels import _triton_host

    spec = SPECS[op]
    if not any(c.name == name for c in spec.cases):
        return
    padded = Padded()
    monkeypatch.setattr(_triton_host, "like", padded.empty)
    for dtype in (torch.float32, torch.float16):
        run(spec, spec.inputs("cpu", dtype, case(name)), "triton")
    assert padded.buffers and padded.intact()


@inside
@pytest.mark.parametrize("stride", [300, 263])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_in_place_stays_in_its_rows(dtype, stride):
    spec = SPECS["klq_loss"]
    inputs = spec.inputs("cpu", dtype)
    base = torch.full((15, stride), CANARY, dtype=dtype)
    base[:, :257] = inputs["logits"].view(15, 257)
    rows = base.view(3, 5, stride)[..., :257]
    want = run(spec, inputs, "triton").grads
    leaf = inputs["values"].requires_grad_()
    made = spec.function(**{**inputs, "logits": rows, "values": leaf}, inplace=True)
    made.loss.backward()
    assert (base[:, 257:] == CANARY).all()
    assert same_bits(leaf.grad, want["values"])
    if dtype == torch.float32:
        assert same_bits(rows, want["logits"])


@inside
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("lengths", [None, (0, 150, 0, 1, 64, 65, 7, 0)])
def test_long_sequences_cut_into_tiles(monkeypatch, lengths, trace):
    """The two launches of few long sequences, with tiles of 64 tokens in place of 1024."""
    module = sys.modules[klq_kernels._operators.kernel("lambda_returns").__module__]
    monkeypatch.setattr(module, "_LANES", 16)
    monkeypatch.setattr(module, "_LONG", 64)
    spec, size = SPECS["lambda_returns"], {"leading": (3, 300)}
    if lengths is not None:
        size = {"leading": (300,), "lengths": lengths}
    inputs = spec.inputs("cpu", torch.float32, **size)
    if trace:
        inputs["trace"] = inputs["rewards"].sigmoid()
        del inputs["lam"]
    launched = []
    launch = module.host.launch
    monkeypatch.setattr(
        module.host, "launch", lambda kernel, *args, **how: (launched.append(kernel.__name__),
                                                           launch(kernel, *args, **how))
    )  # fmt: skip
    check(spec, inputs, "triton", torch.float32)
    assert launched == ["tile_map_kernel", "tile_scan_kernel"]


@inside
@pytest.mark.parametrize("length", [31, 32, 33, 1023, 1025, 2051])
def test_lengths_around_lanes_and_tiles(length):
    spec = SPECS["gae"]
    check(spec, spec.inputs("cpu", torch.float32, leading=(2, length)), "triton", torch.float32)


@inside
@pytest.mark.parametrize("width", [2047, 4096, 4097, 8191, 12289])
def test_vocabularies_around_tiles(width):
    for op in ("token_logprobs", "klq_loss", "token_stats"):
        spec = SPECS[op]
        check(spec, spec.inputs("cpu", leading=(2,), vocabulary=width), "triton", torch.float32)


@inside
@pytest.mark.parametrize("op", ["token_logprobs", "token_stats", "klq_loss"])
@pytest.mark.parametrize("width", [12289, 24600])  # without and with vector loads
def test_the_chosen_token_in_any_tile(op, width):
    """Its tile is walked apart from the others: first, in the middle, last whole one, the rest."""
    spec = SPECS[op]
    inputs = spec.inputs("cpu", leading=(6,), vocabulary=width)
    at = [0, 2047, 8192, width // 2, width // 4096 * 4096 - 1, width - 1]
    inputs["actions"] = torch.tensor(at)
    check(spec, inputs, "triton", torch.float32)


@inside
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("tops", [(3e38, 2.9e38), (-3e38, -3.1e38), (3e38, 0.0), (2.0, -3e38)])
def test_logits_whose_products_overflow(tops, temperature):
    """Case 48 with entropy, KL and gradient: two values, so far apart that one of them is all, in
    rows of several tiles; the reference likewise, or ordinary."""
    logits = torch.full((2, 12296), tops[1])
    logits[0, [7, 9000]] = logits[1, [8, 12295]] = tops[0]
    actions = torch.tensor([9000, 3])
    log2 = torch.tensor(2.0).log()
    for ref in (logits, torch.zeros_like(logits)):
        got = klq_kernels.token_stats(
            logits, actions, ref_logits=ref, temperature=temperature, backend="triton"
        )
        torch.testing.assert_close(got.entropy, log2.expand(2))
        torch.testing.assert_close(got.logprobs[0], -log2)
        want = 0.0 if ref is logits else torch.tensor(12296.0).log() - log2
        torch.testing.assert_close(got.kl, torch.full((2,), float(want)))
    z, row = logits.requires_grad_(), torch.zeros(2)
    klq_kernels.klq_loss(
        z, actions, row, ref_logprobs=row, returns=row, mask=torch.tensor([True, False]),
        temperature=temperature, tau=1.0, normalizer=1.0, backend="triton",
    ).loss.backward()  # fmt: skip
    want = torch.zeros_like(z)
    want[0, 9000], want[0, 7] = -log2 / temperature, log2 / temperature
    torch.testing.assert_close(z.grad, want)


@inside
def test_a_mask_in_front_of_a_bad_pointer_reads_nothing():
    """An active action outside [0, V) is NaN for its token and harmless for the others (the checks
    of the CPU are not passed here)."""
    logits = torch.randn(4, 33)
    actions = torch.tensor([3, 33, -1, 2**40])
    out, _ = torch.ops.klq_triton.token_logprobs.default(logits, actions, None, 1.0, 0.0)
    assert out[1:].isnan().all()
    want = logits.log_softmax(-1)[0, 3]
    assert error(out[:1], want[None]) < 1e-6


@inside
def test_a_row_is_the_same_bits_in_any_layout():
    """Lanes follow from V alone: neither the address nor the stride of a row shows."""
    logits = torch.randn(6, 4099)
    actions = torch.arange(6)
    whole = klq_kernels.token_logprobs(logits, actions)
    wide = torch.empty(6, 4107)
    wide[:, 3:4102] = logits
    other = klq_kernels.token_logprobs(wide[:, 3:4102], actions)
    assert same_bits(whole, other)
    assert same_bits(whole[2:3], klq_kernels.token_logprobs(logits[2:3], actions[2:3]))
