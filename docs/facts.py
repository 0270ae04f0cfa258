"""Facts that the docs take from the code: settings, commands and problem types."""

import argparse
import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attrs import fields, frozen

from pulsar_api.cli.parser import parser
from pulsar_api.config import values
from pulsar_api.config.settings import Settings

PACKAGE = Path(__file__).parents[1] / "pulsar_api"

_KINDS: dict[Any, str] = {
    values.text: "text",
    values.name: "text without control characters that does not begin with ``-``",
    values.flag: "``true`` or ``false``",
    values.days: "days, 0 to 36500",
    values.size: "bytes; ``K``, ``M``, ``G`` or ``T`` may follow the number",
    values.address: "IP address",
    values.url: "URL",
    values.texts: "list of texts",
    values.words: "list of texts; on the command line, separated by commas",
    values.addresses: "list of IP addresses, or ``unix``",
    values.rules: "tables, ``[[rights]]``",
    values.run_as: "tables, ``[[run-as]]``",
    values.targets: "list of targets",
    values.pattern: "regular expression",
}


@frozen
class Setting:
    """One setting, as the reference shows it."""

    name: str
    kind: str
    default: str | None
    file_only: bool
    help: str


def settings() -> dict[str, Setting]:
    """Return every setting by its name, in the order of the code."""
    found = {}
    for attribute in fields(Settings):
        name = attribute.name.replace("_", "-")
        parse = attribute.metadata["parse"]
        found[name] = Setting(
            name,
            _KINDS.get(parse) or _range(parse),
            _shown(attribute.default),
            attribute.metadata["file_only"],
            attribute.metadata["help"],
        )
    return found


def _range(parse: Callable[[object], object]) -> str:
    """Return what a parser says about a value that is out of its range."""
    try:
        parse(-1)
    except ValueError as e:
        said = re.sub(r"[0-9.]+e\+[0-9]+", lambda found: f"{float(found[0]):.0f}", str(e))
        return re.sub(r"^(must be|needs an?|is an?) ", "", said)
    raise AssertionError(f"{parse} accepts -1")


def _shown(default: object) -> str | None:
    """Return a default as one writes it in the settings file, None if there is none."""
    if default is None or default == ():
        return None
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, int):
        size = default >> 30
        return f"{size}G" if size and size << 30 == default else str(default)
    if isinstance(default, tuple):
        return "[" + ", ".join(f'"{item}"' for item in default) + "]"
    return f'"{default}"'


def help_texts() -> dict[str, str]:
    """Return the help of ``pulsar-api`` and of each of its commands, by the command."""
    kept = {name: os.environ.get(name) for name in ("COLUMNS", "XDG_STATE_HOME")}
    state = os.environ.pop("STATE_DIRECTORY", None)
    os.environ.update(COLUMNS="84", XDG_STATE_HOME="~/.local/state")
    try:
        return dict(_help("pulsar-api", parser()))
    finally:
        for name, value in (*kept.items(), ("STATE_DIRECTORY", state)):
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _help(name: str, of: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    yield name, of.format_help()
    for action in of._actions:  # noqa: SLF001 - argparse has no public way to them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command, inner in action.choices.items():
                yield from _help(f"{name} {command}", inner)


_TYPE = re.compile(r"[a-z]+(-[a-z]+)*")


def problems() -> dict[str, set[int]]:
    """Return the statuses of each problem type that the code answers with.

    A call or a tuple with a status and then a lower-case word is taken for one.
    """
    found: dict[str, set[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                arguments = node.args
            elif isinstance(node, ast.Tuple):
                arguments = node.elts
            else:
                continue
            constants = [a.value for a in arguments if isinstance(a, ast.Constant)]
            statuses = [c for c in constants if isinstance(c, int) and 400 <= c < 600]
            types = [c for c in constants if isinstance(c, str) and _TYPE.fullmatch(c)]
            if statuses and types:
                found.setdefault(types[0], set()).add(statuses[0])
    return found
