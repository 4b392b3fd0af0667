"""Check the paper's tables and figures: ``python -m benchmarks.paper table1 --scale reduced``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from benchmarks.markdown import markdown
from benchmarks.paper.execute import execute, missing, unavailable
from benchmarks.paper.experiments import EXPERIMENTS, runs_of
from benchmarks.paper.pages import name_of, write_report
from benchmarks.paper.results import Results
from benchmarks.paper.runs import Workshop
from benchmarks.paper.scales import SCALES, Scale
from benchmarks.paper.tables import Findings, table
from jackpot_kernels.cli.common import choose_device

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when all that was asked for has been run, 2 when it cannot be, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    scale = SCALES[options.scale]
    try:
        return _run(options, scale)
    except (ImportError, OSError, ValueError) as error:
        return _refuse(error)
    except typer.Exit as stopped:  # which has said why
        return stopped.exit_code
    except KeyboardInterrupt:
        print("stopped; the runs that had ended are kept, and the same command goes on", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, scale: Scale) -> int:
    device = str(choose_device(options.device, search=True))
    folder = options.output or RESULTS / f"paper-{scale.name}"
    seeds = options.seeds or scale.seeds
    results = Results(folder)
    if results.dropped:
        _say(f"{results.path} ended in half a line, which is dropped; its run is made again")
    names = [] if options.what == "report" else list(EXPERIMENTS) if options.what == "all" else [options.what]
    todo = missing(runs_of(names, scale, seeds), results, Workshop(folder, device))
    reasons = unavailable(todo)
    ready = [run for run in todo if run not in reasons]
    left = execute(ready, results, device, jobs=options.jobs, minutes=options.minutes, say=_say)
    pages = write_report(results, scale, seeds)
    for name in names:
        _show(name, Findings(results, scale, seeds))
    print("report:", *pages)
    if left:
        _say(f"no time for {len(left)} runs, first {left[0]}; the same command goes on")
    for reason in dict.fromkeys(reasons.values()):
        runs = [run for run, why in reasons.items() if why == reason]
        _say(f"{len(runs)} runs cannot be made here, first {runs[0]}: {reason}")
    return 2 if reasons else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument(
        "what", choices=[*EXPERIMENTS, "all", "report"], help="a table or figure; report shows what there is"
    )
    parser.add_argument(
        "--scale", choices=SCALES, default="reduced", help="full: the paper's; smoke: shows that it runs"
    )
    parser.add_argument("--seeds", type=_positive, help="of every search (default: the scale's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/paper-SCALE)")
    parser.add_argument(
        "--jobs", type=_positive, default=1, help="runs at once, each with its share of threads"
    )
    parser.add_argument("--minutes", type=float, help="start nothing that would probably end later")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _show(name: str, findings: Findings) -> None:
    print(f"\n{name_of(name)}: {EXPERIMENTS[name].title}\n", markdown(*table(name, findings)), "", sep="\n")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _refuse(error: Exception) -> int:
    _say(f"benchmarks.paper: {error}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
