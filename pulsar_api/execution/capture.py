"""Runs a command outside of any task and returns what it prints."""

from contextlib import suppress

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from pulsar_api.tasks.model import Command

MOST_OUTPUT = 256 * 1024
"""Bytes of output that are returned at most."""


class _Collector(ProcessProtocol):
    def __init__(self, done: Deferred[str]) -> None:
        self.done = done
        self.text = b""

    def outReceived(self, data: bytes) -> None:
        self.text = (self.text + data)[:MOST_OUTPUT]

    def processEnded(self, reason: Failure) -> None:
        if not self.done.called:  # the caller may have stopped waiting
            self.done.callback(self.text.decode("utf-8", "replace"))


async def capture_output(
    reactor: IReactorProcess, clock: IReactorTime, command: Command, seconds: float = 10
) -> str:
    """Return the first `MOST_OUTPUT` bytes of what a command prints, as text.

    Return "" if the command cannot be started, or if it has not ended after ``seconds``.
    It is killed then, and also if the caller cancels the wait.
    """

    def kill(_: object) -> None:
        with suppress(ProcessExitedAlready):
            process.signalProcess("KILL")

    done: Deferred[str] = Deferred(kill)
    arguments = command.arguments
    if command.directory is not None:
        # With a folder of its own Twisted would fork the whole daemon.
        arguments = ("env", f"--chdir={command.directory}", *arguments)
    try:
        process = reactor.spawnProcess(
            _Collector(done), arguments[0], arguments, env=dict(command.environment)
        )
    except OSError:
        return ""
    process.closeStdin()
    return await done.addTimeout(seconds, clock, lambda *_: "")
