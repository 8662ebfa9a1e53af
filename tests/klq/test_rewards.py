# SPDX-License-Identifier: Apache-2.0
"""Reward functions: the signature, the rules, and case 82, functions that misbehave."""

import numpy as np
import pytest
import torch

from klq.rewards import RewardError, Rewards


def call(functions, weights=None, n=3, **columns):
    texts = [f"text {i}" for i in range(n)]
    return Rewards(functions, weights)(["p"] * n, texts, [[i] for i in range(n)], columns)


def test_signature_columns_and_weights():
    def by_column(prompts, completions, completion_ids, answer, **kwargs):
        assert (prompts[0], completions[2], completion_ids[1]) == ("p", "text 2", [1])
        assert kwargs == {"extra": ["x"] * 3}
        return answer

    def narrow(completions):
        return [1.0] * len(completions)

    scores, sums = call([by_column, narrow], [2.0, 0.5], answer=[1, 2, 3], extra=["x"] * 3)
    assert scores == [2.5, 4.5, 6.5]
    assert sums["rewards/by_column/sum"] == 6 and sums["rewards/narrow/count"] == 3


def test_none_means_does_not_apply():
    def first(completions):
        return [None, 1.0, 2.0]

    def second(completions):
        return [4.0, None, 3.0]

    scores, sums = call([first, second])
    assert scores == [4.0, 1.0, 5.0]
    assert sums["rewards/first/sum"] == 3.0 and sums["rewards/first/count"] == 2


@pytest.mark.parametrize("scores", [torch.tensor([1.0, 2, 3]), np.array([1, 2, 3])])
def test_case_82_tensor_is_taken_as_its_list(scores):
    assert call(lambda **_: scores)[0] == [1, 2, 3]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([None] * 3, "no reward function applies to completion 0"),
        ([1.0, None, 2.0], "no reward function applies to completion 1"),
        ([1.0, float("nan"), 2.0], "bad returned nan for completion 1"),
        ([1.0, 2.0, float("-inf")], "bad returned -inf for completion 2"),
        ([1.0, 2.0], "bad returned 2 scores for 3 completions"),
        (torch.zeros(3, 1), "bad returned \\[0.0\\] for completion 0, not a number"),
        (torch.tensor(1.0), "bad returned float, not a list"),
        (0.5, "bad returned float, not a list"),
        (None, "bad returned NoneType, not a list"),
        (["good", "bad", "ugly"], "bad returned 'good' for completion 0, not a number"),
    ],
)
def test_case_82_wrong_scores_are_one_clear_error(scores, message):
    def bad(**_):
        return scores

    with pytest.raises(RewardError, match=message):
        call(bad)


def test_case_82_exception_names_function_and_keeps_its_cause():
    def bad(**_):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="bad raised KeyError: 'answer'") as caught:
        call(bad)
    assert isinstance(caught.value.__cause__, KeyError)


def test_wrong_functions_and_weights():
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        Rewards([])
    with pytest.raises(TypeError, match="must be functions"):
        Rewards([3])
    with pytest.raises(ValueError, match="2 entries for 1 functions"):
        Rewards(len, [1.0, 2.0])
