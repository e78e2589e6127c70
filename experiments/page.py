"""docs/evidence.md: what was asked, how, and what came of it. A function of the results that are stored beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments import curves, tuning
from experiments.experiment import Contestant, Experiment
from experiments.records import FILE, Finished
from experiments.report import opened, tuned
from experiments.tables import settings, tables
from protocol import errors

PAGE, STORED, IMAGES = "evidence.md", "evidence", "images"
SUMMARY = "summary.md"  # what the stored results say together, in words of whoever looked at all of them
WRITTEN = "<!-- Written by `python -m experiments publish`; change the results or the code that it is made from. -->\n"


def publish(results: Sequence[Path], docs: Path) -> Path:
    """Store these results in the documents' folder, instead of older ones of the same experiments; gives the page.

    Raises InvalidRequest for a folder without results, and where none are stored.
    """
    for folder in results:
        experiment, _ = opened(folder)
        _store(folder, docs / STORED / experiment.name)
    if not (docs / STORED).is_dir():
        raise errors.InvalidRequest(f"no results are stored in {docs / STORED}; name a folder of results")
    for folder in _stored(docs):
        experiment, runs = opened(folder)
        (docs / IMAGES).mkdir(exist_ok=True)
        picture, _ = curves.draw(experiment, runs, folder, "curves")
        shutil.move(picture, docs / IMAGES / f"evidence-{experiment.name}.png")
    (docs / PAGE).write_text(page(docs), "utf-8")
    return docs / PAGE


def _store(folder: Path, stored: Path) -> None:
    """Copy results; those that were stored before are there until the copy is whole."""
    if stored.is_dir() and stored.samefile(folder):
        return
    growing = stored.parent.with_name(f".{stored.name}.part")  # not beside the others: every folder there is read
    shutil.rmtree(growing, ignore_errors=True)
    for part in ("runs", "partitions", tuning.FOLDER):
        if (folder / part).is_dir():
            shutil.copytree(folder / part, growing / part, ignore=shutil.ignore_patterns("*.part"))
    shutil.copyfile(folder / FILE, growing / FILE)
    shutil.rmtree(stored, ignore_errors=True)
    stored.parent.mkdir(exist_ok=True)
    growing.replace(stored)


def _stored(docs: Path) -> list[Path]:
    return sorted(file.parent for file in (docs / STORED).glob(f"*/{FILE}"))


def page(docs: Path) -> str:
    """The page's text. Raises InvalidRequest where nothing is stored."""
    found = [_experiment(*opened(folder), tuned(folder)) for folder in _stored(docs)]
    summary = docs / STORED / SUMMARY
    together = f"\n## All together\n\n{summary.read_text('utf-8').strip()}\n" if summary.exists() else ""
    return f"""{WRITTEN}
# Evidence

What was measured of the strategies' learning, and what was not. Every number here comes from runs through the real agents and the real
application in one process ([simulation](getting-started.md#on-machines-of-your-own)), by `python -m experiments`; the results are
stored as JSON lines beside this page. An experiment is a TOML file: what it says is what was done. Contestants differ in nothing but
what is listed for them; with the same seed they share rows, machines and draws of clients, so that differences are taken seed by seed.
{together}
{chr(10).join(found)}"""


def _experiment(experiment: Experiment, runs: Sequence[Finished], trials: Sequence[Finished]) -> str:
    there = [c for c in experiment.contestants if any(run.header.contestant == c.name for run in runs)]
    limits = "\n".join(f"- {sentence}" for sentence in [*experiment.not_shown, *_seeds(runs)])
    return f"""## {experiment.name}

**Question.** {experiment.question}
{_answer(experiment)}
**Protocol.** {_protocol(experiment)}

| contestant | who takes part | what differs in its plan |
|---|---|---|
{chr(10).join(_contestant(tuning.frozen(experiment, c, trials)) for c in there)}

![Curves of all contestants](images/evidence-{experiment.name}.png)

{chr(10).join(table.markdown() for table in tables(experiment, runs, trials))}
**What is not shown.**

{limits}

**Again.** `{STORED}/{experiment.name}/{FILE}` is the experiment, with whatever its comments ask for in the two folders:

```sh
python -m experiments run docs/{STORED}/{experiment.name}/{FILE} --out out/{experiment.name} --models MODELS --data DATA
python -m experiments publish out/{experiment.name}
```

{_origin(runs)}
"""


def _answer(experiment: Experiment) -> str:
    return "" if experiment.answer is None else f"\n**Answer.** {experiment.answer.strip()}\n"


def _protocol(experiment: Experiment) -> str:
    partition, measures = experiment.partition, experiment.measures
    cohort = experiment.plan.get("cohort")
    target = cohort.get("target") if isinstance(cohort, dict) else None
    rows = "all rows shared out" if partition.rows is None else f"{partition.rows} rows each"
    mix = (
        f" ({partition.kind}, α = {partition.alpha:g}, over {partition.over})" if partition.kind == "dirichlet" else f" ({partition.kind})"
    )
    parts = " : ".join(str(kind.parts) for kind in experiment.classes)
    classes = ", ".join(f"{kind.name} (rank {kind.rank})" for kind in experiment.classes)
    held_out = ", ".join(f"{source.held_out_rows or 'all'} rows of {source.name}" for source in experiment.sources)
    weather = experiment.disturbances
    trouble = f" A client drops out of a job with probability {weather.dropout:g}." if weather.dropout else ""
    slow = f" Steps take longer by a log-normal factor with σ = {weather.slowness:g}." if weather.slowness else ""
    return (
        f"Model `{experiment.model}`, task {experiment.task.kind}. {partition.clients} clients, {rows}{mix}; classes of devices {parts}: "
        f"{classes}. {target} clients a round, {experiment.plan.get('rounds')} rounds.{trouble}{slow} After every "
        f"{_nth(measures.every)} round the global adapter is read out and measured on rows that nobody trains on ({held_out}), by the code "
        f"that agents measure with. The plan, as far as contestants share it: `{settings(experiment.plan)}`."
    )


def _nth(every: int) -> str:
    return {1: "single", 2: "second", 3: "third"}.get(every, f"{every}th")


def _contestant(contestant: Contestant) -> str:
    match contestant.kind:
        case "centralised":
            who = "one client with all rows"
        case "local":
            who = f"{contestant.clients or 'all'} clients that never meet"
        case _:
            who = "all clients, each at its class's rank" if contestant.rank is None else f"all clients, at rank {contestant.rank}"
    return f"| {contestant.name} | {who} | `{settings(contestant.plan)}` |"


def _seeds(runs: Sequence[Finished]) -> list[str]:
    """How far the numbers of seeds carry."""
    counts = [sum(run.header.contestant == name for run in runs) for name in {run.header.contestant for run in runs}]
    few = f"from {min(counts)} to {max(counts)} seeds" if min(counts) < max(counts) else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    words = f"Each contestant ran with {few}."
    return (
        [f"{words} With fewer than five an interval is wide, and with one there is none: this is a first look."]
        if min(counts) < 5
        else [words]
    )


def _origin(runs: Sequence[Finished]) -> str:
    used = {name: sorted({run.header.software[name] for run in runs}) for name in runs[0].header.software}
    software = ", ".join(f"{name} {' and '.join(versions)}" for name, versions in used.items())
    machine = ", ".join(sorted({f"{m['cores']} cores of {m['processor']}, {m['system']}" for m in (run.header.machine for run in runs)}))
    return f"Model fingerprint `{runs[0].header.model}`. Made with {software}; on {machine}, one thread."
