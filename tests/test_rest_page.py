"""Every curl command of docs/rest.md, carried out against the application."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel

from protocol import errors
from protocol.views import Page, QuarantineView, TokenMade
from tests.federation import Federation, make_plan, open_federation, read

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = re.findall(r"(?m)^curl .*$", (DOCS / "rest.md").read_text("utf-8"))


class Curl(BaseModel):
    """One command, as far as the page uses curl."""

    method: str
    url: str
    headers: dict[str, str]
    body: str | None

    @classmethod
    def parse(cls, command: str) -> Curl:
        """The request that curl would make."""
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("-H", action="append", default=[])
        parser.add_argument("-X")
        parser.add_argument("-o")
        parser.add_argument("-N", action="store_true")
        parser.add_argument("--json")
        parser.add_argument("url")
        found = parser.parse_args(shlex.split(command)[1:])
        headers = {name: value.strip() for name, _, value in (header.partition(":") for header in found.H)}
        if found.json:
            headers["Content-Type"] = "application/json"
        return cls(method=found.X or ("POST" if found.json else "GET"), url=found.url, headers=headers, body=found.json)


async def variables(federation: Federation) -> dict[str, str]:
    """What the page's variables stand for: things that there are."""
    device = await federation.enrol("one")
    run = await federation.open(make_plan())
    await federation.open(make_plan(name="alone", cohort={"target": 1, "quorum": 1}, evaluation={"every": 0}))
    with suppress(errors.MalformedSlice):
        await device.put_slice(await device.take(), b"nonsense")
    apart = read(await federation.admin.call("GET", "/v1/quarantine"), Page[QuarantineView])
    made = read(await federation.admin.call("POST", "/v1/tokens", json={"name": "old", "role": "viewer"}), TokenMade)
    return {
        "HLORA_URL": "http://coordinator",
        "auth": f"Authorization: Bearer {federation.admin.secret}",
        "RUN": run,
        "CLIENT": device.id,
        "ENROLMENT": (await federation.admin.invite()).id,
        "TOKEN": made.id,
        "CONTRIBUTION": apart.items[0].id,
    }


async def test_every_command_of_the_page_does_what_the_page_says(sqlite_url: str, tmp_path: Path) -> None:
    async with open_federation(sqlite_url, tmp_path) as federation:
        known = await variables(federation)
        answers: list[httpx.Response] = []
        for command in COMMANDS:
            asked = Curl.parse(Template(command).substitute(known))
            if "/v1/events" in asked.url:
                continue  # it never ends; the path is looked at below
            body = make_plan(name="tickets").model_dump_json() if asked.body == "@plan.json" else asked.body
            answers.append(await federation.http.request(asked.method, asked.url, headers=asked.headers, content=body))
        failed = [f"{answer.request.method} {answer.url}: {answer.text}" for answer in answers if not answer.is_success]
    assert failed == []
    assert len(answers) == len(COMMANDS) - 1


def test_the_page_shows_every_route_that_is_not_for_agents() -> None:
    described = json.loads((DOCS / "openapi.json").read_text("utf-8"))["paths"]
    asked = [(curl.method.lower(), urlsplit(curl.url.removeprefix("$HLORA_URL")).path) for curl in map(Curl.parse, COMMANDS)]
    missing = [
        f"{method} {path}"
        for path, routes in described.items()
        for method, route in routes.items()
        if route["tags"] != ["agents"]
        and not any(method == m and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), where) for m, where in asked)
    ]
    assert missing == []
