"""An answer is given after the commit: what could not be kept was never promised."""

from __future__ import annotations

from protocol.views import Page, TokenView
from tests.federation import Federation

# Every token needs a row that nobody has, and the database looks only when the transaction commits.
BROKEN = """
create table nobodys (id integer primary key);
create table promises (id integer references nobodys (id) deferrable initially deferred);
create trigger unkept after insert on tokens begin insert into promises values (1); end
"""


async def test_a_commit_that_fails_is_a_refusal_and_leaves_nothing(small: Federation) -> None:
    before = await small.admin.get("/v1/tokens", Page[TokenView])
    with small.parts.database.engine.begin() as connection:
        for statement in BROKEN.strip().split(";\n"):
            connection.exec_driver_sql(statement)
    response = await small.admin.call("POST", "/v1/tokens", json={"name": "late", "role": "viewer"})
    assert response.status_code == 500
    assert response.json()["type"] == "/problems/internal-error"
    assert await small.admin.get("/v1/tokens", Page[TokenView]) == before
