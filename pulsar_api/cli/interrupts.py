"""What Ctrl-C does while a task is followed."""

import signal
import sys
from typing import Any

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred

from pulsar_api.cli.console import Answers, Console
from pulsar_api.client import Client, Task


@define(eq=False)
class Interrupts:
    """Handles Ctrl-C: the first one asks, the second one leaves the task running."""

    reactor: Any
    client: Client
    console: Console
    task_id: int
    _following: Deferred[Task] | None = field(default=None, init=False)
    _asked: bool = field(default=False, init=False)
    _answers: Answers | None = field(default=None, init=False)
    _before: Any = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        reactor = self.reactor
        self._before = signal.signal(
            signal.SIGINT, lambda *_: reactor.callFromThread(self._interrupted)
        )

    async def unless(self, following: Any) -> Task | None:
        """Return the task when it has ended, or None if the user stops waiting."""
        self._following = Deferred.fromCoroutine(following)
        try:
            return await self._following
        except CancelledError:
            return None

    def close(self) -> None:
        """Restore the handler of Ctrl-C and ask nothing more."""
        signal.signal(signal.SIGINT, self._before)
        if self._answers is not None:
            self._answers.close()

    def _interrupted(self) -> None:
        if self._asked or not sys.stdin.isatty():
            self._leave()
            return
        self._asked = True
        self.console.say(
            f"kill task {self.task_id}, or leave it running? [k/l, Ctrl-C leaves]"
        )
        fd = sys.stdin.fileno()
        self._answers = Answers(self.reactor, fd, self._answered)

    def _answered(self, text: str) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        if text.startswith("l"):
            self._leave()
        elif text.startswith("k"):
            asked = Deferred.fromCoroutine(self.client.kill(self.task_id))
            asked.addErrback(lambda failure: self.console.say(str(failure.value)))
        else:
            self._asked = False
            self.console.say("the task goes on, and is followed")

    def _leave(self) -> None:
        if self._following is not None:
            self._following.cancel()
