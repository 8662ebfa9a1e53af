# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at the most, in pytest-benchmark's own results too."""

import torch

from benchmarks import jobs


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["ceilings"] = jobs.ceilings("cuda" if torch.cuda.is_available() else "cpu")
