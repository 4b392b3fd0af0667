"""What nvcc makes of the kernels, for each target: no spills, no local memory, few registers."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("80", "90a", "100")

# The most that may be used. Above 64, fewer than 1024 threads fit a multiprocessor.
REGISTERS = {
    "pack_kernel": 40,
    "unpack_kernel": 32,
    "score_grad_rows_kernel": 64,
    "score_grad_tiles_kernel": 64,
    "check_kernel": 40,
    "update_kernel": 64,
    "select_kernel": 64,
    "scan_kernel": 64,
    "threshold_kernel": 64,
}

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_all(source: Path, folder: Path) -> str:
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", *codes, "-Xptxas=-v", "-Werror=all-warnings"]
    target = folder / f"{source.stem}.cubin.o"
    answer = subprocess.run([*command, "-c", source, "-o", target], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("cuda_compile")
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda source: compile_all(source, folder), SOURCES)
        yield [match.groupdict() for answer in answers for match in ENTRY.finditer(answer)]


def test_every_kernel_is_compiled_for_every_target(entries: list[dict[str, str]]) -> None:
    found = {(kernel, entry["target"]) for entry in entries for kernel in REGISTERS if is_of(entry, kernel)}
    assert found == {(kernel, target) for kernel in REGISTERS for target in TARGETS}
    assert len(entries) == len(found)


@pytest.mark.parametrize("kernel", REGISTERS)
def test_no_local_memory_and_few_registers(entries: list[dict[str, str]], kernel: str) -> None:
    for entry in entries:
        if is_of(entry, kernel):
            assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), entry
            assert int(entry["registers"]) <= REGISTERS[kernel], entry


def is_of(entry: dict[str, str], kernel: str) -> bool:
    return f"{len(kernel)}{kernel}E" in entry["name"]
