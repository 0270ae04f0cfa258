"""Finds every form in which a program may print a secret; `shim.masker` replaces them."""

import fnmatch
import json
import re
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from urllib.parse import quote, quote_plus

from pulsar_api.tasks import shell_quoting

PATTERNS = ("*password*", "*token*", "*secret*", "*key*")
"""The default of ``secret-variables``: patterns for the names of secret variables."""

SHORTEST = 4
"""The fewest characters that are masked. A shorter value often occurs in other words."""

COMMON = frozenset("default disabled enabled false none null true undefined".split())
"""Words that are too common to be masked, in upper or lower case."""

LINES = 500
"""How many lines of a task's secrets are masked in every form.

Values with few lines come first. Lines beyond this limit are masked only as they are.
"""

_NUMBER = re.compile("[0-9]{4}")
_PLAIN = re.compile(r"\w+", re.ASCII)  # all programs write these characters unchanged

# The characters that are not percent-encoded by most programs, by Python's quote, by
# encodeURIComponent, by encodeURI, and by Go in the user and in the path of a URL.
_SAFE = ("", "/", "!'()*", "!'()*;,/?:@&=+$#", "$&+,;=", "$&+=:@")

# The line lengths of base64 in Ruby, PEM and MIME.
_WIDTHS = (60, 64, 76)


def is_secret(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a variable of this name is secret. Case does not matter."""
    return any(fnmatch.fnmatchcase(name.lower(), text.lower()) for text in patterns)


def _is_common(text: str) -> bool:
    return _has_common({text})


def _has_common(lines: Collection[str]) -> bool:
    # Loops that run in C: the reactor's thread calls this for thousands of lines.
    numbers = map(_NUMBER.fullmatch, (line for line in lines if len(line) == 4))
    return not COMMON.isdisjoint(map(str.casefold, lines)) or any(numbers)


def _in_full(values: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each value, and whether its lines are masked in every form."""
    room = LINES
    for value in sorted(set(values), key=lambda value: (value.count("\n"), value)):
        room -= value.count("\n")
        yield value, room >= 0


def notes(values: Mapping[str, str]) -> list[str]:
    """Return a sentence for each secret that is masked only in part or not at all."""
    in_full = dict(_in_full(values.values()))
    found = []
    for name, value in sorted(values.items()):
        text = value.strip()
        lines = set(map(str.strip, text.split("\n"))) - {""}
        why = None
        if len(min(lines, key=len, default="")) < SHORTEST:
            why = f"shorter than {SHORTEST} characters"
        elif _has_common(lines):
            why = "a common word or a number of four digits"
        if why is not None:
            what = "" if len(text) < SHORTEST or _is_common(text) else "a line of it is "
            found.append(
                f"variables.{name}: {what}{why}, so it is not masked in the output."
            )
        if not in_full[value]:
            found.append(
                f"variables.{name}: the secrets have more than {LINES} lines, so each line "
                "of this one is masked in the output only if it is printed as it is."
            )
    return found


def forms(values: Collection[str]) -> tuple[bytes, ...]:
    """Return the texts to mask: the values, in every form.

    The forms are: as it is, each line by itself, base64 (also inside longer base64),
    percent-encoded, as a JSON string, and quoted by a shell. Values that are too short or
    too common are left out; see `notes`. This can take half a second.
    """
    found: set[bytes] = set()
    for value, in_full in _in_full(values):
        # White space around a value is not secret, and many programs strip it. Masking it
        # too would swallow the end of the line.
        text = value.strip()
        lines = [*map(str.strip, text.split("\n"))] if "\n" in text else []
        for one in dict.fromkeys([text, *lines]):
            if len(one) >= SHORTEST and not _is_common(one):
                found.update(_as_text(one) if in_full or one == text else [one.encode()])
                if one == text:
                    found.update(_forms(text))
    return tuple(sorted(found))


def _forms(text: str) -> Iterator[bytes]:
    yield from _base64(text.encode())
    yield from (form.encode() for form in _percent(text))
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > 1:
        for end in ("\n", "\r\n"):
            yield from _as_text(end.join(lines))


def _as_text(text: str) -> Iterator[bytes]:
    """Yield a text as it is, as programs quote it for a shell, and as JSON."""
    yield text.encode()
    if not _PLAIN.fullmatch(text):
        yield from shell_quoting.quoted(text)
        yield text.replace("'", "'\"'\"'").encode()  # Python's shlex
        yield re.sub(r"(\W)", r"\\\1", text).encode()
        yield from (form.encode() for form in _json(text))


def _json(text: str) -> Iterator[str]:
    plain, ascii_only = (json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True))
    for form in (plain, ascii_only):
        yield form
        yield form.replace("/", "\\/")
        # Ruby on Rails and Go escape these characters so that the text fits into HTML.
        yield re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", form)
        # Gson and .NET also escape quotes like this.
        bare = form.replace('\\"', '"')
        for signs in ("[<>&='\"]", "[<>&'\"+]"):
            more = re.sub(signs, lambda found: f"\\u{ord(found[0]):04x}", bare)
            yield more
            yield re.sub(
                r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), more
            )
    yield re.sub(r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), ascii_only)


def _percent(text: str) -> Iterator[str]:
    # The form that URLSearchParams and Java write.
    form_data = quote(text, "*").replace("%20", "+").replace("~", "%7E")
    written = (*(quote(text, safe) for safe in _SAFE), quote_plus(text), form_data)
    for form in written:
        yield form
        yield re.sub("%..", lambda found: found[0].lower(), form)


def _base64(data: bytes) -> Iterator[bytes]:
    for before in range(3):
        # Other data encoded together with it: this many bytes before, any number after.
        coded = b64encode(bytes(before) + data).rstrip(b"=")
        begin = (0, 2, 3)[before]
        end = (before + len(data)) * 8 // 6
        for form in (coded[begin:end], coded[begin:]):
            yield form
            yield form.replace(b"+", b"-").replace(b"/", b"_")
    # Leave out the last letter if it also depends on the data that follows.
    coded = b64encode(data)[: len(data) * 8 // 6]
    for width in _WIDTHS:
        lines = [coded[at : at + width] for at in range(0, len(coded), width)]
        yield b"\n".join(lines)
        yield b"\r\n".join(lines)
