# SPDX-License-Identifier: Apache-2.0
"""Reward functions: plain Python, TRL's signature, or reward models; several with weights.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

The other columns of the dataset arrive as lists by name; a function without `**kwargs` gets those
it names. With message prompts a completion is a list of messages; without a tokenizer, of ids.

The rules: None means that the function does not apply to this completion, and counts 0 in the
weighted sum. A completion to which no function applies, a wrong number of scores, a score that is
NaN, infinite or no number, and an exception are each one RewardError that names the function. A
one-dimensional tensor or array is taken as the list it stands for.

In the place of a function may stand a reward model, a transformers sequence-classification model
with one label, or its name or path: `RewardModel`.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from klq.data import is_messages

log = logging.getLogger("klq")


class RewardError(ValueError):
    """A reward function did not do what its signature promises."""


class Rewards:
    """The weighted sum of reward functions and reward models.

    Raises ValueError if there is none, or weights do not fit; and for a reward model as there.
    """

    def __init__(
        self,
        functions: Callable | str | Sequence[Callable | str],
        weights: Sequence[float] | None = None,
    ) -> None:
        alone = callable(functions) or isinstance(functions, str)
        given = [functions] if alone else list(functions or [])
        if not given:
            raise ValueError("reward_funcs is empty: give at least one function")
        for f in given:
            if not callable(f) and not isinstance(f, str):
                raise TypeError(f"reward_funcs must be functions or reward models, got {f!r}")
        self.weights = list(weights) if weights is not None else [1.0] * len(given)
        if len(self.weights) != len(given):
            raise ValueError(
                f"reward_weights: {len(self.weights)} entries for {len(given)} functions"
            )
        self.functions = [RewardModel(f) if _is_model(f) else f for f in given]
        self.names: list[str] = []  # each once: two models may well both be called `final`
        for f in self.functions:
            name = getattr(f, "__name__", type(f).__name__)
            same = sum(n.partition("#")[0] == name for n in self.names)
            self.names.append(f"{name}#{same + 1}" if same else name)

    def prepare(
        self, policy: nn.Module, tokenizer: Any, device: torch.device, batch_size: int
    ) -> None:
        """Make the reward models ready for completions of this policy: `RewardModel.prepare`."""
        for f in self.functions:
            if isinstance(f, RewardModel):
                f.prepare(policy, tokenizer, device, batch_size)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        prompt_ids: list[list[int]] | None = None,
    ) -> tuple[list[float], dict[str, float]]:
        """Scores, one a completion; and of each function the sum and number of its own scores.

        prompt_ids: what the policy was given, for reward models (which need it) and no one else.
        """
        every, sums = [], {}
        arguments = {
            "prompts": prompts, "completions": completions, "completion_ids": completion_ids,
            **columns,
        }  # fmt: skip
        for name, f in zip(self.names, self.functions, strict=True):
            more = {"prompt_ids": prompt_ids} if isinstance(f, RewardModel) else {}
            scores = _checked(name, _called(name, f, {**arguments, **more}), len(completions))
            every.append(scores)
            known = [s for s in scores if s is not None]
            sums[f"rewards/{name}/sum"] = sum(known, 0.0)
            sums[f"rewards/{name}/count"] = float(len(known))
        totals = []
        for i, row in enumerate(zip(*every, strict=True)):
            if all(score is None for score in row):
                raise RewardError(
                    f"no reward function applies to completion {i}: {', '.join(self.names)} all "
                    "returned None; at least one must return a number"
                )
            totals.append(
                sum(w * s for w, s in zip(self.weights, row, strict=True) if s is not None)
            )
        return totals, sums


class RewardModel:
    """A sequence-classification model as a reward function: its one logit, prompt + completion.

    model: a transformers module with `num_labels` 1, or the name or path of one, which is loaded
        in the dtype it was saved in. A module is put in eval mode and on the trainer's device.

    It reads the token ids that the policy read and wrote, the end token included. If a tokenizer
    lies where the model came from and does not know every token of the policy's under the same id,
    it reads text instead: prompt and completion through that tokenizer, its special tokens added;
    messages through its chat template. The policy's special tokens, EOS among them, are left out.
    Without such a tokenizer the sizes of the two vocabularies must be equal.

    The score is what the model gives to the row alone: rows are padded on the right with the pad id
    of its config. A causal classifier reads its score at the last token that is not that id; so
    with pad = EOS, before the EOS. A config without pad id scores at the last token whatever it is.

    Raises ValueError, naming the model, if it cannot be loaded, has another number of labels, has
    weights that its directory lacks, or (`prepare`) has another vocabulary and no tokenizer.
    """

    def __init__(self, model: str | nn.Module) -> None:
        path = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        self.source = path
        self.__name__ = Path(path).name or type(model).__name__
        missing = []
        if isinstance(model, str):
            try:
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    path, dtype="auto", output_loading_info=True
                )
            except (OSError, ValueError) as error:
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f"reward model {path!r} cannot be loaded: {reason}") from error
            missing = sorted(info["missing_keys"])
        if model.config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__} has num_labels {model.config.num_labels}: a reward "
                "model is a sequence-classification model with num_labels=1, one score a completion"
            )
        if missing:  # transformers fills them with random numbers, and training would follow those
            raise ValueError(
                f"reward model {self.__name__} lacks the weights {', '.join(missing)}: train it "
                "first, or give the directory of the trained one"
            )
        self.model = model.eval()
        self.tokenizer: Any = None  # of its own, where the policy's ids mean nothing to it
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.batch_size = 1

    def prepare(
        self, policy: nn.Module, tokenizer: Any, device: torch.device, batch_size: int
    ) -> None:
        """Settle how it reads the policy, and move it.

        tokenizer: the policy's; None: prompts are token ids.
        batch_size: rows in one forward pass.
        """
        own = None if tokenizer is None else self._own_tokenizer()
        found = policy.get_input_embeddings().num_embeddings
        if own is not None:
            same = tokenizer.get_vocab().items() <= own.get_vocab().items()
            self.tokenizer = None if same else own
        elif self.vocab_size != found:
            raise ValueError(
                f"reward model {self.__name__} has a vocabulary of {self.vocab_size}, the policy "
                f"of {found}, and there are no two tokenizers to go from one to the other: give "
                "the reward model by a path that holds its tokenizer, and the policy's tokenizer "
                "as processing_class"
            )
        # A row needs a pad id that is not its last token: some id must be free of those.
        self.batch_size = max(1, min(batch_size, self.vocab_size - 1))
        self.model.to(device)

    def _own_tokenizer(self) -> Any:
        """The tokenizer where the model came from; None, said loudly if it came from somewhere."""
        if not self.source:
            return None
        try:
            own = AutoTokenizer.from_pretrained(self.source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
        else:
            # Without files transformers makes a tokenizer that knows its special tokens alone.
            if len(own) > len(own.all_special_ids):
                return own
            reason = "no tokenizer files"
        log.warning(
            "reward model %s: %s; it must share the policy's tokenizer", self.source, reason
        )
        return None

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]],
    ) -> list[float]:
        if self.tokenizer is None:
            rows = [list(p) + list(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        else:
            rows = [self._read(p, c) for p, c in zip(prompts, completions, strict=True)]
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest, highest = max(len(row) for row in rows), max(max(row) for row in rows)
        if room is not None and longest > room:
            raise ValueError(
                f"prompt and completion of {longest} tokens do not fit its {room} positions; lower "
                "max_prompt_length or max_completion_length"
            )
        if highest >= self.vocab_size:  # on a GPU this would end the process, not just the run
            raise ValueError(f"token {highest} is beyond its vocabulary of {self.vocab_size}")
        pieces = range(0, len(rows), self.batch_size)
        return [s for i in pieces for s in self._scores(rows[i : i + self.batch_size])]

    def _read(self, prompt: Any, completion: Any) -> list[int]:
        """Prompt and completion in its own tokens."""
        if is_messages(prompt):
            return self.tokenizer.apply_chat_template(
                [*prompt, *completion], tokenize=True, return_dict=False
            )
        if not isinstance(prompt, str):
            raise ValueError(
                "it has a tokenizer of its own, so prompts must be text, not token ids"
            )
        return self.tokenizer(prompt + completion)["input_ids"]

    def _scores(self, rows: list[list[int]]) -> list[float]:
        config = self.model.config.get_text_config()
        own = pad = getattr(config, "pad_token_id", None)
        if own is None or not 0 <= own < self.vocab_size:
            # transformers refuses batches without a pad id. One that ends no row of this batch
            # makes it read every row's last token, as it does with a single row.
            pad = min(set(range(len(rows) + 1)) - {row[-1] for row in rows})
        width = max(len(row) for row in rows)
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # [B, L]
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = self.model.device
        try:
            config.pad_token_id = pad
            logits = self.model(tokens.to(device), attention_mask=attention.to(device)).logits
        finally:
            config.pad_token_id = own
        if logits.shape != (len(rows), 1):
            raise ValueError(f"it gave logits {tuple(logits.shape)} for {len(rows)} completions")
        return logits.float().squeeze(1).tolist()


def _is_model(f: Any) -> bool:
    return isinstance(f, str) or (isinstance(f, nn.Module) and hasattr(f, "config"))


def _called(name: str, f: Callable, arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(f).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = {p.name for p in parameters}
        arguments = {k: v for k, v in arguments.items() if k in accepted}
    try:
        return f(**arguments)
    except Exception as error:
        raise RewardError(
            f"reward function {name} raised {type(error).__name__}: {error}"
        ) from error


def _checked(name: str, scores: Any, count: int) -> list[float | None]:
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, (list, tuple)):
        raise RewardError(
            f"reward function {name} returned {type(scores).__name__}, not a list of numbers"
        )
    if len(scores) != count:
        raise RewardError(
            f"reward function {name} returned {len(scores)} scores for {count} completions"
        )
    checked: list[float | None] = []
    for i, score in enumerate(scores):
        try:
            number = None if score is None else float(score)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward function {name} returned {score!r} for completion {i}, not a number"
            ) from None
        if number is not None and not math.isfinite(number):
            raise RewardError(f"reward function {name} returned {number} for completion {i}")
        checked.append(number)
    return checked
