# SPDX-License-Identifier: Apache-2.0
"""What both loops of the whole-step benchmark share: model, prompts, settings, stopwatch.

Imports torch and transformers alone, so that the environment of another trainer can read it too.
"""

import ctypes
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    prompts: int  # a batch
    prompt: int  # tokens each
    response: int  # tokens each: nothing ends one early
    micro: int  # rows of one forward and backward
    dtype: torch.dtype


SIZES = {
    "tiny": Size(128, 2, 4, 8192, 16, 32, 24, 8, torch.float32),
    "pythia-1b": Size(2048, 16, 8, 50304, 64, 512, 53, 16, torch.bfloat16),
}
EPOCHS, WARM, REPEATS = 4, 1, 3
PHASES = "rollout", "targets", "update"  # rewards, a stub in both, are in the first or second


def config(size: Size, **more) -> GPTNeoXConfig:
    made = {
        "hidden_size": size.hidden,
        "intermediate_size": 4 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return GPTNeoXConfig(**{**made, **more})


def build(kind, made: GPTNeoXConfig, size: Size, device: str):
    """Random weights, where and as they are trained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            return kind(made)
    finally:
        torch.set_default_dtype(before)


def policy(size: Size, device: str) -> GPTNeoXForCausalLM:
    return build(GPTNeoXForCausalLM, config(size), size, device)


def scorer(size: Size, device: str, **more) -> GPTNeoXForSequenceClassification:
    """A value or reward model."""
    made = config(size, num_labels=1, pad_token_id=size.vocabulary - 1, **more)
    return build(GPTNeoXForSequenceClassification, made, size, device)


def prompts(size: Size) -> list[list[int]]:
    """Of one batch; the last id of the vocabulary is free, to pad with."""
    shape = size.prompts, size.prompt
    return torch.randint(size.vocabulary - 1, shape, generator=torch.Generator()).tolist()


class Stopwatch:
    """Seconds and peak bytes by phase. On a GPU of the allocator, on Linux without one of the
    process: these compare loops in processes of their own."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.laps: list[dict[str, dict]] = []

    def start(self) -> None:
        self.laps.append({})
        self._wait()

    def lap(self, name: str) -> None:
        """Everything since `start` or the last lap was `name`."""
        begun, peak = self.begun, self._peak()
        self._wait()
        now = self.laps[-1].setdefault(name, {"s": 0.0, "peak_bytes": 0})
        now["s"] += self.begun - begun
        now["peak_bytes"] = max(now["peak_bytes"], peak)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.begun = time.perf_counter()

    def _peak(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))

    def found(self) -> dict:
        """Medians of the measured laps, and the largest peaks."""
        laps = self.laps[WARM:]
        out = {}
        for name in PHASES:
            seconds = sorted(lap[name]["s"] for lap in laps)
            peak = max(lap[name]["peak_bytes"] for lap in laps)
            out[name] = {"median_s": seconds[len(seconds) // 2], "s": seconds, "peak_bytes": peak}
        return out
