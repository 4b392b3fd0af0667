"""Build the compiled extensions ``jackpot_kernels._C`` and, where nvcc is found, ``jackpot_kernels._C_cuda``.

All else on the package stands in pyproject.toml.

``JACKPOT_CUDA=0`` leaves CUDA out, ``JACKPOT_CUDA_ARCHS="80 90a"`` names other targets than the usual ones.
"""

import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ModuleNotFoundError as error:
    raise SystemExit(
        "jackpot_kernels compiles against an installed torch, which is missing: "
        "run `pip install 'torch>=2.10' 'setuptools>=77' ninja` first"
    ) from error

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build/objects")
FACTS_HEADER = OBJECTS / "build_facts.h"
# By path, for the package itself cannot be imported before its extension stands.
LOADER = runpy.run_path(str(ROOT / "jackpot_kernels/_extension.py"))


def files(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def extension(name: str, *sources: str, **settings: list[str]) -> Extension:
    return CppExtension(
        f"jackpot_kernels.{name}",
        files(*sources),
        depends=[*files("csrc/**/*.h"), str(FACTS_HEADER)],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / OBJECTS), *settings.pop("include_dirs", [])],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)],
        # Same bits everywhere: a fused multiply-add happens where the source asks for one, nowhere else.
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"],
        py_limited_api=True,
        **settings,
    )


@functools.cache
def nvcc() -> str | None:
    """Return the CUDA compiler, or None after saying why there is none."""
    if os.environ.get("JACKPOT_CUDA") == "0":
        reason = "JACKPOT_CUDA is 0"
    elif found := shutil.which("nvcc") or shutil.which(
        f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    ):
        return found
    else:
        reason = "no nvcc was found"
    print(f"jackpot_kernels: {reason}, building for the CPU only", file=sys.stderr)
    return None


def cuda_archs() -> list[str]:
    """Return the targets, such as sm_90a, and last the one that later devices compile the kernels from."""
    if not nvcc():
        return []
    chosen = os.environ.get("JACKPOT_CUDA_ARCHS", "").replace(";", " ").split()
    if not chosen:
        answer = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True)
        chosen = [
            arch for arch in ("80", "90a", "100") if f"compute_{arch.rstrip('a')}" in answer.stdout.split()
        ]
    newest = max((arch.rstrip("a") for arch in chosen), key=int)
    return [*(f"sm_{arch}" for arch in chosen), f"compute_{newest}"]


def cuda_flags() -> list[str]:
    *targets, newest = cuda_archs()
    codes = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in targets]
    return [
        *("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"),
        *codes,
        f"-gencode=arch={newest},code={newest}",
    ]


def cuda_home() -> Path:
    """Return the toolkit that nvcc, perhaps a script on the path, belongs to."""
    answer = subprocess.run(
        [nvcc(), "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    (top,) = re.findall(r"^#\$ TOP=(.*?)\s*$", answer.stderr, re.MULTILINE)
    return Path(top).resolve()


def cuda_object(source: str) -> Path:
    return OBJECTS / f"{source}.o"


def compile_cuda(source: str) -> None:
    """Compile one file of kernels, unless it was compiled with these flags after its last change."""
    target = cuda_object(source)
    command = [nvcc(), *cuda_flags(), "-c", source, "-o", str(target)]
    used = target.with_suffix(".command")
    inputs = [
        ROOT / source,
        *ROOT.glob("csrc/*.h"),
        *ROOT.glob("csrc/cuda/*.h"),
        *ROOT.glob("csrc/cuda/*.cuh"),
    ]
    newest = max(path.stat().st_mtime for path in inputs)
    known = used.exists() and used.read_text() == str(command)
    if known and target.exists() and target.stat().st_mtime > newest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True, cwd=ROOT)
    used.write_text(str(command))


def extensions() -> list[Extension]:
    built = [extension("_C", "csrc/ops.cpp", "csrc/cpu/*.cpp")]
    if nvcc():
        home = cuda_home()
        cuda = extension(
            "_C_cuda",
            "csrc/cuda/*.cpp",
            include_dirs=[str(home / "include")],
            extra_objects=[str(cuda_object(source)) for source in files("csrc/cuda/*.cu")],
            library_dirs=[str(home / folder) for folder in ("lib64", "lib") if (home / folder).is_dir()],
            # Part of the library, so that it works beside any CUDA that torch brings along.
            libraries=["cudart_static", "dl", "rt", "pthread"],
            # Symbols are looked for in what a library names: libtorch, of which this one uses nothing else,
            # brings along the part of torch that knows the current stream.
            extra_link_args=["-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"],
        )
        built.append(cuda)
    return built


class BuildWithFacts(BuildExtension):
    """Compiles the extensions after writing down what it is built from, for ``jackpot::build_facts``."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One folder for every kind of build, so that the next one compiles only what changed.
        self.build_temp = str(OBJECTS)

    def build_extensions(self) -> None:
        compiler = subprocess.run([get_cxx_compiler(), "--version"], capture_output=True, text=True)
        facts = {
            "version": self.distribution.get_version(),
            "digest": LOADER["source_digest"](ROOT / "csrc"),
            "compiler": compiler.stdout.partition("\n")[0],
            "torch": torch.__version__,
            "cuda_archs": cuda_archs(),
        }
        # A JSON string is also a C string literal, so the second dumps quotes the first.
        text = f"#define JACKPOT_BUILD_FACTS {json.dumps(json.dumps(facts))}\n"
        if not FACTS_HEADER.exists() or FACTS_HEADER.read_text() != text:
            OBJECTS.mkdir(parents=True, exist_ok=True)
            FACTS_HEADER.write_text(text)
        if nvcc():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_cuda, files("csrc/cuda/*.cu")))
        super().build_extensions()


LOADER["require_torch"](torch.__version__)
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWithFacts})
