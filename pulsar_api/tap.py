"""The plugin of twistd: its options, and the function that makes the daemon."""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from twisted.application.service import Service
from twisted.python import usage

from pulsar_api import __version__
from pulsar_api.config import loading, settings
from pulsar_api.config.settings import Settings
from pulsar_api.daemon.preflight import (
    LOG,
    check,
)
from pulsar_api.daemon.service import Daemon
from pulsar_api.errors import CannotListen, SettingsError, StoreUnavailable


def _parameters() -> tuple[list[list[Any]], list[list[Any]]]:
    parameters: list[list[Any]] = []
    flags: list[list[Any]] = []
    for name, help, default, is_flag in settings.options():
        if default in (None, False, ()) or "[" in help:
            text = help
        else:
            text = f"{help} [{default:g}]" if is_number(default) else f"{help} [{default}]"
        if is_flag:
            flags.append([name, None, text])
        elif name != "listen":  # it can be repeated, see opt_listen
            parameters.append([name, None, None, text])
    parameters.append(["config", None, None, "Read these options from a TOML file"])
    return parameters, flags


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a default is written as a number."""
    return isinstance(value, float)


class Options(usage.Options):
    """The command line. ``settings`` is the result."""

    synopsis = "[options]"
    longdesc = (
        "Run deployment and operations tasks over HTTP. Every option can also be set in "
        "the file of --config, without the dashes; the command line takes precedence."
    )
    optParameters, optFlags = _parameters()
    settings: Settings

    def __init__(self) -> None:
        self._listen: list[str] = []
        super().__init__()

    def opt_listen(self, endpoint: str) -> None:
        """Listen on this Twisted endpoint instead of --port; may be repeated"""  # noqa: D400,D415
        self._listen.append(endpoint)

    def opt_version(self) -> NoReturn:
        """Show the version and exit."""
        print("pulsar-api", __version__)
        sys.exit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse and check everything. On a mistake, print one line and exit with 1."""
        try:
            super().parseOptions(options)
        except usage.UsageError as e:
            fail(str(e))

    def parseArgs(self, *unknown: str) -> None:
        """Refuse arguments that are not options."""
        if unknown:
            raise usage.UsageError(f"{unknown[0]!r} is not an option")

    def postOptions(self) -> None:
        """Make the settings, and check everything that can be checked without a start."""
        given = {k: v for k, v in self.items() if v not in (None, 0)}
        if self._listen:
            given["listen"] = self._listen
        twistd: Mapping[str, Any] = self.parent or {}
        try:
            self.settings = loading.load(given, os.environ)
            check(self.settings, own_files=twistd.get("uid") is None)
        except (SettingsError, CannotListen, StoreUnavailable) as e:
            fail(str(e))
        if "auth-password" in given:
            text = "every user of this machine can see --auth-password. Use a file"
            print(f"pulsar-api: warning: {text}: --auth-password-file", file=sys.stderr)
        if self.settings.log_dir and self.parent is not None:
            self.parent["logfile"] = str(Path(self.settings.log_dir) / LOG)


def fail(message: str) -> NoReturn:
    """Print in one line why the daemon does not start, and exit with 1."""
    print("pulsar-api:", " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def steady(reactor: Any) -> None:
    """Give the reactor a clock that never jumps.

    Twisted measures by the time of day. If somebody set that back by an hour, every
    long-poll and every event would be late by an hour.
    """
    assert not reactor.getDelayedCalls()
    reactor.seconds = time.monotonic


def makeService(options: Options) -> Service:
    """Return the daemon for ``twistd``."""
    from twisted.internet import reactor

    steady(reactor)
    daemon = Daemon(reactor, options.settings, os.environ)
    # A function rather than SIG_IGN, because tasks would inherit SIG_IGN.
    signal.signal(signal.SIGHUP, daemon.hang_up)
    return daemon
