"""Runs simulated worlds: ``python -m tests.simulation --seeds 100000``."""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pool
from typing import Any

from attrs import evolve, frozen
from twisted.internet import defer
from twisted.python.failure import Failure

from pulsar_api.concurrency import background
from pulsar_api.execution import (
    executor,
    followed_run,
    permits,
    secret_files,
    shim_protocol,
)
from pulsar_api.tasks import retention, service
from tests.simulation.mutations import MUTATIONS
from tests.simulation.plan import KINDS, Plan, make_plan
from tests.simulation.scheduler import Died
from tests.simulation.world import Violation, World

LOGGERS = (
    background,
    executor,
    followed_run,
    permits,
    retention,
    secret_files,
    service,
    shim_protocol,
)
"""The modules of the core that log."""


class Quiet:
    """Replaces the core's logger. It keeps nothing, and turns failures into violations."""

    def __init__(self) -> None:
        self.world: World | None = None

    def info(self, text: str, **values: object) -> None:
        """Note the event for the trace."""
        world = self.world
        if world is not None and world.trace is not None:
            fiber = world.scheduler.current
            if getattr(fiber, "alive", False):
                world.log("  " + text, **values)

    error = warn = debug = info

    def failure(self, text: str, failure: Failure | None = None, **values: object) -> None:
        """Note a violation, unless it comes from a process that was killed."""
        found = failure or Failure()
        if self.world is not None and not found.check(Died, GeneratorExit):
            self.world.failure(text.format(**values), found)


@contextmanager
def quiet() -> Iterator[Quiet]:
    """Replace the core's loggers."""
    made = Quiet()
    before: list[tuple[Any, str, object]] = [
        (module, "_log", module._log) for module in LOGGERS
    ]
    before.append((defer, "log", defer.log))
    for module, name, _ in before:
        setattr(module, name, made)
    try:
        yield made
    finally:
        for module, name, old in before:
            setattr(module, name, old)


def run_plan(
    plan: Plan, without: str | None = None, trace: list[str] | None = None
) -> list[Violation]:
    """Run one world, and return the violations."""
    with quiet() as log:
        return _run(plan, log, without, trace)


def _run(
    plan: Plan, log: Quiet, without: str | None, trace: list[str] | None
) -> list[Violation]:
    world = log.world = World(plan, trace)
    try:
        if without is None:
            return world.run()
        with MUTATIONS[without]():
            return world.run()
    finally:
        log.world = None


@frozen
class Batch:
    """Seeds to run in sequence."""

    first: int
    number: int
    without: str | None = None
    only: Sequence[str] = ()


def run_batch(batch: Batch) -> list[tuple[int, list[Violation]]]:
    """Run some seeds, and return those with violations."""
    found = []
    gc.collect()
    gc.freeze()
    gc.disable()
    with quiet() as log:
        for seed in range(batch.first, batch.first + batch.number):
            violations = _run(make_plan(seed, batch.only), log, batch.without, None)
            if violations:
                found.append((seed, violations))
            if seed % 20 == 0:
                gc.collect()
    gc.enable()
    return found


def shrink(plan: Plan, without: str | None = None) -> Plan:
    """Return a smaller plan that violates the same invariant."""
    wanted = {violation.invariant for violation in run_plan(plan, without)}

    def fails(candidate: Plan) -> Plan | None:
        for salt in (candidate.salt, *range(20)):
            tried = evolve(candidate, salt=salt)
            found = run_plan(tried, without)
            if wanted & {violation.invariant for violation in found}:
                return tried
        return None

    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(plan):
            found = fails(candidate)
            if found is not None:
                plan, smaller = found, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    for at in range(len(plan.faults)):
        yield evolve(plan, faults=plan.faults[:at] + plan.faults[at + 1 :])
    for at in range(len(plan.clients)):
        if len(plan.clients) > 1:
            yield evolve(plan, clients=plan.clients[:at] + plan.clients[at + 1 :])
    if plan.preempt:
        yield evolve(plan, preempt=0.0)
    if plan.drift:
        yield evolve(plan, drift=0.0)
    if plan.drain:
        yield evolve(plan, drain=0.0)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="number of worlds [2000]")
    parser.add_argument("--first", type=int, default=0, help="the first seed [0]")
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    parser.add_argument("--without", choices=sorted(MUTATIONS), help="take this fix out")
    parser.add_argument(
        "--faults", nargs="+", default=(), choices=sorted(KINDS), help="only these kinds"
    )
    parser.add_argument("--seed", type=int, help="run only this seed")
    parser.add_argument("--trace", action="store_true", help="print its events")
    parser.add_argument("--shrink", action="store_true", help="shrink failing plans")
    parser.add_argument("--stop", action="store_true", help="stop at the first violation")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worlds that the command line selects, and return the exit status."""
    options = _options(arguments)
    if options.seed is not None:
        return _one(options)
    began = time.monotonic()
    step = min(500, max(1, options.seeds // options.jobs))
    last = options.first + options.seeds
    batches = [
        Batch(first, min(step, last - first), options.without, options.faults)
        for first in range(options.first, last, step)
    ]
    failed: list[tuple[int, list[Violation]]] = []
    done = 0
    with Pool(options.jobs) as pool:
        for batch, found in zip(batches, pool.imap(run_batch, batches), strict=True):
            done += batch.number
            failed += found
            for seed, violations in found:
                text = violations[0].text.partition("\n")[0]
                print(f"seed {seed}: {violations[0].invariant}: {text}", flush=True)
            if failed and options.stop:
                pool.terminate()
                break
    took = time.monotonic() - began
    print(f"{done} seeds in {took:.1f} s, {done / took:.0f} a second; {len(failed)} fail")
    return 1 if failed else 0


def _one(options: argparse.Namespace) -> int:
    plan = make_plan(options.seed, options.faults)
    if options.shrink:
        plan = shrink(plan, options.without)
        print(plan)
    trace: list[str] | None = [] if options.trace else None
    violations = run_plan(plan, options.without, trace)
    with suppress(BrokenPipeError):
        for line in trace or ():
            print(line)
        for violation in violations:
            print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
