# SPDX-License-Identifier: Apache-2.0
"""Where responses come from.

An engine is any object with `generate(prompt_ids) -> Rollout`. What the engine says about lengths,
ends and turns is taken as it is: nothing downstream looks at token ids to find out where a response
stopped, so a pad token that equals EOS, or an EOS inside a prompt, cannot mislead anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import GenerationConfig

log = logging.getLogger("klq")

# What changes the distribution a token is drawn from, and nothing else. Where a response ends and
# how many there are is the engine's business: the masks depend on it.
SAMPLING_SETTINGS = frozenset({
    "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "suppress_tokens", "begin_suppress_tokens", "min_new_tokens",
    "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values",
})  # fmt: skip


@dataclass
class Rollout:
    """Responses to a list of prompts.

    response_ids: tokens after the prompt, the end token included where there is one.
    finish_reasons: "stop" (a true end) or "length" (cut), one a response.
    sampling_logprobs: the engine's own log-probs of the response tokens, if it has them; they are
        compared with the training forward's and logged, never trained on.
    response_masks: True where the policy chose the token. None: everywhere. Tool results and user
        turns between the policy's own are False.
    """

    response_ids: list[list[int]]
    finish_reasons: list[str]
    sampling_logprobs: list[list[float]] | None = None
    response_masks: list[list[bool]] | None = None

    def check(self, count: int) -> None:
        """ValueError unless this is a well-formed answer to `count` prompts."""
        if len(self.response_ids) != count or len(self.finish_reasons) != count:
            raise ValueError(
                f"the rollout engine answered {count} prompts with {len(self.response_ids)} "
                f"responses and {len(self.finish_reasons)} finish reasons"
            )
        bad = sorted(set(self.finish_reasons) - {"stop", "length"})
        if bad:
            raise ValueError(f"finish_reasons must be 'stop' or 'length', got {bad}")
        lengths = [len(ids) for ids in self.response_ids]
        for name in ("sampling_logprobs", "response_masks"):
            rows = getattr(self, name)
            if rows is not None and [len(row) for row in rows] != lengths:
                raise ValueError(f"{name} must have one entry for every response token")


class RolloutEngine(Protocol):
    def generate(self, prompt_ids: list[list[int]]) -> Rollout: ...


def eos_ids(tokenizer, lm: nn.Module) -> set[int]:
    """The ids that end a response: the tokenizer's and the model's generation config's."""
    config = lm.generation_config.eos_token_id
    ids = set(config) if isinstance(config, (list, tuple)) else {config}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return ids - {None}


class HFRollout:
    """`model.generate` with temperature as the only sampling setting.

    The model's own generation config (top-k, top-p, penalties of a chat model) is set aside while
    sampling: truncated distributions have renormalised log-probs, and the log-ratio enters the KLQ
    residual linearly. `generation_kwargs` puts one of SAMPLING_SETTINGS back, at the price of a
    warning. Dropout is off: the trainer keeps the model in eval mode.
    `autocast` makes the context to sample in: the one that training computes log-probs in.

    Raises ValueError if generation_kwargs holds anything else or an impossible value.
    """

    def __init__(
        self,
        lm: nn.Module,
        *,
        eos: set[int],
        pad_id: int,
        max_completion_length: int,
        temperature: float,
        generation_kwargs: dict | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        unknown = sorted(set(generation_kwargs or {}) - SAMPLING_SETTINGS)
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} cannot be set there, only "
                f"{', '.join(sorted(SAMPLING_SETTINGS))}; ends, lengths and temperature have "
                "settings of their own (stop_token_ids, max_completion_length, temperature)"
            )
        if generation_kwargs:
            log.warning(
                "generation_kwargs %s: log-probs are of the full distribution at this temperature, "
                "so responses sampled otherwise bias the log-ratio",
                sorted(generation_kwargs),
            )
        self.lm, self.eos, self.pad_id, self.autocast = lm, eos, pad_id, autocast
        settings = {
            "do_sample": True,
            "temperature": float(temperature),
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": max_completion_length,
            "eos_token_id": sorted(eos) or None,
            "pad_token_id": pad_id,
            "disable_compile": True,
        }
        try:
            self.config = GenerationConfig(**{**settings, **(generation_kwargs or {})})
            if generation_kwargs:
                # Most values are only looked at when a response is sampled: do it once, unnoticed.
                self.config.validate(strict=True)
                devices = [lm.device] if lm.device.type == "cuda" else []
                with torch.random.fork_rng(devices=devices):
                    self.generate([[0]])
        except (ValueError, TypeError) as error:
            raise ValueError(f"generation_kwargs: {' '.join(str(error).split())}") from error

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]]) -> Rollout:
        device = self.lm.device
        width = max(len(ids) for ids in prompt_ids)
        tokens = torch.full((len(prompt_ids), width), self.pad_id)
        attention = torch.zeros_like(tokens)
        for row, ids in enumerate(prompt_ids):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            attention[row, width - len(ids) :] = 1
        own, self.lm.generation_config = self.lm.generation_config, self.config
        try:
            with self.autocast():
                out = self.lm.generate(
                    input_ids=tokens.to(device),
                    attention_mask=attention.to(device),
                    generation_config=self.config,
                )
        finally:
            self.lm.generation_config = own
        responses, reasons = [], []
        for ids in out[:, width:].tolist():
            end = next((i for i, token in enumerate(ids) if token in self.eos), None)
            responses.append(ids if end is None else ids[: end + 1])
            reasons.append("length" if end is None else "stop")
        return Rollout(responses, reasons)
