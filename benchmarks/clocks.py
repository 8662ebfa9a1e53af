# SPDX-License-Identifier: Apache-2.0
"""What the card did while it was measured: nvidia-smi beside the run, a line every two seconds."""

import contextlib
import subprocess
import tempfile

NAMES = "sm_mhz", "memory_mhz", "watts", "celsius"
ASKED = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
COMMAND = ("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits", "-i", "0")


class Clocks:
    """`with Clocks() as clocks:` and then `clocks.samples()`; none without nvidia-smi."""

    def __init__(self, command: tuple[str, ...] = (*COMMAND, "-lms", "2000")):
        self.command, self.process = command, None

    def __enter__(self) -> "Clocks":
        self.log = tempfile.TemporaryFile("w+")
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen(
                self.command, stdout=self.log, stderr=subprocess.DEVNULL, text=True
            )
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def samples(self) -> dict[str, list[float]]:
        """By name, in order of time; a line that is not four numbers is left out."""
        with open(self.log.fileno(), closefd=False) as log:
            log.seek(0)
            lines = [line.split(",") for line in log.read().splitlines()]
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append([float(x) for x in line])
        columns = zip(*(r for r in rows if len(r) == len(NAMES)), strict=True)
        return dict(zip(NAMES, map(list, columns), strict=False))
