"""Requests as values: their query, body and headers, parsed and checked."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from attrs import frozen

from pulsar_api.errors import InvalidInput, PulsarError
from pulsar_api.tasks.model import Status, TaskQuery

MAX_LIST = 1000
"""Tasks in one list."""
MAX_TEXT = 200
"""Characters of a text to search for."""
_MAX_FIELDS = 500


@frozen
class UnsupportedMedia(PulsarError):
    """The body has an unsupported type."""

    content_type: str

    def __str__(self) -> str:
        return (
            f"A body of type {self.content_type!r} is not supported; send "
            "application/json or application/x-www-form-urlencoded."
        )


def parse_query(query: bytes) -> dict[str, str]:
    """Return the parameters of a URL; a repeated one has its last value."""
    return _fields("query", query)


def _fields(where: str, data: bytes) -> dict[str, str]:
    try:
        # keep_blank_values: an empty action is a wrong action, not a missing one.
        pairs = parse_qsl(
            data.decode("ascii"),
            keep_blank_values=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=_MAX_FIELDS,
        )
    except UnicodeError:
        raise InvalidInput(where, "must be percent-encoded UTF-8") from None
    except ValueError:
        raise InvalidInput(where, f"at most {_MAX_FIELDS} fields are allowed") from None
    return dict(pairs)


def _check_no_nul(fields: Mapping[str, str], *names: str) -> None:
    for name in names:
        if "\0" in fields.get(name, ""):
            raise InvalidInput(name, "NUL is not allowed")


@frozen
class NewTask:
    """The task that the body and the query of a ``POST /:app/:env`` ask for."""

    action: str
    variables: Mapping[str, str]
    secret: frozenset[str] = frozenset()
    """The secret variables, beside those with a secret name."""
    wait: bool = False
    """Whether the answer waits for the end of the task (release 0.6)."""


_REFUSED = frozenset({"shell", "invoke"})
"""Names that release 0.6 refused for ``task``, as they can run any command."""


def parse_new_task(content_type: str, body: bytes, query: Mapping[str, str]) -> NewTask:
    """Parse a request for a task; the body takes precedence over the query.

    Raises:
        InvalidInput: A field is missing or malformed.
        UnsupportedMedia: The type of the body is not supported.
    """
    kind = content_type.partition(";")[0].strip().lower()
    fields: dict[str, Any] = {}
    if kind == "application/json":
        fields = _json_object(body)
    elif kind == "application/x-www-form-urlencoded":
        fields = _form(body)
    elif body or kind:
        raise UnsupportedMedia(content_type[:100])
    name = "task" if "task" in fields and "action" not in fields else "action"
    action = fields.get(name, query.get("action"))
    if action is None:
        raise InvalidInput("action", "is missing; name the action to run")
    if not isinstance(action, str):
        raise InvalidInput(name, "must be a text")
    action = action.strip(" \t")
    if name == "task" and action.partition("[")[0] in _REFUSED:
        raise InvalidInput("task", f"{action.partition('[')[0]!r} is not allowed")
    variables = "taskVariables" if "variables" not in fields else "variables"
    wait = fields.get("wait", False)
    if wait not in (True, False, "true", "false") or isinstance(wait, int | float) != (
        isinstance(wait, bool)
    ):
        raise InvalidInput("wait", "must be true or false")
    given = _variables(variables, fields.get(variables, {}))
    for field in fields:
        if field.startswith("secret") and field != "secret":
            # A typo must not make a password public.
            raise InvalidInput(field[:100], "is unknown; secret is a list of names")
    secret = _secret(fields.get("secret", []), given)
    return NewTask(action, given, secret, wait in (True, "true"))


def parse_form(content_type: str, body: bytes) -> dict[str, str]:
    """Return the fields of a form sent by a browser.

    Raises:
        InvalidInput: The form is malformed.
        UnsupportedMedia: The body is not a form.
    """
    if (
        content_type.partition(";")[0].strip().lower()
        != "application/x-www-form-urlencoded"
    ):
        raise UnsupportedMedia(content_type[:100])
    fields = _fields("body", body)
    _check_no_nul(fields, *fields)
    return fields


def parse_key(given: Sequence[str] | None) -> str | None:
    """Return the Idempotency-Key, in quotes or not, or None if there is none."""
    if not given:
        return None
    key = given[0].strip()
    if len(given) > 1 or not re.fullmatch(r"[!-~]{1,255}", key):
        detail = "must be one text of 1 to 255 visible ASCII characters"
        raise InvalidInput("Idempotency-Key", detail)
    if key.startswith('"') and key.endswith('"') and len(key) > 2:  # RFC 8941
        key = key[1:-1]
    return key


def _form(body: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in _fields("body", body).items():
        found = re.fullmatch(r"(variables|taskVariables)\[(.*)\]", name, re.DOTALL)
        if name in {"secret", "secret[]"}:
            names = [part.strip() for part in value.split(",")]
            fields.setdefault("secret", []).extend(names)
            continue
        if name in {"variables", "taskVariables"}:
            raise InvalidInput(name, f"in a form write {name}[key]=value")
        if found is None:
            fields[name] = value
        else:
            fields.setdefault(found[1], {})[found[2]] = value
    return fields


def _json_object(body: bytes) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise InvalidInput("body", f"must be JSON in UTF-8: {why}"[:300]) from None
    if not isinstance(value, dict):
        raise InvalidInput("body", "must be a JSON object")
    return value


def _variables(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidInput(name, "must be an object")
    result = {}
    for key, item in value.items():
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise InvalidInput(f"{name}.{key[:100]}", "must be a string or a number")
        if isinstance(item, float) and not math.isfinite(item):
            raise InvalidInput(f"{name}.{key[:100]}", "is too large")
        try:
            result[key] = str(item)
        except ValueError:
            raise InvalidInput(f"{name}.{key[:100]}", "has too many digits") from None
    return result


def _secret(names: object, variables: Mapping[str, str]) -> frozenset[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput("secret", "must be a list of names of variables")
    for name in names:
        if name not in variables:
            # A typo must not make a password public.
            raise InvalidInput("secret", f"there is no variable {name[:100]!r}")
    return frozenset(names)


def parse_number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """Return a parameter that is a whole number from 0 to ``most``."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise InvalidInput(name, f"must be a whole number from 0 to {most}")
    return int(text)


