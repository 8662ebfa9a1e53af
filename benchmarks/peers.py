# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels for the same work, each called at its own best public settings.

A peer is a `load` that imports what it needs and returns a function of the op's tensors. A package
that is missing is a reason in the results, not an error. `PEERS[op]` is all a benchmark looks at:

token_logprobs   (logits, actions) -> log-probs, or their negative where `sign` is -1
token_stats      (logits, actions, ref_logits) -> logprobs, entropy, ref_logprobs, kl
klq_loss         (logits, actions, values, ref_logprobs, returns, tau) -> the logits' gradient: of
                 the summed KLQ loss, or of the summed cross entropy where `sign` is -1 (the work is
                 the same: read a row, write softmax - onehot times a number)
gae              (rewards, values, mask) -> advantages, returns
lambda_returns   (log_ratios, values, rewards, mask, tau) -> q, advantages, returns
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

import torch
import torch.nn.functional as F

from benchmarks.measure import Absent

GAMMA, LAM = 1.0, 0.95


@dataclass(frozen=True)
class Peer:
    name: str
    load: Callable[[], Callable]
    package: str = "torch"  # whose version counts
    sign: int = 1
    compiles: bool = False  # through torch.compile: seconds a shape
    longest: int | None = None  # not run on more tokens a sequence
    masked: bool = True  # knows masks; one that does not is held to the unmasked truth


def get(module: str, *names: str):
    """Attributes of an optional package."""
    package = module.split(".")[0]
    try:
        found = import_module(module)
    except ImportError as error:
        why = "not installed" if error.name == package else str(error)
        raise Absent(f"{package}: {why}") from error
    if absent := [n for n in names if not hasattr(found, n)]:
        raise Absent(f"{module}: this version has no {', '.join(absent)}")
    return [getattr(found, n) for n in names]


def versions() -> dict[str, str]:
    """Installed versions of the peers' packages."""
    out = {}
    for package in sorted({p.package for peers in PEERS.values() for p in peers}):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[package] = "not installed"
    return out


