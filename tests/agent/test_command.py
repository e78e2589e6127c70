"""The agent's command, in this process: what it says when something is missing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import structlog
from pydantic import SecretStr
from typer.testing import CliRunner

from agent import identity
from agent.__main__ import app
from agent.client import Client
from agent.identity import Identity
from protocol import errors
from protocol.messages import Enrol
from tests.agent.work import catalogue
from tests.federation import Federation, make_profile

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens
WHO = Identity(url=NOWHERE, id="client-1", name="device", credential="the secret")


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """The command sets up logs for its process, which is ours here."""
    yield
    structlog.reset_defaults()


def call(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    result = CliRunner().invoke(app, list(arguments), env=environment)
    return result.exit_code, result.output


def findings(home: Path, *arguments: str) -> tuple[int, dict[str, tuple[bool, str]]]:
    """What doctor finds, by point; the last of a point if there are several."""
    code, said = call("doctor", "--home", str(home), "--json", *arguments)
    return code, {line["point"]: (line["ok"], line["detail"]) for line in json.loads(said)}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A device that was enrolled somewhere, with one data set."""
    catalogue(tmp_path)
    (tmp_path / "datasets.toml").write_text('[things]\nformat = "jsonl"\npath = "things.jsonl"\nheld_out = 0.25\nseed = 10\n')
    (tmp_path / "policy.toml").write_text('models = ["*/encoder"]\nmemory_bytes = 1_000_000\ndevice = "cpu"\n')
    identity.save(WHO, tmp_path)
    return tmp_path


def test_doctor_says_point_by_point_what_is_there_and_what_to_mend(home: Path, encoder: Path) -> None:
    code, found = findings(home, "--model", str(encoder))
    assert code == 1
    assert found["policy"] == (True, str(home / "policy.toml"))
    assert found["data"] == (True, "things: 18 rows to train on, 6 held out, columns text, label")
    assert found["model"][0]
    assert found["model"][1].startswith(f"{encoder}: 0 MiB in {encoder}, sha256:")
    assert found["identity"] == (True, f"device (client-1) at {NOWHERE}")
    assert not found["coordinator"][0]
    assert "does not answer" in found["coordinator"][1]


def test_doctor_looks_on_when_something_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("memory = 1\n")
    (tmp_path / "datasets.toml").write_text('[things]\nformat = "jsonl"\npath = "gone.jsonl"\n')
    code, found = findings(tmp_path)
    assert code == 1
    assert not found["policy"][0]
    assert found["device"][0]
    assert found["data"] == (False, "'things': gone.jsonl is not there; mend the file or its entry in datasets.toml")
    assert "enrol first" in found["identity"][1]


def test_doctor_names_a_data_set_whose_columns_cannot_be_told(home: Path) -> None:
    (home / "things.jsonl").write_text(json.dumps({"a private sentence " * 20: 1, "other": 2}) + "\n" + json.dumps({"other": 3}) + "\n")
    ok, detail = findings(home)[1]["data"]
    assert not ok
    assert "names in Unicode of at most 256 characters" in detail
    assert "private" not in detail


def test_doctor_says_how_to_begin_where_nothing_is_there(tmp_path: Path) -> None:
    _, found = findings(tmp_path)
    assert found["policy"] == (True, f"no policy.toml in {tmp_path}: everything is allowed")
    assert found["data"] == (False, f"there are no data sets; describe some in {tmp_path / 'datasets.toml'}")
    (tmp_path / "datasets.toml").write_text('[things]\nformat = "jsonl"\npath = "things.jsonl"\n')
    (tmp_path / "policy.toml").write_text('data = ["thing"]\n')
    assert "names thing, which datasets.toml does not describe" in findings(tmp_path)[1]["data"][1]


def test_doctor_names_models_that_cannot_be_used(home: Path, encoder: Path, decoder: Path) -> None:
    assert "do not include" in findings(home, "--model", str(decoder))[1]["model"][1]
    (home / "policy.toml").write_text("memory_bytes = 1000\n")
    assert "GiB are offered" in findings(home, "--model", str(encoder))[1]["model"][1]
    assert "put the model there" in findings(home, "--model", "/no/such/model")[1]["model"][1]


def test_doctor_names_a_model_of_which_a_file_is_no_longer_whole(home: Path, encoder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(encoder, tmp_path / "copy" / "encoder"))
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert findings(home, "--model", str(place))[1]["model"] == (
        False,
        f"{weights} is incomplete, damaged or a Git-LFS pointer: fetch the model again",
    )


def test_doctor_warns_of_a_credential_that_others_can_read(home: Path) -> None:
    (home / "credential.json").chmod(0o644)
    assert "chmod 600" in findings(home)[1]["identity"][1]


def test_doctor_speaks_to_people_too(home: Path) -> None:
    code, said = call("doctor", "--home", str(home))
    assert code == 1
    assert f"ok      policy       {home / 'policy.toml'}" in said
    assert "failed  coordinator" in said


def test_a_credential_is_kept_for_its_owner_only(home: Path) -> None:
    assert stat.S_IMODE((home / "credential.json").stat().st_mode) == 0o600
    identity.save(WHO.model_copy(update={"name": "renamed"}), home)
    assert stat.S_IMODE((home / "credential.json").stat().st_mode) == 0o600
    assert identity.load(home).name == "renamed"


