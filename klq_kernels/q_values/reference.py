# SPDX-License-Identifier: Apache-2.0
"""Full-vocabulary action values in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels._checks import wide
from klq_kernels.token_logprobs.reference import log_softmax


@torch.no_grad()
def q_values(
    logits: Tensor,
    ref_logits: Tensor,
    values: Tensor,
    *,
    tau: float,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Q(s, .) = tau (log pi - log pi_b) + V, eq. (13); -inf where pi = 0, also where pi_b = 0."""
    dtype = wide(logits, ref_logits, values)
    log_pi = log_softmax(logits.to(dtype), None, temperature, logit_softcap)
    log_pi_b = log_softmax(ref_logits.to(dtype), None, temperature, logit_softcap)
    q = tau * (log_pi - log_pi_b) + values.to(dtype).unsqueeze(-1)
    return q.masked_fill(log_pi == -torch.inf, -torch.inf)
