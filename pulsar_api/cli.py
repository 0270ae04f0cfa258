"""The command ``pulsar-api`` for people and scripts."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from twisted.internet.task import react

from pulsar_api import __version__, demo, process, settings


def parser() -> argparse.ArgumentParser:
    """Return what understands the command line."""
    result = argparse.ArgumentParser(
        prog="pulsar-api",
        description="Runs deployment tasks over HTTP and follows them.",
        epilog="The daemon itself: python -m pulsar_api --help, or twistd pulsar-api.",
    )
    result.add_argument("--version", action="version", version=f"pulsar-api {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    end = commands.add_parser(
        "end-tasks",
        help="end every task that a stopped daemon has left running",
        description=(
            "Ends every running task of a daemon on this machine, each with all its "
            "processes, also while no daemon runs. The next daemon finds them killed."
        ),
    )
    end.add_argument(
        "--state-dir", default=settings.default_state_dir(os.environ), metavar="DIR"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with its status."""
    given = parser().parse_args(arguments)
    if given.command == "end-tasks":
        ended = process.end_all(Path(given.state_dir))
        names = ", ".join(map(str, ended)) or "none runs"
        print(f"{len(ended)} tasks are told to end: {names}")
        return
    react(lambda reactor: demo.run(reactor, given.action, once=given.once))
