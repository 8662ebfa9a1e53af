# SPDX-License-Identifier: Apache-2.0
"""The command line: one clear line for every mistake, flags over file over preset."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from klq.cli import main
from klq.logging import CONFIG, read_jsonl

SMALL = ["--num_updates", "2", "--per_device_train_batch_size", "8", "--disable_tqdm", "--use_cpu"]


def error_of(capsys, *argv):
    """The exit code and the one line on stderr."""
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    lines = [s for s in capsys.readouterr().err.splitlines() if s and "value head" not in s]
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lamda", "0.5"], "unknown argument --lamda, did you mean --lam?"),
        (["--preset", "exakt"], "invalid choice: 'exakt'"),
        (["--preset", "exact", "--lam", "high"], "--lam: invalid float value: 'high'"),
        (["--preset", "exact", "--lam", "1.5"], "lam must be between 0 and 1, got 1.5"),
        (["--preset", "exact", "--tau", "1", "--beta", "1"], "tau and beta are names of one"),
        (["--preset", "exact", "--max_completion_length", "5"], "max_completion_length of the"),
        (["--preset", "exact", "--report_to", "nosuch"], "report_to='nosuch' is not installed"),
        (["--preset", "exact", "--value_model", "tail"], "value_model must be 'head', 'separate'"),
        (["--preset", "exact", "--model", "x"], "--model and --preset exclude each other"),
        (["--model", "x"], "give --preset (docsum, exact), or all of --model"),
        (["--preset", "exact", "--config", "/no/such.yaml"], "No such file"),
        (["--preset", "exact", "--truncation", "bootstrap"], "truncation of the preset exact"),
        (["--preset"], "argument --preset: expected one argument"),
        (["--preset", "exact", "--seed", str(2**32)], "seed must be below 2**31"),
        (["--preset", "exact", "--eval_dataset", "x"], "has no setting eval_dataset"),
    ],
)
def test_mistake_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, line = error_of(capsys, "train", *argv)
    assert code == 2 and message in line
    assert not list(tmp_path.iterdir()), "nothing may be written before the settings are right"


REWARDS = """
def short(prompts, completions, completion_ids, answer, **columns):
    assert isinstance(completions[0], str) and answer[0] in ("yes", "no") and not columns
    return [-len(ids) / 10 for ids in completion_ids]

def broken(completions):
    return completions[0] + 1
