"""How the operator's command shows rounds that merge what comes."""

from __future__ import annotations

from tests.admin.conftest import Desk
from tests.federation import make_plan


async def test_a_late_contribution_is_shown_where_it_was_handed_out_and_where_it_was_merged(desk: Desk) -> None:
    federation = desk.federation
    plan = make_plan(buffer={"size": 1}, cohort={"target": 2, "quorum": 1}, rounds=9)
    run, (quick, slow), (first, held) = await federation.training(plan, count=2)
    await quick.complete(first)
    federation.tick()
    await slow.complete(held)
    federation.tick()

    before, after = desk.say("rounds", "show", run, 1), desk.say("rounds", "show", run, 2)

    assert "1, ranks 4×1; 2 jobs handed out" in " ".join(before.split())
    assert "merged into round 2, 1 versions later" in before
    assert "1, ranks 4×1; 1 jobs handed out" in " ".join(after.split())
    assert "device 2" in after
