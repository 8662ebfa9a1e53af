# SPDX-License-Identifier: Apache-2.0
"""Log-ratios in Triton: the row kernel of token_logprobs over both models at once."""

from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels.token_logprobs.triton import run


def token_log_ratios(
    logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    log_ratios = host.like(logits, actions.shape)
    row_stats = host.like(logits, (3, *actions.shape))
    run(
        logits,
        ref_logits,
        actions,
        mask,
        temperature,
        softcap,
        log_ratios=log_ratios,
        row_stats=row_stats,
    )
    return log_ratios, row_stats
