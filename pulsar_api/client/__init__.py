"""The client for Python programs: `Client`, what it returns, and how it fails."""

from pulsar_api.client.client import Client
from pulsar_api.client.errors import ClientError, Refused, Unreachable
from pulsar_api.client.model import Event, Piece, Task

__all__ = ["Client", "ClientError", "Event", "Piece", "Refused", "Task", "Unreachable"]
