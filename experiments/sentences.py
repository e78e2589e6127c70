"""An experiment's set-up in sentences: its protocol, who takes part, how many seeds ran, what that took and where."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.cells import settings
from experiments.experiment import Contestant, Experiment
from experiments.records import Finished
from experiments.summary import computed


def protocol(experiment: Experiment) -> str:
    """How it was done, in one paragraph."""
    partition, measures = experiment.partition, experiment.measures
    cohort = experiment.plan.get("cohort")
    target = cohort.get("target") if isinstance(cohort, dict) else None
    rows = (
        "all rows shared out" if partition.rows is None else f"{partition.rows} rows each{' on average' * (partition.kind == 'quantity')}"
    )
    mix = (
        f" ({partition.kind}, α = {partition.alpha:g}, over {partition.over})" if partition.kind == "dirichlet" else f" ({partition.kind})"
    )
    parts = " : ".join(str(kind.parts) for kind in experiment.classes)
    classes = ", ".join(kind.name if kind.name == f"rank {kind.rank}" else f"{kind.name} (rank {kind.rank})" for kind in experiment.classes)
    held_out = ", ".join(f"{source.held_out_rows or 'all'} rows of {source.name}" for source in experiment.sources)
    weather = experiment.disturbances
    trouble = f" A client drops out of a job with probability {weather.dropout:g}." if weather.dropout else ""
    slow = f" Steps take longer by a log-normal factor with σ = {weather.slowness:g}." if weather.slowness else ""
    return (
        f"Model `{experiment.model}`, task {experiment.task.kind}. {partition.clients} clients, {rows}{mix}; classes of devices {parts}: "
        f"{classes}. {target} clients a round, {experiment.plan.get('rounds')} rounds.{trouble}{slow} After every"
        f"{nth(measures.every)} round the global adapter is read out and measured on rows that nobody trains on ({held_out}), by the code "
        f"that agents measure with. The plan, as far as contestants share it: `{settings(experiment.plan)}`."
    )


def nth(every: int) -> str:
    """Between *every* and *round*: nothing, *second*, *21st*."""
    if every <= 3:
        return {1: "", 2: " second", 3: " third"}[every]
    ending = "th" if every % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(every % 10, "th")
    return f" {every}{ending}"


def part(contestant: Contestant, own: str = "its class's rank") -> str:
    """Who takes part in a contestant's federation; `own` says which rank a client has where not all have one."""
    rank = own if contestant.rank is None else f"rank {contestant.rank}"
    match contestant.kind:
        case "centralised":
            strongest = "the largest rank" if contestant.rank is None else rank
            return f"no federation: one machine with all rows, at {strongest}, that takes as many of them in a round as a whole cohort"
        case "local":
            who = f"{contestant.clients} clients" if contestant.clients else "all clients"
            return f"no federation: {who} that never meet, each training in every round, at {rank}; measured are the means of their values"
        case _:
            return f"all clients, each at {rank}" if contestant.rank is None else f"all clients, at {rank}"


def seeds(runs: Sequence[Finished]) -> str:
    """How far the numbers of seeds carry."""
    counts = [sum(run.header.contestant == name for run in runs) for name in {run.header.contestant for run in runs}]
    few = f"with {min(counts)} to {max(counts)} seeds" if min(counts) < max(counts) else f"with {counts[0]} seed{'s' * (counts[0] > 1)}"
    return f"Each contestant ran {few}." + (
        " With fewer than five an interval is wide, and with one there is none: this is a first look." if min(counts) < 5 else ""
    )


def hours(runs: Sequence[Finished]) -> float:
    """Hours of one thread that these runs took."""
    return sum(computed(runs).values()) / 3600


def computing(runs: Sequence[Finished], trials: Sequence[Finished]) -> str:
    """How long all of it took, by part."""
    parts = {name: seconds / 3600 for name, seconds in computed([*runs, *trials]).items()}
    tuned = f"; of these tuning took {hours(trials):.2g}" if trials else ""
    return (
        f"Computing: {hours([*runs, *trials]):.2g} hours of one thread ({parts['train']:.2g} of training, {parts['merge']:.2g} of merging, "
        f"{parts['measure']:.2g} of measuring, {parts['overhead']:.2g} of all other work of the bench{tuned})."
    )


def origin(runs: Sequence[Finished]) -> str:
    """The model, and what computed."""
    used = {name: sorted({run.header.software[name] for run in runs}) for name in runs[0].header.software}
    software = ", ".join(f"{name} {' and '.join(versions)}" for name, versions in used.items())
    machine = ", ".join(sorted({f"{m['cores']} cores of {m['processor']}, {m['system']}" for m in (run.header.machine for run in runs)}))
    return f"Model fingerprint `{runs[0].header.model}`. Made with {software}; on {machine}, one thread."
