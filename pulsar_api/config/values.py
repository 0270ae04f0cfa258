"""Parsers for the values of options; a `ValueError` says what is allowed."""

import ipaddress
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from pulsar_api.auth.rights import Rule
from pulsar_api.tasks.accounts import RunAs
from pulsar_api.tasks.targets import Target


def text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a non-empty string")
    return value


def name(value: object) -> str:
    found = text(value)
    if found.startswith("-") or not found.isprintable():
        raise ValueError(
            "must be a name of printable characters that does not begin with a hyphen"
        )
    return found


def flag(value: object) -> bool:
    # On the command line a flag is 0 or 1.
    if not isinstance(value, bool) and value not in (0, 1):
        raise ValueError("must be true or false")
    return bool(value)


def number(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("must be a whole number")  # noqa: TRY004
        if not least <= value <= most:
            raise ValueError(f"must be from {least} to {most}")
        return value

    return parse


def seconds(least: float, most: float = 31 * 86400) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,6})?", value):
            value = float(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("must be a number of seconds")  # noqa: TRY004
        if not least <= value <= most:
            raise ValueError(f"must be from {least:g} to {most:g} seconds")
        return float(value)

    return parse


def days(value: object) -> float:
    parse = seconds(0, 36500)
    try:
        return parse(value)
    except ValueError:
        raise ValueError("must be a number of days from 0 to 36500") from None


def size(value: object) -> int:
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", str(value), re.ASCII)
    if found is None or isinstance(value, bool):
        raise ValueError("must be a number of bytes, optionally followed by K, M, G or T")
    return int(found[1]) << 10 * " KMGT".index(found[2] or " ")


def address(value: object) -> str:
    try:
        return str(ipaddress.ip_address(text(value)))
    except ValueError:
        raise ValueError(
            f"{value!r} is not an IP address; give the address of the host instead of "
            "its name"
        ) from None


def url(value: object) -> str:
    parts = urlsplit(text(value))
    # Looking at the port raises ValueError if it is none.
    if (
        parts.port == 0
        or parts.scheme not in {"http", "https"}
        or not parts.hostname
        or parts.query
    ):
        raise ValueError("must be a URL like https://deploy.example.com")
    return parts._replace(fragment="").geturl().rstrip("/")


def texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of strings")  # noqa: TRY004
    return tuple(text(item) for item in value)


def words(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    return tuple(item.strip() for item in texts(items))


def addresses(value: object) -> tuple[str, ...]:
    return tuple(item if item == "unix" else address(item) for item in texts(value))


def one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return str(value)

    return parse


def rules(value: object) -> tuple[Rule, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of tables: [[rights]]")  # noqa: TRY004
    return tuple(Rule.parse(table) for table in value)


def run_as(value: object) -> tuple[RunAs, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of tables: [[run-as]]")  # noqa: TRY004
    return tuple(RunAs.parse(table) for table in value)


def targets(value: object) -> tuple[Target, ...]:
    return tuple(Target.parse(item) for item in texts(value))


def pattern(value: object) -> re.Pattern[str]:
    try:
        return re.compile(text(value))
    except (re.error, OverflowError) as e:
        raise ValueError(f"is not a regular expression: {e}") from None


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
