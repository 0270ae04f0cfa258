"""Cut the power, boot, lose, damage or copy state, and count the starts of tasks.

    python -m tests.integration.power busy=50 idle=50 folder=50 boot=50 copy=20 --seed 1

prints a line of figures for each kind of trial, then the broken promises. The exit status
is 1 if a promise was broken. It needs root to mount a file system of its own, which no
other process sees (`machine`).
"""

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.integration.daemon import Daemon, wait_for
from tests.integration.machine import (
    STOP_LIMIT,
    Boot,
    Disk,
    end_all,
    enter,
    rise,
    send,
    stat,
    terminate,
)
from tests.integration.witness import ENDED, Client, Ledger, Wish, Witness

OPTIONS = ("--kill-grace=1", "--max-running-per-target=1", "--poll-timeout=5")
DAMAGE = ("removed", "empty", "zeros", "half", "garbage")
"""The ways in which a trial can damage a file."""
FILES = {"lock": "lock", "permit": "begun", "index": "output.idx", "exit": "exit"}
"""Files in the folder of a task, by their purpose."""
ORDERS = frozenset({"spec", "spec.tmp"})
"""The instructions for a shim. Without them a task that has not begun rightly fails."""
LEFT = 60.0
"""Seconds in which every task must end after a boot."""


@define
class Trials:
    """Repeated trials of one kind of damage, on one machine."""

    folder: Path
    chance: random.Random
    idle: float
    boot: Boot
    ledger: Ledger = field(init=False)
    witness: Witness = field(init=False)
    daemon: Daemon = field(init=False)
    client: Client = field(init=False)
    disk: Disk | None = None
    figures: Counter[str] = field(factory=Counter)
    """The sums over all trials of this kind."""
    wrong: dict[str, str] = field(factory=dict)
    """One example of each kind of violation."""
    _count: int = 0

    def __attrs_post_init__(self) -> None:
        self.ledger = Ledger(self.folder)
        self.witness = Witness(self.ledger)

    # -- the machine

    def mount(self) -> None:
        """Mount the disk in one of the modes in which ext4 can write."""
        assert self.disk is not None
        options = [f"commit={self.chance.choice((1, 5, 5, 60))}"]
        if self.chance.random() < 0.25:
            options.append("nodelalloc")
        self.disk.mount(*options)

    def begin(self, *, disk: bool) -> None:
        """Make a new state folder, on a disk of its own or not, and start a daemon."""
        state = self.folder / "state"
        if disk:
            # Space for the tasks of 50 trials, so that retention removes none.
            image, at = self.folder / "image", self.folder / "disk"
            self.disk = Disk(image, at, mib=256, inodes=65536)
            self.mount()
            state = self.disk.at / "state"
        command = ("--command", str(self.ledger.command))
        self.daemon = Daemon(self.folder, *command, *OPTIONS, state=state)
        self.client = Client(self.daemon, self.witness)

    def end(self) -> None:
        """Kill all processes and remove the state folder and its disk."""
        end_all()
        self.daemon.process.wait()
        if self.disk is not None:
            self.disk.unmount()
            self.disk = None
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def restart(self) -> bool:
        """Start the daemon again. Return whether it started."""
        why = rise(self.daemon)
        if why:
            self.witness.violation(
                "a daemon that does not start", self.daemon.log.name, why
            )
        return not why

    def stop(self, daemon: Daemon) -> None:
        """Stop a daemon as systemd does."""
        if not terminate(daemon.process):
            text = f"not {STOP_LIMIT:.0f} s after SIGTERM"
            self.witness.violation("a daemon that does not end", daemon.log.name, text)

    def new_trial(self) -> None:
        """Begin a trial with a witness that knows nothing of the trials before."""
        self.witness = Witness(self.ledger)
        self.client = Client(self.daemon, self.witness)

    # -- requests

    def wish(
        self, env: str, seconds: float, kind: str = "sleep", sealed: float = 0.3
    ) -> Wish:
        """Return another task to ask for. ``sealed`` is the chance that it has a secret."""
        self._count += 1
        chance = self.chance
        return Wish(
            f"n{self._count}",
            env,
            kind,
            seconds=seconds,
            code=chance.choice((0, 0, 3)),
            lines=chance.choice((50, 400)) if kind == "print" else 20_000,
            keyed=chance.random() < 0.7,
            sealed=chance.random() < sealed,
        )

    def posted(self, *wishes: Wish) -> list[int]:
        """Ask for tasks until each is accepted. Return their numbers."""
        return [wait_for(lambda w=w: self.client.post(w), "a POST") for w in wishes]  # type: ignore[misc]

    def told_running(self, number: int) -> None:
        """Wait until the daemon reports that a task runs."""

        def runs() -> bool:
            task = self.client.look(number)
            return task is not None and task["status"] != "created"

        wait_for(runs, "the start")

    # -- the result

    def settle(self) -> None:
        """Repeat the requests with a key, wait for all ends, and judge them."""
        self.ledger.gate.touch()
        for wish in list(self.witness.wishes.values()):
            # Until the answer, a client with a key does not know whether the task exists.
            if wish.keyed:
                wait_for(lambda w=wish: self.client.post(w), "the retry of a POST")  # type: ignore[misc]
        tasks = self.client.judge(self._ended(), None)
        for task in tasks:
            self.figures[task["status"]] += 1
            entry = self.ledger.entry(task["variables"]["mark"])
            self.figures["started"] += bool(entry.starts)
        self.figures["tasks"] += len(tasks)

    def _ended(self) -> list[int]:
        """Return the tasks of this trial when all have ended, or after `LEFT` seconds."""

        def asked() -> list[dict[int, dict[str, Any]]]:
            tasks = self.client.tasks()
            return [] if tasks is None else [tasks]

        until = time.monotonic() + LEFT
        while True:
            (tasks,) = wait_for(asked, "the list of tasks")
            wishes = self.witness.wishes
            mine = [n for n, t in tasks.items() if t["variables"]["mark"] in wishes]
            left = [n for n in mine if tasks[n]["status"] not in ENDED]
            if not left or time.monotonic() > until:
                return mine
            self.client.look(left[0], "/state?output=none&timeout=2")

    def conclude(self) -> None:
        """Add the violations of this trial to the figures of its kind."""
        told = self.witness.told.values()
        self.figures["told ended"] += sum(task["status"] in ENDED for task in told)
        for what, whose in self.witness.violations.items():
            self.figures[what] += len(whose)
            self.wrong.setdefault(what, "; ".join(f"{m}: {t}" for m, t in whose.items()))
        for entry in self.ledger.entries().values():
            for pid in entry.living:
                send(pid, stat(pid)[2], signal.SIGKILL)


