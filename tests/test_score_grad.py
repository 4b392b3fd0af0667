"""The scores' gradient: the effective weight's gradient times the weight, whatever their order and dtype."""

import pytest
import torch
from torch.library import opcheck

from jackpot_kernels.ops.score_grad import score_grad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAST = torch.channels_last


def contiguous(*shape):
    return torch.randn(shape)


# Gradients and weights; more dimensions that do not merge than a launch has, too.
CASES = {
    "matrix": lambda: (contiguous(130, 257), contiguous(130, 257)),
    "transposed": lambda: (contiguous(70, 300).t(), contiguous(300, 70)),
    "channels_last": lambda: [contiguous(6, 150, 3, 3).to(memory_format=LAST) for _ in range(2)],
    "one channels_last": lambda: (contiguous(6, 40, 5, 5).to(memory_format=LAST), contiguous(6, 40, 5, 5)),
    "pointwise": lambda: (contiguous(64, 32, 1, 1).to(memory_format=LAST), contiguous(64, 32, 1, 1)),
    "depthwise": lambda: [contiguous(64, 1, 3, 3).to(memory_format=LAST) for _ in range(2)],
    "five dimensions": lambda: (
        contiguous(3, 4, 2, 3, 5).to(memory_format=torch.channels_last_3d),
        contiguous(5, 3, 2, 4, 3).permute(4, 3, 2, 1, 0),
    ),
    "every other": lambda: (contiguous(8, 6, 6, 10)[:, ::2, ::2, ::2], contiguous(8, 3, 3, 5)),
    "one": lambda: (contiguous(1, 1), contiguous(1, 1)),
    "none": lambda: (contiguous(0, 5), contiguous(0, 5)),
}


def operands(case, of_grad, of_weight, device):
    grad, weight = CASES[case]()
    return grad.to(device, of_grad), weight.to(device, of_weight)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("of_grad", (*FLOATS, torch.float64), ids=str)
@pytest.mark.parametrize("of_weight", (*FLOATS, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_the_product_rounded_once(case, of_grad, of_weight, device):
    grad, weight = operands(case, of_grad, of_weight, device)
    wanted = grad.float() * weight.float()
    got = score_grad(grad, weight)
    assert got.dtype == torch.float32 and got.is_contiguous() and got.device == grad.device
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["matrix", "one channels_last", "five dimensions"])
def test_opcheck(case, device):
    opcheck(torch.ops.jackpot.score_grad.default, operands(case, torch.bfloat16, torch.float32, device))


@pytest.mark.gpu
def test_what_does_not_fit_is_refused():
    ones = torch.ones(4, 6, device="cuda")
    for weight, message in (
        (ones[:3], "grad must have the weight's shape"),
        (ones.int(), "weight must be float32, float64, bfloat16 or float16"),
        (ones.double(), "weight must be float32, bfloat16 or float16, got float64"),
        (ones.cpu(), "weight must be on one device with the others"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.jackpot.score_grad(ones, weight)
