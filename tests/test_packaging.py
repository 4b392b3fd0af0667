import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import jackpot_kernels as jk
from jackpot_kernels import _extension

ROOT = Path(__file__).parent.parent
COMMAND = ROOT / "jackpot_kernels" / "cli" / "jackpot"


def python(script: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return answer.stdout


@pytest.mark.parametrize("name", jk.__all__)
def test_public_names_exist_and_are_documented(name):
    public = getattr(jk, name)
    if inspect.isroutine(public) or inspect.isclass(public):
        assert public.__doc__, f"{name} has no docstring"


def test_import_is_lean():
    script = """
import json, sys
import torch
before = set(sys.modules)
import jackpot_kernels
print(json.dumps({"cuda": torch.cuda.is_initialized(), "modules": sorted(set(sys.modules) - before)}))
"""
    facts = json.loads(python(script))
    assert not facts["cuda"]
    loaded = {name.partition(".")[0] for name in facts["modules"]}
    assert not loaded & {"typer", "rich", "matplotlib", "triton", "sklearn", "jinja2", "pytest"}


def test_wheel_serves_every_python():
    script = """
import json, setuptools
from distutils.core import run_setup
distribution = run_setup("setup.py", ["--quiet"], stop_after="config")
wheel, build = (distribution.get_command_obj(name) for name in ("bdist_wheel", "build_ext"))
wheel.ensure_finalized(), build.ensure_finalized()
filename = build.get_ext_filename("jackpot_kernels._C")
print(json.dumps([distribution.get_version(), wheel.get_tag()[:2], filename]))
"""
    built, tag, filename = json.loads(python(script).splitlines()[-1])
    assert built == version("jackpot_kernels") == jk.__version__
    assert tag == ["cp310", "abi3"]
    assert Path(filename) == Path("jackpot_kernels") / _extension.LIBRARY.name


needs_cuda_build = pytest.mark.skipif(
    not _extension.build_facts()["cuda_archs"], reason="the extension was built without CUDA kernels"
)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize(
    "library", [_extension.LIBRARY, pytest.param(_extension.CUDA_LIBRARY, marks=needs_cuda_build)]
)
def test_library_uses_only_the_stable_interface(library):
    answer = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in answer.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    # Anything C++ of torch is mangled, and its namespaces are at, c10 and torch.
    assert [symbol for symbol in symbols if re.match(r"_Z.*NK?(2at|3c10|5torch)", symbol)] == []
    # The runtime is part of the library, and a driver is not needed before there is a device.
    assert not any(re.match(r"cuda|cu[A-Z]", symbol) for symbol in symbols)
    assert b"libpython" not in library.read_bytes()


@needs_cuda_build
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_cuda_library_registers_every_operator_of_a_device(tmp_path):
    """Where torch has no CUDA, the one function that it lacks is lent by a stub."""
    stub = tmp_path / "stub.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", stub]
    subprocess.run(command, input=source, text=True, check=True)
    script = f"""
import ctypes, json, torch, jackpot_kernels
from jackpot_kernels import _extension
ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library(str(_extension.CUDA_LIBRARY))
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("jackpot::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps([sorted(name for name in names if has(name, key)) for key in ("CPU", "CUDA")]))
"""
    cpu, cuda = json.loads(python(script))
    assert cpu and cuda == cpu


@needs_cuda_build
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_cuda_library_names_the_library_that_knows_the_stream():
    """Its symbols are looked for in what it names, and not in all that torch has loaded."""
    command = ["readelf", "--dynamic", _extension.CUDA_LIBRARY]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "[libtorch.so]" in answer.stdout


