# SPDX-License-Identifier: Apache-2.0
"""Reward models: the score is what the model gives to a row alone, whatever it is batched with."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification, PreTrainedTokenizerFast

from klq import KLQConfig, KLQTrainer
from klq.logging import METRICS, read_jsonl
from klq.rewards import RewardError, Rewards

EOS = 15
CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 3]]
ANSWERS = [[5, EOS], [1, 2, 3, 4, 5, 6], [EOS], [7, 0], [9, 9, 14]]


def reward_model(pad=None, vocab=16, labels=1, seed=3):
    config = GPTNeoXConfig(
        vocab_size=vocab, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=pad, num_labels=labels, initializer_range=0.5, classifier_dropout=0.5,
        hidden_dropout=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForSequenceClassification(config).train()


def words(order=range(14)):
    """A tokenizer of w0 ... w13, [PAD] and [EOS]; `order` says which word has which id."""
    vocabulary = {f"w{word}": i for i, word in enumerate(order)} | {"[PAD]": 14, "[EOS]": EOS}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="w0"
    )


def alone(model, rows):
    """The model's own outputs, a row at a time and unpadded."""
    with torch.no_grad():
        return [float(model.eval()(torch.tensor([row])).logits) for row in rows]


def scored(tiny, model, tokenizer=None, batch_size=3, prompts=PROMPTS, texts=None):
    rewards = Rewards(model)
    rewards.prepare(tiny(), tokenizer, CPU, batch_size)
    return rewards(texts or prompts, texts or ANSWERS, ANSWERS, {}, prompts)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
@pytest.mark.parametrize("pad", [None, 0, 14, EOS, -1])
def test_scores_are_those_of_single_rows(tiny, pad, batch_size):
    """Rows end in EOS, in id 0 and at the limit; the pad id is absent, any of those, or invalid."""
    model = reward_model(pad)
    scores = scored(tiny, model, batch_size=batch_size)
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert model.config.pad_token_id == pad and not model.training
    model.config.pad_token_id = None if pad == -1 else pad
    torch.testing.assert_close(scores, alone(model, rows), rtol=1e-5, atol=1e-6)
    assert len({round(s, 4) for s in scores}) == 5, "the rows must be told apart"


def test_more_rows_than_tokens(tiny):
    """Every id ends some row: a batch must still find a pad id that ends none of its own."""
    model, rewards = reward_model(), Rewards([reward_model()])
    rewards.prepare(tiny(), None, CPU, 64)
    answers = [[2] * (i % 3) + [i] for i in range(16)] * 2
    scores, _ = rewards([[1]] * 32, answers, answers, {}, [[1]] * 32)
    want = alone(model, [[1, *answer] for answer in answers])
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-6)


