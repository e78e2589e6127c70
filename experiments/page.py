"""docs/evidence.md: what was asked, how, and what came of it. A function of the results that are stored beside it."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import curves, sentences, tuning
from experiments.cells import settings
from experiments.experiment import Contestant, Experiment
from experiments.links import linked
from experiments.records import FILE, Finished
from experiments.report import opened, tuned
from experiments.tables import tables
from protocol import errors

PAGE, STORED, IMAGES = "evidence.md", "evidence", "images"
SUMMARY = "summary.md"  # what the stored results say together, in words of whoever looked at all of them
CONTENTS = "contents.toml"  # the experiments in their order on the page, each with a line about it
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
    (docs / IMAGES).mkdir(exist_ok=True)
    for folder in _stored(docs):
        experiment, runs = opened(folder)
        curves.draw(experiment, runs, docs / IMAGES / f"evidence-{experiment.name}.png", folder / "curves.svg")
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
    """The folders of results: in the order of the contents, and those that it does not name after these, by name."""
    order = list(_contents(docs))
    places = {name: place for place, name in enumerate(order)}
    found = [file.parent for file in (docs / STORED).glob(f"*/{FILE}")]
    return sorted(found, key=lambda folder: (places.get(folder.name, len(order)), folder.name))


def _contents(docs: Path) -> Mapping[str, str]:
    file = docs / STORED / CONTENTS
    return tomllib.loads(file.read_text("utf-8")) if file.exists() else {}


def page(docs: Path) -> str:
    """The page's text. Raises InvalidRequest where nothing is stored."""
    about = _contents(docs)
    found = [(*opened(folder), tuned(folder)) for folder in _stored(docs)]
    contents = "\n".join(f"- [{e.name}](#{e.name}): {about.get(e.name, ' '.join(e.question.split()))}" for e, _, _ in found)
    hours = sum(sentences.hours([*runs, *trials]) for _, runs, trials in found)
    summary = docs / STORED / SUMMARY
    together = f"\n## All together\n\n{summary.read_text('utf-8').strip()}\n" if summary.exists() else ""
    text = f"""{WRITTEN}
# Evidence

What was measured of the strategies' learning, and what was not. The numbers in tables and pictures come from runs through the real agents
and the real application in one process ([simulation](getting-started.md#on-machines-of-your-own)), by `python -m experiments`; the
results are stored as JSON lines beside this page. A few sentences in words rest on other runs, and say so: MRPC's and RTE's on central
training beside them; and the settings of `cooled` were chosen in the simulator of decision 31. An experiment is a TOML file: what it says
is what was done.
Contestants differ in nothing but what is listed for them; with the same seed they share rows, machines and draws of clients, so
that differences are taken seed by seed. Intervals are over seeds alone: all seeds are measured on the same held-out rows, and how much
other rows would change is in no interval.

{contents}

All stored runs together took {hours:.0f} hours of one thread.
{together}
{chr(10).join(_experiment(*one) for one in found)}"""
    return linked(text, docs)


def _experiment(experiment: Experiment, runs: Sequence[Finished], trials: Sequence[Finished]) -> str:
    there = [c for c in experiment.contestants if any(run.header.contestant == c.name for run in runs)]
    limits = "\n".join(f"- {sentence}" for sentence in [*experiment.not_shown, sentences.seeds(runs)])
    return f"""## {experiment.name}

**Question.** {experiment.question}
{_answer(experiment)}
**Protocol.** {sentences.protocol(experiment)}

| contestant | who takes part | what differs in its plan |
|---|---|---|
{chr(10).join(_contestant(experiment, tuning.frozen(experiment, c, trials)) for c in there)}

![Curves of all contestants]({IMAGES}/evidence-{experiment.name}.png)

[The picture as SVG]({STORED}/{experiment.name}/curves.svg)

{chr(10).join(table.markdown() for table in tables(experiment, runs, trials))}
**What is not shown.**

{limits}

**Again.** `{STORED}/{experiment.name}/{FILE}` is the experiment, with whatever its comments ask for in the two folders:

```sh
python -m experiments run docs/{STORED}/{experiment.name}/{FILE} --out out/{experiment.name} --models MODELS --data DATA
python -m experiments publish out/{experiment.name}
```

{sentences.computing(runs, trials)} {sentences.origin(runs)}
"""


def _answer(experiment: Experiment) -> str:
    return "" if experiment.answer is None else f"\n**Answer.** {experiment.answer.strip()}\n"


def _contestant(experiment: Experiment, contestant: Contestant) -> str:
    chosen = "ranks" in {*experiment.plan, *contestant.plan}
    who = sentences.part(contestant, "the rank that the plan's policy gives it") if chosen else sentences.part(contestant)
    return f"| {contestant.name} | {who} | {f'`{settings(contestant.plan)}`' if contestant.plan else 'nothing'} |"