def test_a_credential_that_is_no_longer_whole_asks_for_enrolment(home: Path) -> None:
    (home / "credential.json").write_text("{")
    with pytest.raises(errors.Unauthenticated, match="enrol under another name"):
        identity.load(home)


def test_an_agent_that_is_not_enrolled_does_not_run(tmp_path: Path) -> None:
    code, said = call("run", HLORA_AGENT_HOME=str(tmp_path))
    assert code == 78
    assert said.startswith("error: ")
    assert "python -m agent enrol" in said


@pytest.mark.parametrize("name", ["policy.toml", "datasets.toml"])
@pytest.mark.parametrize("kind", ["UnicodeDecodeError", "IsADirectoryError"])
def test_a_file_of_the_owner_that_cannot_be_read_ends_the_agent_for_good(home: Path, name: str, kind: str) -> None:
    (home / name).unlink()
    if kind == "UnicodeDecodeError":
        (home / name).write_bytes("[réservé]\n".encode("latin-1"))
    else:
        (home / name).mkdir()
    why = f"{home / name} cannot be read as UTF-8 ({kind}); mend it or its permissions"
    assert call("run", "--home", str(home)) == (78, f"error: {why}\n")
    assert findings(home)[1][name.removesuffix(".toml").removesuffix("sets")] == (False, why)


def test_the_owners_files_are_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('data = ["Pfingströschen"]\n', "utf-8")
    (tmp_path / "datasets.toml").write_text('["Pfingströschen"]\nformat = "jsonl"\npath = "rows.jsonl"\n', "utf-8")
    home = f"pathlib.Path({str(tmp_path)!r})"
    question = f"import pathlib; from agent import data, policy; print(policy.load({home}).data == [*data.load({home}).sources])"
    ascii = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert subprocess.run([sys.executable, "-c", question], env=ascii, capture_output=True, check=True).stdout == b"True\n"


@pytest.mark.parametrize(
    ("words", "variables", "why"),
    [
        (["doctor"], {"HLORA_AGENT_LOG": "text"}, "HLORA_AGENT_LOG: Input should be 'console' or 'json'"),
        (
            ["doctor"],
            {"HLORA_AGENT_CHECKPOINT_SECONDS": "inf"},
            "HLORA_AGENT_CHECKPOINT_SECONDS: Input should be less than or equal to 2592000",
        ),
        (["enrol", NOWHERE, "--name", "d", "--token", "t"], {"HLORA_AGENT_CA_FILE": "/nowhere.pem"}, "/nowhere.pem holds no certificates"),
        (["enrol", NOWHERE, "--name", "a name!", "--token", "t"], {}, "'a name!' cannot be a machine's name: 1 to 64 letters"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(words: list[str], variables: dict[str, str], why: str, tmp_path: Path) -> None:
    code, said = call(*words, "--home", str(tmp_path), **variables)
    assert code == 1
    assert why in said
    assert said.count("\n") == 1


def test_enrolment_refuses_to_tell_the_token_to_the_network(tmp_path: Path) -> None:
    code, said = call("enrol", "http://example.org", "--name", "d", "--home", str(tmp_path), HLORA_AGENT_TOKEN="the token")
    assert code == 1
    assert "use https" in said
    assert "the token" not in said
    assert not (tmp_path / "credential.json").exists()


def test_a_home_folder_that_cannot_be_written_to_is_one_line(home: Path) -> None:
    (home / "agent.lock").mkdir()
    assert call("run", "--home", str(home)) == (
        78,
        f"error: {home} cannot be written to (Is a directory): an agent keeps its work there; mend it\n",
    )
    (home / "loop").symlink_to("loop")
    with pytest.raises(errors.InvalidRequest, match=r"cannot be written \(.*: name another home folder by --home or HLORA_AGENT_HOME"):
        identity.key(home / "loop" / "below", NOWHERE, "device")


def test_enrolment_asks_for_what_it_is_not_told_and_does_not_show_the_token(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["enrol", "--home", str(tmp_path)], input=f"{NOWHERE}\ndevice\nthe token\n")
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "the token" not in result.output


async def test_an_enrolment_whose_answer_was_lost_is_asked_for_again(federation: Federation, tmp_path: Path) -> None:
    token = (await federation.admin.invite(uses=1)).token
    url, link = "http://localhost:1", Link(httpx.ASGITransport(app=federation.app))
    asked = Enrol(name="device", profile=make_profile(), key=identity.key(tmp_path, url, "device"))

    async with Client(url, transport=link) as client:
        enrolled = await client.enrol(SecretStr(token), asked)

    assert link.answers == 2
    assert enrolled.credential == asked.key == identity.key(tmp_path, url, "device")
    assert stat.S_IMODE((tmp_path / "enrolling.json").stat().st_mode) == 0o600
    identity.save(Identity(url=url, id=enrolled.id, name="device", credential=enrolled.credential), tmp_path)
    assert identity.key(tmp_path, url, "device") != asked.key


@dataclass
class Link(httpx.AsyncBaseTransport):
    """Loses the first answer."""

    to: httpx.AsyncBaseTransport
    answers: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.to.handle_async_request(request)
        self.answers += 1
        if self.answers == 1:
            raise httpx.ReadError("the connection was cut", request=request)
        return response
