"""``jackpot evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from jackpot_kernels.cli.common import build_data, build_model, choose_device, fail, one_sentence, print_table


def evaluate(
    file: Annotated[Path, typer.Argument(help="The jackpot file.")],
    model: Annotated[str, typer.Option(help="Known name or module:callable that returns the plain network.")],
    data: Annotated[str, typer.Option(help="Known name or module:callable that returns (train, test).")],
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Load a jackpot file into a fresh network; print accuracy, sparsity and size."""
    with one_sentence():
        from jackpot_kernels.data import Batches, DataError
        from jackpot_kernels.files import load_jackpot
        from jackpot_kernels.search import evaluation

        if not file.is_file():
            fail(f"file must be a jackpot file, got {file}, which is no file")
        place = choose_device(device)
        network = build_model(model)
        info = load_jackpot(file, network)
        network = network.to(place)
        test = Batches(build_data(data)[1], batch_size, place)
        evaluation.require_fit(network, test)
    try:
        score = evaluation.evaluate(network, test)
    except DataError as error:
        fail(str(error))
    size = file.stat().st_size
    dense = sum(tensor.nbytes for tensor in network.state_dict().values())
    rows = [
        ("accuracy", f"{score.accuracy:.2%}"),
        ("loss", f"{score.loss:.4f}"),
        ("sparsity, masked layers", f"{info.sparsity.masked:.2%}"),
        ("sparsity, all weights", f"{info.sparsity.overall:.2%}"),
        ("file", f"{size:,} bytes"),
        ("dense network", f"{dense:,} bytes"),
        ("file / dense", f"{size / dense:.1%}"),
        ("source", info.source or "not recorded"),
    ]
    print_table(["", ""], rows, title=str(file))
