"""``jackpot search``."""

from pathlib import Path
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

if TYPE_CHECKING:
    from jackpot_kernels.search.epochs import Record
    from jackpot_kernels.search.folder import RunFolder
    from jackpot_kernels.search.loop import Search
    from jackpot_kernels.search.settings import SearchSettings


def search(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Known name or module:callable: a network.")] = None,
    data: Annotated[str | None, typer.Option(help="Known name or module:callable: (train, test).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of its weights.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("jackpot-search"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --output.")] = False,
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to remove, in [0, 1).")] = 0.9,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate of the scores; falls along a cosine.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Momentum of the scores.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the scores.")] = 5e-4,
    method: Annotated[
        str, typer.Option(help="sr-popup, or supermask, which wants --lr 100 --weight-decay 0.")
    ] = "sr-popup",
    criterion: Annotated[str, typer.Option(help="magnitude, snip, grasp or random.")] = "magnitude",
    budget: Annotated[str, typer.Option(help="global, magnitude, uniform or erk.")] = "global",
    scope: Annotated[str, typer.Option(help="Weights compete by layer, or global.")] = "layer",
    schedule: Annotated[str, typer.Option(help="quartic, inverse, constant or single.")] = "quartic",
    pairs: Annotated[str, typer.Option(help="best, inverse or random.")] = "best",
    compat: Annotated[str | None, typer.Option(help="authors: do as their released code does.")] = None,
    eta: Annotated[float, typer.Option(help="First score of pruned weights.")] = 0.99,
    keep_last_dense: Annotated[bool, typer.Option(help="Keep all weights of the last layer.")] = True,
    normalization: Annotated[str, typer.Option(help="stats, frozen or recalibrate.")] = "stats",
    random_scores: Annotated[bool, typer.Option(help="Start from random scores, as edge-popup.")] = False,
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    channels_last: Annotated[bool, typer.Option(help="Keep convolutions in that memory format.")] = False,
    compile: Annotated[bool, typer.Option(help="Take steps through torch.compile.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the data and all that is drawn.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Epochs from one test to the next.")] = 1,
    log_every: Annotated[int, typer.Option(help="Steps from one line of the log to the next.")] = 10,
    workers: Annotated[int, typer.Option(help="Processes that load data which is not in tensors.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Search a mask in a pre-trained network; Ctrl-C saves, --resume goes on, bit for bit."""
    with one_sentence():
        from jackpot_kernels.search.folder import SearchFolder
        from jackpot_kernels.search.loop import Search
        from jackpot_kernels.search.settings import SearchSettings

    def build(settings: "SearchSettings", names: Names) -> "Search":
        place = choose_device(device, search=True)
        train, test = build_data(names["data"])
        return Search(build_model(names["model"], weights), train, test, settings, place)

    folder = SearchFolder(output)
    found, names = run_in_folder(context, folder, SearchSettings, build, _swaps)
    _finish(found, folder, names)


def _swaps(record: "Record") -> str:
    return f"swaps {record['granted']} of {record['proposed']}"


def _finish(search: "Search", folder: "RunFolder", names: Names) -> None:
    """Save the jackpot, write the report and print where they are."""
    from jackpot_kernels.files import save_jackpot

    jackpot = folder.path / "jackpot.safetensors"
    with one_sentence(), writing("output", folder.path):
        save_jackpot(search.model, jackpot, source=names["model"])
        from jackpot_kernels.report import write_search_report

        records = folder.records()
        facts = {**names, "device": str(search.device)}
        report = write_search_report(records, folder.path, facts=facts)
    start, last, end = records[0], records[-2], records[-1]
    rows = [
        ("accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
        ("accuracy, dense network", f"{start['dense_accuracy']:.2%}"),
        ("sparsity, masked layers", f"{end['sparsity_masked']:.2%}"),
        ("sparsity, all weights", f"{end['sparsity_overall']:.2%}"),
        ("jackpot", str(jackpot)),
        ("report", str(report)),
    ]
    if last["skipped_steps"]:
        rows.append(("steps skipped, gradients not finite", f"{last['skipped_steps']:,} of {last['step']:,}"))
    print_table(["", ""], rows)
