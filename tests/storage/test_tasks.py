"""Tests of the contract of `TaskStore`, and of faults of the real database."""

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_twisted
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread

from pulsar_api.errors import StoreUnavailable, UnknownTask
from pulsar_api.storage.schema import SCHEMA
from pulsar_api.storage.sqlite import connect
from pulsar_api.storage.tasks import SQLiteStore, prepare
from pulsar_api.tasks.interfaces import RESTART, Keep, NewTask, Reading, TaskStore
from pulsar_api.tasks.model import Process, Status, TaskQuery, TaskSpec, Within
from tests.fakes import MemoryStore, person
from tests.simulation.store import Database, SimulatedStore

reactor: Any = global_reactor  # its type knows no threads
SPEC = TaskSpec("site", "production", "deploy", {"branch": "main"}, person("alice"))


def new(spec: TaskSpec, created_at: float, key: str | None = None) -> NewTask:
    """Return the record of a new task when no clock is wrong."""
    return NewTask(spec, created_at, created_at, key)


@pytest_twisted.async_yield_fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    """Return a store in a real file."""
    store = SQLiteStore(tmp_path / "tasks.db", reactor.callFromThread)
    yield store
    await store.close()


def simulated() -> SimulatedStore:
    """Return the store of the simulation, for a daemon that never dies."""

    def soon(call: Callable[..., object], *args: object) -> None:
        reactor.callLater(0, call, *args)

    def later(_: float, call: Callable[..., object], *args: object) -> None:
        soon(call, *args)

    return SimulatedStore(Database(), soon, later)


