"""Tests of sessions: their lifetime, and their records on disk."""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_twisted
from attrs import define, field
from twisted.internet import reactor

from pulsar_api.auth import credentials
from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import MOST_SESSIONS, CredentialStore
from pulsar_api.auth.sessions import IDLE, TOTAL, SessionId, Sessions
from tests.fakes import person

SHOWN = Credentials("joe", "hunter2")


@define(eq=False)
class World:
    """Sessions in a folder, with a clock that the test sets."""

    folder: Path
    now: float = 1e9
    store: CredentialStore = field(init=False)
    sessions: Sessions = field(init=False)

    def open(self) -> None:
        """Start, or restart."""
        call: Any = reactor
        self.store = CredentialStore(self.folder / "auth.db", call.callFromThread)
        self.sessions = Sessions(self.store, lambda: self.now)

    async def close(self) -> None:
        """Stop."""
        await self.store.close()

    async def begin(self, user: str = "joe") -> SessionId:
        """Return a new id."""
        return await self.sessions.begin(person(user), SHOWN)

    async def find(self, id: SessionId) -> Credentials | None:
        """Return the owner of a session."""
        return await self.sessions.find(id)


@pytest_twisted.async_yield_fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Return a new world."""
    made = World(tmp_path)
    made.open()
    yield made
    await made.close()


async def test_a_session_survives_a_restart(world: World) -> None:
    """Its values are those from its start."""
    id = await world.begin()
    await world.close()
    world.open()
    assert await world.find(id) == SHOWN
    assert await world.find(SessionId(id.value + "x")) is None
    assert await world.find(SessionId("")) is None


async def test_an_unused_session_ends(world: World) -> None:
    """A session in use goes on, but not for ever."""
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
    """Those of other users go on."""
    one, two, three, other = [await world.begin(u) for u in ("joe", "joe", "joe", "eve")]
    await world.sessions.end(one)
    assert [await world.find(id) is None for id in (one, two, three, other)] == [True] + [
        False
    ] * 3
    await world.sessions.end_all(person("joe"))
    assert [await world.find(id) is None for id in (one, two, three, other)] == [
        True
    ] * 3 + [False]


async def test_the_database_reveals_no_session_and_no_password(world: World) -> None:
    """Only the session's id decrypts its record, and the database does not have it."""
    id = await world.begin()
    record = await world.store.session(id.digest)
    assert record is not None
    assert b"hunter2" not in record.sealed
    await world.close()
    data = b"".join(path.read_bytes() for path in world.folder.iterdir())
    assert id.value.encode() not in data
    assert b"hunter2" not in data
    world.open()
    assert await world.find(SessionId(id.digest)) is None


async def test_a_changed_record_is_not_a_session(world: World) -> None:
    """A record under another id is not one either."""
    id, other = await world.begin(), await world.begin("eve")
    await world.close()
    with sqlite3.connect(world.folder / "auth.db") as db:
        db.execute(
            "UPDATE session SET sealed = (SELECT sealed FROM session WHERE name = 'eve')"
        )
    db.close()
    world.open()
    assert await world.find(id) is None
    assert await world.find(other) == SHOWN


async def test_the_least_recently_used_sessions_of_a_user_end(world: World) -> None:
    """Those of other users stay, and a new session always starts."""
    other = await world.begin("eve")
    ids = []
    for _ in range(MOST_SESSIONS):
        ids.append(await world.begin())
        world.now += 1
    world.now += 120
    assert await world.find(ids[0]) == SHOWN  # by this use
    ids.append(await world.begin())
    ids.append(await world.begin())
    left = [id for id in ids if await world.find(id) is not None]
    assert left == [ids[0], *ids[3:]]
    assert await world.find(other) == SHOWN
    # Sessions in use stay, however fast others start.
    for _ in range(2 * MOST_SESSIONS):
        world.now += 0.001
        assert await world.find(ids[0]) == SHOWN
        await world.begin()
    world.now -= 3600  # an operator has set the clock back
    late = await world.begin()
    assert await world.find(late) == SHOWN


async def test_the_cost_of_a_sign_in_does_not_grow_with_the_sessions(world: World) -> None:
    """Each of its statements uses an index, and none reads the whole table."""
    seen: list[str] = []

    def watch(db: sqlite3.Connection) -> None:
        db.set_trace_callback(seen.append)

    threads = world.store._reader, world.store._writer
    for thread in threads:
        await thread.do(watch)
    id = await world.begin()
    await world.find(id)
    await world.sessions.end_all(person("joe"))
    statements = [text for text in seen if "session" in text]
    assert len(statements) == 6

    def plans(db: sqlite3.Connection) -> list[str]:
        rows = [db.execute(f"EXPLAIN QUERY PLAN {text}").fetchall() for text in statements]
        return [row["detail"] for found in rows for row in found]

    for thread in threads:
        await thread.do(lambda db: db.set_trace_callback(None))
    found = await world.store._reader.do(plans)
    assert found
    assert [detail for detail in found if detail.startswith("SCAN")] == []
    assert [detail for detail in found if "TEMP B-TREE" in detail] == []


def fill(path: Path, **users: int) -> None:
    """Write many sessions at once."""
    credentials.prepare(path)
    with sqlite3.connect(path) as db:
        for user, number in users.items():
            key = person(user).key
            rows = [(f"{user} {n}", key, 1e9 + n, 1e9 + n, user) for n in range(number)]
            db.executemany("INSERT INTO session VALUES (?, ?, x'00', ?, ?, ?)", rows)
    db.close()


def kept(path: Path) -> set[str]:
    """Return the digests of the stored sessions."""
    with credentials.opened(path) as db:
        return {row["digest"] for row in db.execute("SELECT digest FROM session")}


async def test_very_many_sessions_are_removed_in_small_steps(tmp_path: Path) -> None:
    """No sign-in waits for more than some hundreds. In the end the newest are left."""
    fill(tmp_path / "auth.db", joe=5000, eve=3)
    world = World(tmp_path, now=1e9 + 5000)
    world.open()
    id = await world.begin()
    assert len(kept(tmp_path / "auth.db")) >= 5004 - 100
    for _ in range(1000):
        await world.find(id)
        if len(kept(tmp_path / "auth.db")) == MOST_SESSIONS + 3:
            break
    assert kept(tmp_path / "auth.db") == {id.digest, "eve 0", "eve 1", "eve 2"} | {
        f"joe {n}" for n in range(5000 - MOST_SESSIONS + 1, 5000)
    }
    await world.close()
