# SPDX-License-Identifier: Apache-2.0
"""What the loop promises around its updates: evaluation, metrics, text in and out, bad numbers."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from klq import KLQConfig, KLQTrainer
from klq.logging import METRICS, SAMPLES, RunLog, read_jsonl
from klq.rewards import Rewards

ALWAYS = {
    "update", "episode", "lr", "objective/kl", "objective/scores", "objective/rlhf_reward",
    "objective/entropy", "klq/residual_rms", "klq/q_explained_variance", "klq/grad_norm_policy",
    "klq/grad_norm_value", "grad_norm", "completions/mean_length", "completions/truncated",
    "rewards/token_sum", "tokens/s", "time/rollout", "time/rewards", "time/measure", "time/update",
}  # fmt: skip


def test_metrics_have_the_names_users_know(make_trainer, tmp_path):
    make_trainer(sample_every=2, num_samples=3).train()
    rows = read_jsonl(tmp_path / "run" / METRICS)
    assert [set(row) for row in rows] == [ALWAYS] * 3
    assert [row["episode"] for row in rows] == [4, 8, 12]
    row = rows[-1]
    parts = row["objective/scores"] - 0.05 * row["objective/kl"]
    assert row["objective/rlhf_reward"] == pytest.approx(parts)
    samples = read_jsonl(tmp_path / "run" / SAMPLES)
    assert [s["update"] for s in samples] == [1] * 3 + [3] * 3
    assert set(samples[0]) == {"update", "prompt", "completion", "score", "finish_reason"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tau"] == 0.05


def test_metrics_are_those_of_literal_sums(make_trainer, script):
    """Uneven lengths: averages are over tokens and responses that exist, never over padding."""
    trainer = make_trainer(engine=script([[5], [1, 2, 3, 4, 5, 15], [15], [7, 8, 15]]))
    with torch.no_grad():
        trainer.unwrapped.lm.get_output_embeddings().weight.mul_(1.3)
    batch, metrics = trainer.step()
    rho, entropy = [], []
    for row, ids in enumerate(batch.rollout.response_ids):
        start = batch.prompt_lengths[row]
        tokens = batch.tokens[row : row + 1, : start + len(ids)]
        with torch.no_grad():
            hidden = trainer.reference.lm.base_model(tokens).last_hidden_state[0, start - 1 : -1]
            reference = trainer.reference.lm.get_output_embeddings()(hidden)
        policy, reference = (1.3 * reference).log_softmax(-1), reference.log_softmax(-1)
        index = torch.tensor(ids)[:, None]
        rho.append(float((policy - reference).gather(1, index).sum()))
        entropy += (-(policy.exp() * policy).sum(-1)).tolist()
    assert metrics["objective/kl"] == pytest.approx(sum(rho) / 4, rel=1e-4)
    assert metrics["objective/entropy"] == pytest.approx(sum(entropy) / 11, rel=1e-4)
    assert metrics["completions/mean_length"] == 11 / 4
    a, on = batch.stored["advantages"][batch.mask], batch.mask
    target = (0.05 * 0 + batch.stored["old_values"])[on] + a
    assert batch.stored["advantages"][~on].abs().sum() == 0 and target.shape == (11,)


def test_first_residual_is_alpha_times_the_advantage(make_trainer, script):
    trainer = make_trainer(engine=script([[5, 15]] * 4), update_epochs=1, alpha=0.5)
    batch, metrics = trainer.step()
    rms = 0.5 * batch.stored["advantages"][batch.mask].pow(2).mean().sqrt()
    assert metrics["klq/residual_rms"] == pytest.approx(float(rms), rel=1e-5)


def test_evaluation_does_not_disturb_training(make_trainer, tmp_path):
    held_out = {"eval_dataset": [{"prompt": [i, 2]} for i in range(6)]}
    plain = make_trainer(output_dir=str(tmp_path / "a"))
    plain.train()
    watched = make_trainer(output_dir=str(tmp_path / "b"), eval_every=2, trainer_kwargs=held_out)
    watched.train()
    rows = read_jsonl(tmp_path / "b" / METRICS)
    assert ["eval/scores" in row for row in rows] == [False, True, False]
    assert rows[1]["eval/completions/mean_length"] > 0
    pairs = zip(plain.unwrapped.parameters(), watched.unwrapped.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    states = random.getstate(), np.random.get_state()[2]
    watched.rewards = Rewards(lambda completions: [random.random() + np.random.rand()] * 4)
    watched.eval_prompts.dataset = watched.eval_prompts.dataset[:4]
    assert watched.evaluate() == watched.evaluate()
    assert states == (random.getstate(), np.random.get_state()[2])
    with pytest.raises(ValueError, match="eval_every needs an eval_dataset"):
        make_trainer(eval_every=1)


def test_numbers_that_are_not_finite_stop_the_run_before_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(save_every=1)
    learn = trainer.learn

    def explode(batch):
        if trainer.update == 1:
            batch.stored["advantages"] *= float("inf")
        return learn(batch)

    trainer.learn = explode
    with pytest.raises(FloatingPointError, match=r"update 2: .* not finite"):
        trainer.train()
    assert not (tmp_path / "run" / "checkpoint-000002").exists()
    make_trainer(save_every=1).train(resume=True)


def test_messages_become_messages_for_the_reward(make_trainer, tiny, tmp_path):
    words = {f"w{i}": i for i in range(14)} | {"[PAD]": 14, "[EOS]": 15}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="w0"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )

    def reward(prompts, completions, completion_ids, level, **columns):
        assert prompts[0] == [{"role": "user", "content": "w1 w2"}] and level == [3] * 4
        assert [m["role"] for m in completions[0]] == ["assistant"] and not columns
        assert "[EOS]" not in completions[0][0]["content"]
        return [float(len(ids)) for ids in completion_ids]

    rows = [{"prompt": [{"role": "user", "content": "w1 w2"}], "level": 3}]
    args = KLQConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_completion_length=5,
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = KLQTrainer(tiny(), [reward], args, rows, processing_class=tokenizer)
    batch, _ = trainer.step()
    assert batch.tokens[0, :3].tolist() == [1, 2, 9] and batch.prompt_lengths == [3] * 4
    trainer.save()
    assert (tmp_path / "checkpoint-000001" / "tokenizer_config.json").exists()


def plain_lines(err):
    """Updates of the plain progress lines; every line must be whole, and there is no bar."""
    assert "it/s, " not in err and "update/s" not in err and "?update" not in err
    lines = [line for line in err.splitlines() if line.startswith("update ")]
    number = r"-?\d\S*"
    whole = rf"update (\d+)/\d+: reward={number} kl={number} residual={number}, {number} s/update"
    return [int(re.fullmatch(whole, line).group(1)) for line in lines]


def test_sample_table_and_plain_lines_where_there_is_no_terminal(make_trainer, capsys):
    make_trainer(disable_tqdm=False, sample_every=1).train()
    out, err = capsys.readouterr()
    assert "samples at update 3: score | prompt | completion" in out + err
    assert plain_lines(err) == [1, 2, 3]


def test_plain_lines_are_few_and_those_of_the_run_resumed(make_trainer, capsys):
    make_trainer(disable_tqdm=False, num_updates=25, save_every=10, update_epochs=1).train()
    assert plain_lines(capsys.readouterr().err) == [1, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    make_trainer(disable_tqdm=False, num_updates=45, update_epochs=1).train(resume=True)
    assert plain_lines(capsys.readouterr().err) == [26, 30, 35, 40, 45]


def test_plain_line_tells_the_time_since_the_line_before(make_trainer, capsys, monkeypatch):
    clock = itertools.count(0, 8)  # seconds: 8 pass from one reading to the next
    args = make_trainer(disable_tqdm=False, num_updates=40).args
    Path(args.output_dir).mkdir()
    with monkeypatch.context() as patched, RunLog(args, 0, main=True) as run_log:
        run_log.told = 0, 0.0
        patched.setattr("klq.logging.time.perf_counter", lambda: float(next(clock)))
        next(clock)
        for update in range(1, 9):
            run_log.metrics({"update": update, "objective/scores": 0.25, "objective/kl": -1e-9})
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "update 1/40: reward=0.25 kl=-1e-09, 8 s/update"
    assert second.startswith("update 4/40: ") and second.endswith(", 2.67 s/update")
    assert third.startswith("update 8/40: ") and third.endswith(", 2 s/update")


@pytest.mark.parametrize("quiet", [False, True])
def test_terminal_gets_the_bar_and_no_plain_line(make_trainer, capsys, monkeypatch, quiet):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make_trainer(disable_tqdm=quiet).train()
    err = capsys.readouterr().err
    assert ("3/3" in err and "residual=" in err and "\r" in err) == (not quiet)
    assert "update 1/3" not in err


def test_command_line_into_a_file_is_plain(tmp_path):
    flags = ["--preset", "exact", "--output_dir", str(tmp_path / "run"), "--num_updates", "20",
             "--per_device_train_batch_size", "8", "--sample_every", "0", "--use_cpu"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "klq.cli", "train", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert plain_lines(done.stderr) == [1, *range(2, 21, 2)] and "\r" not in done.stderr