"""


@pytest.fixture
def own(tmp_path, tiny):
    """Flags of an experiment of one's own: a saved model with tokenizer, JSON lines, a file."""
    words = {f"w{i}": i for i in range(14)} | {"[PAD]": 14, "[EOS]": 15}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="w0"
    )
    fast.save_pretrained(tmp_path / "model")
    tiny().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "w1 w2", "answer": "yes"}, {"prompt": "w3", "answer": "no"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    flags = {
        "model": "model",
        "dataset": "data.jsonl",
        "reward": "my_rewards.py",
        "output_dir": "r",
    }
    return {name: str(tmp_path / value) for name, value in flags.items()}


def argv(flags, reward):
    flags = {**flags, "reward": f"{flags['reward']}:{reward}"}
    return ["train", *[f"--{k}={v}" for k, v in flags.items()], *SMALL, "--max_completion_length=6"]


def test_own_model_data_and_reward_without_a_line_of_code(own):
    assert main(argv(own, "short")) == 0
    out = Path(own["output_dir"])
    assert len(read_jsonl(out / "metrics.jsonl")) == 2
    sample = read_jsonl(out / "samples.jsonl")[0]
    assert sample["prompt"] in ("w1 w2", "w3") and set(sample["completion"].split()) <= {
        f"w{i}" for i in range(14)
    }
    assert (out / "checkpoint-000002" / "tokenizer.json").exists()


def test_reward_that_raises_is_one_line_and_code_1(capsys, own, tmp_path):
    code, line = error_of(capsys, *argv(own, "broken"))
    assert code == 1 and "reward function broken raised TypeError" in line
    code, line = error_of(capsys, *argv(own, "missing"))
    assert code == 2 and "has no function 'missing'" in line
    (tmp_path / "math.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Scale:\n    x: float = 1.0\n"
    )
    for where, message in (
        ("nofile.py:f", "no file nofile.py"),
        ("f", "is not module:function"),
        (f"{tmp_path / 'math.py'}:g", "math.py has no function 'g'"),
    ):
        code, line = error_of(capsys, *argv(own, "short"), "--reward", where)
        assert code == 2 and message in line


def test_yaml_file_holds_the_same_names(capsys, tmp_path, monkeypatch):
    file, out = tmp_path / "c.yaml", tmp_path / "run"
    file.write_text(
        f"preset: exact\noutput_dir: {out}\nlearning_rate: 1e-4\nbeta: 0.2\nlam: 0.5\n"
        "num_updates: 9\ndisable_tqdm: true\n"
    )
    assert main(["train", "--config", str(file), *SMALL]) == 0
    config = json.loads((out / CONFIG).read_text())
    assert (config["learning_rate"], config["tau"], config["lam"]) == (1e-4, 0.2, 0.5)
    assert config["num_updates"] == 2 and len(read_jsonl(out / "metrics.jsonl")) == 2
    monkeypatch.chdir(tmp_path)  # where no demo has left runs/exact
    for text, message in [
        ("preset: exact\nlamda: 1\n", "'exact' has no setting lamda"),
        ("- a\n", "must hold settings"),
        ("a: [1\n", "is not YAML"),
        ("preset: exact\nlam: high\n", "lam must be a number, got 'high'"),
        ("preset: exact\nreward_weights: [a]\n", "reward_weights must be a number"),
        ("preset: exact\nreport_to: [1]\n", "report_to must be a list of str, got 1 in it"),
    ]:
        file.write_text(text)
        code, line = error_of(capsys, "train", "--config", str(file))
        assert code == 2 and message in line


def test_preset_of_the_file_brings_its_options_and_lists_are_numbers(capsys, tmp_path):
    file, out = tmp_path / "c.yaml", tmp_path / "run"
    file.write_text(f"preset: docsum\noutput_dir: {out}\n")
    code, line = error_of(capsys, "train", "--config", str(file), "--size", "huge")
    assert code == 2 and "size of the preset docsum must be" in line
    file.write_text(f'preset: exact\noutput_dir: {out}\nreward_weights: ["1e-1"]\n')
    assert main(["train", "--config", str(file), *SMALL, "--report_to", "none"]) == 0
    config = json.loads((out / CONFIG).read_text())
    assert config["reward_weights"] == [0.1] and config["report_to"] == []


def test_run_that_cannot_be_resumed_is_one_line_and_code_1(capsys, tmp_path):
    flags = ["train", "--preset", "exact", "--output_dir", str(tmp_path / "run"), *SMALL]
    assert main(flags) == 0
    capsys.readouterr()
    for change in (["--seed", "1"], ["--value_model", "separate"]):
        code, line = error_of(capsys, *flags, "--resume", *change)
        assert code == 1 and ("keeps its settings" in line or "resume with the value" in line)


def test_model_that_does_not_exist_is_one_line(capsys, own):
    flags = {**own, "model": own["model"] + "-no"}
    code, line = error_of(capsys, *argv(flags, "short"))
    assert code == 2 and "model-no" in line


def test_evaluation_on_a_file(capsys, own, tmp_path):
    flags = argv({**own, "eval_dataset": own["dataset"]}, "short")
    assert main([*flags, "--eval_every", "2"]) == 0
    last = read_jsonl(Path(own["output_dir"]) / "metrics.jsonl")[-1]
    assert "eval/scores" in last
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1"}\n{"prom')
    capsys.readouterr()
    code, line = error_of(capsys, *argv({**own, "output_dir": "x"}, "short"))
    assert code == 2 and "data.jsonl, line 2 is not JSON" in line


def test_held_directory_is_refused_before_anything_is_built(capsys, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    assert main(["train", "--preset", "exact", "--output_dir", out, *SMALL]) == 0
    capsys.readouterr()

    def built(*_, **__):
        raise AssertionError("the preset was built first")

    monkeypatch.setattr("klq.cli.load_preset", built)
    code, line = error_of(capsys, "train", "--preset", "exact", "--output_dir", out)
    assert code == 2 and "already holds a run" in line


def test_plot_draws_runs_together(capsys, tmp_path):
    runs = [str(tmp_path / name) for name in "ab"]
    for run, algorithm in zip(runs, ("klq", "ppo"), strict=True):
        flags = ["--output_dir", run, "--algorithm", algorithm, "--run_name", algorithm]
        assert main(["train", "--preset", "exact", *flags, *SMALL]) == 0
    figure = tmp_path / "both.png"
    assert main(["plot", *runs, "-o", str(figure)]) == 0
    assert figure.stat().st_size > 10_000
    capsys.readouterr()
    code, line = error_of(capsys, "plot", str(tmp_path))
    assert code == 2 and "holds no metrics" in line


def test_info_names_versions_and_backends(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "transformers" in text and "backends      reference: True" in text


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from klq.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--value_trunk_grad_scale" in done.stdout
