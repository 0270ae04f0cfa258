"""Writes JSON objects piece by piece, so that long texts in them are never held whole."""

import json
from collections.abc import Iterable, Iterator, Mapping

from attrs import frozen


@frozen
class Text:
    """A JSON string of any length, made of parts."""

    parts: Iterable[str]


def pieces(
    fields: Mapping[str, object], /, **streamed: Text | Iterable[bytes]
) -> Iterator[bytes]:
    """Yield an object: its short fields first, then those that are streamed, in order.

    A streamed value is a `Text`, or the pieces of a value that is JSON already.
    """
    opening = _members(fields, ascii=False)
    del fields  # they may be large, and it may take long to write the rest
    separator = ", " if opening else ""
    opening = f"{{{opening}"
    for name, value in streamed.items():
        opening += f"{separator}{json.dumps(name)}: "
        separator = ", "
        if isinstance(value, Text):
            yield f'{opening}"'.encode("utf-8", "replace")
            yield from (escaped(part).encode() for part in value.parts)
            opening = '"'
        else:
            yield opening.encode("utf-8", "replace")
            yield from value
            opening = ""
    yield f"{opening}}}".encode("utf-8", "replace")


def opened(fields: Mapping[str, object], name: str, *, ascii: bool = False) -> str:
    """Return an object up to where the value of its last field, ``name``, begins."""
    members = _members(fields, ascii=ascii)
    separator = ", " if members else ""
    return f"{{{members}{separator}{json.dumps(name)}: "


def escaped(text: str, *, ascii: bool = False) -> str:
    """Return a text as it stands between the quotation marks of a JSON string."""
    return json.dumps(text, ensure_ascii=ascii)[1:-1]


def _members(fields: Mapping[str, object], *, ascii: bool) -> str:
    return json.dumps(fields, ensure_ascii=ascii)[1:-1]
