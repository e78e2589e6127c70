"""The operator's look at what was set apart, in words and as JSON."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from protocol import errors, slices
from protocol.states import ClientState
from protocol.views import QuarantineView
from tests.admin.conftest import Desk
from tests.federation import Device, make_plan

NONSENSE = b"nonsense, and all of it came"


async def apart(desk: Desk, count: int = 1) -> Device:
    """A device that sent so many slices that cannot count, each in a run of its own."""
    device = await desk.federation.enrol("phone")
    for number in range(count):
        await desk.federation.open(make_plan(name=f"run {number}", cohort={"target": 1, "quorum": 1}, evaluation={"every": 0}))
        with suppress(errors.MalformedSlice):
            await device.put_slice(await device.take(), NONSENSE + bytes([number]) * number)
        desk.federation.clock.advance(1)
    return device


async def test_what_was_set_apart_is_listed_and_shown(desk: Desk) -> None:
    await apart(desk, 2)

    said = desk.say("quarantine", "list")
    newer, older = [QuarantineView.model_validate(each) for each in desk.tell("quarantine", "list")]

    assert [newer.client_name, newer.problem] == ["phone", "malformed-slice"]
    for view in (newer, older):
        assert view.id in said
        assert view.reason.split()[0] in desk.say("quarantine", "show", view.id.partition("-")[2][:10])
    assert [each["id"] for each in desk.tell("quarantine", "list", "--run", "run 0")] == [older.id]
    assert desk.tell("quarantine", "list", "--run", "run 1", "--client", "phone")[0]["id"] == newer.id
    assert desk.tell("quarantine", "show", older.id)["slice"]["bytes"] == len(NONSENSE)


async def test_its_bytes_are_pulled_as_they_came(desk: Desk, tmp_path: Path) -> None:
    await apart(desk)
    (view,) = desk.tell("quarantine", "list")
    file = tmp_path / "suspect.safetensors"

    said = desk.say("quarantine", "pull", view["id"], "--out", file)

    assert (said, file.read_bytes()) == (f"{file}  {len(NONSENSE)} B\n", NONSENSE)
    assert slices.digest(NONSENSE) == view["slice"]["digest"]
    assert "cannot be written" in desk.refusal("quarantine", "pull", view["id"], "--out", tmp_path / "no folder" / "file")
    assert "admin" in desk.refusal("quarantine", "pull", view["id"], "--out", file, token=desk.federation.viewer.secret)
    assert file.read_bytes() == NONSENSE


async def test_bytes_that_were_given_up_leave_the_file_alone(desk: Desk, tmp_path: Path) -> None:
    await apart(desk)
    (view,) = desk.tell("quarantine", "list")
    desk.federation.parts.quarantine.store.delete(view["slice"]["digest"])
    file = tmp_path / "suspect.safetensors"
    file.write_text("mine")

    assert "given up" in desk.refusal("quarantine", "pull", view["id"], "--out", file)
    assert file.read_text() == "mine"


async def test_one_is_deleted_and_is_gone(desk: Desk) -> None:
    await apart(desk)
    (view,) = desk.tell("quarantine", "list")

    assert desk.say("quarantine", "delete", view["id"]) == f"{view['id']} is deleted\n"

    assert desk.tell("quarantine", "list") == []
    assert "there is no contribution" in desk.refusal("quarantine", "show", "0")
    assert "there is no" in desk.refusal("quarantine", "delete", view["id"])


async def test_a_client_that_was_paused_for_what_it_sent_is_reinstated(desk: Desk) -> None:
    device = await apart(desk, 3)
    assert (await desk.federation.admin.client(device)).state is ClientState.paused

    found = desk.tell("clients", "reinstate", "phone")

    assert (found["state"], found["reason"], found["rejections"]) == ("active", None, 0)
