# SPDX-License-Identifier: Apache-2.0
"""Every error the public API promises: its type, and the op and the argument in its message.

A row of the table changes good inputs into bad ones for all ops that take the argument. "Before
any work" is checked with meta tensors where the argument's metadata is at fault: they hold no data,
so an op that touched it would fail in another way.
"""

import inspect

import pytest
import torch
from oracle import backends, case

import klq_kernels
from klq_kernels._registry import SPECS
from klq_kernels._samples import PER_SEQUENCE, PER_TOKEN

PACKED = {"leading": (6,), "lengths": (2, 4)}


def floats(x):
    return x.float()


def longer(x):
    return torch.cat([x, x[:1]])


def put(value):
    return lambda x: value


# argument, what is done to it, error, what the message must say besides op and argument
ROWS = [
    ("actions", floats, TypeError, "float32"),
    ("actions", longer, ValueError, "shape"),
    ("actions", lambda x: x.tolist(), TypeError, "list"),
    ("actions", lambda x: x > 1, TypeError, "bool"),
    ("logits", lambda x: x.long(), TypeError, "int64"),
    ("logits", lambda x: x[..., :0], ValueError, "V >= 1"),
    ("logits", lambda x: torch.stack([x, x], -1)[..., 0], ValueError, "contiguous"),
    ("ref_logits", lambda x: x[..., :-1], ValueError, "shape"),
    ("ref_logits", lambda x: x.long(), TypeError, "int64"),
    ("q", lambda x: x[..., :-1], ValueError, "shape"),
    ("mask", floats, TypeError, "weights"),
    ("mask", longer, ValueError, "shape"),
    ("mask", lambda x: x.tolist(), TypeError, "list"),
    ("mask", torch.flatten, ValueError, "shape"),  # as many elements, and yet wrong
    ("values", longer, ValueError, "shape"),
    ("values", lambda x: x.long(), TypeError, "int64"),
    ("rewards", longer, ValueError, "shape"),
    ("rewards", torch.flatten, ValueError, "shape"),
    ("rewards", lambda x: x.long(), TypeError, "int64"),
    ("log_ratios", longer, ValueError, "shape"),
    ("ref_logprobs", longer, ValueError, "shape"),
    ("returns", longer, ValueError, "shape"),
    ("returns", lambda x: x.long(), TypeError, "int64"),
    ("weights", longer, ValueError, "shape"),
    ("bootstrap", longer, ValueError, "one value a sequence"),
    ("bootstrap", lambda x: x[None], ValueError, "one value a sequence"),
    ("bootstrap", lambda x: x.long(), TypeError, "int64"),
    ("scores", longer, ValueError, "one value a sequence"),
    ("scores", lambda x: x.tolist(), TypeError, "list"),
    ("hidden", lambda x: x[..., :-1], ValueError, "weight"),
    ("hidden", lambda x: x.long(), TypeError, "int64"),
    ("weight", lambda x: x[0], ValueError, "[V, D]"),
    ("weight", lambda x: x[:0], ValueError, "V >= 1"),
    ("weight", lambda x: x.double(), TypeError, "autocast"),
    ("bias", longer, ValueError, "shape"),
    ("tau", put(-0.1), ValueError, "-0.1"),
    ("tau", put(float("nan")), ValueError, "nan"),
    ("tau", put(float("inf")), ValueError, "inf"),
    ("tau", put("0.1"), TypeError, "str"),
    ("gamma", put(1.01), ValueError, "[0, 1]"),
    ("gamma", put(-0.01), ValueError, "[0, 1]"),
    ("lam", put(1.01), ValueError, "[0, 1]"),
    ("lam", put(-0.01), ValueError, "[0, 1]"),
    ("alpha", put(0.0), ValueError, "(0, 1]"),
    ("alpha", put(1.5), ValueError, "(0, 1]"),
    ("temperature", put(0.0), ValueError, "(0, inf)"),
    ("temperature", put(float("nan")), ValueError, "nan"),
    ("logit_softcap", put(0.0), ValueError, "(0, inf)"),
    ("logit_softcap", put(-5.0), ValueError, "(0, inf)"),
    ("normalizer", put(0.0), ValueError, "(0, inf)"),
    ("normalizer", put(torch.ones(2)), ValueError, "[2]"),
    ("num_active", put(-1), ValueError, "-1"),
    ("num_active", put(2.5), ValueError, "2.5"),
    ("chunk_bytes", put(0), ValueError, "0"),
    ("keep_bytes", put(-1), ValueError, "-1"),
    ("logits_dtype", put(torch.float16), TypeError, "float16"),
    ("backend", put("fast"), ValueError, "fast"),
]
PACKED_ROWS = [
    ("cu_seqlens", floats, TypeError, "float32"),
    ("cu_seqlens", lambda x: x.to(torch.int16), TypeError, "int16"),
    ("cu_seqlens", lambda x: x[None], ValueError, "[S + 1]"),
    ("cu_seqlens", lambda x: x[:0], ValueError, "[S + 1]"),
    ("cu_seqlens", lambda x: x + 1, ValueError, "start at 0"),
    ("cu_seqlens", lambda x: x.flip(0) - x[-1], ValueError, "start at 0"),
    ("cu_seqlens", lambda x: x * 2, ValueError, "at most at N"),
    ("cu_seqlens", lambda x: x.tolist(), TypeError, "list"),
    ("bootstrap", longer, ValueError, "one value a sequence"),
]


