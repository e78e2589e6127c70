"""Every command against the real coordinator, in words and as JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from pydantic import TypeAdapter
from safetensors.torch import load_file
from typer.testing import CliRunner

from admin.__main__ import app
from admin.words import digest, size
from coordinator import retention
from protocol.messages import Enrol, Enrolled
from protocol.plan import Plan
from protocol.views import (
    ClientView,
    Description,
    EnrolmentMade,
    EnrolmentView,
    Health,
    RoundSummary,
    RoundView,
    RunDetail,
    RunView,
    TokenMade,
    TokenView,
)
from tests.admin.conftest import Desk
from tests.federation import LAYOUT, Caller, Device, make_plan, make_profile, read

DOCS = Path(__file__).parents[2] / "docs" / "operating.md"


async def play(desk: Desk, plan_file: Path) -> str:
    """A finished run of two rounds and three clients."""
    await desk.federation.enrol_many(3)
    run = str(desk.tell("runs", "create", plan_file)["id"])
    await desk.federation.play([run])
    return run


def write(file: Path, plan: dict[str, object]) -> Path:
    file.write_text(json.dumps(plan))
    return file


def on_a_terminal(desk: Desk, *words: str) -> tuple[int, str, str]:
    """Exit code, what was drawn on the terminal, and standard error of the command as a process of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HLORA_URL": desk.url, "HLORA_TOKEN": desk.token, "TERM": "xterm", "COLUMNS": "160", "LINES": "60"}
    command = [sys.executable, "-m", "admin", *words]
    found = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=environment, check=False, timeout=60)
    os.close(theirs)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 1 << 16).decode())  # without colours
    os.close(ours)
    return found.returncode, drawn, found.stderr.decode()


