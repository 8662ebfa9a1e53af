# SPDX-License-Identifier: Apache-2.0
"""KL-regularised Q-Learning (arXiv 2508.17000), the whole loop.

One update, `KLQTrainer.step`: take prompts, sample responses, score them, measure log-probs and
values once without gradients, turn them into advantages, and regress

    Q_theta(s_t, a_t) = tau * (log pi_theta - log pi_ref) + V_theta(s_t)  on  G_t = Q_t + alpha A_t

for a few epochs (`klq.objective`). `algorithm="ppo"` swaps advantages and loss for those of
`klq.ppo` and changes nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoTokenizer

from klq.checkpoint import (
    GracefulInterrupt,
    check_same_settings,
    checkpoints,
    fingerprint,
    load_checkpoint,
    prepare_output_dir,
    random_numbers_kept,
    save_checkpoint,
)
from klq.config import KLQConfig
from klq.data import Batch, Prompts, Rows, columns_of, completions_of, stacked
from klq.engine import make_accelerator, start_trackers
from klq.logging import Clock, RunLog, add_sums, objective_metrics, spread, update_metrics
from klq.model import PolicyValueModel, adamw, frozen, is_peft, load_policy, with_value
from klq.objective import klq_advantages, klq_objective, token_stats
from klq.plots import plot_runs
from klq.ppo import ppo_advantages, ppo_objective, whitened
from klq.rewards import Rewards
from klq.rollout import HFRollout, RolloutEngine, eos_ids
from klq_kernels import place_scores


class KLQTrainer:
    """Trains a causal language model to maximise reward - tau * KL(policy || reference).

    model: name or path of a model, or a transformers causal LM (trained in place).
    reward_funcs: functions, reward models or paths of those, one or several: `klq.rewards`.
    args: the configuration.
    train_dataset, eval_dataset: rows with a prompt; `klq.data.Prompts` has the forms.
    processing_class: the tokenizer; None loads that of a model given by name, or does without
        (prompts are then token ids, and reward functions see token ids).
    value_model: "head", "separate", a model, or a directory: `klq.model.with_value`.
    ref_model: the reference (name or model); None is a frozen copy of `model` as it is now, or with
        peft the model with its adapters switched off.
    peft_config: makes the policy a peft model.
    rollout_engine: an object with `generate(prompt_ids) -> Rollout`; None is `HFRollout`. It can
        also be replaced later through the attribute of that name.

    Raises ValueError or TypeError, naming the argument, before any work.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Callable | str | list[Callable | str],
        args: KLQConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        value_model: str | nn.Module = "head",
        ref_model: str | nn.Module | None = None,
        peft_config: Any = None,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        self.args = args = args or KLQConfig()
        self.rewards = Rewards(reward_funcs, args.reward_weights)
        if processing_class is None and isinstance(model, str):
            processing_class = AutoTokenizer.from_pretrained(model)
        self.processing_class = processing_class
        self.accelerator = make_accelerator(args)
        self.device = self.accelerator.device

        policy = load_policy(model, peft_config)
        self.rewards.prepare(
            policy, processing_class, self.device, args.per_device_train_batch_size
        )
        self.context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        room = None if self.context is None else self.context - args.max_completion_length
        keep = args.max_prompt_length
        vocab_size = policy.get_input_embeddings().num_embeddings
        prompts = partial(
            Prompts, tokenizer=processing_class, room=room, keep=keep, seed=args.seed,
            vocab_size=vocab_size,
        )  # fmt: skip
        self.train_prompts = prompts(train_dataset)
        if args.eval_every and eval_dataset is None:
            raise ValueError("eval_every needs an eval_dataset")
        self.eval_prompts = None if eval_dataset is None else prompts(eval_dataset)

        if ref_model is None and not is_peft(policy):
            ref_model = copy.deepcopy(policy)
        self.reference = None
        if ref_model is not None:
            reference = frozen(load_policy(ref_model), policy)
            self.reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        model = with_value(policy, value_model, args.value_trunk_grad_scale)
        self.model, self.optimizer = self.accelerator.prepare(model, adamw(model, args))
        self.unwrapped: PolicyValueModel = self.accelerator.unwrap_model(self.model)
        self.policy = self.unwrapped.policy
        # What stands between hidden states and log-probs, for every op that forms them.
        self.scale = {"temperature": args.temperature, "logit_softcap": model.logit_softcap}
        klq, ppo = (klq_advantages, klq_objective), (ppo_advantages, ppo_objective)
        self.advantages, self.objective = klq if args.algorithm == "klq" else ppo
        lm = self.unwrapped.lm
        eos = eos_ids(processing_class, lm) | set(args.stop_token_ids)
        pad_id = getattr(processing_class, "pad_token_id", None)
        self.rollout_engine = rollout_engine or HFRollout(
            lm,
            eos=eos,
            pad_id=pad_id if pad_id is not None else min(eos, default=0),
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            generation_kwargs=args.generation_kwargs,
            autocast=self.accelerator.autocast,
        )
        self.update = 0  # updates done
        self.consumed = 0  # prompts used by all processes
        self.saved: int | None = None  # the update of the newest checkpoint

    def train(self, resume: bool = False) -> None:
        """Run to `num_updates`; leaves metrics, samples, checkpoints and curves.png in output_dir.

        The last line it prints, `model: DIRECTORY`, is what AutoModelForCausalLM loads.
        resume: continue from the newest checkpoint; with none there, begin at the beginning. Build
            the trainer as for the first run: the reference is the model it is given, and what
            `klq.checkpoint.MAY_CHANGE` does not name must be as it was (ValueError).
        Ctrl-C finishes the update, saves and raises KeyboardInterrupt.
        """
        args, accelerator = self.args, self.accelerator
        main = accelerator.is_main_process
        if main:
            prepare_output_dir(args.output_dir, resume=resume, overwrite=args.overwrite)
        accelerator.wait_for_everyone()
        set_seed(args.seed, device_specific=True)
        if resume:
            self._load_newest()
        if args.report_to:
            start_trackers(accelerator, args)
        with GracefulInterrupt() as interrupt, RunLog(args, self.update, main=main) as run_log:
            while self.update < args.num_updates and not self._any(interrupt.requested):
                batch, metrics = self.step()
                if args.eval_every and self.update % args.eval_every == 0:
                    metrics.update(self.evaluate())
                run_log.metrics(metrics)
                accelerator.log(metrics, step=self.update)
                if args.sample_every and (self.update - 1) % args.sample_every == 0:
                    run_log.samples(self.update, batch.samples[: args.num_samples])
                if args.save_every and self.update % args.save_every == 0:
                    self.save()
            if self.saved != self.update:
                self.save()
        for tracker in accelerator.trackers:
            tracker.finish()
        if main:
            plot_runs([args.output_dir], Path(args.output_dir) / "curves.png")
            print(f"model: {checkpoints(args.output_dir)[-1]}")
        if self.update < args.num_updates:
            raise KeyboardInterrupt

    def step(self) -> tuple[Batch, dict[str, float]]:
        """One update: its batch, and what it measured. FloatingPointError if that is not finite."""
        args, accelerator, clock = self.args, self.accelerator, Clock()
        done = self.update / args.num_updates if args.lr_scheduler_type == "linear" else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - done)
        count = args.local_batch_size
        rows, ids = self.train_prompts.take(
            self.consumed + accelerator.process_index * count, count
        )

        batch = self.sample(rows, ids, clock)
        measured = self._sum(self.measure(batch))
        clock.lap("measure")
        learned = self._sum(self.learn(batch))
        clock.lap("update")

        self.update += 1
        self.consumed += count * accelerator.num_processes
        metrics = {"update": self.update, "episode": self.consumed, "lr": group["lr"]}
        metrics |= objective_metrics(measured, args.tau)
        metrics |= update_metrics(learned, accelerator.num_processes)
        metrics |= clock.metrics(tokens=measured["tokens"])
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"update {self.update}: {', '.join(bad)} not finite. Nothing is saved since the "
                "last checkpoint; lower learning_rate, or look at the rewards"
            )
        return batch, metrics

    @torch.no_grad()
    def sample(self, rows: list[dict], prompt_ids: list[list[int]], clock: Clock) -> Batch:
        """Responses to `prompt_ids`, scored."""
        rollout = self.rollout_engine.generate(prompt_ids)
        batch = Batch.of(prompt_ids, rollout, self.device, self.context)
        clock.lap("rollout")
        prompts, columns = columns_of(rows)
        completions = completions_of(self.processing_class, prompts, rollout.response_ids)
        batch.scores, batch.reward_sums = self.rewards(
            prompts, completions, rollout.response_ids, columns, prompt_ids
        )
        if self.args.missing_eos_penalty is not None:
            for i, cut in enumerate(batch.truncated):
                batch.scores[i] -= self.args.missing_eos_penalty * cut
        keys = ("prompt", "completion", "score", "finish_reason")
        columns = (prompts, completions, batch.scores, rollout.finish_reasons)
        batch.samples = [dict(zip(keys, s, strict=True)) for s in zip(*columns, strict=True)]
        clock.lap("rewards")
        return batch

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor | float]:
        """Fill `batch.stored` with everything the epochs need; returns sums for the metrics.

        The one pass without gradients: log-probs, entropy and values of the policy that sampled,
        log-probs of the reference, and from them the advantages.
        """
        args, accelerator, mask = self.args, self.accelerator, batch.mask
        bootstraps = args.truncation == "bootstrap"
        parts = []
        for rows in self._passes(batch, torch.arange(len(batch)), extra=int(bootstraps)):
            compute = partial(token_stats, rows=rows, **self.scale)
            stats, values = self.model(rows.tokens, rows.positions, compute)
            if self.reference is not None:
                reference, _ = self.reference(rows.tokens, rows.positions, compute)
            else:
                with self.policy.disable_adapter():
                    reference, _ = self.model(rows.tokens, rows.positions, compute)
            parts.append((stats.logprobs, stats.entropy, reference.logprobs, values))
        old_logprobs, entropy, ref_logprobs, values = map(stacked, zip(*parts, strict=True))

        # A truncated response carries its score, or the value of the state it was cut in. Never
        # both: at gamma = 1 that would count the score twice, and V would diverge.
        scores = torch.tensor(batch.scores, dtype=torch.float32).to(self.device)  # [N]
        bootstrap = None
        if bootstraps:
            cut = torch.tensor(batch.truncated).to(self.device)
            end = torch.tensor(batch.response_lengths).to(self.device)
            bootstrap = torch.where(cut, values.gather(1, end[:, None]).squeeze(1), 0.0)  # V(s_T)
            scores = torch.where(cut, 0.0, scores)
            values = values[:, : mask.shape[1]]
        rewards = place_scores(scores, mask)  # [N, R]
        log_ratios = torch.where(mask, old_logprobs - ref_logprobs, 0.0)
        advantages = self.advantages(
            log_ratios, values, rewards, mask=mask, bootstrap=bootstrap, args=args
        )
        batch.stored.update(old_logprobs=old_logprobs, old_values=values, advantages=advantages)
        if args.algorithm == "ppo":
            reduce = partial(accelerator.reduce, reduction="sum")
            batch.stored["policy_advantages"] = (
                whitened(advantages, mask, reduce) if args.whiten_advantages else advantages
            )
        return {
            "responses": float(len(batch)),
            "tokens": float(sum(batch.active)),
            "truncated": float(sum(batch.truncated)),
            "scores": float(sum(batch.scores)),
            "kl": log_ratios.sum(),
            "entropy": torch.where(mask, entropy, 0.0).sum(),
            "advantage_sq": spread(advantages, mask),
            "target_sq": spread(args.tau * log_ratios + values + advantages, mask),
            **batch.logprob_gap(),
            **batch.reward_sums,
        }

    def learn(self, batch: Batch) -> dict[str, Tensor | float]:
        """`update_epochs` over the batch; returns sums for the metrics.

        Losses are divided by the active tokens of the whole optimiser step, over its micro-batches
        and all processes, so that no way of splitting it changes the gradient.
        """
        args, accelerator, grad_sq = self.args, self.accelerator, self.unwrapped.trunk_grad_sq
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + self.update)
        sums: dict[str, Tensor | float] = {}
        grad_sq.clear()
        for _ in range(args.update_epochs):
            order = torch.randperm(len(batch), generator=generator)
            for chosen in order.split(len(batch) // args.num_mini_batches):
                active = self._sum({"": float(sum(batch.active[i] for i in chosen.tolist()))})[""]
                passes = list(self._passes(batch, chosen))
                for rows in passes:
                    last = rows is passes[-1]
                    with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                        compute = partial(
                            self.objective,
                            rows=rows,
                            normalizer=max(active, 1.0),
                            args=args,
                            **self.scale,
                        )
                        loss, stats = self.model(rows.tokens, rows.positions, compute)
                        # Engines average gradients over processes; the normaliser already counts
                        # the tokens of all of them.
                        accelerator.backward(loss * accelerator.num_processes)
                    add_sums(sums, stats)
                if self.update < args.value_warmup_updates:
                    for p in self.unwrapped.policy_parameters():
                        p.grad = None
                norm = accelerator.clip_grad_norm_(
                    list(self.model.parameters()), args.max_grad_norm or math.inf
                )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                add_sums(sums, {"grad_norm": norm, "tokens": active, "steps": 1.0})
        return sums | {f"grad_{name}_sq": square for name, square in grad_sq.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective on eval_dataset, sampled anew from fixed random numbers, as `eval/...`.

        Training does not notice: its random numbers are put back. Every process answers the whole
        set with its own numbers.
        """
        sums: dict[str, Tensor | float] = {}
        with random_numbers_kept():
            set_seed(self.args.seed, device_specific=True)
            for rows, ids in self.eval_prompts.in_order(self.args.local_batch_size):
                add_sums(sums, self.measure(self.sample(rows, ids, Clock())))
        metrics = objective_metrics(self._sum(sums), self.args.tau)
        return {f"eval/{name.removeprefix('objective/')}": v for name, v in metrics.items()}

    def save(self) -> Path:
        """Write a checkpoint of this update into output_dir."""
        state = {"update": self.update, "consumed": self.consumed}
        state["reference"] = self._reference_fingerprint()
        self.saved = self.update
        return save_checkpoint(
            self.args.output_dir,
            state,
            model=self.unwrapped,
            optimizer=self.optimizer,
            tokenizer=self.processing_class,
            accelerator=self.accelerator,
            keep=self.args.save_total_limit,
        )

    def _load_newest(self) -> None:
        found = checkpoints(self.args.output_dir)
        if not found:
            self.accelerator.print(
                f"resume: {self.args.output_dir} has no complete checkpoint, beginning at update 0"
            )
            return
        check_same_settings(self.args.output_dir, self.args)
        state = load_checkpoint(
            found[-1],
            model=self.unwrapped,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            reference=self._reference_fingerprint(),
        )
        self.update, self.consumed, self.saved = state["update"], state["consumed"], state["update"]
        self.accelerator.print(f"resume: from {found[-1]}")

    def _reference_fingerprint(self) -> str:
        reference = self.unwrapped if self.reference is None else self.reference
        return fingerprint(self.accelerator.unwrap_model(reference).policy)

    def _passes(self, batch: Batch, chosen: Tensor, extra: int = 0) -> Iterator[Rows]:
        """The rows `chosen`, per_device_train_batch_size at a time."""
        size = self.args.per_device_train_batch_size
        on_device = chosen.to(self.device).split(size)
        for host, index in zip(chosen.split(size), on_device, strict=True):
            yield batch.rows(host.tolist(), index, extra)

    def _sum(self, sums: dict[str, Tensor | float]) -> dict[str, float]:
        """Sums over processes, on the host: at most one synchronisation."""
        tensors = {k: v for k, v in sums.items() if isinstance(v, Tensor)}
        if self.accelerator.num_processes > 1:
            tensors = {k: torch.as_tensor(v, device=self.device) for k, v in sums.items()}
        if tensors:
            flat = torch.stack([v.float() for v in tensors.values()])
            flat = self.accelerator.reduce(flat, reduction="sum").tolist()
            return sums | dict(zip(tensors, flat, strict=True))
        return sums

    def _any(self, flag: bool) -> bool:
        return self._sum({"": float(flag)})[""] > 0
