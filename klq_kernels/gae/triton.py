# SPDX-License-Identifier: Apache-2.0
"""GAE in Triton: the scan of lambda_returns with Q = V and alpha = 1."""

from torch import Tensor

from klq_kernels.lambda_returns.triton import scan


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return scan(
        None, values, rewards, 0.0, gamma, lam, None, 1.0, mask, cu_seqlens, bootstrap, None
    )[1:]