def test_two_updates_with_a_model_alone_and_among_functions(make_trainer, tiny, tmp_path):
    model = reward_model(pad=14)
    before = [p.clone() for p in model.parameters()]
    model.score.register_forward_hook(lambda *_: grad_modes.add(torch.is_grad_enabled()))
    grad_modes = set()
    trainer = make_trainer(rewards=model, num_updates=2)
    trainer.train()
    rows = read_jsonl(tmp_path / "run" / METRICS)
    name = "rewards/GPTNeoXForSequenceClassification"
    assert len(rows) == 2
    assert all(row["objective/scores"] == pytest.approx(row[name]) for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(p.grad is not None for p in model.parameters()) and grad_modes == {False}
    rewards = Rewards(model)
    rewards.prepare(tiny(), None, CPU, 4)
    rewards(PROMPTS, ANSWERS, ANSWERS, {}, PROMPTS)
    assert grad_modes == {False}, "not only because the trainer switches gradients off"

    def ones(completions):
        return [1.0] * len(completions)

    mixed = make_trainer(
        rewards=[ones, model, model], reward_weights=[10.0, 2.0, 1.0], output_dir=str(tmp_path)
    )
    batch, metrics = mixed.step()
    responses = batch.rollout.response_ids
    starts = batch.tokens.tolist()
    rows = [
        starts[i][:n] + ids
        for i, (n, ids) in enumerate(zip(batch.prompt_lengths, responses, strict=True))
    ]
    want = [10 + 3 * s for s in alone(model, rows)]
    torch.testing.assert_close(batch.scores, want, rtol=1e-5, atol=1e-5)
    assert metrics["rewards/ones"] == 1 and metrics[name] == pytest.approx(metrics[f"{name}#2"])


def test_by_path_with_the_same_tokenizer_reads_token_ids(tiny, tmp_path):
    """The ids, EOS included, although text would give others (pad = EOS would not see it)."""
    path = tmp_path / "rm"
    model = reward_model()
    model.save_pretrained(path)
    grown = words()
    grown.add_tokens(["w14"])  # the reward model knows more tokens, under other ids
    grown.save_pretrained(path)
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    scores = scored(tiny, str(path), words(), texts=["never read"] * 5)
    torch.testing.assert_close(scores, alone(model, rows), rtol=1e-5, atol=1e-6)


def test_by_path_with_another_tokenizer_reads_text(tiny, tmp_path):
    """Two updates from text; every score is that of the text in the model's own tokens."""
    path, theirs = tmp_path / "rm", words(reversed(range(14)))
    reward_model(vocab=20).save_pretrained(path)
    theirs.save_pretrained(path)
    args = KLQConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, num_updates=2,
        max_completion_length=5, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = [{"prompt": "w1 w2 "}, {"prompt": "w3 "}]
    trainer = KLQTrainer(tiny(), str(path), args, data, processing_class=words())
    batch, metrics = trainer.step()
    rows = [theirs(s["prompt"] + s["completion"])["input_ids"] for s in batch.samples]
    assert rows[0][0] in (12, 10), "w1 is 12 and w3 is 10 in their order"
    want = alone(reward_model(vocab=20), rows)
    torch.testing.assert_close(batch.scores, want, rtol=1e-5, atol=1e-5)
    assert metrics["rewards/rm"] == pytest.approx(sum(want) / 4, rel=1e-4)
    trainer.step()


def test_another_tokenizer_and_messages_or_ids(tiny, tmp_path):
    path, theirs = tmp_path / "rm", words(reversed(range(14)))
    reward_model().save_pretrained(path)
    theirs.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w0"
    theirs.save_pretrained(path)
    rewards = Rewards(str(path))
    rewards.prepare(tiny(), words(), CPU, 4)
    said = [{"role": "user", "content": "w1 w2"}], [{"role": "assistant", "content": "w3"}]
    scores, _ = rewards([said[0]], [said[1]], [[3, EOS]], {}, [[1, 2]])
    torch.testing.assert_close(scores, alone(reward_model(), [[12, 11, 10, 13]]))
    with pytest.raises(RewardError, match=r"rm raised ValueError: .* prompts must be text"):
        rewards([[1, 2]], ["w3"], [[3, EOS]], {}, [[1, 2]])


def test_no_tokenizer_to_compare_means_equal_vocabularies(tiny, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"vocabulary of 20, the policy of 16.* give the reward"):
        scored(tiny, reward_model(vocab=20), words())
    with pytest.raises(ValueError, match="vocabulary of 20, the policy of 16"):
        scored(tiny, reward_model(vocab=20))
    reward_model().save_pretrained(tmp_path / "rm")
    logging.getLogger("klq").setLevel(logging.WARNING)
    scores = scored(tiny, str(tmp_path / "rm"), words(), texts=["never read"] * 5)
    assert "rm: no tokenizer files; it must share the policy's tokenizer" in caplog.text
    assert scores == scored(tiny, reward_model())


def test_models_that_are_no_reward_models(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"has num_labels 2: .* with num_labels=1"):
        Rewards([len, reward_model(labels=2)])
    reward_model(labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="reward model three has num_labels 3"):
        Rewards(str(tmp_path / "three"))
    lm = tiny()
    lm.config.num_labels = 1
    lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"reward model lm lacks the weights score\.weight"):
        Rewards([str(tmp_path / "lm")])
    with pytest.raises(RewardError, match=r"it gave logits \(3, 7, 16\) for 3 completions"):
        scored(tiny, lm)
    with pytest.raises(ValueError, match="reward model '/no/such/dir' cannot be loaded"):
        Rewards("/no/such/dir")


def test_rows_the_model_cannot_hold(tiny):
    with pytest.raises(RewardError, match="33 tokens do not fit its 32 positions; lower max_prom"):
        scored(tiny, reward_model(), prompts=[[1] * 27] * 5)
    with pytest.raises(RewardError, match="token 16 is beyond its vocabulary of 16"):
        scored(tiny, reward_model(), prompts=[[16]] * 5)
