"""Every kernel under every configuration compiles for the devices that are served, and fits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_aot import collect

HERE = Path(__file__).parent
SHARDS = 2
KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
TENSOR_CORES = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma", "mma.sync"}}


@pytest.fixture(scope="module")
def compiled():
    """What came out for each module, variant and architecture, without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "triton_aot.py"]
    running = [
        subprocess.Popen(
            [*command, str(shard), str(SHARDS)], env=env, cwd=HERE.parent, stdout=subprocess.PIPE
        )
        for shard in range(SHARDS)
    ]
    try:
        answers = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * SHARDS
    facts = [fact for answer in answers for fact in json.loads(answer)]
    return {(fact["module"], fact["name"], fact["architecture"]): fact for fact in facts}


def test_names_differ():
    names = [(module, variant.name, architecture) for module, variant, architecture in collect()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "module, variant, architecture",
    [pytest.param(m, v, a, id=f"{m}: {v.name}, sm_{a}") for m, v, a in collect()],
)
def test_fits(compiled, module, variant, architecture):
    fact = compiled[module, variant.name, architecture]
    assert fact["shared"] <= SHARED_MEMORY[architecture]
    assert fact["stack"] == fact["local"] == 0, "registers are spilled to memory"
    assert fact["registers"] > 0
    if variant.tensor_cores:
        # Hopper's own instruction takes 64 rows; tiles of fewer are bound by the weights' bytes.
        few_rows = variant.config.values.get("BLOCK_P", 64) < 64
        assert set(fact["tensor_cores"]) & TENSOR_CORES[80 if few_rows else architecture]


# What is not copied 16 bytes at a time goes to shared memory through registers in any case.
THROUGH_REGISTERS = re.compile("unaligned|scattered|few channels")
MASKED = ("masked_matmul_kernel", "conv_fwd_kernel", "conv_dx_kernel", "boxed_conv_kernel")


@pytest.mark.parametrize(
    "module, variant, architecture",
    [
        pytest.param(m, v, a, id=f"{m}: {v.name}, sm_{a}")
        for m, v, a in collect()
        if v.kernel.__name__ in MASKED and v.tensor_cores and not THROUGH_REGISTERS.search(v.name)
        if a < 100  # which multiplies from a memory of its own
    ],
)
def test_a_masked_weight_stays_in_registers(compiled, module, variant, architecture):
    assert compiled[module, variant.name, architecture]["shared_stores"] == 0


def test_every_problem_has_a_configuration_for_devices_with_less_shared_memory(compiled):
    """Devices of capability 8.6, 8.9 and 12.0 have 99 KiB for a block."""
    least = {}
    for (module, name, architecture), fact in compiled.items():
        problem = module, re.sub(r", \d.*", "", name), architecture
        least[problem] = min(fact["shared"], least.get(problem, fact["shared"]))
    assert max(least.values()) <= 99 * KIB
