# SPDX-License-Identifier: Apache-2.0
"""Generalised advantage estimation: the reverse scan of `lambda_returns` with Q = V."""

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import at_once, operator, resolve
from klq_kernels._operators import fake
from klq_kernels._results import GAE
from klq_kernels.gae import reference

OP = "gae"
_compiled = torch.ops.klq.gae.default


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> GAE:
    """GAE(gamma, lam) over active tokens, un-whitened; a drop-in for the Python loops of trainers.

    delta_t = r_t + gamma V_n - V_t          n the next active token, V_n = bootstrap after the last
    A_t = delta_t + gamma lam A_n            returns = A + V

    On rewards r - tau rho it equals the advantages of `lambda_returns`.

    Args, layouts, masks, `cu_seqlens`, `bootstrap`: as in `lambda_returns`; lam is a number.

    Returns:
        GAE(advantages, returns), float32 (float64 if an input is), exactly 0 at inactive tokens.

    Raises:
        TypeError, ValueError: before any work.

    Source: Schulman et al., arXiv 1506.02438, eq. (16).
    """
    gamma = check.number(OP, "gamma", gamma, 0.0, 1.0)
    lam = check.number(OP, "lam", lam, 0.0, 1.0)
    if at_once(backend, values, mask, cu_seqlens):
        try:
            return GAE._make(_compiled(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap))
        except (RuntimeError, TypeError):
            pass  # the checks below say why
    per_sequence = {} if bootstrap is None else {"bootstrap": bootstrap}
    tokens = {"values": values, "rewards": rewards}
    use, dtype = check.scan(OP, tokens, mask, cu_seqlens, per_sequence)
    chosen = resolve(OP, values.device, dtype, backend)
    if chosen == "reference":
        return reference.gae(
            rewards,
            values,
            gamma=gamma,
            lam=lam,
            mask=use,
            cu_seqlens=cu_seqlens,
            bootstrap=bootstrap,
        )
    return GAE(*operator(chosen, OP)(rewards, values, gamma, lam, use, cu_seqlens, bootstrap))


@fake("gae", differentiable=False)
def _(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap):
    others = {"rewards": rewards, "mask": mask, "cu_seqlens": cu_seqlens, "bootstrap": bootstrap}
    check.same_device(OP, values.device, **others)
    dtype = check.wide(rewards, values, bootstrap)
    return tuple(values.new_empty(values.shape, dtype=dtype) for _ in range(2))