def hollow(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def parameters(spec):
    return inspect.signature(spec.function).parameters


def rows(table, packed):
    for spec in SPECS.values():
        if packed and "cu_seqlens" not in spec.takes:
            continue
        accepted = {*spec.takes, *(set(parameters(spec)) - {*PER_TOKEN, *PER_SEQUENCE}), "lam"}
        accepted &= set(parameters(spec))
        for i, (name, change, error, says) in enumerate(table):
            if (spec.name, name) == ("place_scores", "mask") and change in (longer, torch.flatten):
                continue  # its mask sets the shape, and scores are found wrong
            if name in accepted:
                yield pytest.param(
                    spec, name, change, error, says, packed, id=f"{spec.name}-{name}-{i}"
                )


@pytest.mark.parametrize(
    ("spec", "name", "change", "error", "says", "packed"),
    [*rows(ROWS, False), *rows(PACKED_ROWS, True)],
)
def test_bad_arguments(spec, name, change, error, says, packed):
    good = spec.inputs(**(PACKED if packed else {}))
    spec.function(**good)
    bad = {**good, name: change(good.get(name))}
    calls = [bad]
    tensors = isinstance(good.get(name), torch.Tensor) and isinstance(bad[name], torch.Tensor)
    if tensors and name != "cu_seqlens":
        calls.append({k: hollow(x) if isinstance(x, torch.Tensor) else x for k, x in bad.items()})
    for call in calls:
        with pytest.raises(error) as caught:
            spec.function(**call)
        message = str(caught.value)
        assert message.startswith(f"{spec.name}: ") or name == "backend", message
        assert name in message or name == "backend", message
        assert says in message, message


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_inputs_on_different_devices(spec):
    """A CPU call with one tensor elsewhere; the message names that tensor."""
    good = spec.inputs()
    tensors = [k for k, x in good.items() if isinstance(x, torch.Tensor)]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match=rf"{spec.name}: .* is on ") as caught:
            spec.function(**{**good, name: good[name].to("meta")})
        assert name in str(caught.value) or "on cpu" in str(caught.value)


WITH_ACTIONS = [s for s in SPECS.values() if "actions" in s.takes]


