"""Commands for operators, on the machine of the daemon: tokens, audit log, tasks."""

import argparse
import getpass
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pulsar_api.auth.audit import FILE, AuditLog
from pulsar_api.auth.credentials import FILE as DATABASE
from pulsar_api.auth.credentials import (
    PREFIX,
    Login,
    Token,
    add_token,
    all_logins,
    all_tokens,
    bind_login,
    new_secret,
    opened,
    remove_token,
)
from pulsar_api.auth.rights import Caller, Grant, Right
from pulsar_api.cli import audit_log
from pulsar_api.config import loading
from pulsar_api.errors import SettingsError, StoreUnavailable
from pulsar_api.execution import executor
from pulsar_api.principal import Principal

_Now = Callable[[], float]
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LOGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_ID = re.compile(r"[1-9][0-9]{0,18}")


class _Failed(Exception):
    """The command cannot be carried out; the text is a sentence for people."""


def add_to(commands: Any) -> None:
    """Add these commands to those of a parser."""
    state = argparse.ArgumentParser(add_help=False)
    state.add_argument(
        "--config",
        metavar="FILE",
        help="settings of the daemon, which name its state folder",
    )
    state.add_argument(
        "--state-dir",
        metavar="DIR",
        help="state folder of the daemon, its --state-dir "
        f"[{loading.default_state_dir(os.environ)}]",
    )
    end = commands.add_parser(
        "end-tasks",
        parents=[state],
        help="kill every task that a stopped daemon has left running",
        description=(
            "Kill every running task of a daemon on this machine, each with all its "
            "processes, also while no daemon runs. The next daemon finds them killed."
        ),
    )
    end.set_defaults(local=_end_tasks)
    token = commands.add_parser(
        "token",
        help="create, list and revoke API tokens for scripts and bots",
        description=(
            "Manage the API tokens of a daemon on this machine, also while it runs. Only "
            "the hash of a token is stored. A daemon accepts tokens with any "
            "--auth-provider; with 'tokens' it accepts nothing else."
        ),
    )
    kinds = token.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    create = kinds.add_parser(
        "create", parents=[state], help="create a token and show it once"
    )
    create.add_argument("name", metavar="NAME", help="name of the token in lists and logs")
    create.add_argument(
        "--may",
        type=_words,
        default=(),
        metavar="RIGHTS",
        help=f"rights by commas: {', '.join(Right)} [only those of rules for token:NAME]",
    )
    create.add_argument(
        "--on",
        action="append",
        metavar="TARGET",
        help="target: app, app/env or app/env/action, * is a wildcard; may be repeated [*]",
    )
    create.add_argument(
        "--expires",
        type=_date,
        metavar="DATE",
        help="last day as YYYY-MM-DD (UTC), or days from now [never]",
    )
    create.set_defaults(local=_create_token)
    listing = kinds.add_parser(
        "list", parents=[state], help="list the tokens without their secrets"
    )
    listing.add_argument(
        "--json", action="store_true", help="print lines of JSON, for programs"
    )
    listing.set_defaults(local=_list_tokens)
    revoke = kinds.add_parser(
        "revoke",
        parents=[state],
        help="revoke a token, which takes effect within 10 seconds",
    )
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(local=_revoke_token)
    login = commands.add_parser(
        "login",
        help="list and change which GitHub accounts the listed logins are bound to",
        description=(
            "A GitHub login in the settings is bound to the first account that is accepted "
            "under it. An account that gets the login later is refused until the login is "
            "bound to it by this command."
        ),
    )
    kinds = login.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    listing = kinds.add_parser("list", parents=[state], help="list the bound logins")
    listing.add_argument(
        "--json", action="store_true", help="print lines of JSON, for programs"
    )
    listing.set_defaults(local=_list_logins)
    rebind = kinds.add_parser(
        "rebind",
        parents=[state],
        help="bind a login to another account, which takes effect within a minute",
    )
    rebind.add_argument("login", metavar="LOGIN")
    rebind.add_argument("id", metavar="ID", help="numeric id of the account at GitHub")
    rebind.set_defaults(local=_rebind_login)
    audit = commands.add_parser(
        "audit",
        parents=[state],
        help="show who asked for what, and whether it was allowed",
        description="Show the audit log of a daemon on this machine, oldest entry first.",
    )
    audit.add_argument(
        "--user", help="show only entries of this user: a name, token:NAME or github:ID"
    )
    audit.add_argument("--refused", action="store_true", help="show only refusals")
    audit.add_argument(
        "--limit",
        type=int,
        default=100,
        help="show at most this many entries, the newest [100]",
    )
    audit.add_argument(
        "--json", action="store_true", help="print lines of JSON, for programs"
    )
    audit.set_defaults(local=audit_log.show)


def run(given: argparse.Namespace, now: Callable[[], float]) -> int:
    """Run the command that was given; return its exit status.

    ``now`` gives the seconds since the epoch.
    """
    try:
        given.state_dir = _state_dir(given)
        given.local(given, now)
    except (_Failed, SettingsError, StoreUnavailable) as e:
        print("pulsar-api:", e, file=sys.stderr)
        return 1
    except OSError as e:
        print(f"pulsar-api: {e.filename or given.state_dir}: {e.strerror}", file=sys.stderr)
        return 1
    return 0


