# SPDX-License-Identifier: Apache-2.0
"""Logits to lambda-returns in Triton: the row kernel of token_logprobs, then the scan."""

from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels.lambda_returns.triton import scan
from klq_kernels.token_logprobs.triton import run


def klq_targets(
    logits: Tensor,
    actions: Tensor,
    values: Tensor,
    rewards: Tensor,
    ref_logits: Tensor | None,
    ref_logprobs: Tensor | None,
    tau: float,
    gamma: float,
    lam: float,
    lam_rows: Tensor | None,
    alpha: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, ref, log_ratios = (host.like(logits, actions.shape) for _ in range(3))
    run(
        logits,
        ref_logits,
        actions,
        mask,
        temperature,
        softcap,
        cu_seqlens=cu_seqlens,
        cached=ref_logprobs,
        logprobs=logprobs,
        ref_logprobs=ref,
        log_ratios=log_ratios,
    )
    made = scan(
        *(log_ratios, values, rewards, tau, gamma, lam, lam_rows, alpha),
        *(mask, cu_seqlens, bootstrap, None),
    )
    return logprobs, ref, log_ratios, *made
