# SPDX-License-Identifier: Apache-2.0
"""Real English that every machine already has: docstrings of the Python packages installed on it.

Files are read and parsed by `ast`, never imported. A docstring that follows PEP 257 carries its own
ground truth: one line that says what the thing does, a blank line, then the details. The pair is
(name + details, line).

Files are visited in the order of a hash of their path, so that a limit takes an even sample of what
is installed, and the hash sends a tenth of them to the held-out side. A line, and a beginning of
details, is kept only the first time it appears anywhere: copies of one docstring in several files
cannot sit on both sides of the split.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Tests are mostly noise, and with this project's own files the corpus would move at every edit.
SKIP_DIRECTORIES = {
    "test",
    "tests",
    "testing",
    "__pycache__",
    "_vendor",
    "site-packages",
    "klq",
    "klq_kernels",
}
MAX_FILE_BYTES = 400_000
HELD_OUT_PERCENT = 10
_LETTERS = re.compile(r"[^a-z]+")
_MARKUP = re.compile(
    r"^[^A-Za-z`\"']|>>>|https?:|::|\||^(args|returns?|parameters|note|example)s?\s*:", re.I
)


@dataclass(frozen=True)
class Pair:
    """A docstring: the object's name, the details, the true summary, the side of the split."""

    name: str
    body: str
    summary: str
    held_out: bool


def default_roots() -> list[Path]:
    """The standard library and the directories that installed packages live in."""
    paths = sysconfig.get_paths()
    return sorted({Path(paths[key]).resolve() for key in ("stdlib", "purelib", "platlib")})


def fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """Hash of what the corpus depends on: path and length of the files, the parser, this module."""
    key = hashlib.sha256(sysconfig.get_python_version().encode() + Path(__file__).read_bytes())
    for relative, path in files:
        key.update(f"{relative} {path.stat().st_size}\n".encode())
    return key.hexdigest()


def _digest(relative: str) -> bytes:
    return hashlib.blake2b(relative.encode(), digest_size=16).digest()


def held_out(relative: str) -> bool:
    """Whether the file of this path (relative to its root, posix) is on the held-out side."""
    return int.from_bytes(_digest(relative)[8:], "big") % 100 < HELD_OUT_PERCENT


def python_files(roots: Iterable[Path]) -> list[tuple[str, Path]]:
    """(path relative to its root, path) of every Python file below the roots, in hash order."""
    found: dict[str, Path] = {}
    for root in roots:
        for directory, subdirectories, names in os.walk(root):
            subdirectories[:] = [s for s in subdirectories if s not in SKIP_DIRECTORIES]
            for name in names:
                path = Path(directory) / name
                if name.endswith(".py") and path.is_file():  # not a link to nowhere
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return sorted(found.items(), key=lambda item: _digest(item[0]))


def split_docstring(text: str) -> tuple[str, str] | None:
    """(summary, details as one line) of a cleaned docstring, or None where it has not that form.

    The form: ASCII; a first line of 3 to 16 words, mostly letters and without markup, ended by a
    full stop or by a blank line after it; at least 5 words of details that do not repeat it.
    """
    if not text.isascii():
        return None
    summary, _, rest = text.partition("\n")
    body = " ".join(rest.split())
    summary = summary.strip()
    if not (summary.endswith(".") or rest.startswith("\n")) or _MARKUP.search(summary):
        return None
    if (
        not 3 <= len(summary.split()) <= 16
        or len(body.split()) < 5
        or summary.lower() in body.lower()
    ):
        return None
    if sum(c.isalpha() or c == " " for c in summary) < 0.8 * len(summary):
        return None
    return summary, body


def file_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(name, cleaned docstring) of a file's module, classes and functions; none if unreadable."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    stack: list[ast.AST] = [tree]
    while stack:  # statements only: a visit to every expression takes half as long as the parse
        node = stack.pop()
        for block in ("body", "orelse", "finalbody", "handlers"):
            stack.extend(getattr(node, block, ()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and "\n" in text:
                yield getattr(node, "name", path.stem), text


@contextmanager
def _no_collector() -> Iterator[None]:
    """Syntax trees are many objects and no cycles: parsing takes a third less time without it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collector()
def read_pairs(files: Iterable[tuple[str, Path]], *, limit: int) -> list[Pair]:
    """Up to `limit` pairs from `python_files`, no line and no beginning of details twice."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for relative, path in files:
        side = held_out(relative)
        for name, text in file_docstrings(path):
            split = split_docstring(text)
            if split is None:
                continue
            summary, body = split
            # Letters only, so that versions and punctuation do not make a copy look new; 64 letters
            # of details are no more than a prompt shows.
            keys = {
                "s" + _LETTERS.sub("", summary.lower()),
                "b" + _LETTERS.sub("", body.lower())[:64],
            }
            if keys & seen:
                continue
            seen |= keys
            pairs.append(Pair(name, body, summary, side))
            if len(pairs) == limit:
                return pairs
    return pairs
