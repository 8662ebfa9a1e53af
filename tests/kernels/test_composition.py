# SPDX-License-Identifier: Apache-2.0
"""Defects that live between the kernels and their callers: autocast, compilation, grad mode,
second derivatives, upstreams that are not finite. Each was found once and must stay mended."""

import pytest
import torch

import klq_kernels as klq
from klq_kernels import _dispatch, _tensor_parallel
from klq_kernels._registry import SPECS

INF = float("inf")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    n, d, v = 16, 8, 50
    return {
        "hidden": normal(n, d).requires_grad_(),
        "weight": normal(v, d).requires_grad_(),
        "actions": torch.randint(v, (n,), generator=generator),
        "values": normal(n).requires_grad_(),
        "ref_logprobs": normal(n) - 4,
        "returns": normal(n),
        "tau": 0.5,
    }


def rows(batch):
    """The same batch with logits in place of hidden and weight."""
    kept = {k: x for k, x in batch.items() if k not in ("hidden", "weight")}
    logits = (batch["hidden"] @ batch["weight"].T).detach().requires_grad_()
    return {"logits": logits, **kept}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_linear_loss_under_autocast(batch, dtype, logits_dtype):
    """Gradients are those of the same call on inputs cast by hand, and logits_dtype holds."""
    how = {"logits_dtype": logits_dtype}
    leaves = [batch[k] for k in ("hidden", "weight", "values")]
    with torch.autocast("cpu", dtype):
        inside = klq.linear_klq_loss(**batch, **how).loss
        logprobs = klq.linear_token_logprobs(
            batch["hidden"], batch["weight"], batch["actions"], **how
        )
    by_hand = {**batch, **{k: batch[k].to(dtype) for k in ("hidden", "weight")}}
    outside = klq.linear_klq_loss(**by_hand, **how).loss
    assert torch.equal(inside, outside)
    for got, want in zip(
        torch.autograd.grad(inside, leaves), torch.autograd.grad(outside, leaves), strict=True
    ):
        assert torch.equal(got, want)
    db = torch.autograd.grad(logprobs.sum(), leaves[:2])
    again = klq.linear_token_logprobs(by_hand["hidden"], by_hand["weight"], batch["actions"], **how)
    assert torch.equal(logprobs, again)
    for got, want in zip(db, torch.autograd.grad(again.sum(), leaves[:2]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", ["token_logprobs", "klq_loss", "linear_klq_loss"])
def test_a_second_derivative_is_refused(batch, op):
    inputs = batch if op.startswith("linear") else rows(batch)
    if op == "token_logprobs":
        inputs = {k: inputs[k] for k in ("logits", "actions")}
    out = getattr(klq, op)(**inputs)
    out = out.sum() if op == "token_logprobs" else out.loss
    leaf = inputs.get("logits", inputs.get("hidden"))
    with pytest.raises(RuntimeError, match=f"{op}: cannot be differentiated twice"):
        torch.autograd.grad(out, leaf, create_graph=True)


def test_compiled_inplace_leaves_an_earlier_use_right(batch):
    inputs = rows(batch)
    leaf = inputs.pop("logits")

    def both(z, inplace):
        q = z * 1.0
        earlier = (q * q).sum()
        return klq.klq_loss(q, inplace=inplace, **inputs).loss + earlier

    want = torch.autograd.grad(both(leaf, False), leaf)[0]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.allclose(torch.autograd.grad(compiled(leaf, True), leaf)[0], want)


def test_inplace_refuses_a_leaf_in_every_grad_mode(batch):
    inputs = rows(batch)
    with torch.no_grad(), pytest.raises(ValueError, match="leaf"):
        klq.klq_loss(inplace=True, **inputs)


def test_compiled_with_scalars_that_change(batch):
    inputs = rows(batch)
    del inputs["tau"]

    def loss(z, tau, temperature, normalizer):
        how = {"tau": tau, "temperature": temperature, "normalizer": normalizer}
        return klq.klq_loss(z, **{k: x for k, x in inputs.items() if k != "logits"}, **how).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for scalars in ((0.1, 1.0, 1.0), (0.2, 0.7, 3.0), (0.3, 1.3, 5.0), (0.4, 0.9, 2.0)):
        assert torch.allclose(
            compiled(inputs["logits"], *scalars), loss(inputs["logits"], *scalars)
        )


@pytest.mark.parametrize("op", sorted(_dispatch.TABLE))
def test_the_choice_of_backend_traces_for_a_gpu(op):
    """Needs no GPU: only that nothing on the way calls what Dynamo refuses."""
    torch.compiler.reset()  # one code object, many ops: not a recompilation

    def choose(x):
        return x + len(_dispatch.resolve(op, torch.device("cuda"), torch.float32))

    assert torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(1)) > 0


@pytest.mark.parametrize("op", ["klq_loss", "linear_klq_loss"])
def test_no_gradient_is_made_where_none_is_wanted(batch, op, monkeypatch):
    inputs = batch if op == "linear_klq_loss" else rows(batch)
    seen = []
    packet = getattr(torch.ops.klq, op)
    real = packet.default
    monkeypatch.setattr(packet, "default", lambda *a: seen.append(a) or real(*a))
    with torch.no_grad():
        getattr(klq, op)(**inputs)
    flags = [a for a in seen[0] if isinstance(a, bool)]
    assert flags and not any(flags)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_too_small_a_num_active_leaves_nothing_finite_to_train_on(batch, backend):
    out = klq.linear_klq_loss(**batch, num_active=3, mask=torch.ones(16).bool(), backend=backend)
    out.loss.backward()
    assert out.loss.isnan() and all(s.isnan() for s in out.stats)
    assert all(batch[k].grad.isnan().all() for k in ("hidden", "weight", "values"))
    batch["weight"].grad = None
    logprobs = klq.linear_token_logprobs(
        *(batch[k] for k in ("hidden", "weight", "actions")),
        num_active=3,
        mask=torch.ones(16).bool(),
        backend=backend,
    )
    logprobs.sum().backward()
    assert logprobs.isnan().all() and batch["weight"].grad.isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_cached_reference_of_the_same_policy_gives_ratios_of_zero(batch, backend):
    inputs = rows(batch)
    cached = klq.token_logprobs(inputs["logits"], inputs["actions"], backend=backend)
    out = klq.klq_targets(
        *(inputs[k] for k in ("logits", "actions", "values", "returns")),
        ref_logprobs=cached.detach(),
        tau=1.0,
        backend=backend,
    )
    assert (out.log_ratios == 0).all()


@pytest.mark.parametrize("upstream", [INF, -INF, float("nan"), 65536.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_inactive_and_banned_stay_zero_under_any_upstream(batch, upstream, inplace):
    inputs = rows(batch)
    mask = torch.arange(16) % 3 > 0
    with torch.no_grad():
        inputs["logits"][:, 7] = -INF
        inputs["actions"][inputs["actions"] == 7] = 8
    leaf = inputs.pop("logits")
    loss = klq.klq_loss(leaf * 1.0, mask=mask, inplace=inplace, **inputs).loss
    dlogits, dvalues = torch.autograd.grad(loss * upstream, (leaf, inputs["values"]))
    if abs(upstream) < INF:
        assert dlogits.isfinite().all()
    made = klq.klq_loss(
        leaf.detach().requires_grad_(), mask=mask, **inputs
    ).loss  # straight from the op, without the multiplication by 1.0
    direct = torch.autograd.grad(made, inputs["values"], torch.tensor(upstream))[0]
    assert (direct[~mask] == 0).all() and (dvalues[~mask] == 0).all()


def test_banned_entries_get_zero_under_an_infinite_coefficient(batch):
    inputs = rows(batch)
    with torch.no_grad():
        inputs["logits"][:, 7] = inputs["logits"][:, 9] = -INF
    inputs["actions"][:] = 7
    for backend in ("reference", "cpp"):
        loss = klq.klq_loss(**inputs, backend=backend).loss
        dlogits = torch.autograd.grad(loss, inputs["logits"])[0]
        assert (dlogits[:, 7] == 0).all() and (dlogits[:, 9] == 0).all()


def test_a_nan_in_one_slice_of_the_vocabulary_is_not_lost(monkeypatch):
    z = torch.randn(2, 8)
    z[0, 4:] = torch.nan
    ids = torch.tensor([1, 6])
    slices = [(z[:, :4].contiguous(), 0), (z[:, 4:].contiguous(), 4)]
    parts = []
    for part, start in slices:
        local = torch.where((ids >= start) & (ids < start + 4), ids - start, -1)
        stats = _tensor_parallel.local_rows(part, local, None, 1.0, 0.0, "cpp")
        stats[2] = stats[2].masked_fill(local < 0, torch.nan)
        parts.append(stats)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)

    def gather(out, packed, group):
        for to, part in zip(out, parts, strict=True):
            to.copy_(part)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    local = torch.where(ids < 4, ids, -1)
    logprobs, _ = _tensor_parallel.merge(parts[0], local, None, None)
    assert logprobs[0].isnan()
    assert torch.allclose(logprobs[1], torch.log_softmax(z[1], -1)[6])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "normalizer",
    [4, 4.0, torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.float64)],
)
def test_every_form_of_the_normaliser_is_the_same(batch, backend, normalizer):
    loss = klq.klq_loss(**rows(batch), normalizer=normalizer, backend=backend).loss
    assert loss.shape == () and loss.dtype == torch.float32
    assert torch.equal(loss, klq.klq_loss(**rows(batch), normalizer=4.0, backend=backend).loss)


