# SPDX-License-Identifier: Apache-2.0
"""Accelerate, set up so that nothing but the configuration decides what a run computes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from klq.config import KLQConfig


def make_accelerator(args: KLQConfig) -> Accelerator:
    """The processes, devices and trackers of a run.

    Raises ValueError if a tracker of `report_to` is not installed or unknown.
    """
    trackers = set(map(str, get_available_trackers()))
    for name in args.report_to:
        if name not in trackers:
            raise ValueError(f"report_to={name!r} is not installed or unknown to Accelerate")
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "no",
        cpu=args.use_cpu,
        log_with=args.report_to or None,
        project_dir=args.output_dir,
    )
    # `accelerate launch` sets this by environment, and `backward` divides by it. Our losses are
    # already divided by the tokens of the whole optimiser step.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def start_trackers(accelerator: Accelerator, args: KLQConfig) -> None:
    """Begin a run in every tracker of `report_to`, with the configuration as its parameters.

    Trackers take numbers, booleans and text (tensorboard refuses anything else): lists, mappings
    and None go as text.
    """
    settings = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in asdict(args).items()
    }
    accelerator.init_trackers(args.run_name or Path(args.output_dir).name, settings)
