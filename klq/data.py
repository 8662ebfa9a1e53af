# SPDX-License-Identifier: Apache-2.0
"""Prompts in, rows of tensors out.

`Prompts` turns a dataset into token ids in an order that depends only on (seed, number of prompts
already used), so that the data position of a checkpoint is one integer. `Batch` holds one batch of
prompts and responses on the device, and cuts it into the rows of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klq.rollout import Rollout

# What reward functions get by these names comes from the model, never from the dataset.
REWARD_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})


class Prompts:
    """A dataset with a `prompt` column: a string, a list of messages, or a list of token ids.

    dataset: list of dicts or a `datasets.Dataset`. A column `prompt_ids` is used before `prompt`.
        A column that only some rows have is None in the others.
    room: longest prompt that leaves space for the response in the model's context (None: no limit).
    keep: longer prompts lose their beginning down to so many tokens; None refuses what does not fit
        in `room`.
    vocab_size: token ids must be below it (None: not known).
    Raises ValueError or TypeError naming the row: every row is looked at here and now.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        *,
        room: int | None,
        keep: int | None,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        if dataset is None or len(dataset) == 0:
            raise ValueError("the dataset is empty: give at least one row with a prompt")
        if not isinstance(dataset[0], dict) or not {"prompt", "prompt_ids"} & set(dataset[0]):
            raise ValueError("the dataset needs a column `prompt` (or `prompt_ids`)")
        if room is not None and room < 1:
            raise ValueError(
                "max_completion_length leaves no room for a prompt in the model's context: lower "
                f"it by at least {1 - room}"
            )
        if keep is not None and room is not None and keep > room:
            raise ValueError(
                f"max_prompt_length must be at most {room}: the model's context less the response"
            )
        self.dataset, self.tokenizer, self.room, self.keep = dataset, tokenizer, room, keep
        self.seed, self.vocab_size = seed, vocab_size
        columns: dict[str, None] = {}
        for i in range(len(dataset)):
            row = dataset[i]
            if not {"prompt", "prompt_ids"} & set(row):
                raise ValueError(f"row {i} has no `prompt` (nor `prompt_ids`)")
            columns |= dict.fromkeys(row)
            self.ids(row, i)
        taken = sorted(set(columns) & REWARD_ARGUMENTS)
        if taken:
            raise ValueError(
                f"the dataset has a column {', '.join(taken)}, the name of what reward functions "
                "get from the model: rename it"
            )
        self.columns = [name for name in columns if name not in ("prompt", "prompt_ids")]

    def ids(self, row: dict, where: int) -> list[int]:
        """Token ids of a row's prompt."""
        prompt = row["prompt_ids"] if "prompt_ids" in row else row["prompt"]
        if isinstance(prompt, str) or is_messages(prompt):
            if self.tokenizer is None:
                raise ValueError("prompts are text: give the tokenizer as processing_class")
            if isinstance(prompt, str):
                ids = self.tokenizer(prompt)["input_ids"]
            else:
                ids = self.tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, tokenize=True, return_dict=False
                )
        else:
            ids = list(prompt)
            if not all(isinstance(i, int) for i in ids):
                raise TypeError(f"row {where}: prompt must be text, messages or token ids")
        if not ids:
            raise ValueError(f"row {where}: the prompt has no tokens; it needs at least one")
        if self.vocab_size is not None and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"row {where}: the prompt has token ids from {min(ids)} to {max(ids)}, the model's "
                f"vocabulary goes from 0 to {self.vocab_size - 1}"
            )
        if self.keep is not None:
            return ids[-self.keep :]
        if self.room is not None and len(ids) > self.room:
            raise ValueError(
                f"row {where}: a prompt of {len(ids)} tokens and the response do not fit the model "
                f"(at most {self.room}); set max_prompt_length, or leave such rows out"
            )
        return ids

    def take(self, start: int, count: int) -> tuple[list[dict], list[list[int]]]:
        """Rows number start .. start + count - 1 of an endless shuffled pass over the dataset."""
        n, rows, ids = len(self.dataset), [], []
        for number in range(start, start + count):
            epoch, offset = divmod(number, n)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            if offset == 0 or number == start:
                order = torch.randperm(n, generator=generator)
            where = int(order[offset])
            rows.append(self._row(where))
            ids.append(self.ids(rows[-1], where))
        return rows, ids

    def in_order(self, size: int) -> Iterator[tuple[list[dict], list[list[int]]]]:
        """The dataset once, as it stands, in pieces of at most `size` rows."""
        for start in range(0, len(self.dataset), size):
            where = range(start, min(start + size, len(self.dataset)))
            rows = [self._row(i) for i in where]
            yield rows, [self.ids(row, i) for row, i in zip(rows, where, strict=True)]

    def _row(self, where: int) -> dict[str, Any]:
        return {**dict.fromkeys(self.columns), **self.dataset[where]}


def is_messages(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], dict)