def before_a_terminal(desk: Desk, *words: str) -> tuple[str, str]:
    """The standard output of a command that must succeed, and what it drew on the terminal that is its standard error."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HLORA_URL": desk.url, "HLORA_TOKEN": desk.token, "TERM": "xterm", "COLUMNS": "160"}
    found = subprocess.run(
        [sys.executable, "-m", "admin", *words], stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True, timeout=60
    )
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return found.stdout.decode(), drawn


# --- runs --------------------------------------------------------------------------------------------------------------


async def test_a_plan_becomes_a_run_that_is_listed_and_shown(desk: Desk, plan_file: Path) -> None:
    made = RunDetail.model_validate(desk.tell("runs", "create", plan_file))
    assert made.plan == make_plan()
    assert [RunView.model_validate(one).id for one in desk.tell("runs", "list")] == [made.id]
    assert RunDetail.model_validate(desk.tell("runs", "show", made.id)).plan == made.plan
    said = desk.say("runs", "show", "small")
    for fact in (made.id, "delta, global rank 4", "2, 4, given by fixed", "3 contributions a round, 2 suffice", made.plan_digest):
        assert fact in said


async def test_the_same_key_again_finds_the_run_that_it_made(desk: Desk, plan_file: Path) -> None:
    first, again = (desk.tell("runs", "create", plan_file, "--idempotency-key", "monday")["id"] for _ in range(2))
    other = desk.tell("runs", "create", plan_file)["id"]
    assert first == again != other


async def test_a_run_continues_what_another_one_published(desk: Desk, plan_file: Path) -> None:
    run = await play(desk, plan_file)
    rounds = [await desk.federation.admin.round(run, number) for number in range(3)]
    digests = [round.adapter.digest for round in rounds if round.adapter is not None]
    by_name = RunDetail.model_validate(desk.tell("runs", "create", plan_file, "--continue", "small"))
    by_id = RunDetail.model_validate(desk.tell("runs", "create", plan_file, "--continue", run, "--continue-round", 1))
    assert [by_name.plan.continues, by_id.plan.continues] == [digests[2], digests[1]]
    assert digests[1] in desk.say("runs", "show", by_id.id).replace("\n", "")
    assert "of run" in desk.refusal("runs", "create", plan_file, "--continue", by_id.id)  # it has published nothing yet
    plan = write(plan_file.with_name("bound.json"), make_plan(continues=digests[0]).model_dump(mode="json"))
    assert "leave one of them out" in desk.refusal("runs", "create", plan, "--continue", run)
    assert "needs --continue" in desk.refusal("runs", "create", plan_file, "--continue-round", 1)


async def test_a_run_may_be_named_by_the_beginning_of_its_id_or_its_name_if_only_one_is_meant(desk: Desk, plan_file: Path) -> None:
    run = desk.tell("runs", "create", plan_file)["id"]
    for text in (run, run[:12], run.partition("-")[2][:9], "small"):
        assert desk.tell("runs", "show", text)["id"] == run
    assert desk.refusal("runs", "show", "large") == "there is no run 'large'; there are small"
    again = desk.tell("runs", "create", plan_file)["id"]
    said = desk.refusal("runs", "show", "small")
    assert said.startswith("2 runs are called 'small'; say which by its id: ")
    assert f"{run} (running, made 20" in said
    assert f"{again} (running, made 20" in said
    assert desk.refusal("runs", "show", "run-").startswith("2 runs are called 'run-'; say which by its id:")


async def test_runs_are_paused_resumed_and_stopped(desk: Desk, plan_file: Path) -> None:
    desk.say("runs", "create", plan_file)
    assert desk.tell("runs", "pause", "small")["state"] == "paused"
    assert desk.tell("runs", "resume", "small")["state"] == "running"
    assert "stopped: by an operator" in desk.say("runs", "stop", "small")
    assert "cannot resume" in desk.refusal("runs", "resume", "small")


@pytest.mark.parametrize(("verb", "code"), [("pause", 2), ("stop", 1)])
async def test_watching_a_run_that_does_not_go_on_ends_with_its_exit_code(desk: Desk, plan_file: Path, verb: str, code: int) -> None:
    desk.say("runs", "create", plan_file)
    desk.say("runs", verb, "small")
    assert desk.run("runs", "watch", "small").exit_code == code


async def test_watching_a_finished_run_tells_its_rounds_and_succeeds(desk: Desk, plan_file: Path) -> None:
    run = await play(desk, plan_file)
    said = desk.say("runs", "watch", run).splitlines()
    assert said[1].startswith("round 1 published; the target of 3 is in; 3 of 3 contributions; ")
    assert said[-1] == "run small is finished, 2 of 2 rounds published; accuracy 0.5"
    lines = [json.loads(line) for line in desk.say("runs", "watch", run, "--json").splitlines()]
    assert [line["kind"] for line in lines] == ["round"] * 3 + ["job"] * 6 + ["run"]


async def test_on_a_terminal_the_run_is_drawn(desk: Desk, plan_file: Path) -> None:
    run = await play(desk, plan_file)
    code, drawn, trouble = on_a_terminal(desk, "runs", "watch", run)
    assert (code, trouble) == (0, "")
    assert "small  finished" in drawn
    assert "round 2 of 2" in drawn


# --- rounds and adapters -----------------------------------------------------------------------------------------------


async def test_rounds_are_listed_and_shown_with_ranks_and_why(desk: Desk, plan_file: Path) -> None:
    run = await play(desk, plan_file)
    assert [RoundSummary.model_validate(one).number for one in desk.tell("rounds", "list", run)] == [0, 1, 2]
    newest = RoundView.model_validate(desk.tell("rounds", "show", run))
    assert newest.number == 2
    assert newest == RoundView.model_validate(desk.tell("rounds", "show", run, 2, "--attempt", 1))
    said = desk.say("rounds", "show", run, 1)
    for fact in ("1, attempt 1: published", "device 3", "4: the plan gives every client the same rank", "33.3 %", "attention.query"):
        assert fact in said
    assert "3/3" in desk.say("rounds", "list", run)


async def test_a_round_shows_what_its_bytes_follow_from_and_whether_they_were_given_up(desk: Desk, plan_file: Path) -> None:
    run = await play(desk, plan_file)
    manifest = RoundView.model_validate(desk.tell("rounds", "show", run, 1)).manifest
    assert manifest is not None
    before = desk.say("rounds", "show", run, 1)
    with desk.federation.parts.database.write() as session:
        retention.forget(session, 1, desk.federation.clock.now)
    after = desk.say("rounds", "show", run, 1)

    for fact in (manifest.plan, manifest.previous, f"torch {torch.__version__}", "merged on cpu", digest(manifest.inputs[0].digest)):
        assert str(fact) in before
    assert "given up" not in before
    assert "given up       contributions and slices, by the retention policy; the adapter stays" in after
    assert digest(manifest.inputs[0].digest) in after


async def test_a_round_shows_what_each_rank_leaves_out_of_each_module_and_how_far_that_may_be_from_the_least(
    desk: Desk, plan_file: Path
) -> None:
    run = await play(desk, plan_file)
    found = RoundView.model_validate(desk.tell("rounds", "show", run, 2))
    lines = [line.split() for line in desk.say("rounds", "show", run, 2).splitlines()]
    assert set(found.energy) == set(LAYOUT.modules)
    for module, energy in found.energy.items():
        assert sorted(energy.kept) == [2, 4]
        assert 0 < energy.kept[2] < energy.kept[4] < 1
        lost = [f"{100 * (1 - energy.kept[rank]):.3g}" for rank in (2, 4)]
        assert [module, f"{energy.total**0.5:.4g}", str(energy.stacked_rank), lost[0], "%", lost[1], "%", "is", "the", "best"] in lines
    whole = [f"{100 * (1 - found.kept_energy[rank]):.3g}" for rank in (2, 4)]
    assert [*lines[-3][:2], *lines[-3][4:8]] == ["all", "modules", whole[0], "%", whole[1], "%"]
    assert ["2", f"{100 * found.kept_energy[2]:.3g}", "%", whole[0], "%"] in [line[:5] for line in lines]


async def test_a_rounds_bytes_are_the_slices_that_came_and_those_that_were_handed_out(desk: Desk, plan_file: Path) -> None:
    run = await play(desk, plan_file)
    for number in (1, 2):
        found = RoundView.model_validate(desk.tell("rounds", "show", run, number))
        assert found.bytes_up == sum(job.slice.bytes for job in found.jobs if job.slice) > 0
        assert found.bytes_down == sum(job.usage.download_bytes for job in found.jobs if job.usage)
        said = desk.say("rounds", "show", run, number)
        assert f"{size(found.bytes_up)} up, {size(found.bytes_down)} down" in said


async def test_an_untrained_round_has_no_jobs_and_loses_nothing(desk: Desk, plan_file: Path) -> None:
    desk.say("runs", "create", plan_file)
    desk.federation.tick()
    assert "0, attempt 1: published" in desk.say("rounds", "show", "small", 0)
    assert desk.refusal("rounds", "show", "small", 7) == "run small has no round 7"


async def test_a_pulled_adapter_is_a_folder_of_the_rank_that_was_asked_for(desk: Desk, plan_file: Path, tmp_path: Path) -> None:
    run = await play(desk, plan_file)
    told = desk.tell("adapter", "pull", run, "--rank", 2, "--round", 1, "--out", tmp_path / "new" / "folder")
    assert sorted(told["files"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "new" / "folder" / "adapter_model.safetensors")
    assert tensors["base_model.model.attention.query.lora_A.weight"].shape == (2, 16)
    assert "# small, round 1, rank 2" in (tmp_path / "new" / "folder" / "README.md").read_text()
    assert f"{tmp_path}/adapter_config.json" in desk.say("adapter", "pull", run, "--out", tmp_path)
    assert "rank 5 is more" in desk.refusal("adapter", "pull", run, "--rank", 5, "--out", tmp_path)
    assert "cannot be written" in desk.refusal("adapter", "pull", run, "--out", tmp_path / "README.md")


async def test_a_folder_never_holds_an_adapter_beside_weights_that_it_is_merged_into(desk: Desk, plan_file: Path, tmp_path: Path) -> None:
    desk.say("runs", "create", plan_file)
    desk.federation.tick()
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    model.mkdir()
    (model / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    for _ in range(2):  # the same kind again is written over
        desk.say("adapter", "pull", "small", "--out", adapter)
    before = sorted(adapter.iterdir())

    said = f"{adapter} holds an adapter, and a whole model is asked for; name another folder, or empty this one"
    assert desk.refusal("adapter", "pull", "small", "--merged", "--out", adapter) == said
    said = f"{model} holds a whole model, and an adapter is asked for; name another folder, or empty this one"
    assert desk.refusal("adapter", "pull", "small", "--out", model) == said
    assert sorted(adapter.iterdir()) == before
    assert [file.name for file in model.iterdir()] == ["model-00001-of-00002.safetensors"]


async def test_an_adapter_is_pulled_at_a_share_of_its_energy_of_each_module_or_of_all(desk: Desk, plan_file: Path, tmp_path: Path) -> None:
    run = await play(desk, plan_file)
    each = desk.tell("adapter", "pull", run, "--kept", 0.6, "--out", tmp_path / "each")["ranks"]
    alike = desk.tell("adapter", "pull", run, "--kept", 0.6, "--uniform", "--out", tmp_path / "alike")["ranks"]
    whole = desk.tell("adapter", "pull", run, "--kept", 1, "--rank", 3, "--out", tmp_path / "whole")["ranks"]
    for folder, ranks in (("each", each), ("alike", alike), ("whole", whole)):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert ranks == {module: len(tensors[f"base_model.model.{module}.lora_A.weight"]) for module in LAYOUT.modules}
    assert all(1 <= rank < 4 for rank in each.values())
    assert min(each.values()) <= alike["attention.key"] == alike["attention.query"] <= max(each.values())
    assert set(whole.values()) == {3}
    assert desk.say("adapter", "pull", run, "--rank", 2, "--out", tmp_path / "two").endswith("rank 2 in 2 modules\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kept", 0], "kept: Input should be greater than 0"),
        (["--kept", 1.01], "kept: Input should be less than or equal to 1"),
        (["--uniform"], "uniform says how `kept` is meant"),
        (["--rank", 5, "--kept", 0.9], "rank 5 is more"),
        (["--round", 9], "has not published round 9"),
    ],
)
async def test_what_an_adapter_cannot_be_read_out_at_is_refused_and_nothing_is_written(
    desk: Desk, plan_file: Path, tmp_path: Path, options: list[object], said: str
) -> None:
    run = desk.tell("runs", "create", plan_file)["id"]
    desk.federation.tick()
    assert said in desk.refusal("adapter", "pull", run, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


async def test_a_download_is_followed_on_a_terminal_and_leaves_the_standard_output_alone(
    desk: Desk, plan_file: Path, tmp_path: Path
) -> None:
    desk.say("runs", "create", plan_file)
    desk.federation.tick()
    told, drawn = before_a_terminal(desk, "adapter", "pull", "small", "--out", str(tmp_path / "out"), "--json")
    assert json.loads(told)["ranks"] == dict.fromkeys(LAYOUT.modules, 4)
    assert "kB" in drawn


# --- clients, enrolments, tokens -----------------------------------------------------------------------------------------


async def test_clients_are_listed_and_shown_with_machine_data_and_limits(desk: Desk) -> None:
    await desk.federation.enrol("phone", labels={"class": "small"})
    assert [ClientView.model_validate(one).name for one in desk.tell("clients", "list")] == ["phone"]
    shown = ClientView.model_validate(desk.tell("clients", "show", "phone"))
    assert "class=small" in desk.say("clients", "list")
    said = desk.say("clients", "show", shown.id[:14])
    for fact in (shown.id, "cpu, 1 cores, 1 GB of memory", "texts", "class=small"):
        assert fact in said


async def test_labels_are_set_and_taken_away_one_by_one(desk: Desk) -> None:
    await desk.federation.enrol("phone", labels={"class": "small", "site": "north"})
    assert desk.tell("clients", "label", "phone", "class=large", "site-", "rack=a=b")["labels"] == {"class": "large", "rack": "a=b"}
    assert desk.refusal("clients", "label", "phone", "site-") == "there is no label 'site' to take away; there are class=large rack=a=b"
    assert "neither KEY=VALUE" in desk.refusal("clients", "label", "phone", "site")


async def test_a_label_that_no_database_keeps_is_refused_in_one_line(desk: Desk) -> None:
    await desk.federation.enrol("device")

    for words in (("enrolments", "create", "--label"), ("clients", "label", "device")):
        assert "labels.site" in desk.refusal(*words, "site=Z\udcfcrich")
        assert "256 characters" in desk.refusal(*words, f"site={'x' * 257}")


async def test_clients_are_paused_reinstated_and_revoked(desk: Desk) -> None:
    await desk.federation.enrol("phone")
    for verb, state in (("pause", "paused"), ("reinstate", "active"), ("revoke", "revoked")):
        assert desk.tell("clients", verb, "phone")["state"] == state
    assert desk.refusal("clients", "reinstate", "phone")


async def test_a_rotated_credential_is_the_only_thing_on_standard_output_and_works(desk: Desk) -> None:
    old = await desk.federation.enrol("phone")
    credential = desk.say("clients", "rotate", "phone").strip()
    assert (await Device(old.http, credential).whoami()).status_code == 200
    assert (await old.whoami()).status_code == 401


async def test_an_enrolment_token_is_the_only_thing_on_standard_output_and_works_until_it_is_revoked(desk: Desk) -> None:
    token = desk.say("enrolments", "create", "--uses", 2, "--hours", 1, "--label", "site=north").strip()
    body = Enrol(name="phone", profile=make_profile()).model_dump(mode="json")
    client = read(await Caller(desk.federation.http, token).call("POST", "/v1/clients", json=body), Enrolled)
    assert desk.tell("clients", "show", client.id)["labels"] == {"site": "north"}
    [listed] = TypeAdapter(list[EnrolmentView]).validate_python(desk.tell("enrolments", "list"))
    assert (listed.uses_left, listed.revoked) == (1, False)
    assert desk.say("enrolments", "revoke", listed.id[:15]) == f"{listed.id} is revoked\n"
    assert desk.tell("enrolments", "list")[0]["revoked"] is True
    refused = await Caller(desk.federation.http, token).call("POST", "/v1/clients", json=body | {"name": "other"})
    assert refused.status_code in (401, 410)
    assert EnrolmentMade.model_validate(desk.tell("enrolments", "create")).uses_left == 1


async def test_an_operators_token_may_what_its_role_says_until_it_is_revoked(desk: Desk, plan_file: Path) -> None:
    viewer = desk.say("tokens", "create", "night shift").strip()
    assert desk.run("runs", "list", token=viewer).exit_code == 0
    assert "this is for admin credentials" in desk.refusal("runs", "create", plan_file, token=viewer)
    made = TokenMade.model_validate(desk.tell("tokens", "create", "boss", "--role", "admin"))
    assert desk.run("tokens", "list", token=made.token).exit_code == 0
    assert {TokenView.model_validate(one).name for one in desk.tell("tokens", "list")} >= {"night shift", "boss"}
    desk.say("tokens", "revoke", "night shift")
    assert desk.refusal("runs", "list", token=viewer)
    assert "1 to 64 letters" in desk.refusal("tokens", "create", "night/shift")


# --- the rest ------------------------------------------------------------------------------------------------------------


async def test_strategies_and_rank_policies_are_told_with_their_options(desk: Desk) -> None:
    for command, name in (("strategies", "hlora"), ("ranks", "capacity")):
        assert name in [Description.model_validate(one).name for one in desk.tell(command)]
        assert f"{name}: " in desk.say(command)
    assert "memory_share" in desk.say("ranks")


async def test_health_needs_no_token(desk: Desk) -> None:
    assert Health.model_validate(desk.tell("health")).status == "ok"
    assert desk.run("health", HLORA_TOKEN="").exit_code == 0


async def test_options_override_the_environment(desk: Desk) -> None:
    result = desk.run("--url", desk.url, "--token", desk.token, "runs", "list", HLORA_URL="http://127.0.0.1:1", HLORA_TOKEN="wrong")
    assert result.exit_code == 0


async def test_refusals_are_one_line_with_what_to_do(desk: Desk, plan_file: Path) -> None:
    assert "HLORA_TOKEN" in desk.refusal("runs", "list", HLORA_TOKEN="")
    assert desk.refusal("runs", "list", token="nobody's")
    assert "is the coordinator running" in desk.refusal("runs", "list", HLORA_URL="http://127.0.0.1:1")
    assert "HLORA_INSECURE" in desk.refusal("runs", "list", HLORA_INSECURE="perhaps")
    wrong = make_plan().model_dump(mode="json") | {"strategy": {"name": "guess"}}
    assert "guess" in desk.refusal("runs", "create", write(plan_file, wrong))


def commands() -> Iterator[tuple[str, ...]]:
    """Every command's words."""
    for info in app.registered_commands:
        yield (_name(info),)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for info in group.typer_instance.registered_commands:
            yield (str(group.name), _name(info))


