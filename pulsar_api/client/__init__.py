"""The client for Python programs."""

from pulsar_api.client.client import (
    Client,
    ClientError,
    Event,
    Piece,
    Refused,
    Task,
    Unreachable,
)

__all__ = ["Client", "ClientError", "Event", "Piece", "Refused", "Task", "Unreachable"]