@pytest.fixture(params=["memory", "sqlite", "simulated"])
def store(request: pytest.FixtureRequest) -> TaskStore:
    """Return each implementation of the port in turn."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "simulated":
        return simulated()
    found: SQLiteStore = request.getfixturevalue("sqlite")
    return found


async def test_a_new_task_has_the_values_of_its_request(store: TaskStore) -> None:
    """It is created, has a number, and is found with the same values."""
    created = await store.create(new(SPEC, 12.5))
    assert (created.spec, created.created_at) == (SPEC, 12.5)
    assert created.status is Status.CREATED
    assert await store.load(created.id) == created


async def test_the_names_of_secret_variables_are_stored(store: TaskStore) -> None:
    """Their values are not."""
    variables = {"password": "***", "branch": "main"}
    spec = evolve(SPEC, variables=variables, secret_names=frozenset({"password"}))
    created = await store.create(new(spec, 1.0))
    assert (await store.load(created.id)).spec == spec


async def test_numbers_increase(store: TaskStore) -> None:
    """They do so for concurrent creations, too."""
    found = await gatherResults([store.create(new(SPEC, 0.0)) for _ in range(50)])
    assert [task.id for task in found] == list(range(1, 51))


async def test_a_saved_task_is_found(store: TaskStore) -> None:
    """All fields that can change are read back."""
    created = await store.create(new(SPEC, 1.0))
    ended = evolve(
        created,
        status=Status.KILLED,
        command="true 'a b'",
        pid=77,
        exit_code=3,
        signal="SIGKILL",
        reason="somebody asked",
        killed_by=person("bob"),
        started_at=2.0,
        ended_at=3.0,
        output_size=99,
        index_size=32,
        revision=5,
    )
    await store.save(ended)
    assert await store.load(created.id) == ended


async def test_an_older_record_never_replaces_a_newer_one(store: TaskStore) -> None:
    """Records of one task can be saved in any order."""
    created = await store.create(new(SPEC, 1.0))
    newer = evolve(created, revision=3, status=Status.FINISHED)
    await store.save(newer)
    await store.save(evolve(created, revision=2, status=Status.RUNNING))
    assert await store.load(created.id) == newer


async def test_an_unknown_number_is_an_error(store: TaskStore) -> None:
    """The error has the number."""
    with pytest.raises(UnknownTask) as raised:
        await store.load(5)
    assert raised.value.task_id == "5"


async def test_lists_are_newest_first_and_bounded(store: TaskStore) -> None:
    """``before`` continues after the last page."""
    for _ in range(5):
        await store.create(new(SPEC, 0.0))
    first = await store.select(TaskQuery(limit=2))
    assert [task.id for task in first] == [5, 4]
    rest = await store.select(TaskQuery(limit=9, before=4))
    assert [task.id for task in rest] == [3, 2, 1]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (TaskQuery(app="shop"), [2]),
        (TaskQuery(env="staging"), [3]),
        (TaskQuery(user="bob"), [4]),
        (TaskQuery(status=Status.FAILED), [1]),
        (TaskQuery(app="site", status=Status.CREATED), [4, 3]),
    ],
)
async def test_lists_can_be_filtered(
    store: TaskStore, query: TaskQuery, found: list[int]
) -> None:
    """The filters are state, app, env and user, alone or combined."""
    first = await store.create(new(SPEC, 0.0))
    await store.create(new(evolve(SPEC, app="shop"), 0.0))
    await store.create(new(evolve(SPEC, env="staging"), 0.0))
    await store.create(new(evolve(SPEC, user=person("bob")), 0.0))
    await store.save(evolve(first, status=Status.FAILED, revision=2))
    assert [task.id for task in await store.select(query)] == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Shop", [2]),
        ("AGIN", [3]),
        ("deploy:we", [4]),
        ("bob", [5]),
        ("o", [5, 4, 3, 2, 1]),
        ("_", [6]),
        ("%", []),
        ("s*p", []),
        ("É", []),
        ("é", [7]),
        ("shopp", []),
        ("a\0", []),
        ("\\", []),
    ],
)
async def test_lists_can_be_searched(store: TaskStore, text: str, found: list[int]) -> None:
    """The search covers app, env, action and user, without wildcards."""
    spec = TaskSpec("site", "prod", "deploy")
    await store.create(new(spec, 0.0))
    await store.create(new(evolve(spec, app="my-shop"), 0.0))
    await store.create(new(evolve(spec, env="staging-o"), 0.0))
    await store.create(new(evolve(spec, action="deploy:web"), 0.0))
    await store.create(new(evolve(spec, user=person("BoB")), 0.0))
    await store.create(new(TaskSpec("a_b", "x", "y"), 0.0))
    await store.create(new(TaskSpec("x", "x", "y", user=person("é")), 0.0))
    assert [task.id for task in await store.select(TaskQuery(text=text))] == found
    page = await store.select(TaskQuery(text=text, limit=1, offset=1))
    assert [task.id for task in page] == found[1:2]
    page = await store.select(TaskQuery(text=text, before=5, app="site"))
    assert [task.id for task in page] == [n for n in found if n < 5 and n != 2]
    page = await store.select(TaskQuery(text=text, within=[("my-*", "*", "*")]))
    assert [task.id for task in page] == [n for n in found if n == 2]


async def test_the_next_task_after_a_number_is_the_oldest_newer_one(
    store: TaskStore,
) -> None:
    """The result is None if there is no newer task."""
    for _ in range(3):
        await store.create(new(SPEC, 0.0))
    found = await store.after(1)
    assert found is not None
    assert found.id == 2
    assert await store.after(3) is None


HOLDER = Process(4711, 12, "sleep 1000", "root")


async def test_unfinished_tasks_and_holders_are_loaded_oldest_first(
    store: TaskStore,
) -> None:
    """Each gets a revision on record that no daemon has announced before."""
    tasks = [await store.create(new(SPEC, 0.0)) for _ in range(5)]
    await store.save(evolve(tasks[1], status=Status.FINISHED, revision=2, ended_at=1.0))
    await store.save(evolve(tasks[2], status=Status.RUNNING, revision=2))
    held = evolve(tasks[4], status=Status.KILLED, revision=2, ended_at=1.0, held=True)
    await store.save(evolve(held, still_running=(HOLDER,), notes=("odd",)))
    found = await store.take_up()
    assert [task.id for task in found] == [1, 3, 4, 5]
    assert [task.revision - RESTART for task in found] == [1, 2, 1, 2]
    assert found[3].still_running == (HOLDER,)
    assert found[3].notes == ("odd",)
    again = await store.take_up()
    assert [task.revision - 2 * RESTART for task in again] == [1, 2, 1, 2]


async def test_the_last_reading_of_the_clocks_is_kept(store: TaskStore) -> None:
    """It replaces the one before. The writer makes it, so it is the newest."""
    assert await store.reading() is None
    for wall in (1.5, 2.5):
        reading = Reading("boot", 100.0, wall, 3.5, "1 2 3")
        await store.keep_reading(reading)
        assert await store.reading() == reading


async def test_the_newest_time_in_the_records_is_found(store: TaskStore) -> None:
    """It is that of a creation or an end, or None without records."""
    assert await store.newest_time() is None
    first = await store.create(new(SPEC, 10.0))
    await store.create(new(SPEC, 11.0))
    assert await store.newest_time() == 11.0
    await store.save(evolve(first, status=Status.FINISHED, revision=2, ended_at=30.0))
    assert await store.newest_time() == 30.0


async def test_ages_and_keys_use_the_steady_clock(store: TaskStore) -> None:
    """The wall clock at creation and end does not matter."""
    wrong = 32_000_000.0
    task = await store.create(NewTask(SPEC, wrong, 100.0, "key"))
    assert await store.by_key("key", person("alice"), 99.0) == task
    assert await store.by_key("key", person("alice"), 101.0) is None
    ended = evolve(task, status=Status.FINISHED, revision=2, ended_at=wrong)
    await store.save(evolve(ended, ended_steady=110.0))
    day = 86400.0
    assert await store.expired(Keep(seconds=day), 109.0 + day, 10) == []
    assert await store.expired(Keep(seconds=day), 111.0 + day, 10) == [1]


async def test_a_task_that_holds_its_target_is_kept(store: TaskStore) -> None:
    """An operator must be able to see which processes hold it."""
    task = await store.create(new(SPEC, 0.0))
    await store.create(new(SPEC, 0.0))
    ended = evolve(task, status=Status.KILLED, revision=2, ended_at=1.0, ended_steady=1.0)
    await store.save(evolve(ended, held=True))
    assert await store.expired(Keep(seconds=1), 1e6, 10) == []
    await store.forget([1])
    assert await store.forgotten() == set()
    await store.save(evolve(ended, revision=3))
    assert await store.expired(Keep(seconds=1), 1e6, 10) == [1]


async def test_an_idempotency_key_finds_its_task_for_a_limited_time(
    store: TaskStore,
) -> None:
    """Each caller has keys of its own."""
    created = await store.create(new(SPEC, 100.0, "key"))
    await store.create(new(SPEC, 100.0))
    assert await store.by_key("key", person("alice"), 99.0) == created
    assert await store.by_key("key", person("alice"), 100.0) is None
    assert await store.by_key("other", person("alice"), 0.0) is None
    assert await store.by_key("key", person("bob"), 0.0) is None


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        (Keep(), []),
        (Keep(tasks=2), [2, 3]),
        (Keep(tasks=2, size=22), [2, 3, 4]),
        (Keep(size=24, most=5), [2, 3]),
        (Keep(size=23, most=5), [2, 3, 4]),
        (Keep(size=34), [2, 3]),
        (Keep(seconds=65), [2]),
        (Keep(tasks=1), [2, 3]),
    ],
)
async def test_only_ended_tasks_beyond_the_limits_are_expired(
    store: TaskStore, keep: Keep, found: list[int]
) -> None:
    """They are listed oldest first, without running tasks and those with a valid key.

    An output counts with its remaining size and its index.
    """
    limit = 2 if keep == Keep(tasks=1) else 10
    for number in range(1, 6):
        created = await store.create(new(SPEC, 0.0, "key" if number == 5 else None))
        if number > 1:
            ended = evolve(created, status=Status.FINISHED, revision=2, output_size=10)
            end = 10.0 * number
            ended = evolve(ended, ended_at=end, ended_steady=end, index_size=7)
            await store.save(ended)
    assert await store.expired(keep, 90.0, limit) == found


async def test_a_removed_task_is_gone_unless_it_runs(store: TaskStore) -> None:
    """Its number is not used again."""
    first = await store.create(new(SPEC, 0.0))
    await store.create(new(SPEC, 0.0))
    await store.save(evolve(first, status=Status.FAILED, revision=2, ended_at=1.0))
    await store.forget([1, 2, 3])
    assert [task.id for task in await store.select(TaskQuery())] == [2]
    assert await store.forgotten() == {1}
    await store.cleared([1, 3])
    assert await store.forgotten() == set()
    assert (await store.create(new(SPEC, 0.0))).id == 3


async def test_a_change_during_the_first_check_does_not_make_the_database_look_older(
    tmp_path: Path,
) -> None:
    """Each thread checks once, and the writer does not wait for it."""
    store = SQLiteStore(tmp_path / "tasks.db", reactor.callFromThread)

    class Meanwhile(sqlite3.Connection):
        """A connection during whose reads another thread writes."""

        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            found = super().execute(*arguments)
            store._change += 1
            return found

    with closing(sqlite3.connect(tmp_path / "tasks.db", factory=Meanwhile)) as db:
        store._check(db)
    await store.close()


async def test_an_older_database_in_place_of_ours_is_refused(tmp_path: Path) -> None:
    """It would assign numbers again. A copy with the same state is accepted."""
    path, older, same = (tmp_path / name for name in ("tasks.db", "older", "same"))
    store = SQLiteStore(path, reactor.callFromThread)

    def copy(to: Path) -> None:
        with closing(sqlite3.connect(path)) as db, closing(sqlite3.connect(to)) as made:
            db.backup(made)

    def put(made: Path) -> None:
        for name in ("tasks.db-wal", "tasks.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        made.rename(path)

    await store.create(new(SPEC, 0.0))
    await deferToThread(copy, older)
    await store.create(new(SPEC, 0.0))
    await deferToThread(copy, same)
    put(older)
    for attempt in (
        store.create(new(SPEC, 0.0)),
        store.load(1),
        store.create(new(SPEC, 0.0)),
    ):
        with pytest.raises(StoreUnavailable, match="replaced by an older one"):
            await attempt
    put(same)
    assert (await store.create(new(SPEC, 0.0))).id == 3
    assert (await store.load(2)).id == 2
    await store.close()


async def test_reserved_numbers_are_not_assigned(store: TaskStore) -> None:
    """They can be reserved before the first task.

    Reserving a lower number changes nothing.
    """
    assert await store.reserve(7) == 0
    assert await store.reserve(3) == 7
    assert (await store.create(new(SPEC, 0.0))).id == 8
    await store.reserve(20)
    assert (await store.create(new(SPEC, 0.0))).id == 21


async def test_news_are_the_records_since_a_version(store: TaskStore) -> None:
    """New tasks come first, then changes in order. None is repeated or skipped."""
    assert await store.last_change() == (0, 0)
    first = await store.create(new(SPEC, 0.0))
    second = await store.create(new(SPEC, 0.0))
    assert (await store.news(0, 0, 10)).created == [first, second]
    change, known = await store.last_change()
    assert known == 2
    third = await store.create(new(SPEC, 0.0))
    for task, revision in ((third, 2), (first, 2), (third, 3)):
        await store.save(evolve(task, revision=revision))
    found = await store.news(change, known, 10)
    assert found.created == [evolve(third, revision=3)]
    assert [(task.id, task.revision) for _, task in found.changed] == [(1, 2), (3, 3)]
    # Changes come only after all new tasks are known.
    assert (await store.news(change, 0, 2)).changed == []
    rest = await store.news(found.changed[0][0], 3, 10)
    assert rest.created == []
    assert [task.id for _, task in rest.changed] == [3]
    assert await store.last_change() == (found.changed[-1][0], 3)


async def test_numbers_are_never_used_again(tmp_path: Path) -> None:
    """They stay used after the newest row is removed and the database is closed."""
    path = tmp_path / "tasks.db"
    store = SQLiteStore(path, reactor.callFromThread)
    await store.create(new(SPEC, 0.0))
    await store.create(new(SPEC, 0.0))
    await store.close()
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM task WHERE id = 2")
    db.close()
    again = SQLiteStore(path, reactor.callFromThread)
    assert (await again.create(new(SPEC, 0.0))).id == 3
    await again.close()


async def test_close_writes_all_pending_records(tmp_path: Path) -> None:
    """A record is kept even if no caller waits for it."""
    path = tmp_path / "tasks.db"
    store = SQLiteStore(path, reactor.callFromThread)
    waiting = [store.create(new(SPEC, 0.0)) for _ in range(100)]
    await store.close()
    await gatherResults(waiting)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM task").fetchone() == (100,)
    db.close()


async def test_a_cancelled_write_does_no_harm(sqlite: SQLiteStore) -> None:
    """A client can leave while its record is written."""
    gone = sqlite.create(new(SPEC, 0.0))
    gone.addErrback(lambda _: None)
    gone.cancel()
    assert (await sqlite.create(new(SPEC, 0.0))).id == 2


async def test_commits_wait_for_the_disk(sqlite: SQLiteStore) -> None:
    """WAL with full synchronisation keeps an answered write over a power cut."""

    def look(db: sqlite3.Connection) -> tuple[str, int]:
        mode = db.execute("PRAGMA journal_mode").fetchone()[0]
        return mode, db.execute("PRAGMA synchronous").fetchone()[0]

    assert await sqlite._writer.do(look) == ("wal", 2)


async def test_a_locked_database_is_an_error_and_recovers(
    sqlite: SQLiteStore, tmp_path: Path
) -> None:
    """Another process holds the write lock.

    The error explains that, and a later write works.
    """
    await sqlite._writer.do(lambda db: db.execute("PRAGMA busy_timeout = 1").fetchall())
    other = sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await sqlite.create(new(SPEC, 0.0))
    other.execute("ROLLBACK")
    other.close()
    assert (await sqlite.create(new(SPEC, 0.0))).id == 1


async def test_a_full_disk_is_reported_as_such(sqlite: SQLiteStore) -> None:
    """The client gets that reason, and existing records stay."""
    await sqlite.create(new(SPEC, 0.0))
    await sqlite._writer.do(lambda db: db.execute("PRAGMA max_page_count = 1").fetchall())
    big = evolve(SPEC, variables={"x": "y" * 100_000})
    with pytest.raises(StoreUnavailable) as raised:
        await sqlite.create(new(big, 0.0))
    assert raised.value.full
    assert len(await sqlite.select(TaskQuery())) == 1


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    """The daemon does not touch it. Only a person may move it away."""
    path = tmp_path / "tasks.db"
    path.write_bytes(b"this is my diary" * 100)
    with pytest.raises(StoreUnavailable, match=r"tasks\.db"):
        prepare(path)
    assert path.read_bytes() == b"this is my diary" * 100


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    """Both ways of opening it close it, even while the error is still referenced."""
    path = tmp_path / "tasks.db"
    path.write_bytes(b"this is my diary" * 100)

    def is_open() -> bool:
        fds = Path("/proc/self/fd").iterdir()
        return str(path) in {os.readlink(fd) for fd in fds if fd.is_symlink()}

    with pytest.raises(StoreUnavailable) as refused:
        prepare(path)
    assert not is_open(), refused
    with pytest.raises(sqlite3.DatabaseError) as not_opened:
        connect(path)
    assert not is_open(), not_opened


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """An old daemon must not write a format that it does not know."""
    path = tmp_path / "tasks.db"
    prepare(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreUnavailable, match="newer version"):
        prepare(path)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.dictionaries(texts, texts, max_size=5), texts | st.none())
@settings(max_examples=25, deadline=None)
async def test_any_text_is_read_back(variables: dict[str, str], user: str | None) -> None:
    """Texts in variables and names survive closing and reopening the file."""
    by = None if user is None else person(user)
    spec = TaskSpec("site", "production", "deploy", variables, by)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.db"
        store = SQLiteStore(path, reactor.callFromThread)
        await store.create(new(spec, 0.0))
        await store.close()
        again = SQLiteStore(path, reactor.callFromThread)
        found = await again.load(1)
        await again.close()
    assert found.spec == spec


async def test_a_database_of_an_older_version_is_upgraded(tmp_path: Path) -> None:
    """Its records stay, and new columns are added."""
    path = tmp_path / "tasks.db"
    with sqlite3.connect(path) as db:
        db.executescript(f"{SCHEMA[0]}; PRAGMA user_version = 1")
        db.execute(
            "INSERT INTO task (revision, status, app, env, action, variables, command,"
            " created_at, output_size) VALUES (1, 'created', 'a', 'b', 'c', '{}', '', 5, 0)"
        )
    db.close()
    store = SQLiteStore(path, reactor.callFromThread)
    assert (await store.load(1)).spec == TaskSpec("a", "b", "c", {}, None)
    assert (await store.create(new(SPEC, 10.0, "key"))).id == 2
    found = await store.by_key("key", person("alice"), 0)
    assert found is not None
    assert found.id == 2
    await store.close()


async def test_an_invalid_row_is_an_error_for_its_task_only(
    sqlite: SQLiteStore, tmp_path: Path
) -> None:
    """Other tasks are served, and the threads go on."""
    await sqlite.create(new(SPEC, 1.0))
    await sqlite.create(new(SPEC, 2.0))
    with sqlite3.connect(tmp_path / "tasks.db") as db:
        db.execute("UPDATE task SET status = 'odd' WHERE id = 2")
    db.close()
    with pytest.raises(StoreUnavailable, match="odd"):
        await sqlite.load(2)
    assert (await sqlite.load(1)).id == 1
    with pytest.raises(StoreUnavailable):
        await sqlite.create(new(evolve(SPEC, action="\ud800"), 3.0))
    assert (await sqlite.create(new(SPEC, 4.0))).id == 3


@pytest.mark.parametrize(
    ("within", "apps"),
    [
        (None, ["shop", "blog", "shop"]),
        ((), []),
        ((("shop", "*", "*"),), ["shop", "shop"]),
        ((("shop", "prod*", "*"),), ["shop"]),
        ((("b?og", "*", "deploy"), ("shop", "staging", "*")), ["shop", "blog"]),
        ((("SHOP", "*", "*"),), []),
        ((("[sb]*", "*", "*"),), []),
    ],
)
async def test_lists_are_limited_to_visible_tasks(
    store: TaskStore, within: Within, apps: list[str]
) -> None:
    """Pages and the next task obey the limit."""
    for app, env in (("shop", "production"), ("blog", "production"), ("shop", "staging")):
        await store.create(new(TaskSpec(app, env, "deploy"), 1.0))
    found = await store.select(TaskQuery(within=within))
    assert [task.spec.app for task in found] == apps
    page = await store.select(TaskQuery(within=within, limit=1, offset=1))
    assert page == found[1:2]
    many = [*(within or ()), *[(f"none{n}", "*", "*") for n in range(1500)]]
    if within is not None:
        assert await store.select(TaskQuery(within=many)) == found
    first = await store.after(0, within)
    assert first == (found[-1] if found else None)


async def test_notes_of_a_new_task_are_on_record(store: TaskStore) -> None:
    """They are written with its creation."""
    task = await store.create(evolve(new(SPEC, 0.0), notes=("odd",)))
    assert task.notes == ("odd",)
    assert (await store.load(task.id)).notes == ("odd",)
