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

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater, react

from pulsar_api.cli import admin, demo
from pulsar_api.cli.console import LEFT, REFUSED, UNREACHABLE, Console
from pulsar_api.cli.parser import URL, parser
from pulsar_api.cli.session import Session
from pulsar_api.client import Client, ClientError, Refused, Unreachable


def client_of(
    reactor: Any, given: argparse.Namespace, environ: Mapping[str, str]
) -> Client:
    """Return a client by the options, else the environment, else the file.

    Raises:
        Unreachable: The file cannot be read, or is not TOML.
    """
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
        # The handlers that Twisted sets at its start would end the reactor, and the command
        # would exit as if it had succeeded.
        await deferLater(reactor, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: reactor.callFromThread(running.cancel))
        running = Deferred.fromCoroutine(calls[given.command]())
        status = await running
    except CancelledError:
        # Only the command ends; the task goes on.
        status = LEFT
    except ClientError as e:
        console.say(str(e))
        status = REFUSED if isinstance(e, Refused) else UNREACHABLE
    except BrokenPipeError:
        # The reader has closed the pipe, like head(1). Python must not report that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    finally:
        if client is not None:
            await client.close()
    raise SystemExit(status)


def _complete(commands: argparse.ArgumentParser) -> None:
    """Print the words that complete the command line, if the extra is installed."""
    try:
        import argcomplete
    except ImportError:
        raise SystemExit(1) from None
    argcomplete.autocomplete(commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
    commands = parser()
    if "_ARGCOMPLETE" in os.environ:
        _complete(commands)
    given = commands.parse_args(arguments)
    if "local" in given:
        raise SystemExit(admin.run(given, time.time))
    if given.command == "demo":
        react(lambda reactor: demo.run(reactor, given.action, once=given.once))
    else:
        react(lambda reactor: Deferred.fromCoroutine(_call(reactor, given)))
