# SPDX-License-Identifier: Apache-2.0
"""Named, complete experiments: everything `klq train --preset NAME` needs besides flags.

A preset is one module of this package with a function

    load(overrides: dict, *, option=default, ...) -> Preset

`overrides` holds the `KLQConfig` fields the caller set (they win over the preset's own values:
build the config with `klq.config.merged`); the keyword-only parameters are the preset's own
options, and become flags of the command line. Adding a preset is adding a file and its name below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from klq.config import KLQConfig, config_names

if TYPE_CHECKING:
    from klq.trainer import KLQTrainer

PRESETS = ("docsum", "exact")


@dataclass
class Preset:
    """What a run is made of.

    args: the configuration, the caller's overrides applied.
    trainer_kwargs: the other arguments of `KLQTrainer` (model, processing_class, reward_funcs,
        train_dataset, eval_dataset, value_model, ref_model, ...).
    before: called with the trainer before training (e.g. to print samples of the start).
    report: called with the trainer after training; prints the preset's own table of truth and
        returns it as a dict that JSON can hold, which is written to `report.json`.
    """

    args: KLQConfig
    trainer_kwargs: dict[str, Any]
    before: Callable[[KLQTrainer], None] | None = None
    report: Callable[[KLQTrainer], dict] | None = None


def _loader(name: str) -> Callable[..., Preset]:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return import_module(f"{__name__}.{name}").load


def preset_options(name: str) -> dict[str, Any]:
    """The preset's own options and their defaults: the keyword-only parameters of its `load`."""
    parameters = inspect.signature(_loader(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_names(name: str, overrides: Iterable[str]) -> dict[str, Any]:
    """The preset's own options; ValueError where neither it nor `KLQConfig` knows an override."""
    options = preset_options(name)
    unknown = sorted(set(overrides) - set(options) - config_names())
    if unknown:
        own = f"; its own options are {', '.join(options)}" if options else ""
        raise ValueError(f"preset {name!r} has no setting {', '.join(unknown)}{own}")
    return options


def load_preset(name: str, **overrides: Any) -> Preset:
    """Build the preset `name`.

    overrides: fields of `KLQConfig` (or the aliases of tau), and options of the preset itself,
        e.g. `load_preset("docsum", size="cpu", tau=0.1)`. `output_dir` defaults to runs/<name>.
    Raises ValueError for an unknown preset, an unknown override or an impossible value.
    """
    options = check_names(name, overrides)
    own = {key: value for key, value in overrides.items() if key in options}
    config = {key: value for key, value in overrides.items() if key not in options}
    config.setdefault("output_dir", f"runs/{name}")
    return _loader(name)(config, **own)
