"""The report: one Markdown and one HTML page, from finished runs alone."""

from collections.abc import Iterable
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.figures import draw
from benchmarks.paper.results import Results
from benchmarks.paper.scales import Scale
from benchmarks.paper.tables import NOT_RUN, Findings, footnotes, table
from jackpot_kernels.files import write_whole
from jackpot_kernels.report.page import Section, Table, write_page

_LEAD = (
    "Accuracies are test accuracies in % at the last epoch, mean ± standard deviation over the seeds; the "
    "best epoch on the test set stands beside them, named so, where more than the last was looked at. Values "
    "of rival methods are the paper's own. Seconds are wall time of one run, with all its evaluations and "
    "without the dense training. Sparsity is given over the masked layers and over all layers."
)


def write_report(results: Results, scale: Scale, seeds: int) -> tuple[Path, Path]:
    """Write ``report.md``, ``report.html`` and the plots into the folder of the results."""
    folder = results.folder
    folder.mkdir(parents=True, exist_ok=True)
    findings = Findings(results, scale, seeds)
    sections = [_section(name, findings, folder) for name in EXPERIMENTS]
    title = f"The paper's tables and figures at {scale.name} scale"
    lead = f"{_lead(scale)} {_LEAD}"
    facts = _facts(results, scale)
    parts = [f"# {title}", lead, *map(_as_markdown, sections), "## Where the figures come from"]
    parts += ["\n".join(f"- {name}: {value}" for name, value in facts)]
    write_whole(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    page = folder / "report.html"
    write_page(page, title=title, lead=lead, sections=sections, facts=facts)
    return folder / "report.md", page


def name_of(experiment: str) -> str:
    """Return "Table 1" for "table1"."""
    for word, whole in (("table", "Table"), ("fig", "Fig.")):
        if experiment.startswith(word):
            return f"{whole} {experiment.removeprefix(word)}"
    return "Beyond the paper"


def _section(name: str, findings: Findings, folder: Path) -> Section:
    experiment = EXPERIMENTS[name]
    text = [part for part in (experiment.note, *footnotes(name)) if part]
    if not any(findings.row(row) for row in experiment.rows):
        text.insert(0, f"{NOT_RUN.capitalize()} at this scale.")
    figure = draw(name, findings, folder)
    title = f"{name_of(name)}: {experiment.title}"
    return Section(title, text, Table(*table(name, findings)), [figure] if figure else [])


def _as_markdown(section: Section) -> str:
    shown = [f"![{figure.caption}]({figure.path.name})" for figure in section.figures]
    assert section.table is not None
    return "\n\n".join([f"## {section.title}", *section.text, markdown(*section.table), *shown])


def _lead(scale: Scale) -> str:
    if scale.name == "full":
        return (
            "Networks, data and epochs are the paper's. Pre-trained weights for ImageNet are those that the "
            "libraries offer, whose dense accuracy may be another. All seeds share one dense network."
        )
    standing = ", ".join(f"{ours} for {theirs}" for theirs, ours in scale.networks.items())
    images = f"{scale.search.images:,} training images" if scale.search.images else "all training images"
    return (
        f"Smaller than the paper: {standing}; searches on {images}; {scale.dense_epochs} epochs of dense "
        "training. The paper's values are not targets here; what can be compared is the order of methods. "
        "All seeds share one dense network and one subset of images: the deviation is the search's alone."
    )


def _facts(results: Results, scale: Scale) -> list[tuple[str, str]]:
    """Return what the runs have in common, or in which ways they differ."""
    made = list(results.values())
    seconds = sum(result["seconds"] for result in made)
    kinds = {"search": scale.search, "dense training": scale.train}
    facts = [("runs", f"{len(made)}, {seconds / 60:.0f} minutes in sum")]
    facts += [
        (f"settings, {kind}", _told(map("{0[0]}={0[1]}".format, part.options.items())))
        for kind, part in kinds.items()
    ]
    for name in ("device", "threads", "commit"):
        facts.append((name, _told(dict.fromkeys(str(result[name]) for result in made))))
    versions = [f"{package} {version}" for result in made for package, version in result["versions"].items()]
    return [*facts, ("versions", _told(dict.fromkeys(versions)))]


def _told(values: Iterable[str]) -> str:
    return ", ".join(values)