def parse_seconds(query: Mapping[str, str], name: str, most: float) -> float:
    """Return a parameter that is a time from 0 to ``most``, which is the default too."""
    try:
        seconds = float(query.get(name, most))
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= most:
        raise InvalidInput(name, f"must be a number of seconds from 0 to {most:g}")
    return seconds


def parse_flag(query: Mapping[str, str], name: str) -> bool:
    """Return a parameter that is 0 or 1; without it, no."""
    return parse_choice(query, name, "0", ("0", "1")) == "1"


def parse_cursor(text: str) -> tuple[int, ...]:
    """Return the three numbers of an event's id."""
    if not re.fullmatch(r"[0-9]{1,17}-[0-9]{1,17}-[0-9]{1,17}", text, re.ASCII):
        raise InvalidInput("Last-Event-ID", "must be the id of an event of this stream")
    return tuple(int(number) for number in text.split("-"))


def parse_choice(
    query: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]
) -> str:
    """Return a parameter that is one of a few words."""
    value = query.get(name, default)
    if value not in choices:
        raise InvalidInput(name, f"must be one of {', '.join(choices)}")
    return value


def parse_needle(query: Mapping[str, str]) -> str:
    """Return the text to search for."""
    text = query.get("text", "")
    if not 1 <= len(text) <= MAX_TEXT or "\n" in text:
        raise InvalidInput("text", f"must be 1 to {MAX_TEXT} characters of one line")
    return text


def parse_task_query(query: Mapping[str, str]) -> TaskQuery:
    """Return the tasks that a list is to have."""
    _check_no_nul(query, "app", "env", "user", "text")
    limit = parse_number(query, "limit", 100, MAX_LIST)
    if limit == 0:
        raise InvalidInput("limit", f"must be a whole number from 1 to {MAX_LIST}")
    status = query.get("status")
    if status is not None:
        parse_choice(query, "status", "", tuple(Status))
    before = parse_number(query, "before", 0, 2**63 - 1) if "before" in query else None
    text = query.get("text", "")
    if len(text) > MAX_TEXT:
        raise InvalidInput("text", f"must be {MAX_TEXT} characters at most")
    return TaskQuery(
        limit=limit,
        before=before,
        status=None if status is None else Status(status),
        app=query.get("app"),
        env=query.get("env"),
        user=query.get("user"),
        text=text or None,
    )
