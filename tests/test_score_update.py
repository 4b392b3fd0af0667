"""The score update, bit for bit, against the NumPy oracle and `reference.py`."""

import os
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jackpot_kernels import pack_mask, reference
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import new_workspace

SIZES = (1, 15, 16, 17, 31, 33, 4096, 4097, 20_000)


class Case:
    """Scores, momenta, gradients and masks of several layers, drawn from a seed."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = SIZES) -> None:
        rng = np.random.default_rng(seed)
        # Magnitudes from denormal to large: cancellation, underflow and rounding all occur.
        draw = [rng.standard_normal((3, n)) * 10.0 ** rng.integers(-40, 10, (3, n)) for n in sizes]
        layers = [np.clip(d, -1e30, 1e30).astype(np.float32) for d in draw]
        self.scores, self.momenta, self.grads = (
            [torch.from_numpy(layer[i].copy()) for layer in layers] for i in range(3)
        )
        self.masks = [pack_mask(torch.from_numpy(rng.random(n) < 0.1)) for n in sizes]
        columns = [rng.random(len(sizes)) for _ in range(4)]
        nesterov = rng.integers(0, 2, len(sizes))
        rows = np.stack([columns[0], columns[1], columns[2] * 1e-3, nesterov, columns[3]], 1)
        self.hyper = torch.from_numpy(rows.astype(np.float32))  # [L, 5]
        self.control = torch.zeros(3, dtype=torch.int64)

    def tensors(self) -> list[Tensor]:
        return [*self.scores, *self.momenta, self.control]

    def run(self, **options: object) -> None:
        score_update_(self.scores, self.momenta, self.grads, self.masks, self.hyper, self.control, **options)


@given(seed=st.integers(0, 2**32 - 1))
def test_equals_the_oracle_bit_for_bit(seed: int) -> None:
    case, before = Case(seed), Case(seed)
    case.run()
    for i, row in enumerate(before.hyper.tolist()):
        scores, momentum, grad = (t[i].numpy() for t in (before.scores, before.momenta, before.grads))
        with np.errstate(all="ignore"):
            wanted = oracle.update(scores, momentum, grad, (*row[:3], bool(row[3]), row[4]))
        assert np.array_equal(wanted[0].view(np.int32), case.scores[i].numpy().view(np.int32))
        assert np.array_equal(wanted[1].view(np.int32), case.momenta[i].numpy().view(np.int32))
    assert case.control.tolist() == [1, 0, 0]


def test_reference_and_workspace_give_the_same_bits() -> None:
    case, with_workspace, wanted = Case(1), Case(1), Case(1)
    case.run()
    with_workspace.run(workspace=new_workspace(case.scores))
    reference.score_update_(wanted.scores, wanted.momenta, wanted.grads, wanted.hyper, wanted.control)
    assert all(map(torch.equal, case.tensors(), wanted.tensors()))
    assert all(map(torch.equal, case.tensors(), with_workspace.tensors()))


def test_bits_do_not_depend_on_what_torch_flushes() -> None:
    case, wanted = Case(2), Case(2)
    wanted.run()
    torch.set_flush_denormal(True)
    try:
        case.run()
    finally:
        torch.set_flush_denormal(False)
    bits = [[t.view(torch.int32) for t in c.scores + c.momenta] for c in (case, wanted)]
    assert all(map(torch.equal, *bits))


def test_agrees_with_torch_sgd() -> None:
    scores, grad = torch.randn(1000), torch.randn(1000)
    parameter = torch.nn.Parameter(scores.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    momentum, control = torch.zeros(1000), torch.zeros(3, dtype=torch.int64)
    masks = [pack_mask(torch.ones(1000, dtype=torch.bool))]
    for _ in range(5):
        parameter.grad = grad
        optimizer.step()
        hyper = torch.tensor([[0.1, 0.9, 5e-4, 1, 1]])
        score_update_([scores], [momentum], [grad], masks, hyper, control)
    torch.testing.assert_close(scores, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", range(len(SIZES)))
def test_one_value_that_is_not_finite_skips_the_whole_step(value: float, layer: int) -> None:
    case, before = Case(2), Case(2)
    case.grads[layer][-1] = value
    case.run(workspace=new_workspace(case.scores))
    assert all(map(torch.equal, case.scores + case.momenta, before.scores + before.momenta))
    assert case.control.tolist() == [0, 1, 1]
    case.grads[layer][-1] = 0
    case.run()
    assert case.control.tolist() == [1, 1, 0]


def test_found_inf_skips_the_whole_step() -> None:
    case, before = Case(3), Case(3)
    case.run(found_inf=torch.tensor(1.0))
    assert all(map(torch.equal, case.scores, before.scores))
    assert case.control.tolist() == [0, 1, 1]
    case.run(found_inf=torch.tensor(0.0))
    assert case.control.tolist() == [1, 1, 0]


def test_a_layer_without_gradient_stays() -> None:
    case, before = Case(4), Case(4)
    case.grads[3] = torch.empty(0)
    case.run(workspace=new_workspace(case.scores))
    changed = [not torch.equal(a, b) for a, b in zip(case.scores, before.scores, strict=True)]
    assert changed == [i != 3 for i in range(len(SIZES))]
    assert torch.equal(case.momenta[3], before.momenta[3])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_bits(threads: int) -> None:
    case, wanted = Case(5), Case(5)
    wanted.run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case.run()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, case.tensors(), wanted.tensors()))


@pytest.mark.parametrize("capability", ["scalar", "avx2", "avx512"])
def test_instruction_sets_give_the_same_bits(capability: str) -> None:
    """The whole selection suite runs again on each instruction set that this machine has."""
    environment = {**os.environ, "JACKPOT_CPU": capability}
    probe = "import torch, jackpot_kernels; print(torch.ops.jackpot.cpu_capability())"
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if found.returncode:
        assert f"got {capability}" in found.stderr
        pytest.skip(f"this processor has no {capability}")
    assert found.stdout.strip() == capability
    names = ("pack_mask", "score_update", "swap", "threshold")
    suite = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *suite, "-k", "not instruction_sets"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_refuses_what_does_not_fit() -> None:
    case = Case(6)
    for name, wrong in {
        "scores": [t.double() for t in case.scores],
        "momenta": case.momenta[:-1],
        "grads": [t[:-1] for t in case.grads],
        "masks": [torch.zeros(1, dtype=torch.int32)] * len(SIZES),
        "hyper": case.hyper[:, :4],
        "control": case.control[:2],
    }.items():
        broken, before = Case(6), Case(6)
        setattr(broken, name, wrong)
        with pytest.raises(RuntimeError, match=name):
            broken.run()
        same = [n for n in ("scores", "momenta", "control") if n != name]
        for attribute in same:
            got, kept = getattr(broken, attribute), getattr(before, attribute)
            assert all(map(torch.equal, got, kept))
    with pytest.raises(RuntimeError, match="workspace must be made for these layers"):
        case.run(workspace=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["momenta", "grads", "masks", "hyper", "control", "found_inf", "workspace"])
def test_refuses_the_meta_device_for_some_tensors_only(name: str) -> None:
    case = Case(6)
    options = {"found_inf": torch.zeros(()), "workspace": new_workspace(case.scores)}
    value = options.get(name, getattr(case, name, None))
    on_meta = value.to("meta") if isinstance(value, Tensor) else [tensor.to("meta") for tensor in value]
    if name in options:
        options[name] = on_meta
    else:
        setattr(case, name, on_meta)
    with pytest.raises(ValueError, match=f"^{name} must be on cpu, got meta$"):
        case.run(**options)


def test_operator_passes_opcheck() -> None:
    case = Case(7, (5, 40))
    workspace = new_workspace(case.scores)
    arguments = (case.scores, case.momenta, case.grads, case.masks, case.hyper, case.control)
    torch.library.opcheck(torch.ops.jackpot.score_update_, (*arguments, None, workspace, False))
