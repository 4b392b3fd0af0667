"""``jackpot pretrain``."""

import json
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from jackpot_kernels.cli.common import (
    build_data,
    build_model,
    choose_device,
    one_sentence,
    print_table,
    writing,
)
from jackpot_kernels.cli.resumable import Names, run_in_folder
from jackpot_kernels.files import write_whole

if TYPE_CHECKING:
    from jackpot_kernels.search.folder import RunFolder
    from jackpot_kernels.search.settings import TrainingSettings
    from jackpot_kernels.search.training import Training


def pretrain(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Known name or module:callable: a network.")] = None,
    data: Annotated[str | None, typer.Option(help="Known name or module:callable: (train, test).")] = None,
    output: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("jackpot-pretrain"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in --output.")] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 160,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 5e-4,
    nesterov: Annotated[bool, typer.Option(help="Nesterov's momentum.")] = False,
    schedule: Annotated[str, typer.Option(help="steps (a tenth at 1/2 and at 3/4) or cosine.")] = "steps",
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    channels_last: Annotated[bool, typer.Option(help="Keep convolutions in that memory format.")] = False,
    compile: Annotated[bool, typer.Option(help="Take steps through torch.compile.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first weights, the order of the data, all draws.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Epochs from one test to the next.")] = 1,
    log_every: Annotated[int, typer.Option(help="Steps from one line of the log to the next.")] = 10,
    workers: Annotated[int, typer.Option(help="Processes that load data which is not in tensors.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Train the dense network that a search starts from; Ctrl-C saves, --resume goes on, bit for bit."""
    with one_sentence():
        import torch

        from jackpot_kernels.search.folder import TrainingFolder
        from jackpot_kernels.search.settings import TrainingSettings
        from jackpot_kernels.search.training import Training

    def build(settings: "TrainingSettings", names: Names) -> "Training":
        place = choose_device(device)
        train, test = build_data(names["data"])
        torch.manual_seed(settings.seed)
        return Training(build_model(names["model"]), train, test, settings, place)

    folder = TrainingFolder(output)
    trained, names = run_in_folder(context, folder, TrainingSettings, build)
    _finish(trained, folder, names)


def _finish(training: "Training", folder: "RunFolder", names: Names) -> None:
    """Save the weights, write the report and print where they are."""
    weights = folder.path / "dense.safetensors"
    with one_sentence(), writing("output", folder.path):
        records = folder.records()
        last = records[-2]
        write_whole(weights, _checkpoint(training, names, last["test_accuracy"]))
        from jackpot_kernels.report import write_training_report

        report = write_training_report(records, folder.path, facts={**names, "device": str(training.device)})
    # JSON has no word for NaN and infinities.
    loss = "not finite" if last["test_loss"] is None else f"{last['test_loss']:.4f}"
    rows = [
        ("accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
        ("loss, last epoch", loss),
        ("weights", str(weights)),
        ("report", str(report)),
    ]
    print_table(["", ""], rows)
    model, data, file = map(quote, (names["model"], names["data"], str(weights)))
    typer.echo(f"next: jackpot search --model {model} --data {data} --weights {file}")


def _checkpoint(training: "Training", names: Names, accuracy: float) -> bytes:
    """Return the network's state dict as a safetensors file that says where it comes from."""
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory.
    state = {key: tensor.contiguous().clone() for key, tensor in training.model.state_dict().items()}
    record = {**names, "test_accuracy": accuracy, "settings": asdict(training.settings)}
    return save(state, metadata={"training": json.dumps(record)})
