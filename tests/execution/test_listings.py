"""Tests of commands that list the actions of an app, with real shims."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_twisted
from attrs import evolve
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pulsar_api.errors import Busy, StoreUnavailable
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.listings import MOST_LISTINGS, MOST_OUTPUT, Listings
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.shim.shim import process
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Account, Command
from tests.execution.test_damage import NO_FILES, damage
from tests.integration.daemon import PATIENCE
from tests.integration.machine import alive


def sh(text: str) -> Command:
    """Return a command that runs a line of shell."""
    return Command(("/bin/sh", "-c", text), {"PATH": os.environ["PATH"]})


def made(folder: Path, seconds: float = 60) -> Listings:
    """Return listings with a time limit."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    machine = LocalMachine(reactor)
    executor = ShimExecutor(machine, reactor, folder / "tasks", lambda: uuid4().hex)
    bounds = Bounds(0.2, seconds, 0, 2 * MOST_OUTPUT)
    return Listings(executor, machine, reactor, folder / "tasks", bounds)


@pytest_twisted.async_yield_fixture
async def listings(tmp_path: Path) -> AsyncIterator[Listings]:
    found = made(tmp_path)
    await found.start()
    yield found
    found.stop()
    await until(lambda: not left(tmp_path))


def left(folder: Path) -> list[str]:
    """Return the folders that have not been removed."""
    return os.listdir(folder / "tasks")


def lives(note: Path) -> bool:
    """Return whether a process lives whose number is in a file."""
    return any(alive(int(pid)) for pid in note.read_text().split())


def stranger() -> tuple[int, int]:
    """Start a process whose session has lost its leader. Return both numbers."""
    text = (
        "import os; os.fork() and os._exit(0); "
        "os.write(1, b'%d %d' % (os.getpid(), os.getsid(0))); "
        "os.close(1); os.execlp('sleep', 'sleep', '60')"
    )
    command = (sys.executable, "-c", text)
    started = subprocess.run(
        command, stdout=subprocess.PIPE, start_new_session=True, check=True
    )
    pid, session = map(int, started.stdout.split())
    return pid, session


async def until(condition: object) -> None:
    """Wait until a condition is true."""
    end = reactor.seconds() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert reactor.seconds() < end
        await deferLater(reactor, 0.02)


def asked(listings: Listings, app: str, text: str) -> "Deferred[str]":
    """Ask for a listing, and return at once."""
    return Deferred.fromCoroutine(listings.capture_output(app, sh(text)))


async def test_the_output_of_a_command_is_returned(listings: Listings) -> None:
    """It is returned after a failure, too. A command that cannot start has none."""
    assert (
        await listings.capture_output("site", sh("echo deploy '#' now")) == "deploy # now\n"
    )
    assert await listings.capture_output("site", sh("echo a; exit 3")) == "a\n"
    assert await listings.capture_output("site", Command(("/no/program",), {})) == ""


async def test_a_remaining_child_delays_nothing_and_is_ended(
    listings: Listings, tmp_path: Path
) -> None:
    """It has a session of its own, and holds the pipe."""
    note = tmp_path / "pid"
    text = f"(setsid sh -c 'echo $$ > {note}; exec sleep 300' &); echo a"
    assert await listings.capture_output("site", sh(text)) == "a\n"
    await until(lambda: not left(tmp_path))
    assert not lives(note)


async def test_a_command_that_hangs_is_ended_and_blocks_no_other_app(
    tmp_path: Path,
) -> None:
    """No descriptor, process or folder of it remains."""
    listings = made(tmp_path, 1)
    await listings.start()
    assert await listings.capture_output("first", sh("echo a")) == "a\n"
    await until(lambda: not left(tmp_path))
    before = sorted(os.listdir("/proc/self/fd"))
    text = f"echo $$ >> {tmp_path}/pids; echo a; trap '' TERM; while :; do sleep 1; done"
    hanging = [asked(listings, f"app{n}", text) for n in range(3)]
    assert await listings.capture_output("other", sh("echo b")) == "b\n"
    assert not any(one.called for one in hanging)
    assert [await one for one in hanging] == ["a\n"] * 3
    await until(lambda: not left(tmp_path))
    assert not lives(tmp_path / "pids")
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_concurrent_callers_share_one_run(listings: Listings, tmp_path: Path) -> None:
    """A caller soon afterwards gets the same answer, unless it was empty."""
    count = f"echo >> {tmp_path}/count; "
    several = [asked(listings, "site", count + "sleep 0.2; echo a") for _ in range(5)]
    assert [await one for one in several] == ["a\n"] * 5
    assert await listings.capture_output("site", sh(count + "sleep 0.2; echo a")) == "a\n"
    assert (tmp_path / "count").read_text() == "\n"
    for _ in range(2):
        assert await listings.capture_output("site", sh(count + "exit 1")) == ""
    assert (tmp_path / "count").read_text() == "\n" * 3


