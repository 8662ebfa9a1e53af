# SPDX-License-Identifier: Apache-2.0
"""Leaving a run and taking it up again: cases 80 (killed), 83 (disk), 84 (Ctrl-C)."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import klq.checkpoint
import klq.trainer
from klq.checkpoint import checkpoints
from klq.cli import main
from klq.logging import METRICS, SAMPLES, cut_jsonl, read_jsonl

CLOCKS = ("time/", "tokens/s")


class Crash(BaseException):
    """Stands for a death of the process that nothing can handle."""


def curves(run):
    """The metrics of a run without what a clock measured."""
    rows = read_jsonl(Path(run) / METRICS)
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def same_parameters(a, b):
    pairs = zip(a.unwrapped.parameters(), b.unwrapped.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def dies_at(trainer, name, count, error=Crash):
    """The method raises at its count-th call, before doing anything."""
    method, calls = getattr(trainer, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            raise error
        return method(*args, **kwargs)

    setattr(trainer, name, wrapped)


CONFIGS = {
    "klq": {"lr_scheduler_type": "linear", "value_learning_rate": 1e-2},
    "ppo": {"algorithm": "ppo", "num_mini_batches": 2},
}


@pytest.mark.parametrize("value_model", ["head", "separate"])
@pytest.mark.parametrize("config", CONFIGS)
def test_case_80_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_trainer, tmp_path, config, value_model
):
    def make(name):
        return make_trainer(
            output_dir=str(tmp_path / name),
            num_updates=5,
            save_every=2,
            sample_every=1,
            trainer_kwargs={"value_model": value_model},
            **CONFIGS[config],
        )

    whole = make("whole")
    whole.train()
    broken = make("parts")
    dies_at(broken, "learn", 4)  # after the metrics of update 3, which no checkpoint covers
    with pytest.raises(Crash):
        broken.train()
    assert [row["update"] for row in curves(tmp_path / "parts")] == [1, 2, 3]
    torch.manual_seed(99)  # nothing of this process may matter
    resumed = make("parts")
    resumed.train(resume=True)
    assert same_parameters(whole, resumed)
    assert curves(tmp_path / "whole") == curves(tmp_path / "parts")
    samples = [(tmp_path / name / SAMPLES).read_text() for name in ("whole", "parts")]
    assert samples[0] == samples[1]


def test_case_80_death_in_the_checkpoint_leaves_the_one_before(make_trainer, tmp_path, monkeypatch):
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_updates=4)
    whole.train()
    config = {"output_dir": str(tmp_path / "parts"), "num_updates": 4, "save_every": 1}
    write, calls = klq.checkpoint.save_value, []

    def torn(model, directory):
        calls.append(directory)
        if len(calls) == 3:
            raise Crash
        write(model, directory)

    monkeypatch.setattr(klq.checkpoint, "save_value", torn)
    with pytest.raises(Crash):
        make_trainer(**config).train()
    assert [p.name for p in checkpoints(config["output_dir"])] == [
        "checkpoint-000001",
        "checkpoint-000002",
    ]
    assert list(Path(config["output_dir"]).glob(".tmp-checkpoint-000003"))
    resumed = make_trainer(**config)
    resumed.train(resume=True)
    assert same_parameters(whole, resumed)
    assert curves(tmp_path / "whole") == curves(tmp_path / "parts")
    assert not list(Path(config["output_dir"]).glob(".tmp-*"))


def test_case_80_death_before_the_first_checkpoint_begins_again(make_trainer, tmp_path, capsys):
    whole = make_trainer(output_dir=str(tmp_path / "whole"))
    whole.train()
    broken = make_trainer(output_dir=str(tmp_path / "parts"))
    dies_at(broken, "sample", 3)
    with pytest.raises(Crash):
        broken.train()
    resumed = make_trainer(output_dir=str(tmp_path / "parts"))
    resumed.train(resume=True)
    assert "beginning at update 0" in capsys.readouterr().out
    assert same_parameters(whole, resumed)
    assert curves(tmp_path / "whole") == curves(tmp_path / "parts")


KILLED = """
import os, signal, sys
import klq.checkpoint, klq.trainer
where, run, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
calls = 0
def kill_at(module, name, count):
    inner = getattr(module, name)
    def outer(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    setattr(module, name, outer)
if where == "rollout":
    kill_at(klq.trainer.HFRollout, "generate", 4)
else:
    kill_at(klq.checkpoint, "save_value", 2)
from klq.cli import main
main(rest)
"""


@pytest.mark.parametrize("where", ["rollout", "checkpoint"])
def test_case_80_sigkill_and_resume_from_the_command_line(tmp_path, where):
    def flags(run):
        return ["train", "--preset", "exact", "--output_dir", str(run), "--num_updates", "5",
                "--per_device_train_batch_size", "32", "--save_every", "2", "--disable_tqdm",
                "--use_cpu"]  # fmt: skip

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(flags(whole)) == 0
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(parts), *flags(parts)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads as here
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [p.name for p in checkpoints(parts)] == ["checkpoint-000002"]
    assert main([*flags(parts), "--resume"]) == 0
    assert curves(whole) == curves(parts)
    reports = [(run / "report.json").read_text() for run in (whole, parts)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("where", ["rollout", "update", "checkpoint"])
def test_case_84_interrupt_leaves_one_clean_checkpoint_and_code_130(tmp_path, monkeypatch, where):
    """The signal arrives during update 2; the run stops at its end and resumes exactly."""
    owner, name, call = {
        "rollout": (klq.trainer.HFRollout, "generate", 2),
        "update": (klq.trainer.KLQTrainer, "learn", 2),
        "checkpoint": (klq.checkpoint, "save_value", 1),
    }[where]
    inner, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*args, **kwargs)

    run = tmp_path / "run"
    flags = ["train", "--preset", "exact", "--num_updates", "4", "--disable_tqdm", "--use_cpu",
             "--per_device_train_batch_size", "16", "--save_every", "2"]  # fmt: skip
    monkeypatch.setattr(owner, name, interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert main([*flags, "--output_dir", str(run)]) == 130
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in checkpoints(run)] == ["checkpoint-000002"]
    assert not list(run.glob(".tmp-*"))
    assert [row["update"] for row in curves(run)] == [1, 2]
    assert main([*flags, "--output_dir", str(run), "--resume"]) == 0
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    assert curves(run) == curves(tmp_path / "whole")


def test_case_84_second_interrupt_stops_at_once(make_trainer, capfd):
    def impatient(completion_ids):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return [0.0] * len(completion_ids)

    trainer = make_trainer(rewards=impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.update == 0 and not checkpoints(trainer.args.output_dir)
    assert capfd.readouterr().err.count("stopping after this update") == 1


def test_case_83_directory_that_holds_a_run_is_refused(make_trainer, tmp_path):
    run = tmp_path / "run"
    make_trainer(num_updates=2).train()
    (run / "mine.txt").write_text("not the run's")
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume.*--overwrite"):
        make_trainer(num_updates=1).train()
    assert len(curves(run)) == 2
    with pytest.raises(ValueError, match="resume and overwrite are opposites"):
        make_trainer(overwrite=True).train(resume=True)
    make_trainer(num_updates=1, overwrite=True).train()
    assert len(curves(run)) == 1
    assert [p.name for p in checkpoints(run)] == ["checkpoint-000001"]
    assert (run / "mine.txt").exists()


def test_case_83_output_directory_that_cannot_be_written(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir cannot be written"):
        make_trainer(output_dir=str(tmp_path / "file" / "run")).train()


class FullDisk:
    """A file on a disk that is full from some line on."""

    def __init__(self, file, lines):
        self.file, self.lines = file, lines

    def write(self, text):
        if self.lines == 0:
            self.file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lines -= 1
        self.file.write(text)

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


def test_case_83_disk_full_while_logging(make_trainer, tmp_path, monkeypatch):
    make_trainer(output_dir=str(tmp_path / "whole")).train()
    config = {"output_dir": str(tmp_path / "parts"), "save_every": 1}
    opened = klq.logging.RunLog.__init__

    def full(self, *args, **kwargs):
        opened(self, *args, **kwargs)
        self.files[METRICS] = FullDisk(self.files[METRICS], lines=2)

    monkeypatch.setattr(klq.logging.RunLog, "__init__", full)
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        make_trainer(**config).train()
    monkeypatch.undo()
    make_trainer(**config).train(resume=True)
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")


def test_case_83_disk_full_in_the_checkpoint(make_trainer, tmp_path, monkeypatch):
    make_trainer(save_every=1, num_updates=1).train()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(klq.checkpoint, "save_value", full)
    with pytest.raises(OSError, match=r"could not be written .*earlier ones are whole"):
        make_trainer(num_updates=2).train(resume=True)
    run = tmp_path / "run"
    assert [p.name for p in checkpoints(run)] == ["checkpoint-000001"]
    assert not list(run.glob(".tmp-*"))


FULL = """
import logging, resource, signal, sys
from pathlib import Path
logging.getLogger("klq").setLevel(logging.ERROR)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from klq import KLQConfig, KLQTrainer
from tests.klq.conftest import tiny_model, token_sum
trainer = KLQTrainer(
    tiny_model(hidden=64), token_sum,
    KLQConfig(output_dir=sys.argv[1], num_updates=2, save_every=1, use_cpu=True, disable_tqdm=True,
              max_completion_length=4, per_device_train_batch_size=2, sample_every=0),
    [{"prompt": [1, 2]}],
)
save = trainer.save
def limited():
    if trainer.update == 2:
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return save()
trainer.save = limited
try:
    trainer.train()
except OSError as error:
    print(f"{error.errno}|{error}")
"""


@pytest.mark.parametrize("largest", ["rng", "model", "optimizer"])
def test_case_83_disk_really_full_in_the_checkpoint(tmp_path, largest):
    """The limit lies below one file after the other: torch and safetensors fail in their ways."""
    limits = {"rng": 2_000, "model": 20_000, "optimizer": 200_000}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(limits[largest])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint could not be written" in done.stdout, done.stdout
    assert str(tmp_path / "checkpoint-000002") in done.stdout
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000001"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_generation_config_that_cannot_be_saved_is_refused_at_once(make_trainer, tiny):
    lm = tiny()
    lm.generation_config.top_p = 0.5  # without do_sample
    with pytest.raises(ValueError, match=r"generation_config cannot be saved.*top_p"):
        make_trainer(model=lm)


def test_old_checkpoints_go_and_the_newest_by_number_is_taken(make_trainer, tmp_path):
    trainer = make_trainer(num_updates=4, save_every=1, save_total_limit=2)
    trainer.train()
    names = ["checkpoint-000003", "checkpoint-000004"]
    assert [p.name for p in checkpoints(tmp_path / "run")] == names
    (tmp_path / "run" / "checkpoint-1000000").mkdir()
    (tmp_path / "run" / "checkpoint-best").mkdir()
    assert [p.name for p in checkpoints(tmp_path / "run")][-1] == "checkpoint-1000000"


def test_resume_against_another_reference_is_refused(make_trainer, tiny):
    make_trainer(num_updates=1).train()
    with pytest.raises(ValueError, match="another reference policy"):
        make_trainer(model=tiny(seed=5), num_updates=2).train(resume=True)


def test_resume_of_a_finished_run_changes_nothing(make_trainer, tmp_path):
    make_trainer().train()
    before = (tmp_path / "run" / METRICS).read_text()
    make_trainer().train(resume=True)
    assert (tmp_path / "run" / METRICS).read_text() == before


def test_torn_line_is_cut(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"update": 1}\n{"update": 2}\n{"upd')
    assert read_jsonl(path) == [{"update": 1}, {"update": 2}]
    cut_jsonl(path, 1)
    assert path.read_text() == '{"update": 1}\n'
