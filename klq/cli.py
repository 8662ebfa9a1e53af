# SPDX-License-Identifier: Apache-2.0
"""The command line: `klq {train, plot, bench, info}`.

The flags of `klq train` are the fields of `KLQConfig`, the options of the chosen preset, and a few
of its own. A YAML file holds the same names; flags win over the file, the file over the preset.
A mistake is one line on stderr and exit code 2; a run that has to stop, one line and code 1;
Ctrl-C leaves a checkpoint and code 130.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from klq.config import TAU_NAMES, KLQConfig, field_type, merged
from klq.presets import PRESETS, Preset, check_names, load_preset, preset_options

OWN = ("model", "dataset", "reward")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _Parser(prog="klq", description="KL-regularised Q-Learning for language models")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train = commands.add_parser("train", help="train a model", allow_abbrev=False)
    plot = commands.add_parser("plot", help="draw the curves of runs", allow_abbrev=False)
    plot.add_argument("runs", nargs="+", help="output directories of runs")
    plot.add_argument("-o", "--out", default="curves.png", help="image to write")
    commands.add_parser("bench", help="measure the kernels: klq bench --help", add_help=False)
    commands.add_parser("info", help="versions, kernel backends, device")

    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    _add_train_flags(train, argv)
    known, unknown = parser.parse_known_args(argv)
    flags = vars(known)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, train._option_string_actions, n=1)
        parser.error(f"unknown argument {flag}" + (f", did you mean {near[0]}?" if near else ""))
    command: Callable[[dict], int] = {"train": _train, "plot": _plot, "info": _info}[
        flags.pop("command")
    ]
    try:
        return command(flags)
    except KeyboardInterrupt:
        print("klq: interrupted", file=sys.stderr)
        return 130
    except _Stop as stop:
        print(f"klq: error: {stop}", file=sys.stderr)
        return stop.code


class _Stop(Exception):
    """An error whose one line says everything."""

    def __init__(self, error: Exception, code: int) -> None:
        super().__init__(" ".join(str(error).split()) or type(error).__name__)
        self.code = code


def _add_train_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="a complete experiment")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by the names of the flags")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    own = parser.add_argument_group("without a preset")
    texts = ("name or directory of a causal language model", "JSON lines with a prompt column",
             "reward function, as module:function or file.py:function")  # fmt: skip
    for name, text in zip(OWN, texts, strict=True):
        own.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text)
    own.add_argument(
        "--eval_dataset", default=argparse.SUPPRESS, help="JSON lines, for --eval_every"
    )
    parser.add_argument("--value_model", default=argparse.SUPPRESS, help="head, separate or a path")

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", nargs="?")
    early.add_argument("--config", nargs="?")
    found = early.parse_known_args(argv)[0]
    preset = found.preset
    if preset is None and found.config is not None:
        with contextlib.suppress(ValueError, OSError):  # said when the command runs
            preset = _read_yaml(found.config).get("preset")
    if preset in PRESETS and "train" in argv:
        group = parser.add_argument_group(f"preset {preset}")
        for name, default in preset_options(preset).items():
            if name != "value_model":
                kind = str if default is None else type(default)
                group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS,
                                   help=f"default {default}")  # fmt: skip
    group = parser.add_argument_group("configuration")
    for f in fields(KLQConfig):
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **_flag(f))
    for alias in TAU_NAMES[1:]:
        group.add_argument(f"--{alias}", type=float, default=argparse.SUPPRESS, help="same as tau")


def _flag(f: Any) -> dict[str, Any]:
    """How argparse reads a field of the configuration."""
    kind, _ = field_type(f)
    text = get_args(f.type)[1]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if kind is dict:
        return {"type": json.loads, "metavar": "JSON", "help": text}
    if get_origin(kind) is list:
        return {"type": get_args(kind)[0], "nargs": "+", "help": text}
    shown = "" if f.default is None else f" (default {f.default})"
    return {"type": kind, "metavar": kind.__name__.upper(), "help": text + shown}


def _train(flags: dict[str, Any]) -> int:
    config_file, preset_name = flags.pop("config"), flags.pop("preset")
    resume = flags.pop("resume")
    try:
        settings = {**(_read_yaml(config_file) if config_file else {}), **flags}
        preset_name = preset_name or settings.pop("preset", None)
        settings.pop("preset", None)
        preset, trainer = _build(preset_name, settings, resume)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise _Stop(error, 2) from error

    main_process = trainer.accelerator.is_main_process
    try:
        if preset.before and main_process:
            preset.before(trainer)
        trainer.train(resume=resume)
        out = Path(preset.args.output_dir)
        if preset.report and main_process:
            report = json.dumps(preset.report(trainer), indent=1)
            (out / "report.json").write_text(report + "\n")
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        raise _Stop(error, 1) from error
    if main_process:
        print(f"curves: {out / 'curves.png'}")
    return 0


def _build(name: str | None, settings: dict[str, Any], resume: bool) -> tuple[Preset, Any]:
    """The experiment and its trainer. The output directory is checked before anything costs."""
    given = [key for key in OWN if key in settings]
    if name is None and len(given) < len(OWN):
        raise ValueError(
            f"give --preset ({', '.join(PRESETS)}), or all of --model, --dataset and --reward"
        )
    if name is not None and given:
        raise ValueError(f"--{given[0]} and --preset exclude each other")
    import transformers

    from klq.checkpoint import check_output_dir

    transformers.utils.logging.disable_progress_bar()  # it would write over ours at every save
    if name is not None:
        check_names(name, settings)
    out = settings.get("output_dir", KLQConfig.output_dir if name is None else f"runs/{name}")
    check_output_dir(out, resume=resume, overwrite=settings.get("overwrite", False))
    preset = load_preset(name, **settings) if name else _own_experiment(settings)
    from klq.trainer import KLQTrainer

    return preset, KLQTrainer(args=preset.args, **preset.trainer_kwargs)


def _own_experiment(settings: dict[str, Any]) -> Preset:
    model, dataset, reward = (settings.pop(key) for key in OWN)
    value_model, held_out = settings.pop("value_model", "head"), settings.pop("eval_dataset", None)
    known = {f.name for f in fields(KLQConfig)} | set(TAU_NAMES)
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}")
    kwargs = {
        "model": model,
        "train_dataset": _rows(dataset),
        "eval_dataset": None if held_out is None else _rows(held_out),
        "reward_funcs": _function(reward),
        "value_model": value_model,
    }
    return Preset(merged({}, settings), kwargs)


def _rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if rows and not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number} must be an object with a prompt")
    return rows


def _function(where: str) -> Callable:
    """The function at module:function or file.py:function."""
    source, _, name = where.rpartition(":")
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"reward {where!r}: there is no file {source}")
        sys.path.insert(0, str(path.parent.resolve()))  # for what it imports from beside it
        # by its path: its name may be that of another module
        spec = importlib.util.spec_from_file_location(f"reward file {path.resolve()}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif source:
        module = importlib.import_module(source)
    else:
        raise ValueError(f"reward {where!r} is not module:function or file.py:function")
    if not callable(getattr(module, name, None)):
        raise ValueError(f"reward {where!r}: {source} has no function {name!r}")
    return getattr(module, name)


def _read_yaml(path: str) -> dict[str, Any]:
    """A mapping of settings. YAML reads 1e-5 as text, so numbers are read as the flags are."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines")
    kinds = {f.name: field_type(f)[0] for f in fields(KLQConfig)}
    kinds |= dict.fromkeys(TAU_NAMES, float)
    for name, value in content.items():
        kind, many = kinds.get(name), isinstance(value, list)
        if kind is float or (many and kind == list[float]):
            try:
                read = [float(v) if isinstance(v, str) else v for v in (value if many else [value])]
            except ValueError:
                raise ValueError(f"{path}: {name} must be a number, got {value!r}") from None
            content[name] = read if many else read[0]
    return content


def _plot(flags: dict[str, Any]) -> int:
    from klq.plots import plot_runs

    try:
        print(plot_runs(flags["runs"], flags["out"]))
    except (ValueError, OSError) as error:
        raise _Stop(error, 2) from error
    return 0


def _bench(argv: list[str]) -> int:
    """The suite lies beside this package in a checkout and is not installed: `benchmarks` is no
    name to put on everybody's import path."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        print(
            "klq: error: klq bench runs from a checkout, and this klq is installed without one: "
            "clone the repository and `pip install --no-build-isolation -e .` there",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.__main__").main(argv)


def _info(flags: dict[str, Any]) -> int:
    """Everything a bug report needs."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import klq_kernels

    print(f"python        {platform.python_version()} on {platform.platform()}")
    for name in ("klq", "torch", "triton", "transformers", "accelerate", "peft", "datasets"):
        try:
            print(f"{name:13} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:13} not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices       cpu {' '.join(gpus)}".rstrip())
    for title, content in (
        ("kernels", klq_kernels.build_info()),
        ("backends", klq_kernels.available_backends()),
    ):
        for key, value in content.items():
            print(f"{title:13} {key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
