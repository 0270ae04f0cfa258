"""Frames: what SockJS sends at a time, and what its clients send."""

import json

from pulsar_api.web.legacy.message import Message

OPEN = "o"
BEAT = "h"
GO_AWAY = 'c[3000,"Go away!"]'
DENIED = 'c[403,"Access denied"]'
BUSY = 'c[2010,"Another connection still open"]'
LAST = frozenset({GO_AWAY, DENIED})
"""Frames after which there is nothing more."""

Frame = str | Message


def parse_messages(data: bytes | str) -> list[str] | None:
    """Return the texts that a client has sent; None if it has sent something else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    return None
