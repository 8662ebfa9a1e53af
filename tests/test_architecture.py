# SPDX-License-Identifier: Apache-2.0
"""The rules of the layout, enforced: who may import whom, one op = one name everywhere, file sizes,
no host synchronisation in the kernels, the public names."""

import ast
import inspect
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import klq_kernels
from klq_kernels._dispatch import TABLE
from klq_kernels._registry import SPECS

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
PUBLIC = {
    *("token_logprobs", "token_log_ratios", "token_stats", "q_values", "boltzmann_values"),
    *("lambda_returns", "gae", "klq_targets", "klq_loss", "linear_token_logprobs"),
    *("linear_token_stats", "linear_klq_loss", "place_scores"),
    *("available_backends", "build_info", "use_backend"),
    *("TokenStats", "LambdaReturns", "GAE", "KLQTargets", "KLQLoss", "KLQStats"),
}
# the signatures of the API, parameter by parameter; every op also takes backend=
SCALING = ["temperature", "logit_softcap"]
SCAN = ["mask", "cu_seqlens", "bootstrap"]
HEAD = ["logits_dtype", "num_active", "chunk_bytes"]
LOSS = ["ref_logprobs", "returns", "tau", "mask", "weights", "normalizer", *SCALING]
SIGNATURES = {
    "token_logprobs": (["logits", "actions"], ["mask", *SCALING, "tp_group"]),
    "token_log_ratios": (["logits", "ref_logits", "actions"], ["mask", *SCALING]),
    "token_stats": (["logits", "actions"], ["ref_logits", "mask", *SCALING]),
    "q_values": (["logits", "ref_logits", "values"], ["tau", *SCALING]),
    "boltzmann_values": (["q", "ref_logits"], ["tau", *SCALING]),
    "lambda_returns": (
        ["log_ratios", "values", "rewards"],
        ["tau", "gamma", "lam", "alpha", *SCAN, "trace"],
    ),
    "gae": (["rewards", "values"], ["gamma", "lam", *SCAN]),
    "klq_targets": (
        ["logits", "actions", "values", "rewards"],
        ["ref_logits", "ref_logprobs", "tau", "gamma", "lam", "alpha", *SCAN, *SCALING],
    ),
    "klq_loss": (["logits", "actions", "values"], [*LOSS, "inplace", "tp_group"]),
    "linear_token_logprobs": (
        ["hidden", "weight", "actions"],
        ["bias", "mask", *SCALING, *HEAD, "keep_bytes", "tp_group"],
    ),
    "linear_token_stats": (
        ["hidden", "weight", "actions"],
        ["bias", "mask", *SCALING, *HEAD, "tp_group"],
    ),
    "linear_klq_loss": (
        ["hidden", "weight", "actions", "values"],
        ["bias", *LOSS, *HEAD, "tp_group"],
    ),
    "place_scores": (["scores", "mask"], ["cu_seqlens"]),
}


