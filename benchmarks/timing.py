"""Checks that the time of a response does not reveal how wrong a secret is.

``python -m benchmarks.timing`` prints Welch's t of many checks in random order. Above 4.5
an attacker could distinguish two kinds (the limit for cryptographic devices in ISO 17825).
"""

import argparse
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import (
    FILE,
    PREFIX,
    CredentialStore,
    Token,
    add_token,
    opened,
)
from pulsar_api.auth.providers.local import OwnTokens, Static

SECRET = PREFIX + "Zx3hQ0mWf5T-uR9bL1yKcA7vE_nD2gPjS8oXiN4tBqU"
KINDS = {
    "right": slice(0),
    "last character wrong": slice(-1, None),
    "first character wrong": slice(len(PREFIX), len(PREFIX) + 1),
    "all wrong": slice(len(PREFIX), None),
}
"""The positions that differ, at random: a fixed text would be recognisable by its place in
memory, whatever the code does."""
_CHARACTERS = string.ascii_letters + string.digits + "-_"
TRIM = 0.1
"""The slowest part is dropped, because other work of the machine caused it."""

Check = Callable[[str], Coroutine[Deferred[Any], Any, object]]


def welch(one: list[float], other: list[float]) -> float:
    """Return Welch's t of two samples."""
    variance = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
    return float((statistics.fmean(one) - statistics.fmean(other)) / variance**0.5)


def secret_of(kind: str) -> str:
    """Return a new secret that is right, or wrong in one of the ways."""
    others = random.choices(_CHARACTERS, k=len(SECRET))
    for place in range(len(SECRET))[KINDS[kind]]:
        while others[place] == SECRET[place]:
            others[place] = random.choice(_CHARACTERS)
    wrong = range(len(SECRET))[KINDS[kind]]
    return "".join(
        others[place] if place in wrong else SECRET[place] for place in range(len(SECRET))
    )


def trimmed(samples: list[float]) -> list[float]:
    """Return the samples without the slowest."""
    return sorted(samples)[: int(len(samples) * (1 - TRIM))]


async def measure(name: str, check: Check, rounds: int) -> None:
    """Time each kind of secret in random order, and print the values of t."""
    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    kinds = random.sample(list(KINDS) * rounds, len(KINDS) * rounds)
    # Made in advance, because making a secret affects the processor's caches.
    secrets = [secret_of(kind) for kind in kinds]
    times = []
    for secret in secrets:
        began = time.perf_counter_ns()
        await check(secret)
        times.append(float(time.perf_counter_ns() - began))
    for kind, taken in zip(kinds, times, strict=True):
        samples[kind].append(taken)
    right = trimmed(samples["right"])
    print(f"{name}: right {statistics.fmean(right) / 1000:.2f} us")
    for kind, found in samples.items():
        if kind != "right":
            mean = statistics.fmean(trimmed(found)) / 1000
            print(f"  {kind:22} {mean:8.2f} us   t = {welch(right, trimmed(found)):+.2f}")
    near, far = (trimmed(samples[k]) for k in ("last character wrong", "all wrong"))
    print(f"  near against far                     t = {welch(near, far):+.2f}")


async def _main(reactor: Any, rounds: int) -> None:
    static = Static("joe", SECRET)
    await measure(
        "static password", lambda s: static.identify(Credentials("joe", s)), rounds
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        now = time.time()
        with opened(path) as db:
            add_token(db, Token("ci", ("read",), ("*",), now), SECRET)
        store = CredentialStore(path, reactor.callFromThread)
        tokens = OwnTokens(
            store, lambda: now
        )  # the first use writes a note, so it is not timed
        await tokens.identify(Credentials("", SECRET))
        await measure(
            "own token", lambda s: tokens.identify(Credentials("", s)), rounds // 4
        )
        await store.close()


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser("python -m benchmarks.timing", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=20_000, help="checks of each kind [20000]"
    )
    given = parser.parse_args()
    react(lambda reactor: Deferred.fromCoroutine(_main(reactor, given.rounds)))


if __name__ == "__main__":
    main()
