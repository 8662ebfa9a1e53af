# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: explicit argument > use_backend > KLQ_BACKEND > best for the device."""

import pytest
import torch
from oracle import CUDA_ONLY

from klq_kernels import _checks, _dispatch, available_backends, token_logprobs, use_backend
from klq_kernels._dispatch import TABLE, resolve
from klq_kernels._registry import SPECS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("KLQ_BACKEND", raising=False)


def test_precedence(monkeypatch):
    assert resolve("token_logprobs", CPU, torch.float32) == "cpp"
    monkeypatch.setenv("KLQ_BACKEND", "reference")
    assert resolve("token_logprobs", CPU, torch.float32) == "reference"
    with use_backend("cpp"):
        assert resolve("token_logprobs", CPU, torch.float32) == "cpp"
        assert resolve("token_logprobs", CPU, torch.float32, "reference") == "reference"
        with use_backend("reference"):
            assert resolve("token_logprobs", CPU, torch.float32) == "reference"
        assert resolve("token_logprobs", CPU, torch.float32) == "cpp"
    assert resolve("token_logprobs", CPU, torch.float32) == "reference"
    monkeypatch.setenv("KLQ_BACKEND", "")
    assert resolve("token_logprobs", CPU, torch.float32) == "cpp"


def test_use_backend_ends_with_its_block_also_on_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert resolve("gae", CPU, torch.float32) == "cpp"


def test_the_choice_reaches_the_op(monkeypatch):
    called = []
    op = torch.ops.klq.token_logprobs

    class Spy:
        def default(self, *args):
            called.append("cpp")
            return op.default(*args)

    monkeypatch.setattr(torch.ops.klq, "token_logprobs", Spy())
    z, a = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    token_logprobs(z, a, backend="reference")
    assert called == []
    token_logprobs(z, a)
    assert called == ["cpp"]


@pytest.mark.parametrize("spec", [SPECS["lambda_returns"], SPECS["gae"]], ids=lambda s: s.name)
def test_scans_are_looked_at_only_where_something_is_asked(spec, monkeypatch):
    """The compiled operator checks what it is given; nothing on the way there hides a request."""
    looked = []
    scan = _checks.scan
    monkeypatch.setattr(_checks, "scan", lambda *args: looked.append(1) or scan(*args))
    inputs = spec.inputs()
    spec.function(**inputs)
    assert not looked
    spec.function(**{**inputs, "mask": inputs["mask"].long()})
    spec.function(**inputs, backend="reference")
    with use_backend("reference"):
        spec.function(**inputs)
    for name, value in (("KLQ_BACKEND", "reference"), ("KLQ_VALIDATE", "1")):
        monkeypatch.setenv(name, value)
        spec.function(**inputs)
        monkeypatch.delenv(name)
    assert len(looked) == 5
    spec.function(**inputs)
    assert len(looked) == 5


@pytest.mark.parametrize("name", ["lambda_returns", "gae"])
def test_scan_operators_refuse_what_nobody_looked_at(name):
    """On the CPU, called around the Python checks; around_the_checks.py has the CUDA ones."""
    x, mask = torch.randn(6), torch.ones(6, dtype=torch.bool)
    ends, boot = torch.tensor([0, 2, 6]), torch.randn(2)
    numbers = [0.3, 0.9, 0.9, None, 0.7] if name == "lambda_returns" else [0.9, 0.9]
    tokens = [x] * (3 if name == "lambda_returns" else 2)
    right = [*tokens, *numbers, mask, ends, boot, *([x] if name == "lambda_returns" else [])]
    op = getattr(torch.ops.klq, name)
    op(*right)
    for i, y in enumerate(right):
        if isinstance(y, torch.Tensor):
            another = y.float() if y is mask else y.long()
            for bad in [y[None], y.repeat(2), *([] if y is ends else [another])]:
                with pytest.raises(RuntimeError, match=f"klq::{name}"):
                    op(*right[:i], bad, *right[i + 1 :])


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_unknown_backends(monkeypatch, how):
    with pytest.raises(ValueError, match="fast.*choose one of"):  # noqa: RUF043
        if how == "argument":
            resolve("gae", CPU, torch.float32, "fast")
        elif how == "context":
            use_backend("fast").__enter__()
        else:
            monkeypatch.setenv("KLQ_BACKEND", "fast")
            resolve("gae", CPU, torch.float32)


@pytest.mark.parametrize("op", TABLE)
def test_an_explicit_request_never_falls_back(op):
    """No kernel for the tensors' device, or none in this build: an error that says what to do."""
    for backend in ("cuda", "triton"):
        if "cpu" in TABLE[op].get(backend, ()):
            continue
        with pytest.raises(RuntimeError, match=rf"{op}: backend '{backend}'") as caught:
            resolve(op, CPU, torch.float32, backend)
        message = str(caught.value)
        assert any(
            remedy in message for remedy in ("rebuild", "available there", "no CUDA", "Triton")
        )


def test_missing_cuda_names_the_remedy(monkeypatch):
    monkeypatch.setitem(_dispatch.BUILD_INFO, "cuda", None)
    with pytest.raises(RuntimeError, match="KLQ_CUDA=1"):
        resolve("gae", torch.device("cuda"), torch.float32, "cuda")
    monkeypatch.setitem(_dispatch.BUILD_INFO, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        resolve("gae", torch.device("cuda"), torch.float32, "cuda")


def test_other_devices_take_the_reference():
    assert resolve("gae", torch.device("meta"), torch.float32) == "reference"


def test_available_backends_says_why_not():
    found = available_backends()
    assert set(found) == set(_dispatch.BACKENDS)
    assert found["reference"] is True and found["cpp"] is True
    assert all(x is True or (isinstance(x, str) and x) for x in found.values())


def test_every_op_of_the_table_is_registered():
    assert set(TABLE) == set(SPECS)
    for name in TABLE:
        assert hasattr(torch.ops.klq, name), name


def test_missing_triton_names_the_remedy(monkeypatch):
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install 'triton"):
        resolve("gae", torch.device("cuda"), torch.float32, "triton")
    assert "not installed" in available_backends()["triton"]


@pytest.mark.skipif(_dispatch.INTERPRET, reason="asked for")
def test_the_interpreter_runs_only_when_asked():
    """An explicit request on CPU tensors says how to ask; no choice ever falls on it."""
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        resolve("gae", CPU, torch.float32, "triton")
    assert all("cpu" not in row["triton"] for row in TABLE.values())


def test_twins_have_the_schemas_of_the_operators():
    for name in torch._C._dispatch_get_all_op_names():
        short = name.removeprefix("klq::")
        if name.startswith("klq::") and short not in CUDA_ONLY:
            schema = str(getattr(torch.ops.klq, short).default._schema)
            twin = str(getattr(torch.ops.klq_triton, short).default._schema)
            assert twin == schema.replace("klq::", "klq_triton::"), name
