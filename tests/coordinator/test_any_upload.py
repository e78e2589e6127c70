"""Any history of parts, cuts, repeats and strays ends in the same slice, and the coordinator always says how far it is."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import errors, slices
from protocol.messages import Job, SliceReceipt
from tests.federation import Device, Federation, make_plan, open_federation, repr_digest


@dataclass(frozen=True)
class Stage:
    """A device that holds a job, and the loop that it lives in."""

    runner: asyncio.Runner
    federation: Federation
    device: Device
    job: Job
    numbers: Iterator[int] = field(default_factory=count)

    async def another(self) -> bytes:
        """A slice that was not sent before."""
        return await self.device.trained(self.job, salt=next(self.numbers))


@pytest.fixture(scope="module")
def stage(_migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("any-history")
    url = f"sqlite:///{shutil.copy(_migrated_sqlite, folder / 'test.sqlite')}"
    with asyncio.Runner() as runner:
        opened = AsyncExitStack()
        federation = runner.run(opened.enter_async_context(open_federation(url, folder)))
        _, (device, *_), (job, *_) = runner.run(federation.training(make_plan()))
        yield Stage(runner, federation, device, job)
        runner.run(opened.aclose())


shares = st.floats(0, 1)
histories = st.lists(
    st.one_of(
        st.tuples(st.just("send"), shares, st.just(0.0)),
        st.tuples(st.just("cut"), shares, shares),  # so much was announced, and so much of it came
        st.tuples(st.just("elsewhere"), shares, shares),  # from there, so much
        st.tuples(st.just("repeat"), st.just(0.0), st.just(0.0)),
    ),
    max_size=12,
)


@given(history=histories)
@settings(max_examples=40, deadline=None)
def test_any_history_of_parts_ends_in_the_same_blob(stage: Stage, history: list[tuple[str, float, float]]) -> None:
    stage.runner.run(played(stage, history))


async def played(stage: Stage, history: list[tuple[str, float, float]]) -> None:
    device, job, data = stage.device, stage.job, await stage.another()
    offset, last = 0, (0, 0)
    for kind, one, other in history:
        start, stop = offset, offset + round(one * (len(data) - offset))
        came = stop
        if kind == "cut":
            came = start + round(other * (stop - start))
        if kind == "elsewhere":
            start = round(one * len(data))
            came = stop = start + round(other * (len(data) - start))
        if kind == "repeat":
            start, came = last
            stop = came
        offset, last = await sent(device, job, data, offset, start, stop, came), (start, came)
        headers = await device.head(job)
        if offset:
            assert (headers["Upload-Offset"], headers["Repr-Digest"]) == (str(offset), repr_digest(data))

    receipt = await device.patch(job, data, offset, len(data))

    assert receipt == SliceReceipt(digest=slices.digest(data), bytes=len(data))
    assert stage.federation.parts.blobs.read(slices.digest(data)) == data


async def sent(device: Device, job: Job, data: bytes, offset: int, start: int, stop: int, came: int) -> int:
    """The offset that must be reached after bytes start … stop − 1 were announced and those before `came` arrived."""
    headers = {"Content-Length": str(stop - start), "Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data)}
    try:
        answer = await device.patch(job, data[:came], start, came, headers=headers)
    except (errors.OffsetMismatch, errors.TruncatedBody) as error:
        expected = came if isinstance(error, errors.TruncatedBody) else offset
        assert error.facts == {"offset": expected, "length": len(data)}  # noqa: PT017
        assert start != offset or came < stop
        return expected
    assert offset in (start, len(data))
    assert came == stop or offset == len(data)
    return answer if isinstance(answer, int) else answer.bytes
