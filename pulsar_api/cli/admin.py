"""Commands for whoever runs the daemon, on its machine: tokens, audit log, its tasks."""

import argparse
import getpass
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
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
from pulsar_api.config import loading
from pulsar_api.errors import StoreUnavailable
from pulsar_api.execution import executor
from pulsar_api.principal import Principal

_Now = Callable[[], float]
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LOGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_ID = re.compile(r"[1-9][0-9]{0,18}")


class _Failed(Exception):
    """What was asked for cannot be done; the message is for people."""


def add_to(commands: Any) -> None:
    """Add these commands to a parser's."""
    state = argparse.ArgumentParser(add_help=False)
    state.add_argument(
        "--state-dir",
        default=loading.default_state_dir(os.environ),
        metavar="DIR",
        help="what the daemon has as --state-dir [%(default)s]",
    )
    end = commands.add_parser(
        "end-tasks",
        parents=[state],
        help="end every task that a stopped daemon has left running",
        description=(
            "Ends every running task of a daemon on this machine, each with all its "
            "processes, also while no daemon runs. The next daemon finds them killed."
        ),
    )
    end.set_defaults(local=_end_tasks)
    token = commands.add_parser(
        "token",
        help="make, list and revoke tokens for scripts and bots",
        description=(
            "Manages the tokens of a daemon on this machine, also while it runs. Only "
            "the hash of a token is kept. A token is heard where the daemon has an "
            "--auth-provider; 'tokens' is one that knows nothing else."
        ),
    )
    kinds = token.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    create = kinds.add_parser("create", parents=[state], help="make one, and show it once")
    create.add_argument("name", metavar="NAME", help="what it is called in lists and logs")
    create.add_argument(
        "--may",
        type=_words,
        default=(),
        metavar="RIGHTS",
        help=f"by commas: {', '.join(Right)}; else only what rules allow token:NAME",
    )
    create.add_argument(
        "--on",
        action="append",
        metavar="TARGET",
        help="where: app, app/env or app/env/action, * is wild; may be repeated [*]",
    )
    create.add_argument(
        "--expires", type=_date, metavar="DATE", help="YYYY-MM-DD (UTC), or days from now"
    )
    create.set_defaults(local=_create_token)
    listing = kinds.add_parser("list", parents=[state], help="show them, but their secret")
    listing.add_argument("--json", action="store_true", help="for programs: lines of JSON")
    listing.set_defaults(local=_list_tokens)
    revoke = kinds.add_parser(
        "revoke", parents=[state], help="let one count no more, within 10 seconds"
    )
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(local=_revoke_token)
    login = commands.add_parser(
        "login",
        help="show and change whose the listed logins of GitHub are",
        description=(
            "A login of GitHub that the settings list is bound to the first account that "
            "is let in by it. Another account that gets the login later is refused until "
            "the login is bound to it here."
        ),
    )
    kinds = login.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    listing = kinds.add_parser("list", parents=[state], help="show the bound logins")
    listing.add_argument("--json", action="store_true", help="for programs: lines of JSON")
    listing.set_defaults(local=_list_logins)
    rebind = kinds.add_parser(
        "rebind", parents=[state], help="bind a login to another account, within a minute"
    )
    rebind.add_argument("login", metavar="LOGIN")
    rebind.add_argument("id", metavar="ID", help="the number of the account at GitHub")
    rebind.set_defaults(local=_rebind_login)
    audit = commands.add_parser(
        "audit",
        parents=[state],
        help="show who wanted what, and whether they got it",
        description="Shows the audit log of a daemon on this machine, oldest first.",
    )
    audit.add_argument(
        "--user", help="only what this user wanted: by name, token:NAME or github:ID"
    )
    audit.add_argument("--refused", action="store_true", help="only what was not allowed")
    audit.add_argument("--limit", type=int, default=100, help="the last so many [100]")
    audit.add_argument("--json", action="store_true", help="for programs: lines of JSON")
    audit.set_defaults(local=_audit)


