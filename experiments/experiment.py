"""An experiment as its TOML file describes it: one task, one way to share out its rows and machines, many contestants."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from protocol import errors
from protocol.messages import Bytes
from protocol.plan import Task
from protocol.strict import Name, Strict, mistakes

FOLDER = Path(__file__).parent
Settings = dict[str, JsonValue]
Rank = Annotated[int, Field(ge=1)]


class Source(Strict):
    """Rows of one origin. With `texts` every text of these columns is a row of its own; without, rows stay as they are."""

    name: Name
    train: str = Field(min_length=1, description="JSON lines, relative to the data folder; with `hub`, a split")
    held_out: str = Field(min_length=1, description="the same, on which everything is measured, and nothing trained")
    hub: str | None = Field(default=None, min_length=1, description="a data set of the hub that stands in place of files")
    subset: str | None = Field(default=None, description="hub only: the data set's configuration")
    texts: list[str] = Field(default=[], description="columns whose texts become rows with the one column `text`")
    rows: int | None = Field(default=None, ge=1, description="no more than so many training rows, drawn by the seed")
    held_out_rows: int | None = Field(default=None, ge=1, description="no more than the first so many held-out rows")

    @model_validator(mode="after")
    def _of_the_hub(self) -> Self:
        if self.subset is not None and self.hub is None:
            raise ValueError("only a data set of the hub has a subset; name it with `hub`")
        return self


class Partition(Strict):
    """How rows are shared out among clients; see `experiments.partition`."""

    kind: Literal["iid", "dirichlet", "quantity", "by-source"] = "iid"
    over: Literal["source", "label"] = Field(default="source", description="what a client's mix is a mix of")
    alpha: float = Field(default=1.0, gt=0, le=1e6, description="of the Dirichlet distribution: the smaller, the more unequal")
    clients: int = Field(ge=1, le=100_000)
    rows: int | None = Field(default=None, ge=1, description="rows of each client; by default all rows are shared out")


class DeviceClass(Strict):
    """Machines of one kind, and the rank that they run."""

    name: Name
    parts: int = Field(ge=1, description="how many of the clients, in proportion to the other classes' parts")
    rank: Rank
    memory_bytes: Bytes = Field(default=16 * 2**30, gt=0)
    training_flops: float = Field(default=1e11, gt=0)
    bytes_per_second: float = Field(default=1e7, gt=0, description="of the link, up and down")


class Disturbances(Strict):
    """What happens to machines: drawn anew for every client and round, from the seed."""

    dropout: float = Field(default=0.0, ge=0, le=1, description="probability that a client goes away with its job undone, once a round")
    slowness: float = Field(default=0.0, ge=0, le=10, description="σ of the log-normal factor by which steps take longer; jobs are cut")


class Contestant(Strict):
    """One line of the comparison: what it changes of the plan, and who takes part."""

    name: Name
    kind: Literal["federated", "centralised", "local"] = Field(
        default="federated", description="centralised: one client with all rows; local: clients that never meet"
    )
    rank: Rank | None = Field(default=None, description="one rank for all; by default that of each client's class")
    clients: int | None = Field(default=None, ge=1, description="local only: how many clients, by default all")
    plan: Settings = Field(default={}, description="tables and values that stand in place of the experiment's own")


class Measures(Strict):
    """What is measured of the global adapter, and when."""

    metric: Literal["loss", "accuracy", "f1"] = "loss"
    every: int = Field(default=1, ge=1, description="rounds between measures at the largest rank")
    rungs_every: int = Field(default=5, ge=1, description="rounds between measures at all ranks; the last always is one")
    batch_size: int = Field(default=32, ge=1)


class Tuning(Strict):
    """How each contestant is tuned on its own: of these settings it keeps those with which a short run with seed 0 ended best."""

    rounds: int = Field(ge=1, description="of the short runs")
    tries: list[Settings] = Field(min_length=2, max_length=50, description="each laid over the contestant's plan")


class Experiment(Strict):
    """A question, and all that its answer depends on."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    question: str
    answer: str | None = Field(default=None, description="what the stored results say to it, once there are some")
    not_shown: list[str] = Field(default=[], description="what its results do not say")
    model: str = Field(min_length=1, description="folder within the models' folder, package:NAME, or hub id")
    revision: str | None = None
    task: Task
    sources: list[Source] = Field(min_length=1)
    partition: Partition
    classes: list[DeviceClass] = Field(min_length=1)
    disturbances: Disturbances = Disturbances()
    plan: Settings = Field(description="of the plan, what all contestants have in common; `rounds` and `cohort` among it")
    measures: Measures = Measures()
    tuning: Tuning | None = None
    seeds: int = Field(default=5, ge=1, le=1000, description="how many; the first is 0, or 1 where 0 is what was tuned with")
    budget_minutes: float | None = Field(
        default=None, gt=0, description="no run is begun once they are over, nor one that would end later at the pace so far"
    )
    contestants: list[Contestant] = Field(min_length=1)
    reference: str = Field(description="the contestant with which all are compared, seed by seed")
    further_references: list[str] = Field(default=[], description="others with which all are compared besides")
    targets: list[str] = Field(default=[], description="contestants whose final value the others shall reach")
    majority: float | None = Field(default=None, gt=0, le=1, description="classifiers: the commonest label's share of the held-out rows")

    @model_validator(mode="after")
    def _named(self) -> Self:
        for what, names in {
            "sources": [source.name for source in self.sources],
            "classes": [kind.name for kind in self.classes],
            "contestants": [slug(contestant.name) for contestant in self.contestants],
        }.items():
            if len(set(names)) < len(names):
                raise ValueError(f"two of the {what} have the same name")
        for name in (*self.references, *self.targets):
            self.contestant(name)
        return self

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        metric = self.measures.metric
        if metric != "loss" and self.task.kind == "causal-lm":
            raise ValueError(f"measures.metric: a language model has no {metric}; its metric is loss")
        if metric == "f1" and self.partition.over == "label":
            # The F1 of rows that all have one label is 0, or near 1, whatever the model; no mean of such numbers says anything.
            raise ValueError(
                'measures.metric: f1 says nothing of rows of a single label; with a partition over "label" measure accuracy or loss'
            )
        return self

    def contestant(self, name: str) -> Contestant:
        """The contestant of that name. Raises ValueError, naming those that there are."""
        found = next((contestant for contestant in self.contestants if contestant.name == name), None)
        if found is None:
            raise ValueError(f"there is no contestant {name!r}; there are {', '.join(c.name for c in self.contestants)}")
        return found

    @property
    def references(self) -> list[str]:
        """All contestants with which the others are compared, first the one."""
        return [self.reference, *self.further_references]

    @property
    def ranks(self) -> list[int]:
        """The ladder: the ranks of all classes, rising."""
        return sorted({kind.rank for kind in self.classes})

    def numbers(self, count: int | None = None) -> range:
        """The seeds, or so many of them."""
        first = 0 if self.tuning is None else 1
        return range(first, first + (count or self.seeds))

    def digest(self, contestant: Contestant) -> str:
        """Names everything that the file says of the contestant's runs, but the seed.

        What it leaves to defaults is not named, so that a new option of plans voids no results.
        """
        words = {"name", "question", "answer", "not_shown"}
        told = {"reference", "further_references", "targets", "majority"}  # what is said of results, and changes none
        beside = words | told | {"tuning", "seeds", "budget_minutes", "contestants"}
        named = [
            self.model_dump(mode="json", exclude=beside, exclude_unset=True),
            contestant.model_dump(mode="json", exclude={"name"}, exclude_unset=True),
        ]
        return "sha256:" + hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def slug(name: str) -> str:
    """A contestant's name as a file's."""
    return name.replace(" ", "-").lower()


def read(file: Path) -> Experiment:
    """The experiment of a file. Raises InvalidRequest, naming the line at fault."""
    try:
        return Experiment.model_validate(tomllib.loads(file.read_text("utf-8")))
    except UnicodeDecodeError:
        raise errors.InvalidRequest(f"{file} is no text in UTF-8, as TOML must be; save it in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise errors.InvalidRequest(f"{file} is no TOML: {error}") from None
    except ValidationError as error:
        raise errors.InvalidRequest(f"{file}: {next(mistakes(error, Experiment))}") from None


def some(experiment: Experiment, names: Iterable[str]) -> list[Contestant]:
    """The contestants of these names, all if there are none. Raises InvalidRequest."""
    try:
        return [experiment.contestant(name) for name in names] or experiment.contestants
    except ValueError as error:
        raise errors.InvalidRequest(str(error)) from None
