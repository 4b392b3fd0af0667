"""Data flows one way: modules import from their own stage or an earlier one; kernels know no torch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jackpot_kernels"
CSRC = ROOT / "csrc"

STAGES = (
    {"_extension", "_validate", "reference"},
    {"kernels"},
    {"ops"},
    {"functional"},
    {"layers"},
    {"budgets", "convert", "criteria", "data", "files", "initialize", "models", "normalization"},
    {"search"},
    {"__init__"},
    {"cli", "environment", "report"},
)
STAGE_OF = {module: stage for stage, modules in enumerate(STAGES) for module in modules}

# Code around the kernels may know torch: the files that register an operator, and what these share.
HOST_CODE = {
    "cpu/parallel.h",
    "cpu/patch.h",
    "cpu/rank_select.cpp",
    "cpu/rank_select.h",
    "cpu/score_update.h",
    "cpu/segments.h",
    "cpu/swap.h",
    "cpu/workspace.h",
    "cuda/step.h",
    "cuda/tensors.h",
    "search_step.h",
}


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def absolute_imports(source: str, package: str) -> set[str]:
    """Return the dotted names that `source`, a file of `package`, imports at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def imported_modules(source: str, package: str = "jackpot_kernels") -> set[str]:
    """Return the modules of jackpot_kernels that `source` imports; the package itself is `__init__`."""
    modules = set()
    for name in absolute_imports(source, package):
        root, *rest = name.split(".")
        if root == "jackpot_kernels":
            modules.add(rest[0] if rest and rest[0] in STAGE_OF else "__init__")
    return modules


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def includes(file: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE))


def reaches_torch(file: Path) -> bool:
    """Tell whether `file` includes a header of torch, itself or through a header of ours."""
    own = {path for name in includes(file) for path in (file.parent / name, CSRC / name) if path.is_file()}
    return any(name.startswith(("torch/", "ATen/", "c10/")) for name in includes(file)) or any(
        map(reaches_torch, own)
    )


def test_every_module_has_a_stage():
    assert {module_of(file) for file in python_files()} <= set(STAGE_OF)


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_come_from_no_later_stage(file):
    module = module_of(file)
    package = ".".join(file.relative_to(ROOT).parent.parts)
    later = {
        name for name in imported_modules(file.read_text(), package) if STAGE_OF[name] > STAGE_OF[module]
    }
    assert not later, f"{module} must not import {sorted(later)}"


def test_reference_stands_alone():
    assert imported_modules((PACKAGE / "reference.py").read_text()) <= {"_validate"}


@pytest.mark.parametrize(
    "source, package, modules",
    [
        ("import jackpot_kernels as jk", "jackpot_kernels", {"__init__"}),
        ("from jackpot_kernels import layers, sparsity", "jackpot_kernels", {"layers", "__init__"}),
        ("def f():\n    from jackpot_kernels.search.optimizer import SRPopup", "jackpot_kernels", {"search"}),
        ("from ..layers import MaskedLinear", "jackpot_kernels.ops", {"layers"}),
        ("from . import functional", "jackpot_kernels", {"functional"}),
        ("import torch.nn.functional", "jackpot_kernels", set()),
    ],
)
def test_parser_sees_every_form_of_import(source, package, modules):
    assert imported_modules(source, package) == modules


def test_kernels_include_no_torch_headers():
    files = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"})
    kernels = [
        file
        for file in files
        if file.relative_to(CSRC).as_posix() not in HOST_CODE
        and "STABLE_TORCH_LIBRARY" not in file.read_text()
    ]
    assert kernels
    assert [str(file.relative_to(CSRC)) for file in kernels if reaches_torch(file)] == []
