"""The commands that talk to a daemon."""

import argparse
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from pulsar_api.cli.console import LEFT, Console, ending, exit_status
from pulsar_api.cli.interrupts import Interrupts
from pulsar_api.client import Client, Task


@frozen
class Session:
    """Runs one command. Each method returns the exit status."""

    reactor: Any
    client: Client
    console: Console
    given: argparse.Namespace

    async def run(self) -> int:
        """Create a task and follow it."""
        given, console = self.given, self.console
        variables = dict(given.variable)
        task = await self.client.create(
            given.app, given.env, given.action, variables, key=given.idempotency_key
        )
        if given.detach:
            if console.as_json:
                console.value(task.data)
            else:
                console.write(f"{task.id}\n")
            return 0
        if not console.as_json:
            console.say(f"task {task.id}: {task.data['url']}")
        return await self._to_the_end(task.id)

    async def _to_the_end(self, task_id: int) -> int:
        interrupts = Interrupts(self.reactor, self.client, self.console, task_id)
        self.console.watch()
        try:
            task = await interrupts.unless(self._follow(task_id))
        finally:
            self.console.rest()
            interrupts.close()
        if task is None:
            self.console.say(
                f"task {task_id} goes on; follow it by pulsar-api log --follow {task_id}"
            )
            return LEFT
        if not self.console.as_json:
            self.console.say(ending(task))
        return exit_status(task)

    async def _follow(self, task_id: int) -> Task:
        task: Task | None = None
        async for event in self.client.events(task_id):
            if self.console.as_json:
                self.console.value({"event": event.kind, **event.data})
            elif event.kind == "output":
                self._piece(event.data)
            if event.kind == "end":
                task = Task(event.data)
        return await self.client.get(task_id) if task is None else task

    def _piece(self, data: Mapping[str, Any]) -> None:
        only = getattr(self.given, "stderr", False)
        if not only:
            self.console.write(data["text"], data["stream"])
        elif data["stream"] == "stderr":
            self.console.write(data["text"])

    async def tasks(self) -> int:
        """List tasks."""
        given = vars(self.given)
        names = ("app", "env", "status", "user", "limit")
        query = {name: given[name] for name in names if given[name] is not None}
        found = await self.client.tasks(**query)
        if self.console.as_json:
            for task in found:
                self.console.value(task.data)
        else:
            self.console.tasks(found)
        return 0

    async def show(self) -> int:
        """Show a task."""
        return self._print(await self.client.get(self.given.id))

    def _print(self, task: Task) -> int:
        if self.console.as_json:
            self.console.value(task.data)
        else:
            self.console.task(task)
        return 0

    async def log(self) -> int:
        """Show the output so far, or with --follow all of it until the task ends."""
        if self.given.follow:
            return await self._to_the_end(self.given.id)
        size = (await self.client.get(self.given.id)).data["outputSize"]
        if size == 0:
            return 0
        async for piece in self.client.follow(self.given.id):
            data = {"stream": piece.stream, "offset": piece.offset, "text": piece.text}
            if self.console.as_json:
                self.console.value({"event": "output", **data})
            else:
                self._piece(data)
            if piece.end >= size:
                break
        return 0

    async def wait(self) -> int:
        """Wait until a task ends."""
        interrupts = Interrupts(self.reactor, self.client, self.console, self.given.id)
        self.console.watch()
        try:
            task = await interrupts.unless(self.client.wait(self.given.id))
        finally:
            self.console.rest()
            interrupts.close()
        if task is None:
            return LEFT
        if self.console.as_json:
            self.console.value(task.data)
        else:
            self.console.say(ending(task))
        return exit_status(task)

    async def kill(self) -> int:
        """Kill a task and wait until it ends."""
        await self.client.kill(self.given.id)
        task = await self.client.wait(self.given.id)
        if self.console.as_json:
            self.console.value(task.data)
        else:
            self.console.say(ending(task))
        return 0

    async def free(self) -> int:
        """Free a target."""
        given = self.given
        freed = await self.client.free(given.app, given.env)
        target = f"{given.app}/{given.env}"
        if self.console.as_json:
            self.console.value({"app": given.app, "env": given.env, "freed": freed})
        elif freed:
            tasks = ", ".join(map(str, freed))
            self.console.say(f"{target} is free; it was held by task {tasks}")
        else:
            self.console.say(f"{target} was not held")
        return 0
