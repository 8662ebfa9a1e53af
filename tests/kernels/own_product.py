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
    slope = torch.where(z == -torch.inf, 0.0, (1 - (y / cap) ** 2) / t if cap else 1.0)
    own = torch.where(known, -others, 0.0).unsqueeze(-1)
    e = slope * torch.where(known.unsqueeze(-1), e.scatter(-1, at, own), e)
    own = torch.where(known & (chosen != -torch.inf)[:, 0], e.gather(-1, at)[:, 0], 0.0)
    rows = [torch.where(active, x, 0.0).float() for x in (logprobs, h, factors, own)]
    if exponentials is not None:
        e = torch.where(active.unsqueeze(-1) | z.isnan(), e, 0.0)
        exponentials.copy_(torch.where(y == -torch.inf, 0.0, e))
    row_stats = torch.stack([*rows[2:], torch.where(active, from_[:, 0], torch.inf).float()])
    return rows[0], row_stats, rows[1] if entropy else rows[1].new_empty(0)


def linear_dlogits_(out, hidden, weight, bias, actions, scale, own, reference, t, cap):
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    y = torch.where(z == -torch.inf, z, cap * (z / cap).tanh()) if cap else z
    slope = torch.where(z == -torch.inf, 0.0, (1 - (y / cap) ** 2) / t if cap else 1.0)
    e = slope * ((y - reference.double()[:, None]) / t).exp()
    e = torch.where(y == -torch.inf, 0.0, e)
    known = (actions >= 0) & (actions < len(weight))
    at = torch.where(known, actions, 0).unsqueeze(-1)
    mine = torch.where(known, own.double(), e.gather(-1, at)[:, 0]).unsqueeze(-1)
    out.copy_(scale.double()[:, None] * e.scatter(-1, at, mine))


def linear_hidden_(out, dlogits, weight, scale):
    for x in (out, dlogits, weight):
        assert x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.data_ptr() % 16 == 0
    made = dlogits.float() @ weight.float()
    out.copy_(made if scale is None else made * scale[:, None])


def linear_weight_(out, dlogits, hidden, add, slots, extra):
    assert dlogits.dtype == hidden.dtype == torch.bfloat16
    for x in (dlogits, hidden):
        assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    if out.dtype == torch.float32:
        assert slots is None
        return product(dlogits.T, hidden, out, add)
    assert not add and out.dtype == torch.bfloat16
    made = dlogits.T.float() @ hidden.float()
    if slots is not None:
        named = slots[0] >= 0
        made[named] += extra[slots[0, named].long()]
    out.copy_(made)


def linear_chosen_(out, slots, hidden, actions, scale, own, apart, bias):
    """What csrc/cuda/linear_weight.h says."""
    known = (actions >= 0) & (actions < slots.shape[1]) & (own != 0)
    h = torch.where(known[:, None], hidden.float(), 0.0)
    stored = own.to(hidden.dtype).float()[:, None] * (scale[:, None] * h).to(hidden.dtype).float()
    missing = ((scale * own)[:, None] * h - stored)[known]
    ids, places = actions[known], torch.arange(len(actions))[known]
    slots.fill_(-1)
    first = torch.full((slots.shape[1],), len(actions)).scatter_reduce_(0, ids, places, "amin")
    slots[0, ids] = first[ids].int()
    if bias is not None:
        bias.index_add_(0, ids, (scale * (own - own.to(hidden.dtype).float()))[known])
    if out is None:
        return
    if apart:
        out[first[ids]] = 0.0
        ids = first[ids]
    out.index_add_(0, ids, missing)


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
        ops = linear_rows_, linear_dlogits_, linear_hidden_, linear_weight_, linear_chosen_
        for function in (*ops, klq_loss_tokens):
            library.impl(function.__name__, function, "CPU")
        yield
