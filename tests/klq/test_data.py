# SPDX-License-Identifier: Apache-2.0
"""Prompts: every form, the order as a function of the position, and the refusals of case 82."""

import pytest
import torch

from klq.data import Batch, Prompts
from klq.rollout import Rollout


class Words:
    """A tokenizer by word length."""

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, **kwargs):
        assert kwargs["add_generation_prompt"]
        return [len(m["content"]) for m in messages] + [99]


def prompts(dataset, tokenizer=None, room=None, keep=None, seed=0):
    return Prompts(dataset, tokenizer, room=room, keep=keep, seed=seed)


def test_every_form_of_prompt():
    rows = [
        {"prompt": "ab c"},
        {"prompt": [{"role": "user", "content": "hello"}]},
        {"prompt": [3, 4]},
        {"prompt_ids": [5], "prompt": "shown to rewards"},
    ]
    data = prompts(rows, Words())
    assert [data.ids(row, 0) for row in rows] == [[2, 1], [5, 99], [3, 4], [5]]


def test_order_depends_on_position_alone_and_covers_every_row_each_epoch():
    data = prompts([{"prompt": [i]} for i in range(5)], seed=3)
    _, whole = data.take(0, 15)
    _, late = data.take(7, 8)
    assert late == whole[7:]
    for epoch in range(3):
        assert sorted(ids[0] for ids in whole[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert whole[:5] != whole[5:10]


def test_case_82_empty_dataset_and_missing_column():
    with pytest.raises(ValueError, match="the dataset is empty"):
        prompts([])
    with pytest.raises(ValueError, match="the dataset is empty"):
        prompts(None)
    with pytest.raises(ValueError, match=r"column `prompt`"):
        prompts([{"text": "a"}])


def test_case_82_prompt_longer_than_the_model_is_found_before_training():
    rows = [{"prompt": [1]}, {"prompt": list(range(9))}]
    with pytest.raises(ValueError, match=r"row 1: a prompt of 9 tokens .* set max_prompt_length"):
        prompts(rows, room=5)
    assert prompts(rows, room=5, keep=4).ids(rows[1], 1) == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="max_prompt_length must be at most 5"):
        prompts(rows, room=5, keep=6)
    with pytest.raises(ValueError, match="leaves no room"):
        prompts(rows, room=0)


def test_prompt_without_tokens_or_tokenizer():
    with pytest.raises(ValueError, match="row 0: the prompt has no tokens"):
        prompts([{"prompt": []}], room=5)
    with pytest.raises(ValueError, match="give the tokenizer as processing_class"):
        prompts([{"prompt": "text"}], room=5)
    with pytest.raises(TypeError, match="row 0: prompt must be text, messages or token ids"):
        prompts([{"prompt": [1.5]}], room=5)


def test_rows_are_aligned_states_before_tokens():
    rollout = Rollout([[7, 8, 9], [6]], ["stop", "length"])
    batch = Batch.of([[1, 2], [3, 4, 5]], rollout, torch.device("cpu"))
    rows = batch.rows([0, 1], torch.tensor([0, 1]), extra=1)
    assert rows.tokens.tolist() == [[1, 2, 7, 8, 9], [3, 4, 5, 6, 0]]
    assert rows.positions.tolist() == [[1, 2, 3, 4], [2, 3, 4, 4]]
    assert rows.actions[0].tolist() == [7, 8, 9] and rows.actions[1, 0] == 6
    assert rows.mask.tolist() == [[True, True, True], [True, False, False]]
    alone = batch.rows([1], torch.tensor([1]))
    assert alone.tokens.tolist() == [[3, 4, 5, 6]] and alone.num_active == 1


def test_rollout_that_does_not_fit_is_refused():
    for rollout, message in [
        (Rollout([[1]], ["stop"]), "answered 2 prompts with 1"),
        (Rollout([[1], [2]], ["stop", "eos"]), "must be 'stop' or 'length'"),
        (Rollout([[1], [2]], ["stop"] * 2, None, [[True], []]), "response_masks must have one"),
        (Rollout([[1], [2]], ["stop"] * 2, [[0.0], []]), "sampling_logprobs must have one"),
    ]:
        with pytest.raises(ValueError, match=message):
            Batch.of([[1], [2]], rollout, torch.device("cpu"))


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_column_named_like_what_the_model_answered_is_refused(name):
    with pytest.raises(ValueError, match=f"column {name}, .*rename"):
        Prompts([{"prompt": [1]}, {"prompt": [2], name: "x"}], None, room=9, keep=None)


def test_column_of_some_rows_is_none_in_the_others(make_trainer):
    seen = []

    def reward(completions, answer):
        seen.extend(answer)
        return [0.0] * len(completions)

    trainer = make_trainer(rewards=reward)
    rows = [{"prompt": [1]}, {"prompt": [2], "answer": "yes"}, {"prompt_ids": [3]}]
    trainer.train_prompts = Prompts(rows, None, room=9, keep=None)
    for _ in range(3):
        trainer.step()
    assert sorted(seen, key=str) == [None] * 8 + ["yes"] * 4
    with pytest.raises(ValueError, match="row 1 has no `prompt`"):
        Prompts([{"prompt": [1]}, {"answer": "yes"}], None, room=9, keep=None)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "row 1: the prompt has no tokens"), ([16], "row 1.*token ids from 16"), ([-1, 2], "-1")],
)
@pytest.mark.parametrize("keep", [None, 4])
def test_bad_prompt_is_found_before_the_run(make_trainer, prompt, message, keep):
    with pytest.raises(ValueError, match=message):
        make_trainer(prompts=[[1], prompt], max_prompt_length=keep)
