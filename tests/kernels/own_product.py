# SPDX-License-Identifier: Apache-2.0
"""The LM head's own products on a machine without a Hopper GPU: its operators in plain PyTorch
on the CPU, so that the Python around them is tested wherever the tests run."""

from contextlib import contextmanager

import pytest
import torch

from klq_kernels import _linear_head as head
from klq_kernels.klq_loss.reference import squared_residuals

needs_hopper = pytest.mark.skipif(
    not head.is_hopper(torch.device("cuda")), reason="needs a Hopper GPU and sm_90a"
)
FAR = 60 * 0.6931  # exponents from which a row takes its maximum as its reference


def linear_rows_(hidden, weight, bias, actions, mask, t, cap, entropy, exponentials):
    """What csrc/cuda/linear_rows.h says, in float64 and rounded once."""
    for x in (hidden, weight, *([] if exponentials is None else [exponentials])):
        assert x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % 8 == 0
        assert x.data_ptr() % 16 == 0
    assert hidden.shape[1] % 8 == 0 and not (entropy and exponentials is not None)
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    y = torch.where(z == -torch.inf, z, cap * (z / cap).tanh()) if cap else z
    active = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
    known = (actions >= 0) & (actions < len(weight))
    at = torch.where(known, actions, 0).long().unsqueeze(-1)
    chosen = torch.where(known.unsqueeze(-1), y.gather(-1, at), 0.0)
    top = y.amax(-1, keepdim=True)
    near = chosen.isfinite() & ~((top - chosen).abs() / t > FAR)
    from_ = torch.where(near, chosen, torch.where(top.isfinite(), top, 0.0))
    e = ((y - from_) / t).exp()
    others = torch.where(known.unsqueeze(-1), e.scatter(-1, at, 0.0), e).sum(-1)
    total = others + torch.where(known, e.gather(-1, at)[:, 0], 0.0)
    logprobs = (chosen - from_)[:, 0] / t - total.log()
    logprobs = torch.where(known & top[:, 0].isfinite(), logprobs, torch.nan)
    factors = torch.where(known, -(1.0 if cap else 1 / t) / total, torch.nan)
    every = y / t - y.div(t).logsumexp(-1, keepdim=True)
    h = -torch.where(every == -torch.inf, 0.0, every.exp() * every).sum(-1)
    rows = [torch.where(active, x, 0.0).float() for x in (logprobs, factors, h)]
    rows.append(rows[0].new_empty(0))
    if exponentials is not None:
        slope = torch.where(z == -torch.inf, 0.0, (1 - (y / cap) ** 2) / t if cap else 1.0)
        own = torch.where(known, -others, e.gather(-1, at)[:, 0]).unsqueeze(-1)
        e = slope * e.scatter(-1, at, own)
        own = torch.where(chosen == -torch.inf, 0.0, e.gather(-1, at))[:, 0]
        rows[3] = torch.where(active, own, 0.0).float()
        e = torch.where(active.unsqueeze(-1) | z.isnan(), e, 0.0)
        exponentials.copy_(torch.where(y == -torch.inf, 0.0, e))
    return rows[0], rows[1], rows[2] if entropy else rows[2].new_empty(0), rows[3]


def linear_hidden_(out, dlogits, weight, scale):
    for x in (out, dlogits, weight):
        assert x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.data_ptr() % 16 == 0
    out.copy_((dlogits.float() @ weight.float()) * scale[:, None])


def linear_weight_(out, dlogits, hidden, add):
    assert out.dtype == torch.float32 and dlogits.dtype == hidden.dtype == torch.bfloat16
    for x in (dlogits, hidden):
        assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    product(dlogits.T, hidden, out, add)


def linear_chosen_(out, hidden, order, actions, scale, own):
    """What csrc/cuda/linear_weight.h says."""
    assert (actions[1:] >= actions[:-1]).all() and actions.dtype == torch.int32
    h = torch.where((own == 0)[:, None], 0.0, hidden.float())
    stored = own.to(hidden.dtype).float()[:, None] * (scale[:, None] * h).to(hidden.dtype).float()
    missing = (scale * own)[:, None] * h - stored
    out.index_add_(0, actions.long(), missing[order])


def klq_loss_tokens(logprobs, values, ref_logprobs, returns, tau, mask, weights, normalizer):
    rest = {"ref_logprobs": ref_logprobs, "returns": returns, "tau": tau, "mask": mask}
    loss, stats = squared_residuals(
        logprobs, values.float(), **rest, weights=weights, normalizer=normalizer
    )
    # by hand: a compiled graph calls operators below autograd
    residual = tau * (logprobs - ref_logprobs.float()) + values.float() - returns.float()
    dvalues = 2 * residual * (1.0 if weights is None else weights.float()) / normalizer
    dvalues = dvalues if mask is None else torch.where(mask, dvalues, 0.0)
    return loss, torch.stack(stats), tau * dvalues, dvalues


def product(a, b, out, add=False):
    """Of 16-bit operands, added up in float32 (the library's has no such form on the CPU)."""
    made = a.float() @ b.float()
    out.add_(made) if add else out.copy_(made)


@contextmanager
def stand_in():
    """Heads that a Hopper GPU would take by our own product take it on the CPU."""
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.library._scoped_library("klq", "IMPL") as library,
    ):
        patch.setattr(head, "is_hopper", lambda device: True)
        patch.setattr(head, "product", product)
        patch.setattr(head, "own_hidden", lambda rows, width, device: rows % 2 == 0)
        ops = linear_rows_, linear_hidden_, linear_weight_, linear_chosen_, klq_loss_tokens
        for function in ops:
            library.impl(function.__name__, function, "CPU")
        yield
