# SPDX-License-Identifier: Apache-2.0
"""What the ops return: named tuples, never a tensor or a tuple by flag."""

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics of the policy row; the last two are None without reference logits."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None
    kl: Tensor | None


class LambdaReturns(NamedTuple):
    """Q (13), A and G (7), each of the inputs' shape; exactly 0 at inactive tokens."""

    q: Tensor
    advantages: Tensor
    returns: Tensor


class GAE(NamedTuple):
    """A and A + V, each of the inputs' shape; exactly 0 at inactive tokens."""

    advantages: Tensor
    returns: Tensor


class KLQTargets(NamedTuple):
    """Everything between logits and targets, each of the actions' shape; 0 at inactive tokens."""

    logprobs: Tensor
    ref_logprobs: Tensor
    log_ratios: Tensor
    q: Tensor
    advantages: Tensor
    returns: Tensor


class KLQStats(NamedTuple):
    """Detached 0-d sums over active tokens and their count: they add over micro-batches and ranks.

    residual_sq is the sum of (Q - G)^2 without `weights` and without the normaliser.
    """

    residual_sq: Tensor
    logprob: Tensor
    value: Tensor
    count: Tensor


class KLQLoss(NamedTuple):
    loss: Tensor
    stats: KLQStats
