"""The command ``pulsar-api`` for people and scripts."""

import argparse
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import argcomplete
from attrs import define, field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater, react

from pulsar_api import __version__
from pulsar_api.cli import admin, demo
from pulsar_api.cli.console import (
    LEFT,
    REFUSED,
    UNREACHABLE,
    Answers,
    Console,
    ending,
    exit_status,
)
from pulsar_api.client import Client, ClientError, Refused, Task, Unreachable

URL = "http://localhost:8081"

_EPILOG = """\
The daemon itself: python -m pulsar_api --help, or twistd pulsar-api.

Where the daemon is: --url, or $PULSAR_API_URL, or url in the file
$XDG_CONFIG_HOME/pulsar-api/client.toml (~/.config), or http://localhost:8081;
the same for --token and --ca-file (token, ca_file).

run, log --follow and wait end with the exit code of the task, or with
  120  the task is lost             121  it was killed
  122  the daemon has refused       123  the daemon cannot be reached
  124  it has failed without an exit code (not started, a signal, a time limit)
  130  it was left running (Ctrl-C, or the command was ended)

Completion for the shell: eval "$(register-python-argcomplete pulsar-api)"
"""


def parser() -> argparse.ArgumentParser:
    """Return what understands the command line."""
    result = argparse.ArgumentParser(
        prog="pulsar-api",
        description="Runs deployment tasks over HTTP and follows them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"pulsar-api {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    remote = _remote()

    def add(name: str, help: str, *, ids: bool = False) -> argparse.ArgumentParser:
        text = f"{help[0].upper()}{help[1:]}."
        found = commands.add_parser(name, help=help, description=text, parents=[remote])
        if ids:
            found.add_argument("id", type=int, metavar="ID", help="number of the task")
        return found

    run = add("run", "run an action, and show what it prints until it ends")
    for name, help in (("app", "application"), ("env", "environment"), ("action", "what")):
        run.add_argument(name, metavar=name.upper(), help=help)
    run.add_argument(
        *("-v", "--variable"),
        action="append",
        default=[],
        type=_variable,
        metavar="KEY=VALUE",
        help="a variable for it; may be repeated",
    )
    run.add_argument(
        "--detach", action="store_true", help="print its number and do not wait for it"
    )
    run.add_argument(
        "--idempotency-key", metavar="K", help="the same key starts nothing twice in 24 h"
    )
    tasks = add("tasks", "list tasks, newest first")
    for name in ("app", "env", "status", "user"):
        tasks.add_argument(f"--{name}", help=f"only those of this {name}")
    tasks.add_argument("--limit", type=int, default=20, help="at most so many [20]")
    add("show", "show what is known of a task", ids=True)
    log = add("log", "show what a task has printed", ids=True)
    log.add_argument("-f", "--follow", action="store_true", help="until it ends")
    log.add_argument("--stderr", action="store_true", help="its standard error alone")
    add("wait", "wait for the end of a task", ids=True)
    add("kill", "end a task and every process that it has started", ids=True)
    free = add("free", "give back a target that processes hold which could not be killed")
    for name, help in (("app", "application"), ("env", "environment")):
        free.add_argument(name, metavar=name.upper(), help=help)
    _add_local(commands)
    return result


def _remote() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False)
    group = result.add_argument_group("the daemon")
    group.add_argument("--url", help=f"where it is [{URL}]")
    group.add_argument(
        "--token", help="who you are; seen by all on this machine, so rather a file"
    )
    group.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="certificates (PEM) to trust"
    )
    result.add_argument("--json", action="store_true", help="for programs: lines of JSON")
    return result


def _add_local(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        help="start a daemon on this machine and watch it deploy a small site",
        description=(
            "Starts a daemon on this machine, with TLS and everything it keeps in a "
            "temporary folder, lets it deploy a small site, shows what the deployment "
            "prints as it comes, and serves until Ctrl-C."
        ),
    )
    show.add_argument(
        "action",
        nargs="?",
        choices=demo.ACTIONS,
        default="deploy",
        help="what to run; fail shows a deployment that fails [deploy]",
    )
    show.add_argument(
        "--once",
        action="store_true",
        help="end with the task, with its exit code, instead of serving on",
    )
    admin.add_to(commands)


