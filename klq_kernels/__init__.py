# SPDX-License-Identifier: Apache-2.0
"""Kernels for KL-regularised Q-learning on tensors: torch in, torch out, nothing else imported.

Every op is a function with a `reference` in plain PyTorch beside it
(`klq_kernels.<op>.reference`) and compiled kernels behind it; `available_backends()` and
`build_info()` say which.
"""

from klq_kernels._dispatch import available_backends, use_backend
from klq_kernels._extension import build_info
from klq_kernels._results import GAE, KLQLoss, KLQStats, KLQTargets, LambdaReturns, TokenStats
from klq_kernels.boltzmann_values import boltzmann_values
from klq_kernels.gae import gae
from klq_kernels.klq_loss import klq_loss
from klq_kernels.klq_targets import klq_targets
from klq_kernels.lambda_returns import lambda_returns
from klq_kernels.linear_klq_loss import linear_klq_loss
from klq_kernels.linear_token_logprobs import linear_token_logprobs
from klq_kernels.linear_token_stats import linear_token_stats
from klq_kernels.place_scores import place_scores
from klq_kernels.q_values import q_values
from klq_kernels.token_log_ratios import token_log_ratios
from klq_kernels.token_logprobs import token_logprobs
from klq_kernels.token_stats import token_stats

__all__ = [
    "GAE",
    "KLQLoss",
    "KLQStats",
    "KLQTargets",
    "LambdaReturns",
    "TokenStats",
    "available_backends",
    "boltzmann_values",
    "build_info",
    "gae",
    "klq_loss",
    "klq_targets",
    "lambda_returns",
    "linear_klq_loss",
    "linear_token_logprobs",
    "linear_token_stats",
    "place_scores",
    "q_values",
    "token_log_ratios",
    "token_logprobs",
    "token_stats",
    "use_backend",
]
