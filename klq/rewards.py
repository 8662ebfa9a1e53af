# SPDX-License-Identifier: Apache-2.0
"""Reward functions: plain Python, TRL's signature, several with weights.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

The other columns of the dataset arrive as lists by name; a function without `**kwargs` gets those
it names. With message prompts a completion is a list of messages; without a tokenizer, of ids.

The rules: None means that the function does not apply to this completion, and counts 0 in the
weighted sum. A completion to which no function applies, a wrong number of scores, a score that is
NaN, infinite or no number, and an exception are each one RewardError that names the function. A
one-dimensional tensor or array is taken as the list it stands for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any


class RewardError(ValueError):
    """A reward function did not do what its signature promises."""


class Rewards:
    """The weighted sum of reward functions; ValueError if there is none, or weights do not fit."""

    def __init__(
        self, functions: Callable | Sequence[Callable], weights: Sequence[float] | None = None
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions or [])
        if not self.functions:
            raise ValueError("reward_funcs is empty: give at least one function")
        for f in self.functions:
            if not callable(f):
                raise TypeError(f"reward_funcs must be functions, got {f!r}")
        self.weights = list(weights) if weights is not None else [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights: {len(self.weights)} entries for {len(self.functions)} functions"
            )
        self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
    ) -> tuple[list[float], dict[str, float]]:
        """Scores, one a completion; and of each function the sum and number of its own scores."""
        every, sums = [], {}
        arguments = {
            "prompts": prompts, "completions": completions, "completion_ids": completion_ids,
            **columns,
        }  # fmt: skip
        for name, f in zip(self.names, self.functions, strict=True):
            scores = _checked(name, _called(name, f, arguments), len(completions))
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