def columns_of(rows: Sequence[dict]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Prompts as the dataset has them, and the other columns, each a list."""
    prompts = [row["prompt"] if "prompt" in row else row["prompt_ids"] for row in rows]
    names = [name for name in rows[0] if name not in ("prompt", "prompt_ids")]
    return prompts, {name: [row[name] for row in rows] for name in names}


def completions_of(tokenizer: Any, prompts: list[Any], response_ids: list[list[int]]) -> list[Any]:
    """What reward functions see: text, a message where the prompt was messages, or the ids."""
    if tokenizer is None:
        return response_ids
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in response_ids]
    return [
        [{"role": "assistant", "content": text}] if is_messages(prompt) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Pieces [B, R'] of one batch, each as wide as its own longest row, as one [N, R]."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part.float(), (0, width - part.shape[1])) for part in parts])


@dataclass
class Rows:
    """Some rows of a batch, cut to their own longest row; one forward pass."""

    index: Tensor  # [B]
    tokens: Tensor  # [B, L]
    positions: Tensor  # [B, R] states that choose the response tokens (one more with `extra`)
    actions: Tensor  # [B, R]
    mask: Tensor  # [B, R]
    num_active: int
    stored: dict[str, Tensor]  # per-token tensors of the batch, [B, R]


@dataclass
class Batch:
    """Prompts and responses of one update, one row each, R the longest response (at least 1).

    Host lists say how long everything is, so that nothing ever asks the device. `stored` collects
    per-token float32 [N, R] tensors: old_logprobs, ref_logprobs, old_values, advantages, ...
    """

    tokens: Tensor  # [N, L] prompt and response, padded on the right
    starts: Tensor  # [N] prompt lengths
    mask: Tensor  # [N, R] True where the policy chose the token
    prompt_lengths: list[int]
    response_lengths: list[int]
    active: list[int]  # active tokens a row
    truncated: list[bool]
    rollout: Rollout
    stored: dict[str, Tensor] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    reward_sums: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def of(
        prompt_ids: list[list[int]],
        rollout: Rollout,
        device: torch.device,
        context: int | None = None,
    ) -> Batch:
        """`rollout` as tensors. ValueError if it is malformed, or a row exceeds `context` tokens.

        context: the model's positions (None: no limit). Beyond them a learned position embedding
            stops the process with an index error, and a rotary one goes on with nonsense.
        """
        rollout.check(len(prompt_ids))
        responses = rollout.response_ids
        for row, (p, r) in enumerate(zip(prompt_ids, responses, strict=True)):
            if context is not None and len(p) + len(r) > context:
                raise ValueError(
                    f"rollout {row}: a prompt of {len(p)} and a response of {len(r)} tokens (tool "
                    f"and user turns included) do not fit the model's {context} positions; let the "
                    "rollout engine end the dialogue or cut tool results earlier, or lower "
                    "max_completion_length or max_prompt_length"
                )
        masks = rollout.response_masks or [[True] * len(ids) for ids in responses]
        width = max(len(p) + len(r) for p, r in zip(prompt_ids, responses, strict=True))
        longest = max(1, *(len(r) for r in responses))
        tokens = torch.zeros(len(responses), width, dtype=torch.long)
        mask = torch.zeros(len(responses), longest, dtype=torch.bool)
        for row, (p, r, m) in enumerate(zip(prompt_ids, responses, masks, strict=True)):
            tokens[row, : len(p) + len(r)] = torch.tensor(p + list(r))
            mask[row, : len(r)] = torch.tensor(m, dtype=torch.bool)
        lengths = [len(p) for p in prompt_ids]
        return Batch(
            tokens=tokens.to(device),
            starts=torch.tensor(lengths).to(device),
            mask=mask.to(device),
            prompt_lengths=lengths,
            response_lengths=[len(r) for r in responses],
            active=[sum(map(bool, m)) for m in masks],
            truncated=[reason == "length" for reason in rollout.finish_reasons],
            rollout=rollout,
        )

    def __len__(self) -> int:
        return len(self.active)

    def rows(self, host: list[int], index: Tensor, extra: int = 0) -> Rows:
        """The rows `host` (`index` is the same list on the device), cut to what they need.

        extra: further states read behind the last response token (1 for a bootstrap value).
        """
        length = max(self.prompt_lengths[i] + self.response_lengths[i] for i in host)
        reach = max(1, *(self.response_lengths[i] for i in host))
        tokens = self.tokens[index, :length]
        steps = torch.arange(reach + extra, device=tokens.device)
        positions = (self.starts[index, None] - 1 + steps).clamp(max=length - 1)
        actions = tokens.gather(1, (positions[:, :reach] + 1).clamp(max=length - 1))
        return Rows(
            index=index,
            tokens=tokens,
            positions=positions,
            actions=actions,
            mask=self.mask[index, :reach],
            num_active=sum(self.active[i] for i in host),
            stored={name: value[index, :reach] for name, value in self.stored.items()},
        )

    def logprob_gap(self) -> dict[str, float]:
        """Sum and count of |engine's log-prob - ours| over active tokens, if it gave its own."""
        engine = self.rollout.sampling_logprobs
        if engine is None:
            return {}
        theirs = [torch.tensor(row) for row in engine]
        theirs = torch.nn.utils.rnn.pad_sequence(theirs, batch_first=True).to(self.mask.device)
        gap = (theirs - self.stored["old_logprobs"][:, : theirs.shape[1]]).abs()
        gap = torch.where(self.mask[:, : theirs.shape[1]], gap, 0.0)
        name = "rollout/logprob_gap"
        return {f"{name}/sum": gap.sum(), f"{name}/count": float(sum(self.active))}
