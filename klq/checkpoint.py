# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk, and how it is left and taken up again.

A checkpoint is a directory `checkpoint-NNNNNN` that transformers can load as it stands (model and
tokenizer), with `value_head.safetensors` next to the model, and `optimizer.pt`, `rng-RANK.pt` and
`state.json` for resuming. The learning-rate schedule is a function of the update number and needs
no state. A checkpoint is written under a temporary name and renamed when complete, and renamed away
before it is deleted, so a directory of that name is whole whenever the process is killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from klq.config import KLQConfig
from klq.model import TRUNK_DIR, PolicyValueModel, is_peft, load_value_head, save_value

_NAME = re.compile(r"checkpoint-(\d{6,})")
_TEMPORARY = ".tmp-"
# What a run may be resumed with other values of: its length, what it writes and shows, where it
# runs, and the step it takes. Everything else says what is learned from which numbers.
MAY_CHANGE = frozenset({
    "output_dir", "overwrite", "num_updates", "use_cpu", "eval_every", "save_every",
    "save_total_limit", "sample_every", "num_samples", "report_to", "run_name", "disable_tqdm",
    "learning_rate", "value_learning_rate", "lr_scheduler_type", "weight_decay", "adam_epsilon",
    "max_grad_norm",
})  # fmt: skip
RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "report.json", "curves.png")


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name).group(1)))


def run_files(output_dir: Path) -> list[Path]:
    """What a run has left in a directory."""
    files = [Path(output_dir) / name for name in RUN_FILES]
    return [p for p in files if p.exists()] + checkpoints(output_dir)


def check_output_dir(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds a run (FileExistsError) unless resumed or overwritten.

    A run that ended before its first update left nothing worth keeping, and is not held.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite are opposites: give only one")
    held = [p for p in run_files(output_dir) if p.name != "config.json" and p.stat().st_size]
    if held and not (resume or overwrite):
        raise FileExistsError(
            f"{output_dir} already holds a run ({held[0].name}): resume it (--resume or "
            "train(resume=True)), delete it (--overwrite or overwrite=True) or choose another "
            "output_dir"
        )


def prepare_output_dir(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Check, make the directory, and clear it of half-written files and of a run to overwrite.

    Overwriting deletes the files of the run and nothing else. OSError if it cannot be written.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir, resume=resume, overwrite=overwrite)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / f"{_TEMPORARY}probe").touch()
    except OSError as error:
        raise OSError(
            error.errno, f"output_dir cannot be written ({error.strerror})", str(output_dir)
        ) from None
    leftovers = list(output_dir.glob(f"{_TEMPORARY}*"))
    for path in leftovers + (run_files(output_dir) if overwrite else []):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_same_settings(output_dir: Path, args: KLQConfig) -> None:
    """ValueError, naming them, if settings that define a run differ from its config.json.

    Those of MAY_CHANGE differ freely, and a setting that only one of the two knows is no difference
    (the run may have begun with another version).
    """
    path = Path(output_dir) / "config.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, so this run cannot be resumed: {error}") from None
    now = json.loads(json.dumps(asdict(args)))
    changed = [
        f"{name} {before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name not in MAY_CHANGE and before.get(name, value) != value
    ]
    if changed:
        raise ValueError(
            f"a resumed run keeps its settings, but {', '.join(changed)}: leave them as they were, "
            "or begin a new run in another output_dir"
        )


def fingerprint(reference: nn.Module) -> str:
    """Tells one reference policy from another: a hash of the beginning of each frozen tensor."""
    digest = hashlib.sha256()
    for name, p in reference.named_parameters():
        if not p.requires_grad:
            start = p.detach().reshape(-1)[:64].float().cpu()
            digest.update(name.encode() + start.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_checkpoint(
    output_dir: Path,
    state: dict[str, Any],
    *,
    model: PolicyValueModel,
    optimizer: Any,
    tokenizer: Any,
    accelerator: Any,
    keep: int,
) -> Path:
    """Write the checkpoint of `state["update"]`, then delete all but the newest `keep`.

    OSError, naming the directory, whatever it is that cannot be written.
    """
    final = Path(output_dir) / f"checkpoint-{state['update']:06d}"
    temporary = final.with_name(_TEMPORARY + final.name)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    accelerator.wait_for_everyone()
    try:
        torch.save(_rng_state(), temporary / f"rng-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            model.policy.save_pretrained(temporary)
            save_value(model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps(state))
            _to_disk(temporary)
            if final.exists():
                _delete(final)
            temporary.rename(final)
            _to_disk(final.parent, deep=False)
            for old in checkpoints(output_dir)[:-keep]:
                _delete(old)
    except Exception as error:
        # A full disk is an OSError here, a RuntimeError from torch, safetensors' own error there.
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"the checkpoint could not be written ({reason}); earlier ones are whole",
            str(final),
        ) from error
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    path: Path, *, model: PolicyValueModel, optimizer: Any, accelerator: Any, reference: str
) -> dict[str, Any]:
    """Put everything back as `save_checkpoint` found it, and return its state.

    Learning rates, epsilon and weight decay stay those that `optimizer` was made with.
    Raises ValueError if the run began from another reference policy than `reference` (a
    fingerprint) or has its value function elsewhere, FileNotFoundError or ValueError if a file is
    missing or does not fit.
    """
    state = json.loads((path / "state.json").read_text())
    if state["reference"] != reference:
        raise ValueError(
            f"{path} was trained against another reference policy: build the trainer with the "
            "model the run began with, not with one of its checkpoints"
        )
    separate = (path / TRUNK_DIR).is_dir()
    if separate != (model.value_trunk is not None):
        kind = "a separate value model" if separate else "its values on the policy's trunk"
        raise ValueError(f"{path} has {kind}: resume with the value_model the run began with")
    if is_peft(model.policy):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model.policy, load_file(path / "adapter_model.safetensors"))
    else:
        _load_module(model.lm, path)
    if model.value_trunk is not None:
        _load_module(model.value_trunk, path / TRUNK_DIR)
    load_value_head(model.value_head, path)
    names = ("lr", "initial_lr", "eps", "weight_decay")
    current = [{name: group[name] for name in names} for group in optimizer.param_groups]
    optimizer.load_state_dict(
        torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    )
    for group, settings in zip(optimizer.param_groups, current, strict=True):
        group.update(settings)
    _set_rng_state(torch.load(path / f"rng-{accelerator.process_index}.pt", weights_only=True))
    return state


def _load_module(module: nn.Module, path: Path) -> None:
    # Through from_pretrained, which knows about shards, tied weights and renamed keys.
    loaded = type(module).from_pretrained(path, dtype=module.dtype)
    module.load_state_dict(loaded.state_dict())


def _delete(path: Path) -> None:
    hidden = path.with_name(_TEMPORARY + "old-" + path.name)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _to_disk(path: Path, deep: bool = True) -> None:
    for entry in [*(path.rglob("*") if deep else ()), path]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Whatever is drawn within (torch, numpy, python), afterwards it has not been."""
    state = _rng_state()
    try:
        yield
    finally:
        _set_rng_state(state)


class GracefulInterrupt:
    """While active, a first Ctrl-C only sets `requested`; a second one interrupts at once.

    The loop finishes its update and saves, so that the checkpoint it leaves lies on the boundary of
    an update and resumes exactly, whether the signal came in rollout, update or checkpoint.
    """

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come within one, and its buffer takes no second writer.
        os.write(
            2, b"\nstopping after this update, with a checkpoint; Ctrl-C again stops at once\n"
        )

    def __enter__(self) -> GracefulInterrupt:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
