"""The commands and their names."""

import typer

from jackpot_kernels.cli.bench import bench
from jackpot_kernels.cli.demo import demo
from jackpot_kernels.cli.env import env
from jackpot_kernels.cli.evaluate import evaluate
from jackpot_kernels.cli.export import export
from jackpot_kernels.cli.pretrain import pretrain
from jackpot_kernels.cli.search import search

app = typer.Typer(
    name="jackpot",
    help="Find lottery jackpots: masks that prune a pre-trained network without training any weight.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, pretrain, search, evaluate, export, bench, env):
    app.command()(command)
