"""Build the compiled extension ``jackpot_kernels._C``; all else on the package stands in pyproject.toml."""

import json
import runpy
import subprocess
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


def cpu_extension() -> Extension:
    return CppExtension(
        "jackpot_kernels._C",
        files("csrc/ops.cpp", "csrc/cpu/*.cpp"),
        depends=[*files("csrc/**/*.h"), str(FACTS_HEADER)],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / OBJECTS)],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)],
        # Same bits everywhere: a fused multiply-add happens where the source asks for one, nowhere else.
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"],
        py_limited_api=True,
    )


class BuildWithFacts(BuildExtension):
    """Compiles the extension after writing down what it is built from, for ``jackpot::build_facts``."""

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
            "cuda_archs": [],
        }
        # A JSON string is also a C string literal, so the second dumps quotes the first.
        text = f"#define JACKPOT_BUILD_FACTS {json.dumps(json.dumps(facts))}\n"
        if not FACTS_HEADER.exists() or FACTS_HEADER.read_text() != text:
            OBJECTS.mkdir(parents=True, exist_ok=True)
            FACTS_HEADER.write_text(text)
        super().build_extensions()


LOADER["require_torch"](torch.__version__)
setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": BuildWithFacts})
