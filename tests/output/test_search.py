"""Tests of searches for tasks: by pages, in small steps, and beside quick reads."""

import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import pytest_twisted
from attrs import evolve
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import CancelledError, gatherResults
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.storage.rows import PAGE
from pulsar_api.storage.tasks import _WINDOW, SQLiteStore
from pulsar_api.tasks.interfaces import NewTask, TaskStore
from pulsar_api.tasks.model import Found, Status, TaskQuery, TaskSnapshot, TaskSpec
from tests.fakes import MemoryStore, person

CASE = SynchronousTestCase()
reactor: Any = global_reactor  # its type knows no threads
SPEC = TaskSpec("site", "prod", "deploy", {"branch": "main"}, person("alice"))
OTHER = evolve(SPEC, app="shop", env="staging", user=person("bob"))
MINE = [("shop", "*", "*")]
QUICK = [
    TaskQuery(),
    TaskQuery(limit=3),
    TaskQuery(before=5),
    TaskQuery(limit=2, offset=3),
    TaskQuery(app="shop", env="staging"),
    TaskQuery(status=Status.CREATED),
    TaskQuery(status=Status.RUNNING, app="shop", text="s"),
]
SLOW = [
    TaskQuery(app="shop"),
    TaskQuery(env="staging"),
    TaskQuery(app="shop", env="staging", user="bob"),
    TaskQuery(user="alice", limit=2),
    TaskQuery(status=Status.FAILED),
    TaskQuery(text="sho", offset=2),
    TaskQuery(within=MINE, before=9),
    TaskQuery(within=[("*", "*", "*")], limit=2, offset=7),
    TaskQuery(within=[]),
    TaskQuery(offset=5000),
]


@pytest_twisted.async_yield_fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    """Return a store in a real file."""
    store = SQLiteStore(tmp_path / "tasks.db", reactor.callFromThread)
    yield store
    await store.close()


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest) -> TaskStore:
    """Return each implementation of the port in turn."""
    if request.param == "memory":
        return MemoryStore()
    found: SQLiteStore = request.getfixturevalue("sqlite")
    return found


async def create(store: TaskStore, specs: Sequence[TaskSpec]) -> list[TaskSnapshot]:
    """Record new tasks."""
    return await gatherResults([store.create(NewTask(spec, 0.0, 0.0)) for spec in specs])


async def whole(store: TaskStore, found: Found) -> list[int]:
    """Return the numbers of all found tasks, read page by page."""
    numbers = [task.id for task in found.tasks]
    while found.rest:
        found = await store.read(found.rest)
        numbers += [task.id for task in found.tasks]
    return numbers


@pytest.mark.parametrize("query", QUICK + SLOW)
async def test_a_search_finds_the_same_as_a_list(
    store: TaskStore, query: TaskQuery
) -> None:
    """The numbers of all tasks are known at once, and tasks come page by page."""
    tasks = await create(store, [SPEC, OTHER] * 5)
    for task in tasks[::3]:
        await store.save(evolve(task, status=Status.FAILED, revision=2))
    expected = [task.id for task in await store.select(query)]
    found = await store.search(query)
    assert found.numbers == expected
    assert await whole(store, found) == expected


def test_queries_with_an_index_are_quick() -> None:
    """Other queries must read tasks that do not match."""
    assert [query for query in QUICK if not query.quick] == []
    assert [query for query in SLOW if query.quick] == []


async def test_the_size_of_a_page_is_limited(sqlite: SQLiteStore) -> None:
    """Large tasks fill it sooner. A page of small ones has a hundred."""
    large = evolve(SPEC, variables={"data": "x" * 60_000})
    await create(sqlite, [SPEC] * 150 + [large] * 10)
    found = await sqlite.search(TaskQuery(limit=1000))
    assert len(found.tasks) == PAGE // 60_000 + 1
    assert len(found.rest) == 160 - len(found.tasks)
    found = await sqlite.read([*range(150, 0, -1), 10_000])
    assert [task.id for task in found.tasks] == list(range(150, 50, -1))
    found = await sqlite.read([5, 10_000, 4])
    assert [task.id for task in found.tasks] == [5, 4]
    assert found.rest == []


@pytest.mark.parametrize("rare", [1, _WINDOW, _WINDOW + 1, 3 * _WINDOW])
async def test_a_rare_match_is_found(sqlite: SQLiteStore, rare: int) -> None:
    """It is at either edge of the window that one step reads."""
    specs = [SPEC] * (3 * _WINDOW)
    specs[rare - 1] = OTHER
    await create(sqlite, specs)
    for query in (TaskQuery(within=MINE), TaskQuery(app="shop"), TaskQuery(text="shop")):
        assert (await sqlite.search(query)).numbers == [rare]
        assert (await sqlite.search(evolve(query, before=rare))).numbers == []
        assert (await sqlite.search(evolve(query, before=rare + 1))).numbers == [rare]
    first = await sqlite.after(0, MINE)
    assert first is not None
    assert first.id == rare
    assert await sqlite.after(rare, MINE) is None
    assert (await sqlite.after(rare - 1, MINE)) == first