def compiled(function: Callable) -> Callable:
    """A fresh torch.compile for one shape: reused objects turn to dynamic shapes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# --- log-probs ---------------------------------------------------------------------------------


def logprobs_of(logits, actions):
    return torch.log_softmax(logits, -1).gather(-1, actions[:, None]).squeeze(-1)


def eager_logprobs(logits, actions):
    return logprobs_of(logits.float(), actions)


def lean_logprobs(logits, actions):
    """What torch.compile makes the least of: no log-probs of other tokens."""
    x = logits.float()
    return x.gather(-1, actions[:, None]).squeeze(-1) - x.logsumexp(-1)


def torch_cross_entropy():
    return lambda logits, actions: F.cross_entropy(logits, actions, reduction="none")


def quack_forward():
    (forward,) = get("quack.cross_entropy", "cross_entropy_fwd")
    return lambda logits, actions: forward(logits, actions)


def quack_public():
    (function,) = get("quack.cross_entropy", "cross_entropy")

    def run(logits, actions):
        with torch.no_grad():
            return function(logits, actions, reduction="none")

    return run


def trl_logprobs():
    # what trl.trainer.utils.selective_log_softmax calls on a GPU; also computes the entropy
    (run,) = get("trl.kernels", "selective_log_softmax_and_entropy")
    return lambda logits, actions: run(logits, actions)[0]


def flash_logprobs():  # also what verl's logprobs_from_logits calls; it has no kernel of its own
    (run,) = get("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda logits, actions: run(logits, actions)[0]


def stats_of(logits, actions, ref_logits):
    a = actions[:, None]
    policy, ref = (torch.log_softmax(x, -1) for x in (logits, ref_logits))
    p = policy.exp()
    entropy, kl = -(p * policy).sum(-1), (p * (policy - ref)).sum(-1)
    return policy.gather(-1, a).squeeze(-1), entropy, ref.gather(-1, a).squeeze(-1), kl


def eager_stats(logits, actions, ref_logits):
    return stats_of(logits.float(), actions, ref_logits.float())


# --- loss and gradient -------------------------------------------------------------------------


def autograd_loss(logprobs: Callable, wrap: Callable) -> Callable:
    def loss(logits, actions, values, ref_logprobs, returns, tau):
        q = tau * (logprobs(logits, actions) - ref_logprobs) + values
        return (q - returns).square().sum()

    run = wrap(loss)

    def gradient(logits, *rest):
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(run(x, *rest), x)[0]

    return gradient


def liger_gradient(backward: bool):
    (function,) = get("liger_kernel.ops", "LigerCrossEntropyFunction")

    def gradient(logits, actions, *_):
        # the forward leaves the gradient in the logits, the backward hands it over
        x = logits.detach().requires_grad_()
        loss = function.apply(x, actions, None, -100, 0.0, 0.0, "sum")[0]
        return torch.autograd.grad(loss, x)[0] if backward else x.detach()

    return gradient


def quack_gradient(inplace: bool):
    (forward,) = get("quack.cross_entropy", "cross_entropy_fwd")
    return lambda logits, actions, *_: forward(
        logits, actions, return_dx=True, inplace_backward=inplace
    )[1]


# --- scans -------------------------------------------------------------------------------------


def loop(rewards, values, mask, baseline):
    """The loop over time of PPO trainers; inactive tokens pass value and advantage on."""
    after, advantage, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * after - baseline[:, t]
        advantage = torch.where(mask[:, t], delta + GAMMA * LAM * advantage, advantage)
        after = torch.where(mask[:, t], values[:, t], after)
        out.append(advantage)
    advantages = torch.where(mask, torch.stack(out[::-1], 1), 0.0)
    return advantages, torch.where(mask, baseline + advantages, 0.0)


def loop_gae(rewards, values, mask):
    return loop(rewards, values, mask, values)


def loop_returns(log_ratios, values, rewards, mask, tau):
    q = tau * log_ratios + values
    return torch.where(mask, q, 0.0), *loop(rewards, values, mask, q)


def rl_triton_gae():
    (run,) = get("rl_triton.ops.gae", "compute_gae")
    ends: dict[torch.Size, torch.Tensor] = {}

    def gae(rewards, values, mask):
        if values.shape not in ends:
            ends[values.shape] = torch.zeros_like(values)
            ends[values.shape][:, -1] = 1.0
        return (run(rewards, values, ends[values.shape], gamma=GAMMA, lambda_=LAM),)

    return gae


def _is(function: Callable) -> Callable:
    return lambda: function


PEERS: dict[str, list[Peer]] = {
    "token_logprobs": [
        Peer("eager float32", _is(eager_logprobs)),
        Peer("F.cross_entropy", torch_cross_entropy, sign=-1),
        Peer("torch.compile", lambda: compiled(lean_logprobs), compiles=True),
        Peer("quack", quack_forward, "quack-kernels", sign=-1),
        Peer("quack, public function", quack_public, "quack-kernels", sign=-1),
        Peer("trl", trl_logprobs, "trl"),
        Peer("flash-attn", flash_logprobs, "flash-attn", sign=-1),
    ],
    "token_stats": [Peer("eager float32", _is(eager_stats))],
    "klq_loss": [
        Peer("eager float32", lambda: autograd_loss(eager_logprobs, lambda f: f)),
        Peer("torch.compile", lambda: autograd_loss(lean_logprobs, compiled), compiles=True),
        Peer("liger, forward alone", lambda: liger_gradient(False), "liger-kernel", sign=-1),
        Peer("liger", lambda: liger_gradient(True), "liger-kernel", sign=-1),
        Peer("quack, forward alone", lambda: quack_gradient(True), "quack-kernels", sign=-1),
        Peer(
            "quack, forward alone, new dx", lambda: quack_gradient(False), "quack-kernels", sign=-1
        ),
    ],
    "gae": [
        Peer("eager loop", _is(loop_gae), longest=2048),
        Peer("rl-triton", rl_triton_gae, "rl-triton", masked=False),
    ],
    "lambda_returns": [Peer("eager loop", _is(loop_returns), longest=2048)],
}