def run(given: argparse.Namespace, now: Callable[[], float]) -> int:
    """Run the command that was given; return its exit status.

    ``now`` gives the seconds since the epoch.
    """
    try:
        given.local(given, now)
    except (_Failed, StoreUnavailable) as e:
        print("pulsar-api:", e, file=sys.stderr)
        return 1
    except OSError as e:
        print(f"pulsar-api: {e.filename or given.state_dir}: {e.strerror}", file=sys.stderr)
        return 1
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _date(text: str) -> datetime | timedelta:
    if re.fullmatch(r"[0-9]{1,5}", text):
        return timedelta(days=int(text))
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date like 2027-01-31") from None


def _state(given: argparse.Namespace) -> Path:
    """Return the state folder, if it is for us to write: files have to stay its owner's."""
    state = Path(given.state_dir)
    if state.stat().st_uid != os.geteuid():
        raise _Failed(
            f"{state} is another user's; run this as that one: "
            f"sudo -u {state.owner()} pulsar-api ..."
        )
    return state


def _end_tasks(given: argparse.Namespace, _: _Now) -> None:
    ended = executor.end_all(Path(given.state_dir))
    names = ", ".join(map(str, ended)) or "none runs"
    print(f"{len(ended)} tasks are told to end: {names}")


def _noted(state: Path, now: _Now, what: str, **more: object) -> None:
    operator = Principal("machine", str(os.geteuid()), getpass.getuser())
    caller = Caller(operator, "this machine", "command line")
    AuditLog(state / FILE, now).write(caller, what, allowed=True, **more)


def _create_token(given: argparse.Namespace, now: _Now) -> None:
    if not _NAME.fullmatch(given.name):
        raise _Failed("a name is of a-z 0-9 _.- and has at most 64 characters")
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
            raise _Failed(f"there is a token {given.name}; revoke it first") from None
    _noted(state, now, "token create", token=given.name, may=given.may, on=targets)
    print(secret)
    print("This is the only time that it is shown.", file=sys.stderr)


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
    print(f"{given.name} is revoked; a daemon that runs lets nobody in by it after 10 s.")


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
        raise _Failed(f"{given.login!r} is no login of GitHub")
    if not _ID.fullmatch(given.id):
        raise _Failed(f"{given.id!r} is not the number of an account at GitHub")
    state = _state(given)
    login = Login(given.login.casefold(), given.id, now())
    with opened(state / DATABASE) as db:
        before = {one.name: one.id for one in all_logins(db)}.get(login.name)
        bind_login(db, login)
    _noted(state, now, "login rebind", login=login.name, id=login.id, before=before)
    print(
        f"{login.name} is bound to account {login.id}; a daemon that runs knows it "
        "within a minute."
    )


def _day(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%MZ")


def _audit(given: argparse.Namespace, now: _Now) -> None:
    wanted = (
        entry
        for entry in AuditLog(Path(given.state_dir) / FILE, now).read()
        if given.user in {None, entry.get("who"), entry.get("principal")}
        and not (given.refused and entry.get("allowed"))
    )
    show: Callable[[dict[str, Any]], str] = json.dumps if given.json else _line
    for entry in deque(wanted, maxlen=max(0, given.limit)):
        print(show(entry))


def _line(entry: dict[str, Any]) -> str:
    def words() -> Iterator[str]:
        yield str(entry.get("at", "")).replace("T", " ")
        yield "yes" if entry.get("allowed") else "NO "
        yield f"{entry.get('who') or '-'} ({entry.get('means')}, {entry.get('from')})"
        yield str(entry.get("what"))
        place = [entry[name] for name in ("app", "env", "action") if entry.get(name)]
        yield "/".join(map(str, place))
        for name in ("task", "user", "token", "login", "id", "times"):
            if entry.get(name) is not None:
                yield f"{name} {entry[name]}"
        if isinstance(entry.get("tasks"), list):
            yield f"tasks {' to '.join(map(str, entry['tasks']))}"

    # What was said from outside shows as it is, not as what a terminal makes of it.
    text = "  ".join(word for word in words() if word)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