@pytest.mark.parametrize("wish", ["0", ""])
def test_build_says_when_it_leaves_cuda_out(wish, tmp_path):
    """Nothing is built: the path holds no nvcc, or the person wants none."""
    env = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere", "JACKPOT_CUDA": wish, "HOME": str(tmp_path)}
    script = """
from distutils.core import run_setup
distribution = run_setup("setup.py", ["--quiet"], stop_after="config")
print([extension.name for extension in distribution.ext_modules])
"""
    answer = subprocess.run(
        [sys.executable, "-c", "import setuptools" + script],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    reason = "JACKPOT_CUDA is 0" if wish else "no nvcc was found"
    assert f"jackpot_kernels: {reason}, building for the CPU only\n" in answer.stderr
    assert answer.stdout.endswith("['jackpot_kernels._C']\n")


def test_build_facts_name_what_was_built():
    facts = _extension.build_facts()
    assert set(facts) == {"version", "digest", "compiler", "torch", "cuda_archs"}
    assert facts["digest"] == _extension.source_digest(ROOT / "csrc")


def refusal() -> str:
    with pytest.raises(ImportError) as caught:
        _extension.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_extension(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "_C.abi3.so")
    assert refusal() == (
        f"jackpot_kernels has no compiled extension at {tmp_path / '_C.abi3.so'}: "
        f"run `pip install --no-build-isolation -e .` in {ROOT}"
    )
    monkeypatch.setattr(_extension, "CHECKOUT", tmp_path)
    assert "run `pip install --no-build-isolation .` in a checkout" in refusal()


def test_extension_that_is_no_library(monkeypatch, tmp_path):
    foreign = tmp_path / "_C.abi3.so"
    foreign.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "LIBRARY", foreign)
    assert refusal().startswith(f"the compiled extension {foreign} cannot be loaded (")


@pytest.mark.parametrize(
    "change",
    [
        lambda csrc: (csrc / "ops.cpp").write_text("// edited\n"),
        lambda csrc: (csrc / "new.h").write_text(""),
        lambda csrc: (csrc / "order.h").rename(csrc / "orders.h"),
        lambda csrc: (csrc / "order.h").unlink(),
    ],
)
def test_stale_sources(monkeypatch, tmp_path, change):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(_extension, "CHECKOUT", tmp_path)
    (tmp_path / "csrc" / "notes.txt").write_text("no source")
    _extension.load()
    change(tmp_path / "csrc")
    assert refusal() == (
        f"the compiled extension is stale, {tmp_path / 'csrc'} has changed since: "
        f"run `pip install --no-build-isolation -e .` in {tmp_path}"
    )


def test_stale_version(monkeypatch):
    monkeypatch.setattr(_extension, "version", lambda name: "99.0")
    assert f"stale, built for {jk.__version__} and not 99.0: run `pip install" in refusal()


def test_package_that_is_not_installed(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_extension, "version", absent)
    assert refusal().startswith("jackpot_kernels is on the path but not installed: run `pip install")


@pytest.mark.parametrize("old", ["2.9.1+cpu", "1.13.0", "2.9.0a0+git123"])
def test_old_torch(monkeypatch, old):
    monkeypatch.setattr(torch, "__version__", old)
    assert refusal() == f"jackpot_kernels needs torch >= 2.10, got {old}: run `pip install 'torch>=2.10'`"


def test_type_marker():
    assert (ROOT / "jackpot_kernels" / "py.typed").is_file()


def test_command_is_installed(tmp_path):
    script = """
import setuptools  # brings distutils along where Python no longer has it
from distutils.core import run_setup
print(*run_setup("setup.py", ["--quiet"], stop_after="config").scripts)
"""
    assert python(script).split() == [COMMAND.relative_to(ROOT).as_posix()]
    answer = subprocess.run(
        [sys.executable, shutil.copy(COMMAND, tmp_path), "--help"], capture_output=True, text=True
    )
    assert answer.returncode == 0 and "pretrain" in answer.stdout


@pytest.fixture
def copied_package(tmp_path):
    """The package in a checkout of its own, with the compiled extension and its sources."""
    for folder in ("jackpot_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "setup.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda at: (at / "jackpot_kernels" / "_C.abi3.so").unlink(), "has no compiled extension at"),
        (lambda at: (at / "csrc" / "ops.cpp").write_text("// edited\n"), "is stale, .* has changed since"),
    ],
    ids=["missing", "stale"],
)
def test_command_without_its_extension_says_one_sentence(copied_package, change, sentence):
    change(copied_package)
    answer = subprocess.run(
        [sys.executable, shutil.copy(COMMAND, copied_package), "env"],
        env={**os.environ, "PYTHONPATH": str(copied_package)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2 and answer.stdout == ""
    assert re.fullmatch(f"jackpot: .*{sentence}.*: run `pip install .* in {copied_package}\n", answer.stderr)
