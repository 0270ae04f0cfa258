"""The run of a shim that is not a child of this daemon; it is followed by its files."""

from collections.abc import Callable
from contextlib import suppress

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall

from pulsar_api.execution.followed_run import INTERVAL, FollowedRun
from pulsar_api.execution.task_files import BEGUN, LOCK, NOTHING
from pulsar_api.files import Damaged
from pulsar_api.tasks.model import Exit


@define(eq=False)
class AdoptedRun(FollowedRun):
    """Follows a shim that another daemon has started, by looking at its files."""

    _is_valid: Callable[[], bool] = lambda: True
    """Returns whether the start permit is unused, of this boot and of this very folder."""
    _is_here: Callable[[], bool] = lambda: True
    """Returns whether the permit, used or not, is of this boot and folder.

    Only then do the process numbers in the folder mean the same processes.
    """
    _seen: int = field(default=0, init=False)
    _killed: bool = field(default=False, init=False)
    _look: IDelayedCall = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.watch()
        # What is on disk is reported before anybody can ask for it.
        with suppress(OSError):
            self._report_records()
        self._look = self._clock.callLater(0, self._check)

    def kill(self) -> None:
        """Ask the shim to end the process tree, again and again until it has ended."""
        self._killed = True
        self._watchdog.kill()
        self._machine.terminate(self._folder)

    def detach(self) -> None:
        """Stop looking."""
        super().detach()
        if self._look.active():
            self._look.cancel()

    def _check(self) -> None:
        if self._ending:
            return
        try:
            self._look_at_it()
        except OSError as e:
            self.cannot_read(e)
            self._look_later()

    def _look_later(self) -> None:
        self._look = self._clock.callLater(INTERVAL, self._check)

    def _look_at_it(self) -> None:
        # In this order: a shim that is dead now has written its result before.
        lock = self._folder / LOCK
        try:
            begun, lives = True, self._machine.holder(lock) != 0
        except Damaged:  # a task has damaged it, so a shim has begun
            begun, lives = True, False
        except NOTHING:
            begun = lives = False
        exit = self.result()
        # A damaged output changes nothing about the end.
        with suppress(NotADirectoryError, Damaged):
            self._report_records()
        if exit is not None and not (exit.lost and lives):
            self.conclude(exit, numbers=self._is_here())
        elif lives:
            if self._killed:
                self._machine.terminate(self._folder)
            self._look_later()
        elif begun:
            why = "The process that watched the command is gone and left no result."
            self.lost(why, numbers=self._is_here())
        elif self._is_valid() and not BEGUN & set(self._machine.names(self._folder)):
            error = "The daemon ended before the command was started."
            self._tell_end(Exit(error=error, unstarted=True))
        else:
            # From here on no shim can begin, even if one is started late.
            with suppress(*NOTHING):
                if not self._machine.claim(lock):
                    self._look_later()
                    return
            why = (
                "The daemon ended when the command was about to start, and nothing proves "
                "that it did not: the machine has booted since, or the files of the task "
                "are not those of then."
            )
            self.lost(why, numbers=False)

    def _report_records(self) -> None:
        for number, record in self._machine.output(self._folder).news(self._seen):
            self._seen = number + 1
            self._read(record)