@pytest.mark.parametrize("spec", WITH_ACTIONS, ids=[s.name for s in WITH_ACTIONS])
@pytest.mark.parametrize("bad", [-1, 257, 2**40])
def test_active_ids_outside_the_vocabulary(spec, bad):
    """IndexError on the CPU that says where and what; inactive ones may be anything (case 55)."""
    inputs = spec.inputs()
    inputs["mask"] = torch.ones_like(inputs["mask"])
    inputs["actions"][1, 2] = bad
    for backend in backends(spec.name, "cpu"):
        with pytest.raises(IndexError, match=rf"{spec.name}: actions\[1, 2\] = {bad} .*\[0, 257\)"):
            spec.function(**inputs, backend=backend)
        spec.function(**{**inputs, "mask": inputs["mask"].index_fill(0, torch.tensor(1), False)})


def test_ids_past_the_last_sequence_may_be_anything():
    spec = SPECS["klq_targets"]
    inputs = spec.inputs(case=case("packed"))
    inputs["actions"][14:] = -100
    spec.function(**inputs)


def test_bad_ids_are_nan_where_nobody_looks():
    """What a compiled graph, and CUDA without KLQ_VALIDATE, give for a bad active id."""
    z = torch.randn(3, 5)
    ids = torch.tensor([-1, 5, 2])
    row = torch.ops.klq.token_logprobs(z, ids, None, 1.0, 0.0)[0]
    assert row[:2].isnan().all() and row[2].isfinite()


def test_references_are_exclusive():
    spec = SPECS["klq_targets"]
    inputs = spec.inputs()
    ref = inputs.pop("ref_logits")
    with pytest.raises(ValueError, match=r"klq_targets: exactly one of .* neither"):
        spec.function(**inputs)
    with pytest.raises(ValueError, match=r"klq_targets: ref_logprobs"):
        spec.function(**inputs, ref_logprobs=longer(inputs["values"]))
    with pytest.raises(ValueError, match=r"klq_targets: exactly one of .* both"):
        spec.function(**inputs, ref_logits=ref, ref_logprobs=inputs["values"])


def test_lam_and_trace_are_exclusive():
    inputs = SPECS["lambda_returns"].inputs()
    with pytest.raises(ValueError, match=r"lambda_returns: lam and trace"):
        klq_kernels.lambda_returns(**inputs, trace=inputs["values"])


@pytest.mark.parametrize("op", ["lambda_returns", "klq_targets"])
def test_lam_tensors(op):
    spec = SPECS[op]
    inputs = {**spec.inputs(), "lam": torch.tensor([0.5, 1.5, 0.5])}
    with pytest.raises(ValueError, match=rf"{op}: lam must be in \[0, 1\]"):
        spec.function(**inputs)
    for bad in (torch.tensor(0.5), torch.rand(4), torch.rand(3, 5)):
        with pytest.raises(ValueError, match=rf"{op}: lam"):
            spec.function(**{**inputs, "lam": bad})


@pytest.mark.parametrize("name", [s for s in SPECS if "tp_group" in parameters(SPECS[s])])
def test_tp_group_needs_a_process_group(name):
    with pytest.raises(ValueError, match=rf"{name}: tp_group needs an initialised process group"):
        SPECS[name].function(**SPECS[name].inputs(), tp_group=object())


def test_inplace_and_tp_group_are_exclusive():
    with pytest.raises(ValueError, match="klq_loss: inplace and tp_group"):
        klq_kernels.klq_loss(**SPECS["klq_loss"].inputs(), inplace=True, tp_group=object())


def test_scans_need_a_time_dimension():
    one = torch.tensor(1.0)
    for call in (
        lambda: klq_kernels.gae(one, one),
        lambda: klq_kernels.lambda_returns(one, one, one, tau=0.1),
        lambda: klq_kernels.place_scores(one, torch.tensor(True)),
        lambda: klq_kernels.klq_targets(one[None], torch.tensor(0), one, one, tau=0.1,
                                        ref_logits=one[None]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="time dimension"):
            call()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_scalars_are_keywords(spec):
    """Nothing but tensors may be passed by position."""
    kinds = parameters(spec).values()
    positional = {p.name for p in kinds if p.kind is not p.KEYWORD_ONLY}
    assert positional <= {*PER_TOKEN, "scores", "weight"}, positional
