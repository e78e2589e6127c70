"""How the operator's command shows what a plan's number formats cost."""

from __future__ import annotations

from pathlib import Path

from tests.admin.conftest import Desk
from tests.agent.looping import ALONE, instantly, looping
from tests.federation import make_plan


async def test_a_round_says_what_was_rounded_off_on_the_way_up_and_down(desk: Desk, tmp_path: Path) -> None:
    device = await desk.federation.enrol("device")
    run = await desk.federation.open(make_plan(**ALONE, uploads="int8", wire="bfloat16"))
    async with looping(desk.federation, device, instantly, tmp_path) as loop:
        await loop.step()
    desk.federation.tick()

    shown = " ".join(desk.say("rounds", "show", run, 1).split())
    plain = desk.say("rounds", "show", await desk.federation.open(make_plan(name="plain")), 0)

    found = await desk.federation.admin.round(run, 1)
    said = f"{100 * found.train_metrics['rounding']:.3g} % of a client's change, as clients say; at most 0."
    assert f"rounded off {said}" in shown
    assert all(0 < (energy.rounding or 0) < 2**-7 for energy in found.energy.values())
    assert "rounded off" not in plain
