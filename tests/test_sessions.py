"""Sessions: how long they live, and what is on disk of them."""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_twisted
from attrs import define, field
from twisted.internet import reactor

from pulsar_api.auth.gate import Credentials
from pulsar_api.auth.records import Records, digest
from pulsar_api.auth.sessions import IDLE, TOTAL, Sessions

SHOWN = Credentials("joe", "hunter2")


@define(eq=False)
class World:
    """Sessions in a folder, at a time that a test sets."""

    folder: Path
    now: float = 1e9
    records: Records = field(init=False)
    sessions: Sessions = field(init=False)

    def open(self) -> None:
        """Start, or start again."""
        call: Any = reactor
        self.records = Records(self.folder / "auth.db", call.callFromThread)
        self.sessions = Sessions(self.records, lambda: self.now)

    async def close(self) -> None:
        """Stop."""
        await self.records.close()

    async def begin(self, user: str = "joe") -> str:
        """Return a new id."""
        return await self.sessions.begin(user, SHOWN)

    async def find(self, id: str) -> Credentials | None:
        """Return whose it is."""
        return await self.sessions.find(id)


@pytest_twisted.async_yield_fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Return a new one."""
    made = World(tmp_path)
    made.open()
    yield made
    await made.close()


async def test_a_session_survives_a_restart(world: World) -> None:
    """With what it began with."""
    id = await world.begin()
    await world.close()
    world.open()
    assert await world.find(id) == SHOWN
    assert await world.find(id + "x") is None
    assert await world.find("") is None


async def test_a_session_that_is_not_used_ends(world: World) -> None:
    """Used at least now and then it goes on, but not for ever."""
    idle, used = await world.begin(), await world.begin()
    began = world.now
    world.now += IDLE - 1
    assert await world.find(used) == SHOWN
    world.now += 2
    assert await world.find(idle) is None
    while world.now < began + TOTAL - 1:
        assert await world.find(used) == SHOWN
        world.now += IDLE / 2
    world.now = began + TOTAL
    assert await world.find(used) is None


async def test_sessions_end_one_by_one_or_all_of_a_user(world: World) -> None:
    """And those of others do not."""
    one, two, three, other = [await world.begin(u) for u in ("joe", "joe", "joe", "eve")]
    await world.sessions.end(one)
    assert [await world.find(id) is None for id in (one, two, three, other)] == [True] + [
        False
    ] * 3
    await world.sessions.end_all("joe")
    assert [await world.find(id) is None for id in (one, two, three, other)] == [
        True
    ] * 3 + [False]


async def test_who_has_the_database_has_no_session_and_no_password(world: World) -> None:
    """What is kept can be opened by the id alone, which is not kept."""
    id = await world.begin()
    record = await world.records.session(digest(id))
    assert record is not None
    assert b"hunter2" not in record.sealed
    await world.close()
    data = b"".join(path.read_bytes() for path in world.folder.iterdir())
    assert id.encode() not in data
    assert b"hunter2" not in data
    world.open()
    assert await world.find(digest(id)) is None


async def test_a_record_that_was_changed_is_no_session(world: World) -> None:
    """Nor one that was put under another id."""
    id, other = await world.begin(), await world.begin("eve")
    await world.close()
    with sqlite3.connect(world.folder / "auth.db") as db:
        db.execute(
            "UPDATE session SET sealed = (SELECT sealed FROM session WHERE user = 'eve')"
        )
    db.close()
    world.open()
    assert await world.find(id) is None
    assert await world.find(other) == SHOWN