def test_a_normaliser_is_a_constant(batch):
    n = torch.tensor(4.0, requires_grad=True)
    for backend in ("reference", "cpp"):
        inputs = {k: x.detach() if torch.is_tensor(x) else x for k, x in rows(batch).items()}
        assert not klq.klq_loss(**inputs, normalizer=n, backend=backend).loss.requires_grad
    with pytest.raises(TypeError, match="normalizer"):
        klq.klq_loss(**rows(batch), normalizer=torch.tensor(2 + 1j))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_float64_in_any_input_means_the_same_on_every_backend(name):
    spec = SPECS[name]
    if spec.kind == "linear":
        return  # one dtype for hidden and weight; the others follow it
    floats = [k for k, x in spec.inputs().items() if torch.is_tensor(x) and x.is_floating_point()]
    for one in floats:
        inputs = spec.inputs()
        inputs[one] = inputs[one].double()
        dtypes = []
        for backend in ("reference", "cpp"):
            out = spec.function(**inputs, backend=backend)
            out = [out] if torch.is_tensor(out) else [x for x in out if torch.is_tensor(x)]
            dtypes.append([x.dtype for x in out])
        assert dtypes[0] == dtypes[1], (one, dtypes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_active": "x"},
        {"num_active": float("nan")},
        {"chunk_bytes": INF},
        {"keep_bytes": None},
        {"keep_bytes": "1"},
        {"actions": torch.zeros(16, dtype=torch.uint16)},
        {"hidden": torch.zeros(16, 0), "weight": torch.zeros(50, 0)},
    ],
    ids=str,
)
def test_bad_numbers_name_op_and_argument(batch, wrong):
    inputs = {k: batch[k] for k in ("hidden", "weight", "actions")} | wrong
    name = "weight" if "hidden" in wrong else next(iter(wrong))
    with pytest.raises((TypeError, ValueError), match=f"linear_token_logprobs: .*{name}"):
        klq.linear_token_logprobs(**inputs)


def test_numpy_scalars_are_numbers(batch):
    numpy = pytest.importorskip("numpy")
    inputs = {**rows(batch), "tau": numpy.float32(0.5)}
    assert torch.equal(klq.klq_loss(**inputs).loss, klq.klq_loss(**rows(batch)).loss)
