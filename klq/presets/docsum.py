# SPDX-License-Identifier: Apache-2.0
"""Preset `docsum`: summarise real English, learn from ROUGE-L, and show the controls with the gain.

The text is the docstrings of the packages installed on this machine: nothing is downloaded and
nothing is vendored (`klq.presets.docstrings`). A prompt is an object's name and the details of its
docstring; the truth is the summary line its author wrote. A small GPT-NeoX is trained on such lines
(`klq.presets.docsum_sft`), and KLQ raises the ROUGE-L of what it samples.

A rise alone proves little: a lower temperature raises ROUGE-L too, and a drift that only shortens
answers may. So the report samples, for prompts from held-out files, the SFT model at T = 1 (where
KLQ starts, and its reference), at T = 0.7 and greedily, and a control: the same run in every
number, with no reward but that for ending. All are compared prompt by prompt, next to KL, length,
share of ended answers and chrF, a measure that was not the reward.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedTokenizerFast

from klq.config import KLQConfig, merged
from klq.data import Batch
from klq.model import PolicyValueModel
from klq.presets import Preset, docstrings
from klq.presets.docsum_sft import ASK, SIZES, Material, prepare
from klq.presets.rouge import chrf, rouge_l
from klq.rollout import HFRollout
from klq_kernels import token_stats

if TYPE_CHECKING:
    from klq.trainer import KLQTrainer

# Found on one seed, on held-out prompts as in the report, checked on other seeds (2026-11). The
# value gradient is 1 / tau = 50 times the policy's; let into the shared trunk in full it costs a
# third of what ROUGE-L gains.
DEFAULTS = {
    "tau": 0.02,
    "num_updates": 53,
    "value_warmup_updates": 3,
    "per_device_train_batch_size": 192,
    "update_epochs": 2,
    "learning_rate": 3e-4,
    "value_trunk_grad_scale": 0.05,
    "missing_eos_penalty": 0.25,
}
WATCHED = 256  # held-out prompts of an evaluation during the run
GREEDY = 1e-4  # a temperature at which sampling takes the maximum


@dataclass
class Outcome:
    """A policy's answers, one entry a prompt (the mean over its samples), and its first answers."""

    rouge_l: Tensor
    chrf: Tensor
    kl: Tensor  # nats an answer: KL(policy || SFT) summed over the states it went through
    length: Tensor  # tokens, the end token included
    ended: Tensor
    texts: list[str]


