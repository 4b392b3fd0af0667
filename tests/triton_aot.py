"""Compile the Triton kernels for devices that need not be there, and print what came out.

    python tests/triton_aot.py SHARD SHARDS

Prints a JSON list: of each variant and architecture its bytes of shared memory, registers, bytes of stack and
local memory in a thread, the names of the tensor-core instructions, and how often registers are stored to
shared memory before the last of these.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module

ARCHITECTURES = (80, 90, 100)
MODULES = ("masked_linear", "masked_conv", "masked_conv_boxes", "masked_conv_depthwise")
TENSOR_CORE_INSTRUCTION = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma"
SHARED_STORE = r"st\.shared(?!::cluster)|stmatrix"


def collect():
    """Return each module's name with each of its variants and each architecture to compile it for."""
    modules = [(name, import_module(f"jackpot_kernels.kernels.{name}")) for name in MODULES]
    return [
        (name, variant, architecture)
        for name, module in modules
        for variant in module.variants()
        for architecture in ARCHITECTURES
        if architecture >= variant.minimum_architecture
    ]


def build(variant, architecture):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: (i,) for i, name in enumerate(variant.kernel.arg_names)}
    options = variant.config.options
    constants = variant.constants | variant.config.values
    source = ASTSource(
        variant.kernel,
        variant.signature,
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in variant.multiples_of_16},
    )
    options = {name: value for name, value in options.items() if name not in variant.config.values}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(cubin):
    """Return what cuobjdump says of a kernel: REG, STACK, SHARED, LOCAL."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", answer.stdout + answer.stderr)}


def facts(module, variant, architecture):
    built = build(variant, architecture)
    used = usage(built.asm["cubin"])
    *products, _ = re.split(TENSOR_CORE_INSTRUCTION, built.asm["ptx"])
    return {
        "module": module,
        "name": variant.name,
        "architecture": architecture,
        "shared": built.metadata.shared,
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "tensor_cores": sorted(set(re.findall(TENSOR_CORE_INSTRUCTION, built.asm["ptx"]))),
        "shared_stores": len(re.findall(SHARED_STORE, "".join(products))),
    }


if __name__ == "__main__":
    shard, shards = map(int, sys.argv[1:])
    print(json.dumps([facts(*each) for each in collect()[shard::shards]]))
