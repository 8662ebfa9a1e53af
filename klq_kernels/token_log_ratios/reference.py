# SPDX-License-Identifier: Apache-2.0
"""Log-ratios of policy and reference in plain PyTorch."""

from torch import Tensor

from klq_kernels._checks import wide
from klq_kernels.token_logprobs.reference import token_logprobs


def token_log_ratios(
    logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """rho_t = log pi(a_t | s_t) - log pi_b(a_t | s_t); the reference is a constant."""
    scaling = {"mask": mask, "temperature": temperature, "logit_softcap": logit_softcap}
    dtype = wide(logits, ref_logits)
    policy = token_logprobs(logits.to(dtype), actions, **scaling)
    return policy - token_logprobs(ref_logits.detach().to(dtype), actions, **scaling)