def _variable(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def client_of(
    reactor: Any, given: argparse.Namespace, environ: Mapping[str, str]
) -> Client:
    """Return a client as options, environment and file say, in this order."""
    home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = Path(home) / "pulsar-api" / "client.toml"
    try:
        file = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        file = {}
    except (OSError, ValueError) as e:
        raise Unreachable(str(path), str(e)) from None

    def chosen(name: str) -> Any:
        option = getattr(given, name)
        return option or environ.get(f"PULSAR_API_{name.upper()}") or file.get(name)

    ca_file = chosen("ca_file")
    return Client(
        reactor,
        chosen("url") or URL,
        chosen("token"),
        None if ca_file is None else Path(ca_file),
    )


@frozen
class Session:
    """One call of the command."""

    reactor: Any
    client: Client
    console: Console
    given: argparse.Namespace

    async def run(self) -> int:
        """Create a task and follow it."""
        given, console = self.given, self.console
        variables = dict(given.variable)
        task = await self.client.create(
            given.app, given.env, given.action, variables, key=given.idempotency_key
        )
        if given.detach:
            if console.as_json:
                console.value(task.data)
            else:
                console.write(f"{task.id}\n")
            return 0
        if not console.as_json:
            console.say(f"task {task.id}: {task.data['url']}")
        return await self._to_the_end(task.id)

    async def _to_the_end(self, task_id: int) -> int:
        leave = _Leave(self, task_id)
        self.console.watch()
        try:
            task = await leave.unless(self._follow(task_id))
        finally:
            self.console.rest()
            leave.close()
        if task is None:
            self.console.say(f"task {task_id} goes on: pulsar-api log --follow {task_id}")
            return LEFT
        if not self.console.as_json:
            self.console.say(ending(task))
        return exit_status(task)

    async def _follow(self, task_id: int) -> Task:
        task: Task | None = None
        async for event in self.client.events(task_id):
            if self.console.as_json:
                self.console.value({"event": event.kind, **event.data})
            elif event.kind == "output":
                self._piece(event.data)
            if event.kind == "end":
                task = Task(event.data)
        return await self.client.get(task_id) if task is None else task

    def _piece(self, data: Mapping[str, Any]) -> None:
        only = getattr(self.given, "stderr", False)
        if not only:
            self.console.write(data["text"], data["stream"])
        elif data["stream"] == "stderr":
            self.console.write(data["text"])

    async def tasks(self) -> int:
        """List tasks."""
        given = vars(self.given)
        names = ("app", "env", "status", "user", "limit")
        query = {name: given[name] for name in names if given[name] is not None}
        found = await self.client.tasks(**query)
        if self.console.as_json:
            for task in found:
                self.console.value(task.data)
        else:
            self.console.tasks(found)
        return 0

    async def show(self) -> int:
        """Show a task."""
        return self._shown(await self.client.get(self.given.id))

    def _shown(self, task: Task) -> int:
        if self.console.as_json:
            self.console.value(task.data)
        else:
            self.console.task(task)
        return 0

    async def log(self) -> int:
        """Show output: what there is, or all to the end."""
        if self.given.follow:
            return await self._to_the_end(self.given.id)
        size = (await self.client.get(self.given.id)).data["outputSize"]
        if size == 0:
            return 0
        async for piece in self.client.follow(self.given.id):
            data = {"stream": piece.stream, "offset": piece.offset, "text": piece.text}
            if self.console.as_json:
                self.console.value({"event": "output", **data})
            else:
                self._piece(data)
            if piece.end >= size:
                break
        return 0

    async def wait(self) -> int:
        """Wait for an end."""
        leave = _Leave(self, self.given.id)
        self.console.watch()
        try:
            task = await leave.unless(self.client.wait(self.given.id))
        finally:
            self.console.rest()
            leave.close()
        if task is None:
            return LEFT
        if self.console.as_json:
            self.console.value(task.data)
        else:
            self.console.say(ending(task))
        return exit_status(task)

    async def kill(self) -> int:
        """Kill a task and wait for its end."""
        await self.client.kill(self.given.id)
        task = await self.client.wait(self.given.id)
        if self.console.as_json:
            self.console.value(task.data)
        else:
            self.console.say(ending(task))
        return 0

    async def free(self) -> int:
        """Give back a target."""
        given = self.given
        freed = await self.client.free(given.app, given.env)
        target = f"{given.app}/{given.env}"
        if self.console.as_json:
            self.console.value({"app": given.app, "env": given.env, "freed": freed})
        elif freed:
            tasks = ", ".join(map(str, freed))
            self.console.say(f"{target} is free; it was held by task {tasks}")
        else:
            self.console.say(f"{target} was not held")
        return 0


@define(eq=False)
class _Leave:
    """What Ctrl-C does: the first one asks, the second one leaves the task running."""

    session: Session
    task_id: int
    _following: Deferred[Task] | None = field(default=None, init=False)
    _asked: bool = field(default=False, init=False)
    _answers: Answers | None = field(default=None, init=False)
    _before: Any = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        reactor = self.session.reactor
        self._before = signal.signal(
            signal.SIGINT, lambda *_: reactor.callFromThread(self._interrupted)
        )

    async def unless(self, following: Any) -> Task | None:
        """Return what is waited for, or None if the user does not want to wait."""
        self._following = Deferred.fromCoroutine(following)
        try:
            return await self._following
        except CancelledError:
            return None

    def close(self) -> None:
        """Ask nothing more."""
        signal.signal(signal.SIGINT, self._before)
        if self._answers is not None:
            self._answers.close()

    def _interrupted(self) -> None:
        if self._asked or not sys.stdin.isatty():
            self._leave()
            return
        self._asked = True
        self.session.console.say(
            f"kill task {self.task_id}, or leave it running? [k/l, Ctrl-C leaves]"
        )
        fd = sys.stdin.fileno()
        self._answers = Answers(self.session.reactor, fd, self._answered)

    def _answered(self, text: str) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        if text.startswith("l"):
            self._leave()
        elif text.startswith("k"):
            asked = Deferred.fromCoroutine(self.session.client.kill(self.task_id))
            asked.addErrback(lambda failure: self.session.console.say(str(failure.value)))
        else:
            self._asked = False
            self.session.console.say("it goes on, and so do we")

    def _leave(self) -> None:
        if self._following is not None:
            self._following.cancel()


async def _call(reactor: Any, given: argparse.Namespace) -> None:
    console = Console(reactor, given.json)
    client: Client | None = None
    try:
        client = client_of(reactor, given, os.environ)
        session = Session(reactor, client, console, given)
        calls: dict[str, Callable[[], Coroutine[Deferred[Any], Any, int]]] = {
            "run": session.run,
            "tasks": session.tasks,
            "show": session.show,
            "log": session.log,
            "wait": session.wait,
            "kill": session.kill,
            "free": session.free,
        }
        # Twisted's own handlers, which it sets when it starts, would end the reactor, and
        # that would look like a success.
        await deferLater(reactor, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: reactor.callFromThread(running.cancel))
        running = Deferred.fromCoroutine(calls[given.command]())
        status = await running
    except CancelledError:
        # Only what was asked for on this side ends; a task goes on.
        status = LEFT
    except ClientError as e:
        console.say(str(e))
        status = REFUSED if isinstance(e, Refused) else UNREACHABLE
    except BrokenPipeError:
        # Whoever read has enough, as head(1). Python must not complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    finally:
        if client is not None:
            await client.close()
    raise SystemExit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with its status."""
    understood = parser()
    argcomplete.autocomplete(understood)
    given = understood.parse_args(arguments)
    if "local" in given:
        raise SystemExit(admin.run(given, time.time))
    if given.command == "demo":
        react(lambda reactor: demo.run(reactor, given.action, once=given.once))
    else:
        react(lambda reactor: Deferred.fromCoroutine(_call(reactor, given)))
