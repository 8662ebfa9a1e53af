# SPDX-License-Identifier: Apache-2.0
"""The distribution as a user gets it: sdist -> wheel -> install -> import from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import klq_kernels
from klq_kernels import _C

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = Path(_C.__file__)


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "KLQ_BACKEND")}
    return subprocess.run(
        command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=280
    )


def isolated(program: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess:
    """Runs `program` without site hooks, so that no editable install can lend its module."""
    packages = Path(torch.__file__).parents[1]
    search = os.pathsep.join(str(p) for p in (cwd, *path, packages))
    return run(sys.executable, "-S", "-c", program, cwd=cwd, PYTHONPATH=search)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The sdist of a copy of the tree, unpacked."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "klq", "klq_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    made = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", cwd=tree)
    assert made.returncode == 0, made.stderr[-2000:]
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(tree / "unpacked", filter="data")
    return next((tree / "unpacked").iterdir())


def test_sdist_holds_every_source(source):
    shipped = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    for folder in ("csrc", "klq", "klq_kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".py"):
                assert path.relative_to(ROOT) in shipped


def test_wheel_from_sdist_imports_outside_the_repository(source, tmp_path):
    built = run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"),
        *("-w", str(tmp_path / "wheels"), "."),
        cwd=source,
        MAX_JOBS="1",
        KLQ_CUDA="0",
    )
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = next((tmp_path / "wheels").glob("klq-*.whl"))
    site = tmp_path / "site"
    installed = run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)),
        str(wheel),
        cwd=tmp_path,
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    program = (
        "import torch, klq_kernels as k; from klq_kernels import _C; "
        "print(_C.__file__); print(k.build_info()['cuda']); "
        "print(k.token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3])))"
    )
    out = isolated(program, tmp_path, site)
    assert out.returncode == 0, out.stderr[-2000:]
    assert str(site) in out.stdout and "None" in out.stdout and "-1.3863" in out.stdout


def test_source_tree_without_the_module_names_the_remedy(tmp_path):
    shutil.copytree(
        ROOT / "klq_kernels",
        tmp_path / "klq_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.copy(ROOT / "setup.py", tmp_path)
    out = isolated("import klq_kernels", tmp_path)
    assert out.returncode != 0
    assert "pip install --no-build-isolation -e ." in out.stderr


@pytest.mark.parametrize(
    "flag, message", [("2", "must be auto, 0 or 1"), ("1", "KLQ_CUDA=1 needs")]
)
def test_a_cuda_request_that_cannot_be_met_fails_the_build(flag, message):
    if flag == "1" and torch.version.cuda:
        pytest.skip("this torch has CUDA, so the request can be met")
    out = run(sys.executable, "setup.py", "--version", cwd=ROOT, KLQ_CUDA=flag)
    assert out.returncode != 0 and message in out.stderr


def test_setup_stays_small():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80


def test_build_info_says_what_was_built():
    info = klq_kernels.build_info()
    assert set(info) == {"torch", "compiler", "cuda", "archs", "cpu_isa", "racecheck"}
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline")


def test_only_the_stable_abi_is_used():
    """No symbol of libtorch's C++ ABI: one build runs on every torch from 2.10 on."""
    nm = shutil.which("nm")
    assert nm, "binutils' nm is part of any machine with gcc"
    symbols = subprocess.run(
        [nm, "-D", "--undefined-only", EXTENSION], capture_output=True, text=True
    )
    names = re.findall(r" U (\S+)", symbols.stdout)
    assert names
    unstable = [n for n in names if re.match(r"_ZN?K?(2at|3c10|5torch)", n)]
    assert not unstable, unstable
