"""From a contestant to the plan that a federation carries out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue, ValidationError

from coordinator import aggregation, ranks
from experiments.experiment import Contestant, Experiment, Settings
from experiments.fleet import ALIAS, CLASS, Member
from protocol import errors
from protocol.plan import Model, Plan
from protocol.strict import mistakes

WHOLE = {"strategy", "ranks"}  # choices with options of their own: one stands in place of the other


def plan(experiment: Experiment, contestant: Contestant, model: Model, team: Sequence[Member], seed: int) -> Plan:
    """The plan of one team, not resolved yet. Raises InvalidPlan, naming contestant and value."""
    told: Settings = {
        "name": contestant.name,
        "model": model.model_dump(),
        "task": experiment.task.model_dump(),
        "data": ALIAS,
        "ranks": _ranks(contestant, team),
        "evaluation": {"every": 0},  # the bench measures what is published itself, the same way for all
        "seed": seed,
    }
    told = overlaid(overlaid(told, experiment.plan), contestant.plan)
    try:
        found = Plan.model_validate(told)
        found = _alone(experiment, contestant, found) if contestant.kind != "federated" else found
        _attainable(found, len(team))
        aggregation.check(found.strategy).check(found)
        ranks.check(found.ranks)
    except ValidationError as error:
        raise errors.InvalidPlan(f"{contestant.name}: {'; '.join(mistakes(error, Plan))}") from None
    except errors.InvalidPlan as error:
        raise errors.InvalidPlan(f"{contestant.name}: {error.detail}") from None
    return found


def overlaid(below: Mapping[str, JsonValue], above: Mapping[str, JsonValue]) -> Settings:
    """Settings with others laid over them: tables key by key, strategies and rank policies whole."""
    found = dict(below)
    for name, value in above.items():
        under = found.get(name)
        found[name] = overlaid(under, value) if isinstance(under, dict) and isinstance(value, dict) and name not in WHOLE else value
    return found


def _attainable(plan: Plan, clients: int) -> None:
    """Raise InvalidPlan for a quorum that never comes together: the run would wait for it until it gives up."""
    if plan.cohort.quorum > clients:
        raise errors.InvalidPlan(f"cohort.quorum: {plan.cohort.quorum} contributions never come of {clients} clients")


def _ranks(contestant: Contestant, team: Sequence[Member]) -> JsonValue:
    table: Settings = {kind.name: kind.rank for kind in sorted((member.kind for member in team), key=lambda kind: kind.name)}
    if contestant.rank is not None or len(team) == 1:
        return {"name": "fixed", "ladder": [contestant.rank or team[0].kind.rank]}
    ladder: list[JsonValue] = [*sorted({member.kind.rank for member in team})]
    return {"name": "labels", "ladder": ladder, "options": {"label": CLASS, "table": table}}


def _alone(experiment: Experiment, contestant: Contestant, plan: Plan) -> Plan:
    """The same for a single client. One that has everybody's rows takes as many of them in a round as a cohort would."""
    share = plan.cohort.target / experiment.partition.clients if contestant.kind == "centralised" else 1.0
    cohort = plan.cohort.model_copy(update={"target": 1, "quorum": 1, "over_selection": 1.0})
    training = plan.training.model_copy(update={"epochs": plan.training.epochs * share})
    return plan.model_copy(update={"cohort": cohort, "training": training})
