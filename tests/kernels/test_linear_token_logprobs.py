# SPDX-License-Identifier: Apache-2.0
"""linear_token_logprobs: arbitrary upstream gradients, dtypes that must agree, small vocabularies.

What the three LM-head ops share is in test_linear_klq_loss.
"""

import pytest
import torch
from oracle import everywhere

from klq_kernels import linear_klq_loss, linear_token_logprobs, linear_token_stats, token_logprobs

places = everywhere("linear_token_logprobs")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@places
@pytest.mark.parametrize("chunk_bytes", [None, 3 * 67 * 4])
def test_case_39_coefficients_of_any_size_and_sign(device, backend, chunk_bytes):
    """Negative, zero, 1e-8 and 1e4 upstream of single tokens, the logits made again by chunks."""
    h, w, b = draw(10, 12, device=device), draw(67, 12, seed=1, device=device), draw(67, seed=2)
    a = torch.arange(10, device=device)
    upstream = torch.tensor([1, -1, 0, 1e-8, 1e4, -3, 0.5, 0, 2, 1], device=device)
    results = []
    for fused in (True, False):
        x, y, c = (t.clone().to(device).requires_grad_() for t in (h, w, b))
        if fused:
            out = linear_token_logprobs(x, y, a, bias=c, chunk_bytes=chunk_bytes, backend=backend)
        else:
            out = token_logprobs(torch.nn.functional.linear(x, y, c), a, backend=backend)
        results.append(torch.autograd.grad(out, (x, y, c), upstream))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    dh = results[0][0]
    assert torch.count_nonzero(dh[[2, 7]]) == 0
    torch.testing.assert_close(dh[3] * 1e8, results[1][0][3] * 1e8, rtol=1e-4, atol=1e-5)


@places
@pytest.mark.parametrize("op", [linear_token_logprobs, linear_token_stats, linear_klq_loss])
def test_mixed_dtypes_raise_outside_autocast(device, backend, op):
    """Case 63: bfloat16 hidden on a float32 weight is refused with the remedy, as is a bias."""
    h, w = draw(4, 8, device=device), draw(11, 8, seed=1, device=device)
    a = torch.arange(4, device=device)
    rest = {"values": draw(4), "ref_logprobs": draw(4), "returns": draw(4), "tau": 0.1}
    rest = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in rest.items()}
    rest = rest if op is linear_klq_loss else {}
    with pytest.raises(TypeError, match=rf"{op.__name__}: weight is .*float32.*autocast"):
        op(h.bfloat16(), w, a, **rest, backend=backend)
    bias = torch.zeros(11, device=device)
    with pytest.raises(TypeError, match=rf"{op.__name__}: bias"):
        op(h.bfloat16(), w.bfloat16(), a, bias=bias, **rest, backend=backend)


@places
def test_case_52_single_column_and_single_class(device, backend):
    """D = 1 and V = 1: log-prob 0 and zero gradients for one class."""
    h, w = draw(5, 1, device=device).requires_grad_(), draw(1, 1, device=device).requires_grad_()
    ids = torch.zeros(5, dtype=torch.long, device=device)
    out = linear_token_logprobs(h, w, ids, backend=backend)
    assert torch.count_nonzero(out) == 0
    out.sum().backward()
    assert torch.count_nonzero(h.grad) == 0 and torch.count_nonzero(w.grad) == 0


@places
def test_a_head_with_banned_tokens(device, backend):
    """Bias -inf pads the vocabulary: probability 0, no gradient, no NaN in dH or dW."""
    h, w = draw(6, 8, device=device).requires_grad_(), draw(33, 8, seed=1, device=device)
    w.requires_grad_()
    b = torch.zeros(33, device=device)
    b[30:] = -torch.inf
    a = torch.arange(6, device=device)
    out = linear_token_logprobs(h, w, a, bias=b, backend=backend)
    out.sum().backward()
    want = (h.detach() @ w.detach().T)[:, :30].log_softmax(-1).gather(-1, a[:, None])[:, 0]
    torch.testing.assert_close(out.detach(), want, rtol=1e-5, atol=1e-5)
    assert h.grad.isfinite().all() and torch.count_nonzero(w.grad[30:]) == 0
