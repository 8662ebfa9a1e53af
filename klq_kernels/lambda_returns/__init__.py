# SPDX-License-Identifier: Apache-2.0
"""Q, lambda-advantages and lambda-returns by one reverse scan over active tokens."""

import math

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import at_once, operator, resolve
from klq_kernels._operators import fake
from klq_kernels._results import LambdaReturns
from klq_kernels.lambda_returns import reference

OP = "lambda_returns"
_compiled = torch.ops.klq.lambda_returns.default


def lambda_returns(
    log_ratios: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    tau: float,
    gamma: float = 1.0,
    lam: float | Tensor | None = None,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    trace: Tensor | None = None,
    backend: str | None = None,
) -> LambdaReturns:
    """Targets of the KLQ regression; no gradient ever flows through them.

    Over the active tokens of a sequence, in order, with n the next active one after t:

    Q_t = tau rho_t + V_t                          (13)
    delta_t = r_t + gamma V_n - Q_t                (14)   V_n = bootstrap after the last one
    A_t = delta_t + gamma c_n A_n                  (7)    c = lam or trace; 0 after the last
    G_t = Q_t + alpha A_t                          (7)

    Inactive tokens do not exist: exactly one gamma lam per active transition, none across a gap.
    rewards[t] follows a_t and carries no KL term (Q already holds tau rho).

    Args:
        log_ratios: [..., T] rho_t, or packed [N] with `cu_seqlens`; 1-D without it is one sequence.
        values: [..., T], V(s_t) read before a_t. rewards: [..., T].
            float32, bfloat16, float16 in any mix (float64 on `reference` and `cpp`), any strides.
        tau: KL coefficient, >= 0. gamma: discount in [0, 1]. alpha: conservatism in (0, 1].
        lam: trace decay in [0, 1], a number or one value per row ([...] without T, or [S]);
            None is 0.95.
        mask: [..., T] bool or integers, nonzero = active.
        cu_seqlens: [S + 1] int32 or int64 on the device: sequence s is tokens
            cu_seqlens[s]:cu_seqlens[s + 1]; tokens past the last end are inactive.
        bootstrap: [...] without T, or [S]: V after the last active token, 0 at a true end
            (default), V(s_T) where the text was cut. Ignored where no token is active.
        trace: [..., T] c_t in place of `lam`, read at the later token of each pair (Retrace:
            lam min(c_max, pi / mu)).
        backend: as in `token_logprobs`.

    With values of length T + 1, pass values[:, :-1] and bootstrap=values[:, -1].

    Returns:
        LambdaReturns(q, advantages, returns), float32 (float64 if an input is), exactly 0 at
        inactive tokens.

    Raises:
        TypeError, ValueError: before any work.

    Source: eqs. (7), (13), (14), arXiv 2508.17000.
    """
    if trace is not None and lam is not None:
        raise ValueError(f"{OP}: lam and trace exclude each other; trace replaces lam")
    tau = check.number(OP, "tau", tau, 0.0, math.inf)
    gamma = check.number(OP, "gamma", gamma, 0.0, 1.0)
    alpha = check.number(OP, "alpha", alpha, 0.0, 1.0, open_low=True)
    if not isinstance(lam, Tensor):
        lam = check.number(OP, "lam", 0.95 if lam is None else lam, 0.0, 1.0)
        if at_once(backend, values, mask, cu_seqlens):
            try:
                # fmt: off
                return LambdaReturns._make(_compiled(
                    log_ratios, values, rewards, tau, gamma, lam, None, alpha,
                    mask, cu_seqlens, bootstrap, trace,
                ))
                # fmt: on
            except (RuntimeError, TypeError):
                pass  # the checks below say why
    tokens = {"values": values, "log_ratios": log_ratios, "rewards": rewards}
    if trace is not None:
        tokens["trace"] = trace
    per_sequence = {} if bootstrap is None else {"bootstrap": bootstrap}
    if isinstance(lam, Tensor):
        per_sequence["lam"] = lam
    use, dtype = check.scan(OP, tokens, mask, cu_seqlens, per_sequence)
    lam, lam_rows = check.trace_decay(OP, lam, values.shape, cu_seqlens)
    chosen = resolve(OP, values.device, dtype, backend)
    if chosen == "reference":
        return reference.lambda_returns(
            log_ratios,
            values,
            rewards,
            tau=tau,
            gamma=gamma,
            lam=lam if lam_rows is None else lam_rows,
            alpha=alpha,
            mask=use,
            cu_seqlens=cu_seqlens,
            bootstrap=bootstrap,
            trace=trace,
        )
    return LambdaReturns(
        *operator(chosen, OP)(
            log_ratios,
            values,
            rewards,
            tau,
            gamma,
            lam,
            lam_rows,
            alpha,
            use,
            cu_seqlens,
            bootstrap,
            trace,
        )
    )


@fake("lambda_returns", differentiable=False)
def _(rho, values, rewards, tau, gamma, lam, lam_rows, alpha, mask, cu_seqlens, boot, trace):
    check.same_device(
        *(OP, values.device),
        **{"log_ratios": rho, "rewards": rewards, "lam": lam_rows, "mask": mask},
        **{"cu_seqlens": cu_seqlens, "bootstrap": boot, "trace": trace},
    )
    dtype = check.wide(rho, values, rewards, lam_rows, boot, trace)
    return tuple(values.new_empty(values.shape, dtype=dtype) for _ in range(3))
