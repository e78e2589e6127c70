"""One simulated device: a real agent's home folder, on a machine whose figures are declared instead of measured.

<name>/datasets.toml   as on a real device
<name>/policy.toml     as on a real device
<name>/machine.toml    memory_bytes, training_flops, up_bytes_per_second, down_bytes_per_second, labels; all optional
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, ValidationError

from agent import data, policy
from agent.data import Catalogue
from agent.policy import Policy
from agent.training import Outcome, Tell, Train
from protocol import VERSION, errors
from protocol.messages import Dataset, Job, Profile, Usage
from protocol.slices import Slice
from protocol.strict import Strict, mistakes
from protocol.texts import Labels

FILE = "machine.toml"


class Machine(Strict):
    """What a simulated machine can do."""

    memory_bytes: int = Field(default=16 * 2**30, gt=0)
    training_flops: float = Field(default=1e11, gt=0, description="floating-point operations per second")
    up_bytes_per_second: float = Field(default=1e7, gt=0)
    down_bytes_per_second: float = Field(default=1e7, gt=0)
    labels: Labels = {}


@dataclass(frozen=True)
class Device:
    """A device of the simulated fleet."""

    name: str
    machine: Machine
    policy: Policy
    catalogue: Catalogue

    def profile(self) -> Profile:
        """What its agent tells the coordinator: the declared machine within the owner's policy, and counts of rows.

        Raises DataRefusal, which names the device.
        """
        aliases = self.catalogue.sources.keys() if self.policy.data is None else self.policy.data
        return Profile(
            memory_bytes=self.policy.offered(self.machine.memory_bytes),
            training_flops=self.machine.training_flops,
            up_bytes_per_second=self.policy.up_bytes_per_second or self.machine.up_bytes_per_second,
            down_bytes_per_second=self.policy.down_bytes_per_second or self.machine.down_bytes_per_second,
            datasets={alias: self._described(alias) for alias in aliases},
            limits=self.policy.limits(),
            software={"hlora": VERSION},
        )

    def _described(self, alias: str) -> Dataset:
        try:
            return self.catalogue.describe(alias)
        except errors.DataRefusal as error:
            raise errors.DataRefusal(f"device {self.name}: {error.detail}", **error.facts) from None

    def trains(self, train: Train) -> Train:
        """The real training, with the usage that this machine would have had: what was measured here would never repeat."""

        def simulated(job: Job, start: Slice, tell: Tell) -> Outcome:
            outcome = train(job, start, tell)
            steps = outcome.usage.steps
            seconds = 4 * job.layout.base.parameters * outcome.examples * job.task.max_length / self.machine.training_flops
            usage = Usage(seconds=seconds, steps=steps, step_seconds=seconds / max(1, steps))
            return replace(outcome, usage=usage)

        return simulated


def fleet(folder: Path) -> list[Device]:
    """The devices in a folder, in the order of their names. Raises DataRefusal, PolicyRefusal, InvalidProfile."""
    homes = sorted(home for home in folder.iterdir() if (home / data.FILE).is_file()) if folder.is_dir() else []
    if not homes:
        raise errors.DataRefusal(f"{folder} holds no device: a device is a folder with a {data.FILE}")
    return [Device(name=home.name, machine=_machine(home), policy=policy.load(home), catalogue=data.load(home)) for home in homes]


def _machine(home: Path) -> Machine:
    try:
        return Machine.model_validate(tomllib.loads((home / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Machine()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.InvalidProfile(f"{home / FILE} is no TOML: {error}") from None
    except ValidationError as error:
        raise errors.InvalidProfile(f"{home / FILE}: {next(mistakes(error, Machine))}") from None
