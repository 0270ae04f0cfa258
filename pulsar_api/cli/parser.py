"""The command line of ``pulsar-api``: its commands, options and help texts."""

import argparse
from pathlib import Path
from typing import Any

from pulsar_api import __version__
from pulsar_api.cli import admin, demo

URL = "http://localhost:8081"

_EPILOG = """\
To start a daemon, see python -m pulsar_api --help.

The URL of the daemon is taken from --url, else from $PULSAR_API_URL, else from
url in $XDG_CONFIG_HOME/pulsar-api/client.toml (by default ~/.config), else it is
http://localhost:8081. Likewise --token, $PULSAR_API_TOKEN and token, and
--ca-file, $PULSAR_API_CA_FILE and ca_file.

run, log --follow and wait exit with the exit code of the task, or with
  120  the task is lost                 121  the task was killed
  122  the daemon refused the request   123  the daemon cannot be reached
  124  the task failed without an exit code (not started, signal, time limit)
  130  the task was left running (Ctrl-C, or pulsar-api was terminated)

Shell completion: pip install 'pulsar-api[completion]', then
eval "$(register-python-argcomplete pulsar-api)"
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="pulsar-api",
        description="Run and follow the tasks of a pulsar-api daemon.",
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

    run = add("run", "run an action and show its output until it ends")
    for name, help in (
        ("app", "app to run it for"),
        ("env", "environment to run it in"),
        ("action", "action to run"),
    ):
        run.add_argument(name, metavar=name.upper(), help=help)
    run.add_argument(
        *("-v", "--variable"),
        action="append",
        default=[],
        type=_variable,
        metavar="KEY=VALUE",
        help="set a variable; may be repeated",
    )
    run.add_argument(
        "--detach", action="store_true", help="print the number of the task and exit"
    )
    run.add_argument(
        "--idempotency-key",
        metavar="KEY",
        help="create only one task with this key in 24 hours",
    )
    tasks = add("tasks", "list tasks, newest first")
    for name in ("app", "env", "status", "user"):
        tasks.add_argument(f"--{name}", help=f"show only tasks of this {name}")
    tasks.add_argument(
        "--limit", type=int, default=20, help="show at most this many tasks [20]"
    )
    add("show", "show a task", ids=True)
    log = add("log", "show the output of a task", ids=True)
    log.add_argument(
        "-f", "--follow", action="store_true", help="show new output until the task ends"
    )
    log.add_argument("--stderr", action="store_true", help="show only standard error")
    add("wait", "wait until a task ends", ids=True)
    add("kill", "kill a task and every process that it has started", ids=True)
    free = add("free", "free a target that is held by processes which could not be killed")
    for name, help in (("app", "app of the target"), ("env", "environment of the target")):
        free.add_argument(name, metavar=name.upper(), help=help)
    _add_local(commands)
    return result


def _remote() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(add_help=False)
    group = result.add_argument_group("daemon")
    group.add_argument("--url", help=f"URL of the daemon [{URL}]")
    group.add_argument(
        "--token", help="API token; visible to all users of this machine, so prefer a file"
    )
    group.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="trust the certificates in this file (PEM)",
    )
    result.add_argument(
        "--json", action="store_true", help="print lines of JSON, for programs"
    )
    return result


def _add_local(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        help="start a daemon on this machine and watch it deploy a small site",
        description=(
            "Start a daemon on this machine, with TLS and with its state in a temporary "
            "folder, let it deploy a small site, show the output of the deployment as it "
            "comes, and serve until Ctrl-C."
        ),
    )
    show.add_argument(
        "action",
        nargs="?",
        choices=demo.ACTIONS,
        default="deploy",
        help="action to run; fail is a deployment that fails [deploy]",
    )
    show.add_argument(
        "--once",
        action="store_true",
        help="exit with the exit code of the task instead of serving on",
    )
    admin.add_to(commands)


def _variable(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form KEY=VALUE")
    return key, value
