"""What the client returns: tasks, pieces of output, and events."""

from collections.abc import Mapping
from typing import Any, cast

from attrs import frozen


@frozen
class Task:
    """A task as the daemon describes it. ``data`` has every field of the API."""

    data: Mapping[str, Any]

    @property
    def id(self) -> int:
        """The number of the task."""
        return cast("int", self.data["id"])

    @property
    def status(self) -> str:
        """``created``, ``running``, ``finished``, ``failed``, ``killed`` or ``lost``."""
        return cast("str", self.data["status"])

    @property
    def ended(self) -> bool:
        """Whether the task has ended, so that it does not change any more."""
        return self.status not in {"created", "running"}

    @property
    def exit_code(self) -> int | None:
        """The exit code of the command; None until it ends, and after a signal."""
        return cast("int | None", self.data["exitCode"])


@frozen
class Piece:
    """A part of the output."""

    stream: str | None
    """``stdout`` or ``stderr``; None if unknown, and for the marker of dropped output."""
    offset: int
    """The byte of the output at which it begins."""
    text: str
    end: int
    """The byte at which the next piece begins; ``text`` may differ in length as UTF-8."""


@frozen
class Event:
    """Something that happened to a task: ``state``, ``output`` or ``end``."""

    kind: str
    data: Mapping[str, Any]
    end: int
    """Bytes of the output before the next event."""
