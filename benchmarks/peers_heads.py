# SPDX-License-Identifier: Apache-2.0
"""Other people's LM heads. Each function here loads one and returns it as (hidden, weight, actions)
-> log-probs of the tokens, or their negative where `sign` is -1, or for the scalar losses their
sum; the wrappers below make of it what `PEERS` of the linear ops holds:

linear_klq_loss              (hidden, weight, actions, values, ref_logprobs, returns, tau) -> the
                             gradients of hidden and weight: of the summed KLQ loss, or, where
                             `sign` is -1, of the summed cross entropy, which is the same work
linear_token_logprobs        (hidden, weight, actions, upstream) -> log-probs and the gradients of
                             hidden and weight; `upstream` maps a sign to the gradient that enters
linear_token_logprobs, forward   (hidden, weight, actions) -> log-probs, without a gradient
linear_token_stats           (hidden, weight, actions) -> log-probs, entropy

Cross entropy of which the gradients are made in the forward is "scalar": it cannot take a gradient
a token. Weight gradients summed over chunks are kept in float32 where the peer offers that.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.measure import Absent
from benchmarks.peers import (
    PEERS,
    Peer,
    compiled,
    eager_logprobs,
    get,
    lean_logprobs,
)


@dataclass(frozen=True)
class HeadPeer(Peer):
    skips: bool = False  # gradients below a threshold: not held to the tail of dW


# --- what they are -----------------------------------------------------------------------------


def eager():
    return lambda h, w, a: eager_logprobs(F.linear(h, w), a)


def lean(h, w, a):
    return lean_logprobs(F.linear(h, w), a)


def liger(reduction: str, chunks: int):
    """`chunks`: its chunk of logits is this many times tokens x width; 1 is the default."""
    (function,) = get(
        "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
    )
    middle = None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32
    last = False, False, False, None, None, chunks
    return lambda h, w, a: function.apply(h, w, a, *middle, *last)[0]


def liger_sm90_scalar():
    (function,) = get(
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "LigerFusedLinearCrossEntropySM90Function",
    )
    return lambda h, w, a: function.apply(h, w, a, -100, "sum")


def liger_sm90():
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # a look at the targets on the host
    (function,) = get(
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
        "LigerFusedScaledCrossEntropySM90Function",
    )
    return lambda h, w, a: function.apply(h, w, a)


def quack(scaled_exp: bool):
    """Its two ways, 4096 rows at a time. The chunked one is not autotuned: a minute a shape."""
    function, supported = get(
        "quack.linear_cross_entropy", "chunked_linear_cross_entropy", "scaled_exp_lce_supported"
    )

    def run(h, w, a):
        if scaled_exp and not supported(h, w, 4096, "sum"):
            raise Absent("quack: its scaled-exp way does not take this shape or card")
        how = {"reduction": "sum", "tuned": False, "use_scaled_exp": scaled_exp}
        return function(h, w, a, **how)

    return run


def cce(**how):
    module = "cut_cross_entropy.linear_cross_entropy"
    function, kinds = get(module, "linear_cross_entropy", "LinearCrossEntropyImpl")
    wanted = how.get("impl", "cce")
    if wanted.upper() not in kinds.__members__:
        raise Absent(f"cut_cross_entropy: this version has no {wanted}")
    return lambda h, w, a: function(h, w, a, reduction="none", **how)


def verl():
    (function,) = get("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return lambda h, w, a: function(h, w, a, 1.0, "none", None)


def trl(*outputs: str):
    """What the forward of `add_fused_lm_head` calls."""
    (function,) = get("trl.kernels", "ChunkedLogProbFunction")
    (columns,) = get("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    return lambda h, w, a: function.apply(h, w, None, a, 1.0, columns, None, 1.0, outputs)[:2]


def eager_stats(h, w, a):
    logprobs = F.linear(h, w).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, a[:, None]).squeeze(-1), entropy


# --- what is asked of them ---------------------------------------------------------------------


def leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def per_token(load: Callable, sign: int = 1) -> Callable:
    """Forward and backward with a gradient a token."""
    function = load()

    def run(hidden, weight, actions, upstream):
        h, w = leaves(hidden, weight)
        y = first(function(h, w, actions))
        return y.detach(), *torch.autograd.grad(y, (h, w), upstream[sign])

    return run


def summed(load: Callable) -> Callable:
    """Forward and backward of a scalar cross entropy."""
    function = load()

    def run(hidden, weight, actions, *_):
        h, w = leaves(hidden, weight)
        return torch.autograd.grad(function(h, w, actions), (h, w))

    return run


def klq(logprobs: Callable, wrap: Callable) -> Callable:
    """Forward and backward of the KLQ loss written out."""

    def loss(h, w, actions, values, ref_logprobs, returns, tau):
        q = tau * (logprobs(h, w, actions) - ref_logprobs) + values
        return (q - returns).square().sum()

    made = wrap(loss)

    def run(hidden, weight, actions, values, *rest):
        h, w, v = leaves(hidden, weight, values)
        return torch.autograd.grad(made(h, w, actions, v, *rest), (h, w, v))[:2]

    return run


def forward(load: Callable) -> Callable:
    function = load()

    @torch.no_grad()
    def run(hidden, weight, actions):
        return first(function(hidden, weight, actions))

    return run


def stats(load: Callable) -> Callable:
    function = load()
    return torch.no_grad()(function)


def _tokens(name, load, package, sign=1, **how) -> HeadPeer:
    return HeadPeer(name, partial(per_token, load, sign), package, sign, **how)


def _sum(name, load, package) -> HeadPeer:
    return HeadPeer(name, partial(summed, load), package, -1)


LIGER, QUACK, CCE = "liger-kernel", "quack-kernels", "cut-cross-entropy"
# logits of at most 2048 to 4096 rows at a time: with the default of 1 it is 256 at the first shape
WIDE = 8

HEADS: dict[str, list[HeadPeer]] = {
    "linear_klq_loss": [
        HeadPeer("eager", lambda: klq(eager(), lambda f: f)),
        HeadPeer("torch.compile", lambda: klq(lean, compiled), compiles=True),
        _sum("liger, scalar CE, fp32 dW", partial(liger, "sum", 1), LIGER),
        _sum(f"liger, scalar CE, fp32 dW, chunks × {WIDE}", partial(liger, "sum", WIDE), LIGER),
        _sum("liger SM90, scalar CE, bf16 dW", liger_sm90_scalar, LIGER),
        _sum("quack, scalar CE, fp32 dW, chunked", partial(quack, False), QUACK),
        _sum("quack, scalar CE, fp32 dW, scaled exp", partial(quack, True), QUACK),
    ],
    "linear_token_logprobs": [
        _tokens("eager", eager, "torch"),
        _tokens("torch.compile", lambda: compiled(lean), "torch", compiles=True),
        _tokens("liger, fp32 dW", partial(liger, "none", WIDE), LIGER, -1),
        _tokens("liger SM90, bf16 dW", liger_sm90, LIGER, -1),
        _tokens("cce, skips gradients", cce, CCE, -1, skips=True),
        _tokens("cce, no filter", partial(cce, filter_eps=None), CCE, -1),
        _tokens("cce_exact", partial(cce, impl="cce_exact"), CCE, -1),
        _tokens("verl, with entropy", verl, "verl"),
        _tokens("trl, fp32 dH and dW", trl, "trl"),
    ],
    "linear_token_logprobs, forward": [
        HeadPeer("eager", lambda: forward(eager)),
        HeadPeer("liger SM90", lambda: forward(liger_sm90), LIGER, -1),
        HeadPeer("cce", lambda: forward(cce), CCE, -1),
        HeadPeer("verl, with entropy", lambda: forward(verl), "verl"),
        HeadPeer("trl", lambda: forward(trl), "trl"),
    ],
    "linear_token_stats": [
        HeadPeer("eager", lambda: stats(lambda: eager_stats)),
        HeadPeer("verl", lambda: stats(verl), "verl"),
        HeadPeer("trl", lambda: stats(lambda: trl("entropy")), "trl"),
    ],
}
PEERS.update(HEADS)
