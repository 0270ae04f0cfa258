"""Checks for every test: it leaves nothing behind, and no error goes unhandled."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from twisted.internet import reactor
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import implementer

from tests import needs
from tests.shims import Trees

ROOT = Path(__file__).parents[1]

# The time of an example depends more on the machine than on the example.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--all``."""
    parser.addoption(
        "--all",
        action="store_true",
        help="run everything: fail where a program is missing, and run all trials",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Give child processes what users have: they hear SIGINT and buffer their output.

    A background job of a shell ignores SIGINT.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Users have no such setting, and it hides a flush that is missing.
    os.environ.pop("PYTHONUNBUFFERED", None)
    needs.everything = config.getoption("all")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a missing program; with ``--all``, let it fail."""
    if item.get_closest_marker("long") and not needs.everything:
        pytest.skip("is long, and runs with --all")
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    for fixture in getattr(item, "fixturenames", ()):
        names += needs.FIXTURES.get(fixture, ())
    why = needs.missing(names)
    if why is not None and needs.everything:
        pytest.fail(why)
    if why is not None:
        pytest.skip(why)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Print a last line on how to run everything, if a test was skipped."""
    yield
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", ()) if reporter is not None else ()
    if not skipped or needs.everything:
        return
    found = {
        package
        for report in skipped
        for package in re.findall(r"Debian package ([\w.-]+)", str(report.longrepr))
    }
    install = f"apt-get install {' '.join(sorted(found))}; then, as root: " if found else ""
    reporter.write_line(
        f"{len(skipped)} tests were skipped. To run everything: {install}"
        f"{sys.executable} -m pytest --all"
    )


def pytest_collection_finish() -> None:
    """Freeze the objects from imports, because the collector runs after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_delayed_call_is_left() -> Iterator[None]:
    before = set(reactor.getDelayedCalls())
    yield
    left = [call for call in reactor.getDelayedCalls() if call not in before]
    assert left == []


@pytest.fixture(autouse=True)
def logged_failures() -> Iterator[list[LogEvent]]:
    """Collect unhandled errors. A test that expects one empties the list."""
    seen: list[LogEvent] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        if "log_failure" in event:
            seen.append(event)

    globalLogPublisher.addObserver(observe)
    yield seen
    gc.collect()  # a failed coroutine without a waiter is logged when it is collected
    globalLogPublisher.removeObserver(observe)
    assert [event["log_failure"].getTraceback() for event in seen] == []


@pytest.fixture
def environ() -> dict[str, str]:
    """Return an environment without variables of the project."""
    kept = ("PATH", "HOME", "LANG", "COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
    return {name: os.environ[name] for name in kept if name in os.environ}


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Trees]:
    """Return a starter of tasks. They end with the test."""
    trees = Trees(tmp_path / "tasks")
    yield trees
    trees.end()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs a script in a new process and returns its output.

    The script can use the names imported below and a folder ``tmp``. It prints JSON.
    """

    def run(script: str, *before: str, argument: str = "") -> Any:
        begin = f"""
            import json, os, signal, subprocess, sys, time
            from pathlib import Path
            sys.path.insert(0, {str(ROOT)!r})
            from pulsar_api.execution import proc, processes, sessions
            from pulsar_api.shim import shim
            from pulsar_api.execution.history import ProcessHistory
            from pulsar_api.execution.proc import Entry, Table, lives
            from tests.integration.daemon import wait_for
            from tests.shims import PYTHON, RUNNER, Trees, runs
            tmp = Path({str(tmp_path)!r})
            trees = Trees(tmp / "tasks")
        """
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(begin) + textwrap.dedent(script))
        done = subprocess.run(
            [*before, sys.executable, path, argument],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)

    return run
