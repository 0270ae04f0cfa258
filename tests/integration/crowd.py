"""Clients of a daemon under attack: the tasks they create, and how they follow them."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPException, HTTPResponse
from typing import Any

from attrs import define, field, frozen

from tests.integration.witness import ENDED, Client, Wish


@define(eq=False)
class Wishing:
    """The tasks that clients ask for, one after the other."""

    chance: random.Random
    count: int = 0
    lock: threading.Lock = field(factory=threading.Lock)

    def next(self) -> Wish:
        """Return the next task to ask for."""
        with self.lock:
            self.count += 1
            chance = self.chance
            kind = chance.choices(
                ("sleep", "print", "flood", "deaf", "child", "server", "bare", "freeze"),
                (30, 20, 10, 6, 8, 8, 8, 3),
            )[0]
            usual = chance.choice((0.0, chance.uniform(0, 1), chance.uniform(1, 4)))
            # Some targets have a queue, most are free.
            busy = chance.random() < 0.3
            return Wish(
                f"c{self.count}",
                f"t{chance.randint(0, 1) if busy else chance.randint(2, 14)}",
                kind,
                seconds=30.0 if kind in {"deaf", "freeze"} else usual,
                code=chance.choice((0, 0, 0, 3)),
                lines={"print": 200, "flood": 40_000, "server": 15}.get(kind, 0),
                more=chance.uniform(1, 15),
                keyed=chance.random() < 0.75,
                sealed=chance.random() < 0.3,
            )


@frozen
class Follower:
    """Follow one task after the other, and check that no output is lost or repeated."""

    client: Client
    chance: random.Random
    over: threading.Event
    events: bool
    """Whether to use server-sent events instead of long-polls."""

    def run(self) -> None:
        """Follow tasks until the run is over."""
        witness = self.client.witness
        how = self.by_events if self.events else self.by_polls
        while not self.over.wait(0.05):
            newest = sorted(witness.accepted)[-20:]
            if not newest:
                continue
            number = self.chance.choice(newest)
            text = how(number)
            task = self.client.look(number)
            if text is not None and task is not None and task["output"] != text:
                mark = witness.accepted[number]
                said = f"{len(text)} bytes, {len(task['output'])} at the end: {how}"
                witness.violation("a follower that missed something", mark, said)

    def by_polls(self, number: int) -> str | None:
        """Return all output, read by long-polls, or None if the run is over first."""
        text, version = "", 0
        while not self.over.is_set():
            path = f"/output?since={version}&offset={len(text)}"
            known = self.client.witness.known(number)
            answer = self.client.ask("GET", f"/task/{number}{path}")
            if answer is None or answer.status != 200:
                self.over.wait(0.1)
                continue
            value = _read(answer.body)
            if not value.get("changed"):
                continue
            task: dict[str, Any] = value["task"]
            if task.get("outputOffset", 0) != len(text):
                mark = task["variables"]["mark"]
                said = f"at {task.get('outputOffset')} and not at {len(text)}"
                self.client.witness.violation("an offset that is wrong", mark, said)
                return None
            text += str(task.pop("output"))
            version = task["version"]
            self.client.witness.saw(task, known)
            if task["status"] in ENDED:
                return text
        return None

    def by_events(self, number: int) -> str | None:
        """Return all output, read as events and resumed after each break."""
        text, cursor = "", ""
        while not self.over.is_set():
            connection = self.client.daemon.connect(self.client.timeout)
            headers = {"Last-Event-ID": cursor} if cursor else {}
            with closing(connection), suppress(OSError, HTTPException):
                connection.request("GET", f"/task/{number}/events", headers=headers)
                response = connection.getresponse()
                if response.status == 204:
                    return text
                for kind, place, value in _events(response):
                    if kind == "output" and value["offset"] != len(text):
                        mark = self.client.witness.accepted[number]
                        said = f"at {value['offset']} and not at {len(text)}"
                        what = "an event that is lost, or came twice"
                        self.client.witness.violation(what, mark, said)
                        return None
                    text += value["text"] if kind == "output" else ""
                    cursor = place
                    if kind == "end":
                        return text
            self.over.wait(0.1)
        return None


def _events(response: HTTPResponse) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield kind, id and value of each complete event."""
    kind = place = ""
    while response.status == 200 and (line := response.readline()).endswith(b"\n"):
        name, _, rest = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = rest
        elif name == "id":
            place = rest
        elif name == "data":
            yield kind, place, json.loads(rest)


def _read(body: bytes) -> dict[str, Any]:
    """Return the JSON value of a body, or an empty one if the body is cut."""
    with suppress(ValueError):
        value: dict[str, Any] = json.loads(body)
        return value
    return {}
