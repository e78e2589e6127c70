"""The largest rank that a client's memory, link and data carry.

With P parameters, L layers, width H and vocabulary V of the base, T = max_length tokens a row, B rows a forward pass,
D(r) numbers in what a client of rank r is handed, N(r) in what it trains of them and sends back, and examples n, each
consideration compares a need with a budget:

D(r) is that of slices alone; where a strategy hands out the whole adapter to whom can carry it, the same needs and budgets, with
D(R_g) in the place of D(r), are asked once the rank is chosen.

memory, bytes      c P  weights, with c = 2 bytes a number where the plan and the device go down to half precision, otherwise 4
                   + c 17 B T L H  activations kept for the backward pass (34 s b h bytes a layer in 16 bits, of Korthikanti
                     et al. 2022, eq. 2, without attention scores, which block-wise attention does not keep)
                   + 8 B T V  for a language model's logits and their gradient + 4 B T r for each adapted module
                   + 16 N(r)  trained numbers, gradient, and both moments of AdamW, in float32
                   + 4 (D(r) − N(r))  numbers that stay frozen
                   + 4·10⁸ where training uses the machine's own memory: the process with its libraries (measured: 382 MiB)
                   ≤ memory_share · memory_bytes
link, seconds      S(r) / down + U(r) / up, with S(r) the bytes of what is handed out, U(r) those of what is sent back
                   ≤ link_share · times.job
data               f(r) / n ≤ f(r_top) / ñ with f(r) = Σ r (n_out + n_in − r), the degrees of freedom of an update of rank r,
                   r_top the ladder's largest rank and ñ the lower median of the eligible clients' examples

Why this rule for data: estimating a rank-r matrix from n examples has an error in proportion to f(r) / n (Candès & Plan
2011), so nobody fits more noise per example than the typical client does at the largest rank. The median, not the mean:
one very large client must not push all others down the ladder.

The time of a job is no consideration: a step takes nearly as long at any rank, so a deadline is met by fewer steps.

What an accepted job of this run cost replaces the estimates: memory is its peak plus the difference of the rank's own
terms; the link has the speeds that were reached. Such a job also proves that the client can take part, so no estimate makes
it drop out afterwards.

Monotone: more memory, link or examples never lower a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

from pydantic import Field

from coordinator.ranks import Candidate, Policy, Population, examples, link_seconds, owner_words, speeds
from coordinator.sizes import held_numbers, layout, trained_numbers
from protocol.plan import CausalLM, Dtype, Plan
from protocol.strict import Share
from protocol.views import RankView

PROCESS_BYTES = 400_000_000


@dataclass(frozen=True)
class Demand:
    """One consideration: what each rank needs of something of which so much is there."""

    name: str
    need: Callable[[int], float]  # rises with the rank
    budget: float  # in the same unit; infinite where it sets no limit
    words: str  # the sentence for the largest rank that fits, with a place for {rank}
    show: Callable[[float], str]

    def largest(self, rungs: Sequence[int], spare: float = 0.0) -> int | None:
        """The largest rung that fits with that share to spare; None if none does."""
        return max((r for r in rungs if self.need(r) * (1 + spare) <= self.budget), default=None)


class Capacity(Policy):
    """Give every client the largest rank that its memory, link and data carry.

    A rank falls at once when it no longer fits, and rises only where the higher one fits with head-room.
    """

    memory_share: Share = Field(default=0.9, description="share of the memory that the client offers that a job may fill")
    link_share: Share = Field(default=0.25, description="share of the job's time that slices may take on the link")
    head_room: float = Field(default=0.25, ge=0, le=10, description="what must be to spare before a rank rises: 0.25 is 25 %")

    def obstacle(self, plan: Plan, candidate: Candidate, rungs: Sequence[int]) -> str | None:
        """What not even the smallest rung fits, unless an accepted job of this run has shown that it does."""
        if candidate.measured is not None:
            return None
        for demand in self._machine(plan, candidate):
            if demand.largest(rungs) is None:
                need, budget = demand.show(demand.need(rungs[0])), demand.show(demand.budget)
                return f"not even rank {rungs[0]} fits the client's {demand.name}: it needs {need}, and {budget} may be used"
        return None

    def choose(self, plan: Plan, candidate: Candidate, population: Population, rungs: Sequence[int]) -> RankView:
        """The largest rung that fits every consideration; above the previous rank only with head-room.

        Examples need no head-room: they are counted, and where all have as many, nobody has more than the typical client.
        """
        machine, data = self._machine(plan, candidate), _data(plan, candidate, population)
        demands = [*machine, data]
        limits = {d.name: None if math.isinf(d.budget) else d.largest(rungs) or rungs[0] for d in demands}
        fitting = rank = _least(demands, rungs)
        previous = candidate.previous
        if previous in rungs and previous is not None and previous < fitting:
            rank = max(previous, min(_least(machine, rungs, self.head_room), fitting))
        owned = rungs[-1] if rungs[-1] < plan.ranks.ladder[-1] else None
        if rank < fitting:
            tight = " and ".join(d.name for d in machine if (d.largest(rungs, self.head_room) or 0) <= rank)
            why = f"rank {fitting} would fit, but with less than {_percent(self.head_room)} to spare on {tight}: too little to rise so far"
        elif binding := [d.words for d in demands if limits[d.name] == rank and rank < rungs[-1]]:
            why = " and ".join(words.format(rank=rank) for words in binding)
        elif owned is not None:
            why = owner_words(candidate.profile)
        else:
            why = "the ladder's largest rank fits the client's memory, link and data"
        return RankView(rank=rank, reason=f"{rank}: {why}", limits={"owner": owned, **limits})

    def burden(self, plan: Plan, candidate: Candidate, rank: int, seconds: float) -> str | None:
        """What of its memory or link does not carry the whole adapter too; after a job without it, with head-room. Or the step it costs."""
        spare = self.head_room if candidate.measured is not None and not candidate.measured.whole else 0.0
        for demand in self._machine(plan, candidate, whole=True):
            if demand.largest([rank], spare) is None:
                need, budget = demand.show(demand.need(rank)), demand.show(demand.budget)
                room = f" with {_percent(spare)} to spare" if spare else ""
                return f"with the whole adapter a job takes {need} of its {demand.name}, and {budget} may be used{room}"
        return super().burden(plan, candidate, rank, seconds)

    def _machine(self, plan: Plan, candidate: Candidate, *, whole: bool = False) -> list[Demand]:
        return [_memory(plan, candidate, self.memory_share, whole), _link(plan, candidate, self.link_share, whole)]


def _least(demands: Sequence[Demand], rungs: Sequence[int], spare: float = 0.0) -> int:
    return min(d.largest(rungs, spare) or rungs[0] for d in demands)


def _memory(plan: Plan, candidate: Candidate, share: float, whole: bool) -> Demand:
    base, rows, profile = layout(plan).base, plan.training.batch_size * plan.task.max_length, candidate.profile
    wish = plan.training.precision
    half = wish != "float32" if wish != "auto" else set(profile.precisions) != {Dtype.float32}
    width = 2 if half else 4
    logits = 8 * rows * base.vocabulary if isinstance(plan.task, CausalLM) else 0
    process = PROCESS_BYTES if profile.device == "cpu" else 0
    fixed = width * base.parameters + width * 17 * rows * base.layers * base.hidden + logits + process

    def own(rank: int, whole: bool = whole) -> int:
        """The part that grows with what is held and trained."""
        trained = trained_numbers(plan, rank)
        return 16 * trained + 4 * (held_numbers(plan, rank, whole=whole) - trained) + 4 * rows * rank * len(layout(plan).modules)

    measured, total = candidate.measured, profile.memory_bytes
    peak = measured.usage.peak_memory_bytes if measured else None
    if measured and peak:
        start, source = peak - own(measured.rank, measured.whole), f"{_bytes(peak)} measured at rank {measured.rank}"
    else:
        start, source = fixed, "estimated"
    words = f"the memory ({_bytes(share * total)} of {_bytes(total)} usable, {source}) holds at most rank {{rank}}"
    return Demand("memory", lambda rank: start + own(rank), share * total, words, _bytes)


def _link(plan: Plan, candidate: Candidate, share: float, whole: bool) -> Demand:
    known = [(speed, way) for speed, way in zip(speeds(candidate), ("down", "up"), strict=True) if speed]
    shown = ", ".join(f"{_bytes(speed)}/s {way}" for speed, way in known)
    words = f"the link ({shown}) carries at most rank {{rank}} in {_percent(share)} of the job's time"
    budget = share * plan.times.job if known else math.inf
    return Demand("link", lambda rank: link_seconds(plan, candidate, rank, whole=whole), budget, words, _seconds)


def _data(plan: Plan, candidate: Candidate, population: Population) -> Demand:
    def freedom(rank: int) -> int:
        """Degrees of freedom of an update of that rank, over all modules."""
        return sum(rank * (n_out + n_in - rank) for n_out, n_in in layout(plan).modules.values())

    mine = examples(plan, candidate)
    typical = median_low(population.examples) if population.examples else 0
    words = f"its {mine:,} examples (the typical client has {typical:,}) support at most rank {{rank}}"
    budget = mine * freedom(plan.ranks.ladder[-1]) if typical else math.inf
    return Demand("data", lambda rank: typical * freedom(rank), budget, words, lambda amount: f"{amount:.3g}")


def _bytes(amount: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 999.5 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _seconds(amount: float) -> str:
    return f"{amount:.3g} s"
