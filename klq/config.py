# SPDX-License-Identifier: Apache-2.0
"""Every number of a run in one dataclass.

The fields are the flags of `klq train`, the keys of its YAML file and the content of config.json.
Values are checked once, here, before any work: a mistake costs one line, not an hour.
"""

import math
from dataclasses import Field, InitVar, dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin

TAU_NAMES = ("tau", "beta", "kl_coef")
DEFAULT_TAU = 0.05


def field_type(f: Field) -> tuple[Any, bool]:
    """The type of a `KLQConfig` field without help text and `None`, and if it may be None."""
    annotated = get_args(f.type)[0]
    args = get_args(annotated)
    return (args[0], True) if type(None) in args else (annotated, False)


@dataclass
class KLQConfig:
    """Configuration of `KLQTrainer`. Raises ValueError or TypeError, naming field and remedy.

    One *update* is: sample a batch of responses, score them, fix the targets, then take
    `update_epochs * num_mini_batches` optimiser steps on it. A process samples
    `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` responses an
    update. `beta` and `kl_coef` are other names of `tau`; at most one of the three may be given.
    """

    output_dir: Annotated[str, "where everything is written"] = "runs/klq"
    overwrite: Annotated[bool, "delete the run that output_dir already holds"] = False
    seed: Annotated[int, "seed of sampling, of the data order and of the minibatches"] = 0

    algorithm: Annotated[str, "klq, or ppo: the baseline on the same rollouts"] = "klq"
    tau: Annotated[float, "KL coefficient (default 0.05)"] = None
    gamma: Annotated[float, "discount"] = 1.0
    lam: Annotated[float, "trace decay lambda"] = 0.95
    alpha: Annotated[float, "conservatism of the KLQ step, in (0, 1]"] = 1.0
    cliprange: Annotated[float, "ppo: clip of the probability ratio"] = 0.2
    cliprange_value: Annotated[float, "ppo: clip of the value update"] = 0.2
    vf_coef: Annotated[float, "ppo: weight of the value loss"] = 0.1
    whiten_advantages: Annotated[bool, "ppo: normalise advantages over the batch"] = True

    temperature: Annotated[float, "of sampling and of every log-probability alike"] = 1.0
    max_completion_length: Annotated[int, "longest response, in tokens"] = 53
    max_prompt_length: Annotated[int | None, "longer prompts keep their end"] = None
    generation_kwargs: Annotated[dict, "further sampling settings (warns)"] = field(
        default_factory=dict
    )
    stop_token_ids: Annotated[list[int], "these end a response too, next to EOS"] = field(
        default_factory=list
    )
    truncation: Annotated[str, "cut responses: score or bootstrap"] = "score"
    missing_eos_penalty: Annotated[float | None, "off the score of a cut response"] = None
    reward_weights: Annotated[list[float] | None, "one a reward function"] = None

    num_updates: Annotated[int, "updates of the whole run"] = 100
    per_device_train_batch_size: Annotated[int, "responses in one forward and backward pass"] = 8
    gradient_accumulation_steps: Annotated[int, "such passes in one optimiser step"] = 1
    num_mini_batches: Annotated[int, "optimiser steps in one epoch over the batch"] = 1
    update_epochs: Annotated[int, "epochs over each batch of responses"] = 4
    learning_rate: Annotated[float, "AdamW step size"] = 1.41e-5
    value_learning_rate: Annotated[float | None, "that of the value parameters"] = None
    lr_scheduler_type: Annotated[str, "constant, or linear: to zero over num_updates"] = "constant"
    weight_decay: Annotated[float, "AdamW weight decay"] = 0.0
    adam_epsilon: Annotated[float, "AdamW epsilon"] = 1e-8
    max_grad_norm: Annotated[float, "clip of the gradient norm; 0 is off"] = 1.0
    value_trunk_grad_scale: Annotated[float, "value gradient into a shared trunk"] = 1.0
    value_warmup_updates: Annotated[int, "first updates: value parameters only"] = 0
    bf16: Annotated[bool, "bfloat16 autocast"] = False
    use_cpu: Annotated[bool, "stay on the CPU although there is an accelerator"] = False

    eval_every: Annotated[int, "updates between evaluations; 0 is never"] = 0
    save_every: Annotated[int, "updates between checkpoints; 0: at the end"] = 0
    save_total_limit: Annotated[int, "checkpoints kept"] = 2
    sample_every: Annotated[int, "updates between samples; 0 is never"] = 10
    num_samples: Annotated[int, "samples shown and written at a time"] = 4
    report_to: Annotated[list[str], "trackers of Accelerate, or none"] = field(default_factory=list)
    run_name: Annotated[str | None, "name of the run for trackers and figures"] = None
    disable_tqdm: Annotated[bool, "no progress bar, no sample table"] = False

    beta: InitVar[float | None] = None
    kl_coef: InitVar[float | None] = None

    def __post_init__(self, beta: float | None, kl_coef: float | None) -> None:
        given = {
            n: v for n, v in zip(TAU_NAMES, (self.tau, beta, kl_coef), strict=True) if v is not None
        }
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are names of one setting: give only one")
        self.tau = next(iter(given.values()), DEFAULT_TAU)
        self._check_types()
        self._check_values()

    def _check_types(self) -> None:
        """Integers stand for floats, and one tracker for a list; anything else is a TypeError."""
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if self.report_to == ["none"]:
            self.report_to = []
        for f in fields(self):
            value, (kind, optional) = getattr(self, f.name), field_type(f)
            if value is None and optional:
                continue
            plain = get_origin(kind) or kind
            accepted = (int, float) if plain is float else plain
            if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
                raise TypeError(f"{f.name} must be of type {plain.__name__}, got {value!r}")
            if plain is float and not math.isfinite(value):
                raise ValueError(f"{f.name} must be finite, got {value!r}")
            for entry in value if plain is list else ():
                of = get_args(kind)[0]
                if isinstance(entry, bool) or not isinstance(
                    entry, (int, float) if of is float else of
                ):
                    raise TypeError(
                        f"{f.name} must be a list of {of.__name__}, got {entry!r} in it"
                    )
                if of is float and not math.isfinite(entry):
                    raise ValueError(f"{f.name} must be finite, got {entry!r}")

    def _check_values(self) -> None:
        def choice(name: str, *allowed: str) -> None:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )

        def need(holds: bool, name: str, what: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        choice("algorithm", "klq", "ppo")
        choice("truncation", "score", "bootstrap")
        choice("lr_scheduler_type", "constant", "linear")
        for name in ("max_completion_length", "num_updates", "per_device_train_batch_size",
                     "gradient_accumulation_steps", "num_mini_batches", "update_epochs",
                     "save_total_limit"):  # fmt: skip
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("tau", "weight_decay", "max_grad_norm", "value_trunk_grad_scale", "seed",
                     "value_warmup_updates", "eval_every", "save_every", "sample_every",
                     "num_samples", "vf_coef", "learning_rate"):  # fmt: skip
            need(getattr(self, name) >= 0, name, "0 or more")
        for name in ("temperature", "cliprange", "cliprange_value", "adam_epsilon"):
            need(getattr(self, name) > 0, name, "greater than 0")
        need(all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", "token ids, 0 or more")
        # numpy takes 32 bits, and every process adds its number.
        need(self.seed < 2**31, "seed", "below 2**31")
        need(0 <= self.gamma <= 1, "gamma", "between 0 and 1")
        need(0 <= self.lam <= 1, "lam", "between 0 and 1")
        need(0 < self.alpha <= 1, "alpha", "greater than 0 and at most 1")
        need(self.max_prompt_length is None or self.max_prompt_length >= 1,
             "max_prompt_length", "at least 1")  # fmt: skip
        if self.algorithm == "klq" and self.tau == 0:
            raise ValueError("tau must be greater than 0: at 0 the KLQ policy has no gradient")
        if self.truncation == "bootstrap" and self.missing_eos_penalty is not None:
            raise ValueError(
                "missing_eos_penalty needs truncation='score': a response cut by length carries "
                "either a score or a bootstrap, never both"
            )

    @property
    def local_batch_size(self) -> int:
        """Responses one process samples an update."""
        return (self.per_device_train_batch_size * self.gradient_accumulation_steps
                * self.num_mini_batches)  # fmt: skip


def config_names() -> set[str]:
    """Everything `KLQConfig(...)` accepts by name, the aliases of tau included."""
    return {f.name for f in fields(KLQConfig)} | set(TAU_NAMES)


def merged(defaults: dict[str, Any], overrides: dict[str, Any]) -> KLQConfig:
    """`KLQConfig(**defaults)` with `overrides` on top.

    A default `tau` gives way to an override under any of its names, so that `--beta 0.1` on a
    preset that sets `tau` is not two settings at once.
    """
    renamed = any(name in overrides for name in TAU_NAMES)
    kept = {k: v for k, v in defaults.items() if not (renamed and k in TAU_NAMES)}
    return KLQConfig(**{**kept, **overrides})
