"""A training step on a GPU: ``python -m benchmarks.bench_cuda_training_step`` prints a table and stores it.

Forward, loss, backward and ``SRPopup.step`` in one CUDA graph, against the same network trained densely by
torch's fused SGD in another. Both autocast to bfloat16 in channels_last and copy a batch into their graph.
The two take turns, round by round, each with some steps in a row as in training, where the host is ahead of
the device.
"""

import statistics
import sys
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jackpot_kernels as jk
from benchmarks.bench_cuda_search_step import averages, graphed, make_parser, measure_all, timed
from benchmarks.paper.runs import build
from benchmarks.searches import LR, MOMENTUM, SPARSITY, WEIGHT_DECAY
from jackpot_kernels.search import GraphedStep

# Name in the table: network, image size, batch, classes.
NETWORKS = {
    "ResNet-32 x2": ("resnet32-cifar10", 32, 256, 10),
    "VGG-19": ("vgg19-cifar10", 32, 256, 10),
    "ResNet-50": ("resnet50", 224, 256, 1000),
}
TINY = {"digits": ("digits", 8, 16, 10)}
# Steps in a row.
STEPS = 5

Step = Callable[[Tensor, Tensor], object]


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return F.cross_entropy(model(x), labels)


def dense_step(model: nn.Module, x: Tensor, labels: Tensor) -> Step:
    """Return a graphed step of torch's fused SGD."""
    sgd = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    inputs = x.clone(), labels.clone()

    def step() -> None:
        sgd.zero_grad()
        loss_of(model, *inputs).backward()
        sgd.step()

    replay = graphed(step)

    def call(x: Tensor, labels: Tensor) -> None:
        for to, tensor in zip(inputs, (x, labels), strict=True):
            to.copy_(tensor, non_blocking=True)
        replay()

    return call


def search_step(model: nn.Module, optimizer: jk.SRPopup) -> Step:
    """Return the step as ``jackpot search`` takes it."""
    return GraphedStep(optimizer, lambda x, labels: loss_of(model, x, labels))


def measure(network: str, size: int, batch: int, classes: int, rounds: int) -> dict[str, float]:
    """Return times in seconds and their ratio."""
    torch.manual_seed(0)
    dense = build(network).cuda().to(memory_format=torch.channels_last).train()
    channels = next(m for m in dense.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(batch, channels, size, size, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,), device="cuda")
    searched = jk.convert(deepcopy(dense))
    jk.initialize(searched, SPARSITY)
    weights = {name: layer.weight.clone() for name, layer in jk.masked_layers(searched).items()}
    warm_up = 10
    total_steps = warm_up + rounds * STEPS
    optimizer = jk.SRPopup(searched, LR, MOMENTUM, WEIGHT_DECAY, total_steps=total_steps)
    steps = {"search": search_step(searched, optimizer), "dense": dense_step(dense, x, labels)}
    for _ in range(warm_up):
        for step in steps.values():
            step(x, labels)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    scanned: list[Tensor] = []
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            several = timed(lambda step=step: [step(x, labels) for _ in range(STEPS)])
            seconds[name].append(several / STEPS)
        scanned.append(optimizer._stats[:, 4].sum())
    for name, layer in jk.masked_layers(searched).items():
        assert torch.equal(layer.weight, weights[name]), f"weight of {name} must keep its bits"
    ratios = [a / b for a, b in zip(seconds["search"], seconds["dense"], strict=True)]
    return {
        **averages(seconds),
        "search / dense": statistics.median(ratios),
        "layers": len(weights),
        "layers scanned again in a step": torch.stack(scanned).double().mean().item(),
        "steps skipped": optimizer.skipped_steps,
    }


def main() -> int:
    options = make_parser("cuda_training_step", __doc__, NETWORKS, rounds=50).parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_training_step needs a CUDA device")
    networks = TINY if options.quick else {name: NETWORKS[name] for name in options.networks}
    measures = {"training": lambda name: measure(*networks[name], options.rounds)}
    return measure_all("cuda_training_step", networks, measures, options)


if __name__ == "__main__":
    sys.exit(main())
