"""Makes a world from a seed: its set-up, its clients and its faults."""

from collections.abc import Sequence
from random import Random

from attrs import field, frozen

from pulsar_api.tasks.interfaces import Bounds, Keep
from pulsar_api.tasks.queue import Limits


@frozen
class Fault:
    """A fault at a step of the scheduler."""

    step: int
    kind: str
    seed: int


@frozen
class Plan:
    """One world. Equal plans make worlds that are equal in every step."""

    seed: int
    salt: int = 0
    """Selects another order of steps with the same clients and faults, for shrinking."""
    clients: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    steps: int = 0
    """The number of steps before all faults end."""
    limits: Limits = field(factory=lambda: Limits(Bounds(10)))
    preempt: float = 0.0
    """The probability that other actors run between two operations of a process."""
    drift: float = 0.0
    latency: float = 0.001
    drain: float = 0.0


KINDS: dict[str, int] = {
    "kill": 6,
    "kill_soon": 8,
    "stop": 4,
    "power": 6,
    "detach": 1,
    "shim_killed": 2,
    "shim_stopped": 2,
    "folder_removed": 2,
    "copied": 2,
    "moved": 2,
    "restored": 2,
    "lock_emptied": 1,
    "clock": 4,
    "store": 5,
    "full": 2,
    "inodes": 2,
    "asleep": 1,
    "crowd": 1,
    "choked": 2,
    "sick": 2,
    "rolled_back": 1,
}
"""The kinds of faults, and the weight of each. `faults` has a function for each."""


def make_plan(seed: int, only: Sequence[str] = ()) -> Plan:
    """Return the plan for a seed, limited to some kinds of faults if given."""
    rng = Random(seed)
    choice = rng.choice
    # Each world has only some kinds of faults, so that those combine more deeply.
    kinds = [kind for kind in only or KINDS if rng.random() < 0.5] or [*only, "kill"]
    weights = [KINDS[kind] for kind in kinds]
    steps = choice((100, 200, 400, 700))
    found = [
        Fault(rng.randrange(10, steps), kind, rng.getrandbits(32))
        for kind in rng.choices(kinds, weights, k=choice((0, 1, 2, 2, 3, 4, 6)))
    ]
    total, silence = choice(((0.0, 0.0), (30.0, 0.0), (0.0, 20.0), (60.0, 30.0)))
    limits = Limits(
        Bounds(choice((0.5, 2.0, 10.0)), total, silence),
        running=choice((1, 2, 4)),
        running_per_target=choice((0, 1, 1, 2)),
        queued=choice((2, 100)),
        keep=Keep(seconds=choice((0.0, 7 * 86400.0))),
    )
    return Plan(
        seed,
        clients=tuple(range(choice((1, 2, 2, 3, 4)))),
        faults=tuple(sorted(found, key=lambda fault: fault.step)),
        steps=steps,
        limits=limits,
        preempt=choice((0.0, 0.1, 0.3, 0.6)),
        drift=choice((0.0, 0.0, 0.02, 0.1)),
        latency=choice((0.0005, 0.005, 0.05)),
        drain=choice((0.0, 0.0, 3.0)),
    )