async def test_a_caller_that_leaves_does_not_affect_others(listings: Listings) -> None:
    """The command goes on."""
    first, second = (asked(listings, "site", "sleep 0.3; echo a") for _ in range(2))
    first.addErrback(lambda _: None)
    first.cancel()
    assert await second == "a\n"


async def test_the_number_of_concurrent_commands_is_limited(tmp_path: Path) -> None:
    """More are refused at once. Later ones run again."""
    listings = made(tmp_path, 0.5)
    await listings.start()
    several = [asked(listings, f"app{n}", "exec sleep 300") for n in range(MOST_LISTINGS)]
    with pytest.raises(Busy):
        await listings.capture_output("one more", sh("echo a"))
    assert [await one for one in several] == [""] * MOST_LISTINGS
    assert await listings.capture_output("one more", sh("echo a")) == "a\n"
    await until(lambda: not left(tmp_path))


async def test_only_the_start_of_a_flood_is_read(listings: Listings) -> None:
    """A listing cannot fill the disk either."""
    text = await listings.capture_output("site", sh("yes | head -c 4000000"))
    assert 0 < len(text) <= MOST_OUTPUT
    assert text.startswith("y\ny\n")


@pytest.mark.parametrize("how", [how for how in NO_FILES if how != "a folder"])
@pytest.mark.parametrize("name", ["listings", "listings/tasks"])
async def test_an_obstacle_in_place_of_the_folder_is_replaced(
    tmp_path: Path, name: str, how: str
) -> None:
    """It is removed, and the folder is created."""
    folder = tmp_path / "listings"
    listings = made(folder)
    shutil.rmtree(tmp_path / name)
    damage(tmp_path / name, how)
    await listings.start()
    assert await listings.capture_output("site", sh("echo a")) == "a\n"
    assert not (tmp_path / name).is_symlink()
    await until(lambda: not left(folder))


async def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """Otherwise numbered folders elsewhere, such as those of tasks, would be removed."""
    (tmp_path / "tasks" / "7").mkdir(parents=True)
    listings = made(tmp_path / "listings")
    shutil.rmtree(tmp_path / "listings")
    (tmp_path / "listings").symlink_to(tmp_path)
    await listings.start()
    assert await listings.capture_output("site", sh("echo a")) == "a\n"
    await until(lambda: not left(tmp_path / "listings"))
    assert (tmp_path / "tasks" / "7").is_dir()


async def test_a_daemon_starts_without_a_folder_for_listings(tmp_path: Path) -> None:
    """Callers get an error until it can be created."""
    state = tmp_path / "state"
    listings = made(state / "listings")
    shutil.rmtree(state)
    await listings.start()
    with pytest.raises(StoreUnavailable):
        await listings.capture_output("site", sh("echo a"))
    state.mkdir()
    assert await listings.capture_output("site", sh("echo a")) == "a\n"
    await until(lambda: not left(state / "listings"))


async def test_numbers_of_an_earlier_boot_are_ignored(tmp_path: Path) -> None:
    """A process with the number of an old shim is a stranger."""
    pid, session = stranger()
    started = process(pid)[1]
    try:
        listings = made(tmp_path)
        folder = tmp_path / "tasks" / "7"
        folder.mkdir()
        # The old shim lived, by its times, until a moment after the stranger's start.
        (folder / "lock").write_text(f"{session} {started + 500}\n")
        (folder / "begun").write_text("boot of-yesterday\nstate 1 1\nfolder 1 1\n")
        await listings.start()
        await until(lambda: not left(tmp_path))
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_an_answer_is_cached_per_account(listings: Listings, tmp_path: Path) -> None:
    """The same command can print something else under another account."""
    command = sh(f"echo >> {tmp_path}/count; wc -l < {tmp_path}/count")
    own = Account("me", os.getuid(), os.getgid(), (os.getgid(),), "/")
    assert await listings.capture_output("site", command) == "1\n"
    # Only root can change the user, even to itself.
    expected = "2\n" if os.getuid() == 0 else ""
    assert await listings.capture_output("site", evolve(command, account=own)) == expected
    assert await listings.capture_output("site", command) == "1\n"


async def test_the_listings_of_a_dead_daemon_are_ended(tmp_path: Path) -> None:
    """Their commands run on under shims, and no caller waits for them."""
    dead = made(tmp_path)
    await dead.start()
    note = tmp_path / "pid"
    forgotten = asked(dead, "site", f"echo $$ > {note}; exec sleep 300")
    await until(lambda: note.exists() and note.read_text().strip())
    for run in dead._runs.values():
        run.detach()
    listings = made(tmp_path)
    await listings.start()
    await until(lambda: not left(tmp_path))
    assert not lives(note)
    assert await listings.capture_output("site", sh("echo a")) == "a\n"
    forgotten.addErrback(lambda _: None)
    forgotten.cancel()
    await until(lambda: not left(tmp_path))
