# SPDX-License-Identifier: Apache-2.0
"""A task so small that the truth is known exactly.

A random GPT-NeoX (2 layers, width 64) over 12 tokens answers one fixed prompt with 4 tokens: 20 736
completions, no end token. The reward is the sigmoid of unigram and bigram weights. Everything the
method estimates can be computed by enumeration:

    J(pi) = E_pi[R] - tau KL(pi || pi_ref)            J_ref = E_ref[R]
    J*    = tau log E_ref[exp(R / tau)]               pi* proportional to pi_ref exp(R / tau)
    V*(s) = tau log E_ref[exp(R / tau) | s]

so a run can be judged by the share of the possible gain it made, (J - J_ref) / (J* - J_ref).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from klq.config import merged
from klq.logging import METRICS, read_jsonl
from klq.presets import Preset

if TYPE_CHECKING:
    from klq.trainer import KLQTrainer

VOCAB, LENGTH, PROMPT = 12, 4, 0
# The value gradient is 1 / tau times the policy's: at full strength it takes the shared trunk for
# itself (gain .89 after 120 updates of 128 at 5e-4); at a tenth it does as well as a second trunk
# (.94 both), at no cost.
DEFAULTS = {
    "max_completion_length": LENGTH,
    "num_updates": 200,
    "per_device_train_batch_size": 256,
    "update_epochs": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "value_trunk_grad_scale": 0.1,
    "tau": 0.05,
}


def tiny_model(seed: int) -> GPTNeoXForCausalLM:
    """The policy and reference the run starts from; depends on the seed alone."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config).eval()