async def test_quick_reads_do_not_wait_for_searches(sqlite: SQLiteStore) -> None:
    """They do not even wait for a search that hangs."""
    (task, *_) = await create(sqlite, [SPEC, OTHER])
    go_on = Event()
    hanging = sqlite._searcher.do(lambda _: go_on.wait(60))
    searching = sqlite.search(TaskQuery(text="shop"))
    following = sqlite.after(0, MINE)
    try:
        assert await sqlite.load(task.id) == task
        assert (await sqlite.search(TaskQuery())).numbers == [2, 1]
        assert await sqlite.after(0) == task
        assert await sqlite.last_change() == (2, 2)
        CASE.assertNoResult(searching)
        CASE.assertNoResult(following)
    finally:
        go_on.set()
    await hanging
    assert (await searching).numbers == [2]
    assert (await following) is not None


async def test_searches_take_turns(sqlite: SQLiteStore) -> None:
    """A short one does not wait for the end of a long one."""
    await create(sqlite, [SPEC] * (5 * _WINDOW))
    ended = []
    long = sqlite.search(TaskQuery(text="nothing"))
    short = sqlite.search(TaskQuery(text="site", limit=1))
    long.addCallback(lambda _: ended.append("long"))
    short.addCallback(lambda _: ended.append("short"))
    await gatherResults([long, short])
    assert ended == ["short", "long"]


async def test_a_cancelled_search_ends(sqlite: SQLiteStore) -> None:
    """It makes no further step."""
    await create(sqlite, [SPEC] * (5 * _WINDOW))
    statements: list[str] = []

    def watch(db: sqlite3.Connection) -> None:
        db.set_trace_callback(statements.append)

    await sqlite._searcher.do(watch)
    searching = sqlite.search(TaskQuery(text="nothing"))
    searching.cancel()
    CASE.failureResultOf(searching, CancelledError)
    for _ in range(5):
        await sqlite._searcher.do(lambda _: None)
    assert len([text for text in statements if "instr" in text]) <= 1


@pytest.mark.parametrize("query", QUICK)
async def test_a_quick_search_uses_an_index(sqlite: SQLiteStore, query: TaskQuery) -> None:
    """It reads no task that does not match, and sorts none."""
    await create(sqlite, [SPEC, OTHER])
    plans = await plans_of(sqlite._reader, sqlite, query)
    assert plans
    narrow = query.status is not None or query.app is not None
    if narrow:
        assert [plan for plan in plans if plan.startswith("SCAN")] == []
    assert [plan for plan in plans if "TEMP B-TREE" in plan] == []
    assert all("task_" in plan or "PRIMARY KEY" in plan for plan in plans)


@pytest.mark.parametrize("query", [query for query in SLOW if query.within != []])
async def test_each_step_of_a_search_is_bounded(
    sqlite: SQLiteStore, query: TaskQuery
) -> None:
    """The bound is a range of task numbers, whatever indexes exist."""
    await create(sqlite, [SPEC, OTHER])
    plans = await plans_of(sqlite._searcher, sqlite, query)
    wanted = {
        "SEARCH task USING INTEGER PRIMARY KEY (rowid<?)",
        "SEARCH task USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
        "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)",
    }
    assert set(plans) <= wanted


async def plans_of(thread: Any, store: SQLiteStore, query: TaskQuery) -> list[str]:
    """Return the query plans of a search."""
    statements: list[str] = []

    def watch(db: sqlite3.Connection) -> None:
        db.set_trace_callback(statements.append)

    def plans(db: sqlite3.Connection) -> list[str]:
        db.set_trace_callback(None)
        asked = [text for text in statements if text.startswith("SELECT")]
        rows = [db.execute(f"EXPLAIN QUERY PLAN {text}").fetchall() for text in asked]
        return [row["detail"] for found in rows for row in found]

    await thread.do(watch)
    await store.search(query)
    found: list[str] = await thread.do(plans)
    return found


async def test_the_size_of_news_is_limited(sqlite: SQLiteStore) -> None:
    """Large tasks fill it sooner. None is left out or repeated."""
    large = evolve(SPEC, variables={"data": "x" * 60_000})
    tasks = await create(sqlite, [large] * 10)
    for task in tasks:
        await sqlite.save(evolve(task, revision=2))
    change, known = 0, 0
    created: list[int] = []
    changed: list[int] = []
    most = 0
    while True:
        news = await sqlite.news(change, known, 100)
        most = max(most, len(news.created), len(news.changed))
        created += [task.id for task in news.created]
        changed += [task.id for _, task in news.changed]
        known = max(created)
        change = news.changed[-1][0] if news.changed else change
        if not news.more:
            break
    assert created == changed == list(range(1, 11))
    assert most == PAGE // 60_000 + 1
