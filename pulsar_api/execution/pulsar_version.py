"""Finds out which version of Pulsar is installed, and chooses the commands for it."""

from typing import Any

from attrs import define, evolve, field
from twisted.internet.task import deferLater
from twisted.logger import Logger

from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import Busy, StoreUnavailable
from pulsar_api.execution import capture
from pulsar_api.execution.listings import Listings
from pulsar_api.tasks import presets
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.model import Command

_log = Logger()

_RETRY = 2.0  # seconds until the next attempt to run ``pulsar --version``


@define(eq=False)
class Pulsar:
    """Finds out once which version of Pulsar is installed, and has the commands for it."""

    _reactor: Any
    _listings: Listings
    _usual: Commands
    _found: Commands | None = None
    _known: Changes = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._known = Changes(self._reactor)

    async def find_out(self) -> None:
        """Run ``pulsar --version`` and choose the commands; retries until it has run."""
        version = self._usual.version()
        if version.account is None:
            answer = await capture.capture_output(self._reactor, self._reactor, version)
        else:
            answer = await self._version_below_a_shim(version)
        name = presets.preset_for(answer)
        said = answer.strip() or "nothing"
        _log.info("pulsar --version says {said}: using {name}", said=said, name=name)
        self._found = evolve(self._usual, template=presets.PRESETS[name])
        self._known.advance(1)

    async def _version_below_a_shim(self, version: Command) -> str:
        # Only a shim can run it under another account.
        while True:
            try:
                return await self._listings.capture_output(presets.DETECTED, version)
            except (StoreUnavailable, Busy) as e:
                _log.error("Cannot find out which pulsar is installed: {e}", e=e)
                await deferLater(self._reactor, _RETRY)

    async def commands(self) -> Commands:
        """Return the commands, as soon as the version is known."""
        while self._found is None:
            await self._known.after(0)
        return self._found
