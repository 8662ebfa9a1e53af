# SPDX-License-Identifier: Apache-2.0
"""What a side is called in tables and figures, with its version, and how it is drawn."""

import re

# Okabe and Ito's palette, told apart by colour-blind eyes; markers differ as well
STYLES = {
    "cuda": ("klq CUDA", "#0072B2", "o"),
    "triton": ("klq Triton", "#56B4E9", "D"),
    "cpp": ("klq C++", "#0072B2", "o"),
    "eager": ("eager PyTorch", "#7F7F7F", "s"),
    "reference": ("klq reference", "#BBBBBB", "s"),
    "F.cross_entropy": ("F.cross_entropy", "#000000", "x"),
    "torch.compile": ("torch.compile", "#E69F00", "^"),
    "liger": ("Liger", "#D55E00", "v"),
    "quack": ("quack", "#009E73", "P"),
    "trl": ("TRL", "#CC79A7", "X"),
    "verl": ("verl", "#F0E442", "h"),
    "cce": ("CCE", "#882255", "<"),
    "flash-attn": ("flash-attn", "#882255", ">"),
    "rl-triton": ("rl-triton", "#009E73", "d"),
    "three": ("cuBLAS alone:", "#000000", "|"),
    "one": ("cuBLAS alone:", "#000000", "|"),
}
PACKAGES = {"cce": "cut-cross-entropy"}  # where the side is not named like its package


def family(side: str) -> str:
    """The key of `STYLES`: a side is named by its first word."""
    first = re.split(r"[ ,]", side)[0]
    return next((f for f in STYLES if first.startswith(f)), first)


def called(side: str, machine: dict) -> str:
    """ "Liger 0.8.5, forward alone"."""
    first = family(side)
    name = STYLES.get(first, (first,))[0]
    rest = side[len(first) :].removeprefix(" float32")
    if first in ("cuda", "triton", "cpp", "reference"):
        return name + rest
    if first in ("three", "one"):
        return f"{name} {side}"
    versions = machine.get("peers", {})
    package = PACKAGES.get(first, next((p for p in versions if p.startswith(first)), "torch"))
    version = versions.get(package) or machine["torch"].partition("+")[0]
    return f"{name} {version}{rest}"
