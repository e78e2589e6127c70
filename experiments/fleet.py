"""The machines of an experiment: each a real agent's device with its own rows, as strong as its class is."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.data import Catalogue, Source
from agent.learning import Enough
from agent.policy import Policy
from agent.training import Outcome, Standing, Tell, Train
from coordinator.ranks import SAFETY
from experiments.experiment import Contestant, DeviceClass, Disturbances, Experiment
from experiments.material import Part
from experiments.partition import counted, shared_out
from protocol import errors
from protocol.messages import Job
from protocol.slices import Slice
from simulation.device import Device, Machine

ALIAS = "rows"
CLASS = "class"  # the label that says a device's class
FLOPS_PER_PARAMETER = 4  # of one token: forward, and backward to the inputs of a frozen base


@dataclass(frozen=True)
class Member:
    """One client of the experiment, before it has a home."""

    name: str
    kind: DeviceClass
    rows: tuple[int, ...]  # numbers of its training rows


@dataclass
class Stopwatch:
    """Seconds that agents spent in the steps of their training."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Participant(Device):
    """A device to which things happen, and whose training is timed."""

    seed: int
    disturbances: Disturbances
    stopwatch: Stopwatch
    away: set[int] = field(default_factory=set)  # rounds in which it went away, once each

    def trains(self, train: Train) -> Train:
        """The real training, unless the device goes away; cut to the steps that a slow one has time for."""

        def disturbed(job: Job, start: Slice, tell: Tell) -> Outcome:
            chance = random.Random(f"{self.seed}/{self.name}/{job.round}")
            if chance.random() < self.disturbances.dropout and job.round not in self.away:
                self.away.add(job.round)
                raise errors.HLoRAError("the device went away")
            outcome = train(job, start, _until(self._steps(job, chance), tell))
            self.stopwatch.seconds += outcome.usage.seconds
            return outcome

        return super().trains(disturbed)

    def _steps(self, job: Job, chance: random.Random) -> int | None:
        """How many steps the device has time for today; none where nothing slows it down."""
        if not self.disturbances.slowness:
            return None
        tokens = job.training.batch_size * job.training.accumulate * job.task.max_length
        usual = FLOPS_PER_PARAMETER * job.layout.base.parameters * tokens / self.machine.training_flops
        slow = chance.lognormvariate(0.0, self.disturbances.slowness)
        return max(1, int(SAFETY * job.remaining_seconds / (usual * slow)))


def _until(most: int | None, tell: Tell) -> Tell:
    """Tell on, and end a training with Enough after so many steps."""

    def told(standing: Standing) -> None:
        tell(standing)
        if most is not None and standing.phase == "train" and standing.step >= most:
            raise Enough

    return told


def members(experiment: Experiment, part: Part, seed: int) -> list[Member]:
    """All clients with their rows; which of them is of which class is drawn from the seed."""
    rows = shared_out(experiment.partition, part.kinds, part.sources, seed)
    counts = counted(len(rows), [kind.parts for kind in experiment.classes])
    kinds = [kind for kind, count in zip(experiment.classes, counts, strict=True) for _ in range(count)]
    random.Random(f"classes/{seed}").shuffle(kinds)
    width = len(str(len(rows) - 1))
    return [Member(f"client-{n:0{width}}", kind, tuple(mine)) for n, (kind, mine) in enumerate(zip(kinds, rows, strict=True))]


def teams(contestant: Contestant, everybody: Sequence[Member]) -> list[list[Member]]:
    """The federations that a contestant is: one of all; one of a single client with all rows; or one for each of some clients."""
    match contestant.kind:
        case "federated":
            return [list(everybody)]
        case "centralised":
            strongest = max((member.kind for member in everybody), key=lambda kind: kind.rank)
            return [[Member("all", strongest, tuple(n for member in everybody for n in member.rows))]]
        case "local":
            count = min(contestant.clients or len(everybody), len(everybody))
            ordered = sorted(everybody, key=lambda member: (member.kind.rank, member.name))  # so that every class has its part
            return [[ordered[(2 * n + 1) * len(ordered) // (2 * count)]] for n in range(count)]


def devices(
    team: Sequence[Member], part: Part, folder: Path, seed: int, disturbances: Disturbances, stopwatch: Stopwatch
) -> list[Participant]:
    """The team as devices, with their rows in files of their own."""
    made = []
    for member in team:
        file = folder / f"{member.name}.jsonl"
        file.write_text("".join(json.dumps(part.rows[n]) + "\n" for n in member.rows))
        kind = member.kind
        machine = Machine(
            memory_bytes=kind.memory_bytes,
            training_flops=kind.training_flops,
            up_bytes_per_second=kind.bytes_per_second,
            down_bytes_per_second=kind.bytes_per_second,
            labels={CLASS: kind.name},
        )
        catalogue = Catalogue({ALIAS: Source(format="jsonl", path=file.name)}, folder)
        made.append(Participant(member.name, machine, Policy(), catalogue, seed, disturbances, stopwatch))
    return made


def mixes(everybody: Sequence[Member], part: Part) -> dict[str, dict[str, float]]:
    """Each class's mix of kinds: the share of its clients' rows."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted({member.kind.name for member in everybody}):
        counts = Counter(part.kinds[n] for member in everybody if member.kind.name == name for n in member.rows)
        found[name] = {kind: count / counts.total() for kind, count in sorted(counts.items())}
    return found