def reward_table(seed: int) -> Tensor:
    """R of every completion, [12, 12, 12, 12] float64."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    two = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    score = torch.zeros([VOCAB] * LENGTH, dtype=torch.float64)
    for t in range(LENGTH):
        score += one.reshape([-1 if i == t else 1 for i in range(LENGTH)])
    for t in range(LENGTH - 1):
        score += two.reshape([VOCAB if i in (t, t + 1) else 1 for i in range(LENGTH)])
    return torch.sigmoid(score)


@torch.no_grad()
def joint_logprobs(lm: nn.Module, temperature: float = 1.0) -> Tensor:
    """log pi(completion), [12, 12, 12, 12] float64, from the conditionals after every prefix."""
    logits = lm(input_ids=_prefixes(lm.device)).logits.cpu().double() / temperature
    logprobs = logits.log_softmax(-1).reshape([VOCAB] * (LENGTH - 1) + [LENGTH, VOCAB])
    joint = torch.zeros([VOCAB] * LENGTH, dtype=torch.float64)
    for t in range(LENGTH):
        # The distribution after t tokens does not depend on the later ones: read it at 0.
        conditional = logprobs[(..., *[0] * (LENGTH - 1 - t), t, slice(None))]
        joint += conditional.reshape([VOCAB] * (t + 1) + [1] * (LENGTH - 1 - t))
    return joint


def _prefixes(device: Any) -> Tensor:
    """The prompt and every three tokens, [1728, 4]: all states a token is chosen in."""
    grid = torch.cartesian_prod(*[torch.arange(VOCAB)] * (LENGTH - 1))
    return torch.cat([torch.full((len(grid), 1), PROMPT), grid], dim=1).to(device)


@dataclass
class Truth:
    """Reference log-probs and rewards of every completion, and what follows from them."""

    ref: Tensor
    reward: Tensor
    tau: float

    @property
    def best(self) -> float:
        return self.tau * float((self.ref + self.reward / self.tau).logsumexp(dim=(0, 1, 2, 3)))

    @property
    def optimum(self) -> Tensor:
        """log pi* of every completion."""
        return self.ref + (self.reward - self.best) / self.tau

    def judge(self, logprobs: Tensor) -> dict[str, float]:
        """reward, kl, J of a policy, its distance to pi* and the share of the possible gain."""
        p = logprobs.exp()
        reward, kl = float((p * self.reward).sum()), float((p * (logprobs - self.ref)).sum())
        start, value = float((self.ref.exp() * self.reward).sum()), reward - self.tau * kl
        return {
            "reward": reward,
            "kl": kl,
            "J": value,
            "kl_to_optimum": float((p * (logprobs - self.optimum)).sum()),
            "gain": (value - start) / (self.best - start),
        }

    def values(self) -> Tensor:
        """V* of the states before tokens 1..4, [1728, 4], in the order of the prefixes."""
        joint, columns = self.ref + self.reward / self.tau, []
        for t in range(LENGTH):
            rest = tuple(range(t, LENGTH))
            given = joint.logsumexp(dim=rest) - self.ref.logsumexp(dim=rest)
            given = given.reshape([VOCAB] * t + [1] * (LENGTH - 1 - t))
            columns.append(self.tau * given.expand([VOCAB] * (LENGTH - 1)).reshape(-1))
        return torch.stack(columns, dim=1)


def load(overrides: dict[str, Any], *, value_model: str = "head") -> Preset:
    """value_model: "head" or "separate". The seed chooses the reference and the reward, too."""
    args = merged(DEFAULTS, overrides)
    if args.max_completion_length != LENGTH:
        raise ValueError(f"max_completion_length of the preset exact is {LENGTH}")
    if args.truncation == "bootstrap":
        raise ValueError("truncation of the preset exact is score: every completion ends by length")
    model, table = tiny_model(args.seed), reward_table(args.seed)
    truth = Truth(joint_logprobs(model, args.temperature), table, args.tau)

    def sigmoid_ngram(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(table[tuple(ids)]) for ids in completion_ids]

    def before(trainer: KLQTrainer) -> None:
        start = truth.judge(truth.ref)["J"]
        print(f"exact: {VOCAB**LENGTH} completions, J of the reference {start:.4f}", end=", ")
        print(f"best possible J* {truth.best:.4f} at tau {truth.tau}")

    def report(trainer: KLQTrainer) -> dict:
        return exact_report(trainer, truth)

    kwargs = {
        "model": model,
        "reward_funcs": sigmoid_ngram,
        "train_dataset": [{"prompt_ids": [PROMPT]}],
        "value_model": value_model,
    }
    return Preset(args, kwargs, before=before, report=report)


def exact_report(trainer: KLQTrainer, truth: Truth) -> dict:
    """Enumerate the trained policy; print it between reference and optimum, and return it."""
    logprobs = joint_logprobs(trainer.unwrapped.lm, trainer.args.temperature)
    rows = {
        "reference": truth.judge(truth.ref),
        "trained": truth.judge(logprobs),
        "optimum": truth.judge(truth.optimum),
    }
    columns = ("reward", "kl", "J", "kl_to_optimum", "gain")
    print(f"\n{'by enumeration':16}" + "".join(f"{c:>15}" for c in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[c]:15.4f}" for c in columns))
    last = read_jsonl(Path(trainer.args.output_dir) / METRICS)[-1]
    sampled = [last[f"objective/{name}"] for name in ("scores", "kl", "rlhf_reward")]
    print(f"{'last batch':16}" + "".join(f"{x:15.4f}" for x in sampled))
    error = value_error(trainer, truth, logprobs)
    print(f"V against V*: error {error:.4f} (root mean square over the states the policy visits)")
    return {**rows, "gain": rows["trained"]["gain"], "J_star": truth.best, "value_rmse": error}


@torch.no_grad()
def value_error(trainer: KLQTrainer, truth: Truth, logprobs: Tensor) -> float:
    """Root mean square of V - V* over the states of a response, weighted by the policy."""
    prefixes = _prefixes(trainer.device)
    positions = torch.arange(LENGTH, device=trainer.device).expand(len(prefixes), -1)
    values = trainer.unwrapped(prefixes, positions, lambda hidden, weight, bias, values: values)
    weight = logprobs.exp().sum(-1).reshape(-1, 1)  # of the prefix
    square = (values.cpu().double() - truth.values()) ** 2
    return float(((weight * square).sum() / LENGTH).sqrt())
