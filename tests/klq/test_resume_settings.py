# SPDX-License-Identifier: Apache-2.0
"""What a run may be resumed with: settings that define it stay, the others are applied."""

import pytest

from klq.logging import METRICS, read_jsonl


@pytest.mark.parametrize(
    "changed",
    [{"tau": 0.2}, {"algorithm": "ppo"}, {"seed": 1}, {"lam": 0.5}, {"num_mini_batches": 2},
     {"per_device_train_batch_size": 2}, {"max_completion_length": 5}, {"temperature": 0.5}],
)  # fmt: skip
def test_resume_with_settings_that_define_the_run_is_refused(make_trainer, tmp_path, changed):
    make_trainer(num_updates=1).train()
    config = (tmp_path / "run" / "config.json").read_text()
    (name, value), trainer = next(iter(changed.items())), make_trainer(num_updates=2, **changed)
    with pytest.raises(ValueError, match=f"keeps its settings, but {name} .*-> {value!r}"):
        trainer.train(resume=True)
    assert (tmp_path / "run" / "config.json").read_text() == config


def test_resume_applies_the_settings_that_may_change(make_trainer, tmp_path):
    make_trainer(num_updates=2).train()
    new = {"learning_rate": 2e-3, "value_learning_rate": 5e-3, "weight_decay": 0.1,
           "adam_epsilon": 1e-6, "eval_every": 0, "save_every": 1, "num_samples": 2}  # fmt: skip
    trainer = make_trainer(num_updates=4, **new)
    trainer.train(resume=True)
    groups = trainer.optimizer.param_groups
    assert [g["lr"] for g in groups] == [g["initial_lr"] for g in groups] == [5e-3, 2e-3]
    assert all((g["eps"], g["weight_decay"]) == (1e-6, 0.1) for g in groups)
    assert [row["lr"] for row in read_jsonl(tmp_path / "run" / METRICS)] == [1e-3, 1e-3, 2e-3, 2e-3]


@pytest.mark.parametrize("kinds", [("head", "separate"), ("separate", "head")])
def test_resume_with_the_value_function_elsewhere_is_refused(make_trainer, kinds):
    first, second = ({"value_model": kind} for kind in kinds)
    make_trainer(num_updates=1, trainer_kwargs=first).train()
    with pytest.raises(ValueError, match="resume with the value_model the run began with"):
        make_trainer(num_updates=2, trainer_kwargs=second).train(resume=True)