# -- power


def _cut(trials: Trials) -> bool:
    """Cut the power, and boot. Return whether the boot id is still the same."""
    disk = trials.disk
    assert disk is not None
    disk.cut_power()
    end_all()
    trials.daemon.process.wait()
    disk.unmount()
    same = trials.chance.random() < 0.5
    if not same:
        trials.boot.renew()
    trials.mount()
    return same


def busy(trials: Trials) -> None:
    """Cut the power at a random moment among many POSTs and many ends."""
    chance, client = trials.chance, trials.client
    over = threading.Event()
    envs = [f"t{n}" for n in range(5)]
    kinds = ("sleep", "sleep", "print", "flood")
    # Made in advance, so that the order of the threads does not change the tasks.
    wishes = [
        trials.wish(chance.choice(envs), chance.uniform(0, 1.5), chance.choice(kinds))
        for _ in range(60)
    ]

    def posts(mine: Iterable[Wish], pauses: random.Random) -> None:
        for wish in mine:
            if over.is_set() or client.post(wish) is None:
                return
            over.wait(pauses.uniform(0, 0.3))

    def watches(picks: random.Random) -> None:
        while not over.is_set():
            with suppress(IndexError):
                client.look(picks.choice(list(trials.witness.accepted)))
            over.wait(0.01)

    threads = [
        threading.Thread(target=posts, args=(wishes[n::3], random.Random(chance.random())))
        for n in range(3)
    ]
    threads += [
        threading.Thread(target=watches, args=(random.Random(chance.random()),))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(chance.uniform(0, 3))  # a random moment
    same = _cut(trials)
    over.set()
    for thread in threads:
        thread.join()
    _after(trials, same=same)


def idle(trials: Trials) -> None:
    """Cut the power while one task runs and no other is written."""
    after = trials.chance.uniform(0, trials.idle)  # a random moment
    (number,) = trials.posted(trials.wish("t0", after + 3))
    trials.told_running(number)
    time.sleep(after)
    _after(trials, same=_cut(trials))


def _after(trials: Trials, *, same: bool) -> None:
    """Start the daemon after a cut, judge, and count double starts with an old boot id."""
    trials.figures["with the same boot id"] += same
    if trials.restart():
        trials.settle()
    else:
        trials.end()
        trials.begin(disk=True)
    doubles = trials.witness.violations.get("a double start", {})
    trials.figures["double with the same boot id"] += len(doubles) if same else 0


# -- lost files


def _some(trials: Trials, sealed: float = 0.3) -> list[int]:
    """Ask for three tasks: two run and one waits, or all are about to start."""
    numbers = trials.posted(*_gated(trials, sealed))
    if trials.chance.random() < 0.7:
        trials.told_running(numbers[0])
    time.sleep(trials.chance.choice((0, trials.chance.uniform(0, 0.5))))
    return numbers


def _gated(trials: Trials, sealed: float = 0.3) -> list[Wish]:
    """Return three tasks, most of which go on only after the daemon is back."""
    trials.ledger.gate.unlink(missing_ok=True)
    kinds = trials.chance.choices(("gate", "sleep"), (3, 1), k=3)
    return [
        trials.wish(env, trials.chance.uniform(0, 1), kind, sealed)
        for env, kind in zip(("t0", "t0", "t1"), kinds, strict=True)
    ]


def _end_some(trials: Trials) -> str:
    """End nothing, or the daemon, or also the shims, or also the tasks. Return which."""
    who = trials.chance.choice(("nobody", "daemon", "shims", "tasks"))
    if who != "nobody":
        trials.daemon.kill()
    for entry in trials.ledger.running().values():
        for _, pid, born, shim in entry.starts:
            # If the shim has ended, the task has another parent.
            if who in {"shims", "tasks"} and stat(pid)[1] == shim:
                send(shim, stat(shim)[2], signal.SIGKILL)
            if who == "tasks":
                send(pid, born, signal.SIGKILL)
    trials.figures[f"{who} ended before"] += 1
    return who


def _go_on(trials: Trials) -> None:
    if trials.daemon.process.poll() is None:
        if trials.chance.random() < 0.5:
            trials.daemon.kill()
        else:
            trials.stop(trials.daemon)
    if trials.restart():
        trials.settle()
    else:
        trials.end()
        trials.begin(disk=False)


def folder(trials: Trials) -> None:
    """Remove the folders of tasks."""
    numbers = _some(trials, sealed=0)  # a removed secret cannot be recovered
    _end_some(trials)
    for number in numbers:
        path = trials.daemon.state / "tasks" / str(number)
        trials.figures["removed"] += path.exists()
        shutil.rmtree(path, ignore_errors=True)
    _go_on(trials)


def tasks(trials: Trials) -> None:
    """Remove the folder of all tasks."""
    _some(trials, sealed=0)
    _end_some(trials)
    shutil.rmtree(trials.daemon.state / "tasks", ignore_errors=True)
    _go_on(trials)


def boot(trials: Trials) -> None:
    """Boot with all files unchanged."""
    _some(trials)
    end_all()
    trials.daemon.process.wait()
    trials.boot.renew()
    _go_on(trials)


def files(trials: Trials) -> None:
    """Remove some files of each task, but never its output."""
    numbers = _some(trials, sealed=0)
    _end_some(trials)
    for number in numbers:
        for path in sorted((trials.daemon.state / "tasks" / str(number)).glob("*")):
            kept = {"output", *ORDERS}
            if path.name not in kept and trials.chance.random() < 0.6:
                path.unlink(missing_ok=True)  # the shim can remove it first
                trials.figures[f"{path.name.partition('.')[0]} removed"] += 1
    _go_on(trials)


def rest(trials: Trials) -> None:
    """Remove all files of each task but its permit."""
    numbers = _some(trials, sealed=0)
    _end_some(trials)
    for number in numbers:
        for path in sorted((trials.daemon.state / "tasks" / str(number)).glob("*")):
            if path.name not in {"start", "begun", *ORDERS}:
                path.unlink(missing_ok=True)  # the shim can remove it first
    _go_on(trials)


def damaged(file: str, *hows: str) -> Callable[[Trials], None]:
    """Return a function that damages one file of each task, in one of the given ways."""

    def damage(trials: Trials) -> None:
        numbers = _some(trials)
        if file == "exit":
            trials.daemon.kill()  # otherwise it reads the file before the damage
            trials.ledger.gate.touch()
            wait_for(lambda: not trials.ledger.running(), "the end of what runs")
        else:
            _end_some(trials)
        for number in numbers:
            folder = trials.daemon.state / "tasks" / str(number)
            path = folder / FILES[file]
            if file == "permit" and not path.exists():
                path = folder / "start"  # no shim has begun
            if file == "exit" and (folder / "lock").exists():
                wait_for(path.exists, "the result")
            if path.exists():
                how = trials.chance.choice(hows)
                trials.figures[how] += 1
                _damage(path, how, trials.chance)
        _go_on(trials)

    return damage


def _damage(path: Path, how: str, chance: random.Random) -> None:
    """Damage a file in one of the ways of `DAMAGE`."""
    data = path.read_bytes()
    kept = {
        "empty": b"",
        "zeros": bytes(len(data)),
        "half": data[: len(data) // 2],
        "garbage": chance.randbytes(chance.randint(1, 200)),
    }
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(kept[how])


def copy(trials: Trials) -> None:
    """Start a second daemon on a copy of the state, beside the first or in its place."""
    trials.posted(*_gated(trials))
    time.sleep(trials.chance.uniform(0, 0.3))  # before, during or after their start
    other = trials.folder / "other"
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    state, first = other / "state", trials.daemon
    # A file can vanish while it is copied.
    subprocess.run(
        ["cp", "-a", str(first.state), str(state)], check=False, stderr=subprocess.DEVNULL
    )
    waiting = _waiting(state, other / "look")
    how = trials.chance.choice(("goes on", "is stopped", "is killed"))
    trials.figures[f"the first {how}"] += 1
    if how == "is stopped":
        trials.stop(first)
    elif how == "is killed":
        first.kill()
    try:
        second = Daemon(other, "--command", str(trials.ledger.command), *OPTIONS)
    except AssertionError:
        trials.figures["copies that were refused"] += 1
    else:
        trials.ledger.gate.touch()
        client = Client(second, Witness(trials.ledger))
        client.witness.wishes = trials.witness.wishes
        until = time.monotonic() + LEFT
        while time.monotonic() < until:
            found = (client.tasks() or {}).values()
            if all(task["status"] in ENDED for task in found):
                break
            time.sleep(0.1)
        trials.stop(second)
    if how == "goes on":
        trials.settle()
    else:
        _go_on(trials)
    doubles = trials.witness.violations.get("a double start", {})
    trials.figures["double, waiting at the copy"] += len(waiting & set(doubles))


def _waiting(state: Path, look: Path) -> set[str]:
    """Return the marks of the tasks that have not begun, read from a copy of the copy."""
    shutil.copytree(state, look)
    with suppress(sqlite3.Error), closing(sqlite3.connect(look / "pulsar-api.db")) as db:
        text = "SELECT json_extract(variables, '$.mark') FROM task WHERE status = 'created'"
        return {mark for (mark,) in db.execute(text)}
    return set()


KINDS: dict[str, Callable[[Trials], None]] = {
    "busy": busy,
    "idle": idle,
    "folder": folder,
    "tasks": tasks,
    "boot": boot,
    "copy": copy,
    "files": files,
    "rest": rest,
    **{file: damaged(file, *DAMAGE) for file in FILES},
}
ONE_WAY = {f"{file}-{how}": damaged(file, how) for file in FILES for how in DAMAGE}
"""Each combination of a file and a damage, to get separate figures for it."""
ON_DISK = frozenset({"busy", "idle"})


def main(arguments: list[str]) -> int:
    """Run the trials of the command line. Return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    wanted = f"KIND=N; a KIND is one of {', '.join(KINDS)}, or like lock-empty"
    parser.add_argument("trials", nargs="+", metavar="KIND=N", help=wanted)
    parser.add_argument("--seed", type=int, default=1)
    help = "seconds after which the power is cut at the latest while one task runs"
    parser.add_argument("--idle", type=float, default=25.0, help=help)
    parser.add_argument("--folder", type=Path, help="is kept, else one is made and removed")
    chosen = parser.parse_intermixed_args(arguments)
    # A power cut takes what forks the daemons, too.
    os.environ["PULSAR_ZYGOTE"] = "0"
    bad = False
    with tempfile.TemporaryDirectory() as made:
        folder = chosen.folder or Path(made)
        boot = Boot(folder)
        for text in chosen.trials:
            kind, _, times = text.partition("=")
            (folder / kind).mkdir(parents=True, exist_ok=True)
            chance = random.Random(f"{chosen.seed} {kind}")
            trials = Trials(folder / kind, chance, chosen.idle, boot)
            bad |= _try(trials, kind, int(times))
    return int(bad)


def _try(trials: Trials, kind: str, times: int) -> bool:
    """Run trials of one kind, and print the figures. Return whether a promise broke."""
    began = time.monotonic()
    trials.begin(disk=kind in ON_DISK)
    for _ in range(times):
        trials.new_trial()
        try:
            (KINDS | ONE_WAY)[kind](trials)
        except AssertionError as e:
            trials.witness.violation("what never came", trials.daemon.log.name, str(e))
        stuck = {"what never came", "a task that never ended"} & set(
            trials.witness.violations
        )
        trials.conclude()
        if stuck:  # so that the next trial does not suffer from it
            trials.end()
            trials.begin(disk=kind in ON_DISK)
    trials.end()
    doubles = trials.figures.pop("a double start", 0)
    figures = ", ".join(f"{n} {what}" for what, n in trials.figures.items() if n)
    seconds = time.monotonic() - began
    print(f"{kind}: {times} times, {doubles} double starts; {figures}; {seconds:.0f} s")
    for what, text in trials.wrong.items():
        print(f"    {what}: {text[:1000]}")
    sys.stdout.flush()
    return bool(trials.wrong)


if __name__ == "__main__":
    enter("tests.integration.power", sys.argv[1:])
    sys.exit(main(sys.argv[1:]))