def _state_dir(given: argparse.Namespace) -> str:
    """Return the state folder, which every daemon marks with a file ``lock``."""
    found: str | None = given.state_dir
    if found is None and given.config is not None:
        found = loading.state_dir(given.config, os.environ)
    if found is None:
        found = loading.default_state_dir(os.environ)
    try:
        wrong = Path(found).is_dir() and not (Path(found) / "lock").exists()
    except PermissionError:
        wrong = False  # another user's; the command itself says so
    if wrong:
        raise _Failed(
            f"{found} is not the state folder of a daemon; give its --state-dir, or its "
            "settings by --config"
        )
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _date(text: str) -> datetime | timedelta:
    if re.fullmatch(r"[0-9]{1,5}", text):
        return timedelta(days=int(text))
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a date such as 2027-01-31, or a number of days"
        ) from None


def _state(given: argparse.Namespace) -> Path:
    """Return the state folder; fail if another user owns it and its files."""
    state = Path(given.state_dir)
    if state.stat().st_uid != os.geteuid():
        raise _Failed(
            f"{state} belongs to another user; run the command as that user: "
            f"sudo -u {state.owner()} pulsar-api ..."
        )
    return state


def _end_tasks(given: argparse.Namespace, _: _Now) -> None:
    ended = executor.end_all(Path(given.state_dir))
    names = ", ".join(map(str, ended)) or "no task is running"
    tasks = "task" if len(ended) == 1 else "tasks"
    print(f"Told {len(ended)} {tasks} to end: {names}")


def _noted(state: Path, now: _Now, what: str, **more: object) -> None:
    operator = Principal("machine", str(os.geteuid()), getpass.getuser())
    caller = Caller(operator, "this machine", "command line")
    AuditLog(state / FILE, now).write(caller, what, allowed=True, **more)


def _create_token(given: argparse.Namespace, now: _Now) -> None:
    if not _NAME.fullmatch(given.name):
        raise _Failed(
            f"{given.name!r} is not a name: use at most 64 of the characters a-z 0-9 _.-"
        )
    targets = tuple(given.on or ("*",))
    if given.may or given.on:
        try:
            Grant.parse(given.may, targets)
        except ValueError as e:
            raise _Failed(str(e)) from None
    state = _state(given)
    secret = PREFIX + new_secret()
    at, expires = now(), given.expires
    if isinstance(expires, timedelta):
        expires = datetime.fromtimestamp(at, UTC) + expires
    end = None if expires is None else expires.timestamp()
    token = Token(given.name, given.may, targets, at, end)
    with opened(state / DATABASE) as db:
        try:
            add_token(db, token, secret)
        except KeyError:
            raise _Failed(
                f"there is a token {given.name} already; revoke it first"
            ) from None
    _noted(state, now, "token create", token=given.name, may=given.may, on=targets)
    print(secret)
    print("Store this token now; it is not shown again.", file=sys.stderr)


def _list_tokens(given: argparse.Namespace, _: _Now) -> None:
    with opened(_state(given) / DATABASE) as db:
        tokens = all_tokens(db)
    for token in tokens:
        times = token.created_at, token.expires_at, token.used_at
        created, expires, used = (_day(at) for at in times)
        if given.json:
            value = {
                "name": token.name,
                "may": token.rights,
                "on": token.targets,
                "created": created,
                "expires": expires,
                "used": used,
            }
            print(json.dumps(value))
        else:
            may = f"{','.join(token.rights)} on {' '.join(token.targets)}"
            print(
                f"{token.name:20} {may if token.rights else 'by rules':40} "
                f"expires {expires or 'never':16} used {used or 'never'}"
            )


def _revoke_token(given: argparse.Namespace, now: _Now) -> None:
    state = _state(given)
    with opened(state / DATABASE) as db:
        if not remove_token(db, given.name):
            raise _Failed(f"there is no token {given.name}")
    _noted(state, now, "token revoke", token=given.name)
    print(f"{given.name} is revoked; a running daemon refuses it after at most 10 seconds.")


def _list_logins(given: argparse.Namespace, _: _Now) -> None:
    with opened(_state(given) / DATABASE) as db:
        logins = all_logins(db)
    for login in logins:
        bound = _day(login.bound_at)
        if given.json:
            print(json.dumps({"login": login.name, "id": login.id, "bound": bound}))
        else:
            print(f"{login.name:40} {login.id:20} bound {bound}")


def _rebind_login(given: argparse.Namespace, now: _Now) -> None:
    if not _LOGIN.fullmatch(given.login):
        raise _Failed(f"{given.login!r} is not a GitHub login")
    if not _ID.fullmatch(given.id):
        raise _Failed(f"{given.id!r} is not the numeric id of a GitHub account")
    state = _state(given)
    login = Login(given.login.casefold(), given.id, now())
    with opened(state / DATABASE) as db:
        before = {one.name: one.id for one in all_logins(db)}.get(login.name)
        bind_login(db, login)
    _noted(state, now, "login rebind", login=login.name, id=login.id, before=before)
    print(
        f"{login.name} is bound to account {login.id}; a running daemon takes it over "
        "within a minute."
    )


def _day(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%MZ")