def sources(*folders: str) -> list[Path]:
    """The files git knows, so that build products and scratch files do not count."""
    listed = subprocess.run(
        ["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    found = [ROOT / n for n in names if n] or [p for f in folders for p in (ROOT / f).rglob("*")]
    return [p for p in found if p.suffix in SUFFIXES and p.is_file()]


def imports(path: Path) -> set[str]:
    """Top-level packages a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def python_files(folder: str) -> list[Path]:
    return [p for p in sources(folder) if p.suffix == ".py"]


def test_kernels_import_torch_and_nothing_else():
    """klq -> klq_kernels -> torch.ops.klq, never back; Triton only where its kernels are."""
    allowed = {"klq_kernels", "torch", *sys.stdlib_module_names}
    for path in python_files("klq_kernels"):
        extra = {"triton"} if path.name in ("triton.py", "_triton.py", "_triton_scan.py") else set()
        assert imports(path) <= allowed | extra, f"{path}: {imports(path) - allowed - extra}"


def test_triton_is_imported_by_its_kernels_only():
    """`_triton.py` is for modules named triton.py, which are imported at a kernel's first call."""
    for path in python_files("klq_kernels"):
        if path.name not in ("triton.py", "_triton.py", "_triton_scan.py"):
            text = path.read_text()
            assert not re.search(r"import _triton|\.triton import|_triton import", text), path


def test_importing_the_kernels_is_light():
    code = (
        "import sys, klq_kernels\n"
        "print([m for m in ('transformers', 'triton', 'klq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_loop_sees_only_public_kernels():
    for path in python_files("klq"):
        text = path.read_text()
        assert not re.search(r"klq_kernels\._|klq_kernels\.\w+\.|torch\.ops\.klq", text), path


@pytest.mark.parametrize("op", TABLE)
def test_one_op_is_one_name_in_every_place(op):
    folder = ROOT / "klq_kernels" / op
    assert callable(getattr(klq_kernels, op)) and (folder / "__init__.py").exists()
    assert re.search(rf"^def {op}\(", (folder / "reference.py").read_text(), re.M)
    assert op in SPECS and SPECS[op].cases
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists()
    schemas = (ROOT / "csrc" / "ops.cpp").read_text()
    composed = op.startswith("linear_")  # defined where their chunks are driven, in Python
    defined = (folder / "__init__.py").read_text() if composed else schemas
    assert "@composite(" in defined if composed else f'm.def("{op}(' in defined
    if not composed:
        assert list((ROOT / "csrc" / "cpu").glob(f"{op}.cpp"))
    for backend, devices in TABLE[op].items():
        if backend == "cuda" and not composed:
            assert list((ROOT / "csrc" / "cuda").glob(f"{op}*")), f"{op} on {devices}"
        if backend == "triton" and not composed:
            assert (folder / "triton.py").exists()


def test_every_op_of_the_api_is_in_the_table():
    assert set(TABLE) == set(SIGNATURES) == set(SPECS)


def test_public_names():
    assert set(klq_kernels.__all__) == PUBLIC
    assert klq_kernels.__all__ == sorted(klq_kernels.__all__)


@pytest.mark.parametrize("op", SIGNATURES)
def test_signatures_and_docstrings(op):
    function = getattr(klq_kernels, op)
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert (positional, keywords) == (SIGNATURES[op][0], [*SIGNATURES[op][1], "backend"])
    for section in ("Args", "Returns:", "Raises:"):
        assert section in function.__doc__, section


def test_kernels_never_wait_for_the_device():
    """No .item() and no .cpu(); tolist, int() and bool() of tensors only in the checks, which look
    at values on the CPU or on request."""
    for path in python_files("klq_kernels"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("item", "cpu"), f"{path}:{node.lineno}"
                if node.attr == "tolist":
                    assert path.name == "_checks.py", f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", ["klq_kernels", "klq", "csrc", "tests", "benchmarks"])
def test_files_are_short_and_licensed(folder):
    for path in sources(folder):
        lines = path.read_text().split("\n")
        assert len(lines) <= 401, f"{path} has {len(lines)} lines"
        head = next(line for line in lines[:2] if not line.startswith("#!"))
        assert re.fullmatch(r"(#|//) SPDX-License-Identifier: Apache-2.0", head), path
        if path.suffix == ".py" and len(lines) > 2:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} says not what it is"


def test_every_test_file_is_collected(pytestconfig):
    """pytest leaves folders out by their names, by default also "build"."""
    skipped = pytestconfig.getini("norecursedirs")
    for path in (ROOT / "tests").rglob("test_*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        assert not [f for f in folders if any(fnmatch(f, s) for s in skipped)], path


def test_no_conftest_at_the_root():
    """It would put the source tree in front of an installed package."""
    assert not (ROOT / "conftest.py").exists()


def test_every_adversarial_case_has_its_test_or_its_reason():
    """tests/kernels/CASES.md lists cases 1-76 once each; the tests it names exist."""
    table = (ROOT / "tests" / "kernels" / "CASES.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \|$", table, re.M)
    assert [int(n) for n, _ in rows] == list(range(1, 77))
    written = "".join(p.read_text() for p in (ROOT / "tests" / "kernels").glob("*.py"))
    samples = (ROOT / "klq_kernels" / "_samples.py").read_text()
    for number, text in rows:
        names = re.findall(r"`(\w+)`", text)
        assert names or "needs a" in text or "belongs to" in text, f"case {number} has no test"
        for name in names:
            known = f"def {name}(" in written or f'Case("{name}"' in samples
            assert known, f"case {number}: {name} does not exist"
