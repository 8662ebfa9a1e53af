# SPDX-License-Identifier: Apache-2.0
"""Case 78 across processes: two ranks of 4 responses, uneven and empty, are one batch of 8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
from tests.klq.conftest import Script, tiny_model, token_sum
from tests.klq.test_gradient import CONFIG, PROMPTS, RESPONSES, gradient, moved
from klq import KLQConfig, KLQTrainer
out, algorithm = sys.argv[1:]
args = KLQConfig(output_dir=out, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                 algorithm=algorithm, use_cpu=True, disable_tqdm=True, max_completion_length=6,
                 **CONFIG)
trainer = KLQTrainer(tiny_model(), token_sum, args, [{"prompt": [1]}])
rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
mine = slice(8 // world * rank, 8 // world * (rank + 1))
trainer.rollout_engine = Script(RESPONSES[mine])
grads = gradient(moved(trainer), PROMPTS[mine])
if rank == 0:
    torch.save(grads, f"{out}/{world}.pt")
trainer.accelerator.wait_for_everyone()
"""


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_case_78_two_ranks_give_the_gradient_of_one(tmp_path, algorithm):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [str(tmp_path / "script.py"), str(tmp_path), algorithm]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for how in (launcher, []):
        done = subprocess.run(
            [sys.executable, *how, *command], capture_output=True, text=True, timeout=120, env=env
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3
    for name, g in one.items():
        torch.testing.assert_close(two[name], g, rtol=1e-4, atol=1e-7, msg=name)
