"""The forms in which a secret value must not be seen; `shim.masker` replaces them."""

import fnmatch
import json
import re
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from urllib.parse import quote, quote_plus

from pulsar_api.tasks import shell_quoting

PATTERNS = ("*password*", "*token*", "*secret*", "*key*")
"""The default of ``secret-variables``: the names of variables that are secret."""

SHORTEST = 4
"""Characters. A shorter value would be masked in the middle of other words."""

COMMON = frozenset("default disabled enabled false none null true undefined".split())
"""Words that are too common to be masked, whatever their case."""

LINES = 500
"""How many lines of a task's secrets are masked in every form.

The lines of the longest values are beyond this limit, and are masked as they are.
"""

_NUMBER = re.compile("[0-9]{4}")
_PLAIN = re.compile(r"\w+", re.ASCII)  # what all programs write as it is

# What programs leave as it is: most of them, Python's quote, encodeURIComponent, encodeURI,
# Go in the user of a URL and in its path.
_SAFE = ("", "/", "!'()*", "!'()*;,/?:@&=+$#", "$&+,;=", "$&+=:@")

# Where base64 is broken: Ruby, PEM, MIME.
_WIDTHS = (60, 64, 76)


def is_secret(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a variable of this name is secret, whatever its case."""
    return any(fnmatch.fnmatchcase(name.lower(), text.lower()) for text in patterns)


def _is_common(text: str) -> bool:
    return _has_common({text})


def _has_common(lines: Collection[str]) -> bool:
    # By loops of C: the reactor's thread asks, about thousands of lines.
    numbers = map(_NUMBER.fullmatch, (line for line in lines if len(line) == 4))
    return not COMMON.isdisjoint(map(str.casefold, lines)) or any(numbers)


def _in_full(values: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield each value, and whether its lines are looked for in every form."""
    room = LINES
    for value in sorted(set(values), key=lambda value: (value.count("\n"), value)):
        room -= value.count("\n")
        yield value, room >= 0


def notes(values: Mapping[str, str]) -> list[str]:
    """Return a sentence for each secret that is not masked, or not in every form."""
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
    """Return the texts that must not be printed: the values, in every form.

    The forms are: as it is, each line by itself, base64 (also inside longer base64),
    percent-encoded, as a string of JSON, and quoted by a shell. Values that are too short
    or too common are left out, see `notes`. It may take half a second.
    """
    found: set[bytes] = set()
    for value, in_full in _in_full(values):
        # The white space around it is no secret, and many programs take it away. Masked
        # with it, a line's end would be missing.
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
    """Yield a text as it is, as programs quote it for a shell, and as JSON writes it."""
    yield text.encode()
    if not _PLAIN.fullmatch(text):
        yield from shell_quoting.quoted(text)
        yield text.replace("'", "'\"'\"'").encode()  # shlex of Python
        yield re.sub(r"(\W)", r"\\\1", text).encode()
        yield from (form.encode() for form in _json(text))


def _json(text: str) -> Iterator[str]:
    plain, ascii_only = (json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True))
    for form in (plain, ascii_only):
        yield form
        yield form.replace("/", "\\/")
        # As for a page: Ruby on Rails, Go.
        yield re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", form)
        # Gson, .NET, which write a quote in this way as well.
        bare = form.replace('\\"', '"')
        for signs in ("[<>&='\"]", "[<>&'\"+]"):
            more = re.sub(signs, lambda found: f"\\u{ord(found[0]):04x}", bare)
            yield more
            yield re.sub(
                r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), more
            )
    yield re.sub(r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), ascii_only)


def _percent(text: str) -> Iterator[str]:
    # URLSearchParams, and Java.
    form_data = quote(text, "*").replace("%20", "+").replace("~", "%7E")
    written = (*(quote(text, safe) for safe in _SAFE), quote_plus(text), form_data)
    for form in written:
        yield form
        yield re.sub("%..", lambda found: found[0].lower(), form)


def _base64(data: bytes) -> Iterator[bytes]:
    for before in range(3):
        # What else is encoded with it: so many bytes before it, and any number behind.
        coded = b64encode(bytes(before) + data).rstrip(b"=")
        begin = (0, 2, 3)[before]
        end = (before + len(data)) * 8 // 6
        for form in (coded[begin:end], coded[begin:]):
            yield form
            yield form.replace(b"+", b"-").replace(b"/", b"_")
    # Without the last letter if that depends on what is behind, too.
    coded = b64encode(data)[: len(data) * 8 // 6]
    for width in _WIDTHS:
        lines = [coded[at : at + width] for at in range(0, len(coded), width)]
        yield b"\n".join(lines)
        yield b"\r\n".join(lines)