def _name(info: typer.models.CommandInfo) -> str:
    assert info.callback is not None
    return info.name or info.callback.__name__


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_answers_as_json_explains_itself_and_stands_in_the_handbook(words: tuple[str, ...]) -> None:
    said = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert said.exit_code == 0
    assert "--json" in said.stdout
    assert f"`{' '.join(words)}" in DOCS.read_text()


def without_transformers(desk: Desk, *words: object) -> str:
    """The one line of a command that must fail where transformers is not installed."""
    code = "import sys; sys.modules['transformers'] = None; from admin.__main__ import app; app()"
    environment = {**os.environ, "HLORA_URL": desk.url, "HLORA_TOKEN": desk.token}
    command = [sys.executable, "-c", code, *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1)
    return found.stderr


async def test_packages_that_are_missing_are_named_with_the_extra_that_brings_them(desk: Desk, plan_file: Path, tmp_path: Path) -> None:
    desk.say("runs", "create", plan_file)
    desk.federation.tick()
    unresolved = write(plan_file, make_plan().model_dump(mode="json") | {"layout": None})
    for words in (["plans", "check", unresolved], ["adapter", "pull", "small", "--merged", "--out", tmp_path / "out"]):
        said = without_transformers(desk, *words)
        assert "transformers" in said
        assert "install HLoRA's extra `agent`" in said


def test_plans_are_read_back_as_they_were_resolved(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(make_plan().model_dump_json())
    result = CliRunner().invoke(app, ["plans", "resolve", str(tmp_path / "plan.json"), "--out", str(tmp_path / "again.json")])
    assert (result.exit_code, result.stdout) == (0, "")
    assert Plan.model_validate_json((tmp_path / "again.json").read_text()) == make_plan()
