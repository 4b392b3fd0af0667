"""The compiled CPU operators under AddressSanitizer and UBSan, on the tests of their bits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = (
    "test_pack_mask.py",
    "test_score_update.py",
    "test_search_step.py",
    "test_swap.py",
    "test_threshold.py",
)
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


def run(command: list[str], folder: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, its extension built with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized") / "checkout"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "*.egg-info", "results")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, CFLAGS=FLAGS, LDFLAGS=FLAGS)
    return folder


def runtime(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_no_error_is_found(checkout: Path) -> None:
    library = (checkout / "jackpot_kernels/_C.abi3.so").read_bytes()
    assert b"__asan_report_store" in library and b"__ubsan_handle" in library
    # Python itself is not sanitized, so the runtimes come first by preloading; it leaks by design.
    preload = " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so")))
    tests = [f"tests/{name}" for name in SUITE]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    selection = ["-k", "not instruction_sets and not opcheck"]
    printed = run([*command, *selection], checkout, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")
    assert " passed" in printed
