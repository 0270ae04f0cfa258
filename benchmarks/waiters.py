"""A thousand clients wait for one task: the times of their responses, and their memory."""

import json
import os
from collections.abc import Callable

from attrs import define, field

from benchmarks.client import Crowd, request
from benchmarks.measure import Line, compare, in_turn
from benchmarks.place import Place, Server, create, program, served

WAITERS = 1000


@define
class Waiters:
    """A crowd of clients at one server, and the FIFO that makes a line appear there."""

    server: Server
    path: Callable[[], str]
    """The address of the next poll."""
    text: Callable[[bytes], str]
    """Returns the line in a response."""
    tap: int
    crowd: Crowd = field(init=False)
    memory: float = field(init=False)
    """KiB of the server's memory per client during its first wait."""
    last: list[float] = field(factory=list, init=False)

    def begin(self) -> None:
        """Connect all clients and let them wait."""
        self.server.rest()
        before = self.server.memory()
        self.crowd = Crowd.connect(self.server.port, WAITERS)
        self.crowd.send(request("GET", self.path()))
        self.server.rest()
        self.memory = (self.server.memory() - before) / WAITERS / 1024

    def wake(self) -> float:
        """Return the milliseconds to the first response, and note those to the last."""
        os.write(self.tap, b".")
        answers = list(self.crowd.answers())
        written = int(self.text(answers[0][1]))
        assert len({body for _, body in answers}) == 1
        self.last.append((answers[-1][0] - written) / 1e6)
        # The clients wait again, for the next round.
        self.crowd.send(request("GET", self.path()))
        self.server.rest()
        return (answers[0][0] - written) / 1e6


def run(place: Place, rounds: int) -> list[Line]:
    """Compare with a server that responds to a list of requests in sequence."""
    fifos = [place.fifo(name) for name in ("ours", "bare")]
    place.action("line", *program("line", str(fifos[0])))
    server = served(place.daemon())
    bare_server = place.bare("follow", *program("line", str(fifos[1])))
    connection = place.connect(server)
    number = create(connection, "line")
    taps = [place.tap(fifo) for fifo in fifos]

    def path() -> str:
        task = json.loads(connection.ask(request("GET", f"/task/{number}?output=none")))
        return f"/task/{number}/output?offset={task['outputSize']}"

    def text(body: bytes) -> str:
        line: str = json.loads(body)["task"]["output"]
        return line

    ours = Waiters(server, path, text, taps[0])
    bare = Waiters(bare_server, lambda: "/", bytes.decode, taps[1])
    sides = (ours, bare)
    for side in sides:
        side.begin()
    try:
        first = in_turn(2 * rounds, ours.wake, bare.wake)
    finally:
        for side in sides:
            side.crowd.close()
    what = f"{WAITERS:,} long-polls"
    return [
        compare(f"{what}, first answered", "ms", *first),
        compare(f"{what}, last answered", "ms", ours.last[1:], bare.last[1:]),
        compare(f"{what}, memory each", "KiB", [ours.memory], [bare.memory]),
    ]
