# SPDX-License-Identifier: Apache-2.0
"""`klq bench`, or `python -m benchmarks`: the suite for this machine's device.

On a GPU `benchmarks.gpu` (our kernels and everyone else's), on a CPU `benchmarks.cpu` (the
registry, naive against fused). `--device` chooses; the other options are theirs.
"""

import argparse
import sys

import torch

from benchmarks import cpu, gpu


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    known, rest = parser.parse_known_args(argv)
    device = known.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"cuda": gpu, "cpu": cpu}[device].main(rest)


if __name__ == "__main__":
    sys.exit(main())
