"""Says in which forms a secret value must not be seen. Pure; `mask` replaces them."""

import fnmatch
import json
import re
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from urllib.parse import quote, quote_plus

PATTERNS = ("*password*", "*token*", "*secret*", "*key*")
"""Which variables are secret by their name, unless the settings say otherwise."""

SHORTEST = 4
"""Characters; what is shorter would be masked in the middle of every other word."""

# What programs leave as it is: most of them, Python's quote, encodeURIComponent, encodeURI,
# Go in the user of a URL and in its path.
_SAFE = ("", "/", "!'()*", "!'()*;,/?:@&=+$#", "$&+,;=", "$&+=:@")

# Where base64 is broken: Ruby, PEM, MIME.
_WIDTHS = (60, 64, 76)


def is_secret(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a variable of this name is secret, in capitals or not."""
    return any(fnmatch.fnmatchcase(name.lower(), text.lower()) for text in patterns)


def notes(values: Mapping[str, str]) -> list[str]:
    """Return a sentence for each secret that is too short to be masked."""
    found = []
    for name, value in sorted(values.items()):
        text = value.strip()
        what = "" if len(text) < SHORTEST else None
        if any(0 < len(line.strip()) < SHORTEST for line in text.split("\n")) and text:
            what = "a line of it is " if what is None else what
        if what is not None:
            found.append(
                f"variables.{name}: {what}shorter than {SHORTEST} characters, so it is not "
                "masked in the output."
            )
    return found


def forms(values: Collection[str]) -> tuple[bytes, ...]:
    """Return the texts that must not be seen: the values, and ways of writing them.

    Written as they are, each line of several by itself, as base64 (also as a part of
    longer base64), percent-encoded, as a string of JSON, and quoted by a shell.
    """
    found: set[bytes] = set()
    for value in values:
        # The white space around it is no secret, and many programs take it away. Masked
        # with it, a line's end would be missing.
        text = value.strip()
        if len(text) >= SHORTEST:
            found.update(_forms(text))
    return tuple(sorted(found))


def _forms(text: str) -> Iterator[bytes]:
    data = text.encode()
    yield from (form.encode() for form in _as_text(text))
    yield from _base64(data)
    yield from (form.encode() for form in _percent(text))
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > 1:
        for end in ("\n", "\r\n"):
            yield from (form.encode() for form in _as_text(end.join(lines)))
        for line in map(str.strip, lines):
            if len(line) >= SHORTEST:
                yield from (form.encode() for form in _as_text(line))


def _as_text(text: str) -> Iterator[str]:
    """Yield a text as it is, as JSON writes it, and as a shell does that is traced."""
    yield text
    for quote_in_quotes in ("'\\''", "'\"'\"'"):
        yield text.replace("'", quote_in_quotes)
    yield re.sub(r"(\W)", r"\\\1", text)
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