@torch.no_grad()
def measure(
    policy: nn.Module,
    sft: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[dict[str, str]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    chunk: int = 256,
) -> Outcome:
    """Sample answers to every prompt from `policy` at `temperature` and hold them to the truth.

    Every policy meets the same random numbers. The KL of a state is the exact sum over the
    vocabulary, of the policy at `temperature` and the SFT at 1.
    """
    engine = HFRollout(
        policy,
        eos={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id,
        max_completion_length=max_tokens,
        temperature=temperature,
    )

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, _: None) -> Tensor:
        return linear(hidden, weight, bias)  # [B, R, V]

    table: list[tuple[float, ...]] = []
    texts: list[str] = []
    for sample in range(samples):
        for start in range(0, len(rows), chunk):
            # For every chunk: how many numbers the one before took depends on the policy.
            torch.manual_seed((seed * samples + sample) * len(rows) + start)
            part = rows[start : start + chunk]
            ids = tokenizer([row["prompt"] for row in part])["input_ids"]
            batch = Batch.of(ids, engine.generate(ids), policy.device)
            view = batch.rows(list(range(len(part))), torch.arange(len(part), device=policy.device))
            ours = PolicyValueModel(policy)(view.tokens, view.positions, logits) / temperature
            theirs = PolicyValueModel(sft)(view.tokens, view.positions, logits)
            kl = token_stats(ours, view.actions, ref_logits=theirs, mask=view.mask).kl.sum(-1)
            answers = tokenizer.batch_decode(batch.rollout.response_ids, skip_special_tokens=True)
            texts += answers
            ended = [float(not cut) for cut in batch.truncated]
            scores = [
                (rouge_l(answer, row["summary"]), chrf(answer, row["summary"]))
                for answer, row in zip(answers, part, strict=True)
            ]
            for score, *rest in zip(scores, kl.tolist(), batch.active, ended, strict=True):
                table.append((*score, *rest))
    columns = torch.tensor(table, dtype=torch.float64).view(samples, len(rows), 5).mean(0)
    return Outcome(*columns.unbind(1), texts=texts[: len(rows)])


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of a - b over prompts, and its standard error."""
    difference = a - b
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def rouge_l_reward(completions: list[str], summary: list[str]) -> list[float]:
    return [rouge_l(answer, truth) for answer, truth in zip(completions, summary, strict=True)]


def no_reward(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def load(
    overrides: dict[str, Any],
    *,
    size: str = "cpu",
    eval_prompts: int = 1024,
    eval_samples: int = 1,
    cache: str | None = None,
    value_model: str = "head",
) -> Preset:
    """The preset on the docstrings of this machine.

    size: one of SIZES. eval_prompts, eval_samples: held-out prompts of the report, and samples of
    each. cache: directory of what is made once; None is $KLQ_CACHE, or else ~/.cache/klq.
    value_model: "head" or "separate".
    """
    if size not in SIZES:
        raise ValueError(f"size of the preset docsum must be {' or '.join(SIZES)}, got {size!r}")
    if eval_prompts < 2 or eval_samples < 1:
        raise ValueError("the preset docsum needs eval_prompts >= 2 and eval_samples >= 1")
    shape = SIZES[size]
    args = merged({**DEFAULTS, "max_completion_length": shape.completion_tokens}, overrides)
    if args.temperature != 1:
        raise ValueError("temperature of the preset docsum is 1: its table compares samples at 1")
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    home = cache or os.environ.get("KLQ_CACHE") or Path.home() / ".cache" / "klq"
    material = prepare(
        shape, cache=Path(home), roots=docstrings.default_roots(), device=torch.device(device)
    )
    return build(material, args, eval_prompts, eval_samples, value_model)


def build(
    material: Material, args: KLQConfig, eval_prompts: int, eval_samples: int, value_model: str
) -> Preset:
    """The preset on the given material, whose model becomes the policy and is trained in place."""
    sft = copy.deepcopy(material.model).requires_grad_(False)
    # The held-out rows are in the order of their files: a random choice spreads over all files.
    shuffled = random.Random(0).sample(material.held_out, len(material.held_out))
    rows, others = shuffled[:eval_prompts], shuffled[eval_prompts:]
    if args.eval_every and not others:
        raise ValueError("eval_every of the preset docsum needs fewer eval_prompts: none are left")
    common = {
        "processing_class": material.tokenizer,
        "train_dataset": material.train,
        # To watch the run by, never the rows of the report.
        "eval_dataset": others[:WATCHED] or None,
        "value_model": value_model,
    }

    def report(trainer: KLQTrainer) -> dict[str, Any]:
        if trainer.accelerator.num_processes > 1:
            # The control is a second training run, and only this process is here to run it.
            print("docsum: no table, it is made by runs of one process only")
            return {}
        policies = {
            "SFT": (sft, 1.0),
            "SFT, T = 0.7": (sft, 0.7),
            "SFT, greedy": (sft, GREEDY),
            "no reward": (train_control(sft, args, common), 1.0),
            "KLQ": (trainer.unwrapped.lm, 1.0),
        }
        outcomes = {}
        for name, (policy, temperature) in policies.items():
            outcomes[name] = measure(
                policy,
                sft,
                material.tokenizer,
                rows,
                max_tokens=args.max_completion_length,
                temperature=temperature,
                samples=1 if temperature == GREEDY else eval_samples,
            )
        return summarise(outcomes, rows, eval_samples)

    kwargs = {"model": material.model, "reward_funcs": [rouge_l_reward], **common}
    return Preset(args, kwargs, report=report)


def train_control(sft: nn.Module, args: KLQConfig, common: dict[str, Any]) -> nn.Module:
    """The run again from the SFT, same numbers and seed, with nothing to gain but an end token."""
    from klq.trainer import KLQTrainer

    print("\ndocsum: the control, the same run with no reward", flush=True)
    directory = str(Path(args.output_dir) / "no-reward")
    # The aliases of tau are spent: they must not be handed on by `replace`.
    same = replace(
        args, output_dir=directory, overwrite=True, sample_every=0, beta=None, kl_coef=None
    )
    model = copy.deepcopy(sft).requires_grad_(True)
    trainer = KLQTrainer(model=model, reward_funcs=[no_reward], args=same, **common)
    trainer.train()
    return trainer.unwrapped.lm


def summarise(
    outcomes: dict[str, Outcome], rows: Sequence[dict[str, str]], samples: int
) -> dict[str, Any]:
    """Print the table of truth and three examples; return the table's numbers."""
    base, control, klq = (outcomes[name] for name in ("SFT", "no reward", "KLQ"))
    print(
        f"\n{len(rows)} prompts of held-out files, {samples} sample(s) each; ± one standard error;"
        "\ndifferences are paired by prompt, and also given in their own standard errors (SE)"
        "\none training run: the errors are those of the prompts, not of training again; and the"
        "\npreset's settings were chosen on held-out prompts like these, with one seed"
    )
    heads = ("ROUGE-L", "minus SFT", "minus no reward", "KL to SFT", "chrF", "tokens", "ended")
    line = "{:<13}{:>16}{:>20}{:>20}{:>11}{:>8}{:>8}{:>8}"
    print(line.format("policy", *heads))
    table: dict[str, dict[str, float]] = {}
    for name, outcome in outcomes.items():
        mean, se = paired(outcome.rouge_l, torch.zeros_like(outcome.rouge_l))
        entry, cells = {"rouge_l": mean, "rouge_l_se": se}, [f"{mean:.4f} ± {se:.4f}"]
        for label, other in (("minus_sft", base), ("minus_no_reward", control)):
            mean, se = paired(outcome.rouge_l, other.rouge_l)
            entry |= {label: mean, f"{label}_se": se}
            cells.append(f"{mean:+.4f} ({mean / se:+.1f} SE)" if se > 0 else "")
        for key in ("kl", "chrf", "length", "ended"):
            entry[key] = getattr(outcome, key).mean().item()
        cells += [f"{entry['kl']:.2f}", f"{entry['chrf']:.4f}", f"{entry['length']:.1f}"]
        print(line.format(name, *cells, f"{entry['ended']:.1%}"))
        table[name] = entry
    margins = [paired(klq.rouge_l, other.rouge_l) for other in (base, control)]
    passed = all(mean > 3 * se for mean, se in margins)
    print(f"KLQ above the SFT and the no-reward control by more than 3 SE: {['NO', 'yes'][passed]}")
    for row, before, after in list(zip(rows, base.texts, klq.texts, strict=True))[:3]:
        print(f"\n  prompt  {row['prompt'].removesuffix(ASK)!r}\n  truth   {row['summary']}")
        print(f"  SFT     {before}\n  KLQ     {after}")
    return {"prompts": len(rows), "samples": samples, "passed": passed, "policies": table}
