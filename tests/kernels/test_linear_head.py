# SPDX-License-Identifier: Apache-2.0
"""What the LM-head ops owe to chunks: accuracy over their number, kept logits, memory, splits of a
batch, upstreams of the loss."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from oracle import everywhere, same_bits, short
from own_product import stand_in
from test_process import python

from klq_kernels import linear_klq_loss, linear_token_logprobs
from klq_kernels._linear_cut import chunks
from klq_kernels._linear_head import ours

places = everywhere("linear_klq_loss", "linear_token_logprobs")


@pytest.fixture
def logits(request):
    """What `logits_dtype` to ask for; "own": with the stand-in for our own product."""
    with stand_in() if request.param == "own" else nullcontext():
        yield None if request.param is None else torch.float32


def heads(*dtypes):
    """parametrize arguments (device, backend, dtype, logits): all places, bfloat16 also with logits
    in float32, and with the stand-in for the product that is our own on a Hopper GPU."""
    out = [pytest.param("cpu", "cpp", torch.bfloat16, "own", id="cpu-own")]
    for place in places.args[1]:
        for dtype in dtypes:
            for kind in (None, "float32") if dtype == torch.bfloat16 else (None,):
                name = f"{place.id}-{short(dtype)}" + ("" if kind is None else "-logits32")
                values = *place.values, dtype, kind
                out.append(pytest.param(*values, id=name, marks=place.marks))
    names = ("device", "backend", "dtype", "logits")
    return pytest.mark.parametrize(names, out, indirect=["logits"])


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(device, dtype)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000, 16384])
@pytest.mark.parametrize("fit", [1, 3, 100, 128, 300, 5000, 20000])
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("tile", [128, 256])
def test_chunks_cover_every_row_once_within_the_bound(rows, fit, first, tile):
    parts = list(chunks(first, first + rows, 10, fit * 10 + 9, tile))
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(first, first + rows))
    sizes = [p.stop - p.start for p in parts]
    assert all(0 < n <= fit for n in sizes) and sizes == sorted(sizes, reverse=True)
    least = -(-rows // fit)
    assert least <= len(parts) <= least + 1
    if fit >= 128 and len(parts) > 1:
        assert all(n % 128 == 0 for n in sizes[:-1]) or max(sizes) > fit - 128


def problem(device, dtype, kind, tokens=256, width=64, vocabulary=1031):
    """Hidden states, head, targets on flat or peaked rows, or with chosen tokens that are all but
    certain (1 - p about 1e-5)."""
    scale = {"flat": 0.3, "peaked": 8.0, "confident": 0.3}[kind]
    h = draw(tokens, width, device=device, dtype=dtype)
    w = (draw(vocabulary, width, seed=1, device=device) * scale * width**-0.5).to(dtype)
    a = torch.arange(tokens, device=device) * 4 % vocabulary
    if kind == "confident":
        own = w[a].double()
        h = (h.double() / 4 + own * 19 / own.square().sum(-1, keepdim=True)).to(dtype)
    else:
        a[::2] = (h[::2].float() @ w.float().T).argmax(-1)  # half of them likely
    v, ref, g = (draw(tokens, seed=s, device=device) for s in (4, 5, 6))
    return h, w, a, v, {"ref_logprobs": ref - 3, "returns": g, "tau": 0.7, "normalizer": 1.0}


def gradients(op, h, w, a, v, rest, upstream=None, **how):
    h, w = (x.detach().clone().requires_grad_() for x in (h, w))
    if op == "loss":
        out = linear_klq_loss(h, w, a, v, **rest, **how).loss
    else:
        out = linear_token_logprobs(h, w, a, **how)
    return out.detach(), torch.autograd.grad(out, (h, w), upstream)


def eager(op, h, w, a, v, rest, upstream=None):
    """The head and its loss as a PyTorch user writes them: 16-bit logits, float32 log-softmax."""
    h, w = (x.detach().clone().requires_grad_() for x in (h, w))
    logits = torch.nn.functional.linear(h, w)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    out = logits.log_softmax(-1).gather(-1, a[:, None])[:, 0]
    if op == "loss":
        q = rest["tau"] * (out - rest["ref_logprobs"]) + v
        out = (q - rest["returns"]).square().sum()
    return out.detach(), torch.autograd.grad(out, (h, w), upstream)


@heads(torch.bfloat16)
@pytest.mark.parametrize("kind", ["flat", "peaked", "confident"])
@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_error_is_no_larger_than_eager_for_any_number_of_chunks(
    device, backend, dtype, logits, op, kind
):
    """Case 64: dH and dW of a bfloat16 head over 1 to 64 chunks, against float64."""
    h, w, a, v, rest = problem(device, dtype, kind)
    upstream = draw(len(a), seed=9, device=device) if op == "logprobs" else None
    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in rest.items()}
    up64 = None if upstream is None else upstream.double()
    _, truth = eager(op, h.double(), w.double(), a, v.double(), wide, up64)
    _, plain = eager(op, h, w, a, v, rest, upstream)

    def errors(grads):
        return [(g.double() - t).norm() / t.norm() for g, t in zip(grads, truth, strict=True)]

    allowed = [x * 1.02 for x in errors(plain)]
    counts = (1, 2, 3, 16, 64) if backend != "reference" else (1,)  # which has no chunks
    keeps = (0, len(a) // 2, len(a)) if op == "logprobs" else (None,)
    for count, keep in product(counts, keeps):
        how = {"chunk_bytes": len(a) // count * w.shape[0] * 2, "logits_dtype": logits}
        if keep is not None:  # rows
            how["keep_bytes"] = keep * 1032 * (2 if logits is None or backend == "cpp" else 4)
        _, grads = gradients(op, h, w, a, v, rest, upstream, backend=backend, **how)
        for name, got, most in zip(("dH", "dW"), errors(grads), allowed, strict=True):
            assert got <= most, f"{name}, {count} chunks, {keep}: {got:.3e} against {most:.3e}"


@places
@pytest.mark.parametrize("kind", ["flat", "peaked", "confident"])
def test_float32_logits_cost_a_tenth_of_the_log_probs_error(device, backend, kind):
    h, w, a, v, rest = problem(device, torch.bfloat16, kind)
    truth, _ = eager("logprobs", h.double(), w.double(), a, v, rest, v.double())
    plain, _ = eager("logprobs", h, w, a, v, rest, v)
    got = linear_token_logprobs(h, w, a, logits_dtype=torch.float32, backend=backend)
    assert (got.double() - truth).norm() <= 0.1 * (plain.double() - truth).norm()


@pytest.fixture
def one_thread():
    """Several cut a library's product on the CPU by its size, and a row's sum with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@heads(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("keep", [1, 100, 256, 5000])
@pytest.mark.parametrize("kind", ["flat", "confident"])
def test_keep_bytes_changes_no_number(one_thread, device, backend, dtype, logits, keep, kind):
    """Nothing, a part, all but nothing and everything kept; two backwards of each."""
    h, w, a, v, rest = problem(device, dtype, kind)
    mask = torch.arange(len(a), device=device) % 5 > 0
    row = w.shape[0] * dtype.itemsize
    own = backend != "reference" and ours(backend, h, w)
    how = {"mask": mask, "chunk_bytes": 37 * row, "backend": backend, "logits_dtype": logits}
    out, want = gradients("logprobs", h, w, a, v, rest, v, **how)
    x, y = (t.clone().requires_grad_() for t in (h, w))
    kept = linear_token_logprobs(x, y, a, keep_bytes=keep * row, **how)
    assert same_bits(kept.detach(), out)
    for _ in range(2):
        got = torch.autograd.grad(kept, (x, y), v, retain_graph=True)
        for g, t in zip(got, want, strict=True):
            # where a chunk ends does not change its rows, only the sums over them; but our own
            # product keeps exponentials, and makes the others again as gradients, each rounded
            most = (
                {"rtol": 1e-5, "atol": 1e-5}
                if dtype == torch.float32
                else {"rtol": 2**-7, "atol": 2**-8 if own else 2**-10}
            )
            most["atol"] *= float(t.abs().max())
            torch.testing.assert_close(g, t, **most)


@heads(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("kind", ["flat", "confident"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(device, backend, dtype, logits, kind):
    """Rule 11: 8 = 2 x 4 = 4 x 2 micro-batches and one empty of active tokens, one normaliser. A
    bfloat16 dW is rounded once a part."""
    h, w, a, v, rest = problem(device, dtype, kind)
    mask = draw(len(a), seed=3, device=device) < 0.5
    mask[:32] = False
    per_token = ("ref_logprobs", "returns")
    rest["normalizer"] = mask.sum().float()
    how = {"backend": backend, "logits_dtype": logits}
    _, want = gradients("loss", h, w, a, v, rest, mask=mask, **how)
    for count in (2, 4, 8):
        total = [torch.zeros_like(x, dtype=torch.float32) for x in (h, w)]
        for i in torch.arange(len(a), device=device).chunk(count):
            part = {k: x[i] if k in per_token else x for k, x in rest.items()}
            some = {"mask": mask[i], "num_active": int(mask[i].sum())}
            _, grads = gradients("loss", h[i], w, a[i], v[i], part, **some, **how)
            total[0][i] = grads[0].float()
            total[1] += grads[1]
        for got, x in zip(total, want, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-6 * float(x.abs().max()))
            else:
                assert (got - x).norm() <= 2**-8 * x.float().norm()


@heads(torch.float32, torch.bfloat16)
def test_upstream_of_the_loss(device, backend, dtype, logits):
    """Rule 12, case 40: powers of two scale every gradient exactly, 0 and -1 too."""
    h, w, a, v, rest = problem(device, dtype, "flat")
    how = {"backend": backend, "logits_dtype": logits}
    _, want = gradients("loss", h, w, a, v, rest, **how)
    for factor in (1.0, 0.5, 65536.0, 0.0, -1.0):
        upstream = torch.tensor(factor, device=device)
        _, got = gradients("loss", h, w, a, v, rest, upstream, **how)
        for g, x in zip(got, want, strict=True):
            assert torch.equal(g, x * factor)


@pytest.mark.parametrize("tokens", [0, 6])
@pytest.mark.parametrize("num_active", [None, 0, 4, 9])
@pytest.mark.parametrize("masked", [True, False])
def test_fakes_know_the_rows_that_meet_the_head(tokens, num_active, masked):
    """Also of no token at all, which no number of active ones makes a row of."""
    h, w, a = draw(tokens, 4), draw(11, 4), torch.arange(tokens)
    mask = a % 2 == 0 if masked else None
    head, rest = (h, w, None, a, mask), (1.0, 0.0, None, num_active, None)
    forward = torch.ops.klq.linear_token_logprobs.default
    backward = torch.ops.klq.linear_token_logprobs_backward.default
    keep = 2 * 16 * 4
    made = forward(*head, *rest, keep)
    calls = [(forward, (*head, *rest, keep))]
    calls += [(backward, (torch.ones(tokens), *head, *made[1:], *rest, True, True, False))]
    for op, args in calls:  # the other checks take no NaN, which too small a number gives
        torch.library.opcheck(op, args, test_utils="test_faketensor")


@pytest.mark.parametrize("logits", [None, torch.float32], ids=["16 bits", "float32"])
@pytest.mark.parametrize("own", [False, True], ids=["library", "own"])
def test_keep_bytes_is_what_is_kept(own, logits):
    """Whole rows of what is really stored, also where our own product stores exponentials of 16
    bits in place of float32 logits; and the fake agrees."""
    h, w, a = draw(50, 16).bfloat16(), draw(21, 16, seed=1).bfloat16(), torch.arange(50) % 21
    bytes_a_row = 32 * (2 if own or logits is None else 4)
    op = torch.ops.klq.linear_token_logprobs.default
    with stand_in() if own else nullcontext():
        for rows in (0, 1, 7, 50):
            for spare in (0, bytes_a_row - 1):
                keep = rows * bytes_a_row + spare
                args = h, w, None, a, None, 1.0, 0.0, logits, None, None, keep
                kept = op(*args)[2]
                assert len(kept) == rows and kept.numel() * kept.itemsize == rows * bytes_a_row
                torch.library.opcheck(op, args, test_utils="test_faketensor")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dw_of_one_chunk_by_either_product(monkeypatch, dtype, quick):
    """By a 16-bit product or through float32, whatever this processor multiplies."""
    monkeypatch.setattr("klq_kernels._linear_head.multiplies", lambda dtype: quick)
    h, w, a, v, rest = problem("cpu", dtype, "flat")
    _, (_, want) = eager("logprobs", h.double(), w.double(), a, v, rest, v.double())
    _, (_, plain) = eager("logprobs", h, w, a, v, rest, v)
    _, (_, got) = gradients("logprobs", h, w, a, v, rest, v, backend="cpp")
    assert (got.double() - want).norm() <= 1.1 * (plain.double() - want).norm()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older names are not ours to follow")
def test_torch_says_by_these_names_what_a_processor_multiplies():
    """Where a name is gone, `multiplies` takes the slow way."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        assert callable(getattr(torch.cpu, name))


MEMORY = """
import gc, resource, torch
from klq_kernels import linear_klq_loss, linear_token_logprobs, linear_token_stats

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

tokens, width, chunk = 1024, 32, 40 << 20

def measure(what, dtype, vocabulary):
    h = torch.randn(tokens, width).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    a, x = torch.arange(tokens), torch.randn(tokens)
    how = {"chunk_bytes": chunk, "mask": torch.ones(tokens, dtype=torch.bool)}
    if what == "loss of float32 logits":
        how["logits_dtype"] = torch.float32
    kept = -(-vocabulary // 32) * 32 * tokens * h.itemsize if what == "kept" else 0
    gc.collect()
    keep = torch.ones(max(0, peak() - now()) // 4 + 2**18)
    before = peak()
    if what == "stats":
        made = linear_token_stats(h, w, a, **how)[:2]
    elif what in ("logprobs", "kept"):
        out = linear_token_logprobs(h, w, a, keep_bytes=kept, **how)
        made = [out, *torch.autograd.grad(out, (h, w), x)]
    else:
        out = linear_klq_loss(h, w, a, x, ref_logprobs=x, returns=x, tau=0.1, **how).loss
        made = [out, *torch.autograd.grad(out, (h, w))]
    beyond = peak() - before - sum(t.numel() * t.element_size() for t in made)
    wide = 4 * w.numel() if dtype == torch.bfloat16 and what != "stats" else 0
    return (beyond - wide - kept - chunk) / 2**20

for dtype in (torch.float32, torch.bfloat16):
    measure("logprobs", dtype, 50304)  # the BLAS library keeps buffers of its first products
    for vocabulary in (50304, 50257):
        for what in ("stats", "logprobs", "kept", "loss", "loss of float32 logits"):
            print(what, vocabulary, dtype, measure(what, dtype, vocabulary))
"""


def test_memory_beyond_results_is_a_chunk_and_a_float32_dw():
    """On the CPU, 40 MiB chunks of logits that are 98 or 196 MiB whole: at most 24 MiB beyond the
    chunk, what is kept and, for a 16-bit weight, its gradient in float32 (16 MiB are copies by
    slices)."""
    lines = python(MEMORY, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    seen = [line.rsplit(" ", 1) for line in lines.split("\n") if line]
    assert len(seen) == 20 and not [x for x in seen if float(x[1]) > 24], seen
