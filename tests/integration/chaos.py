"""Attack a daemon, its shims and its disk for half an hour, and look for broken promises.

    python -m tests.integration.chaos --minutes 30 --seed 1

Meanwhile clients create, follow and kill tasks. At the end it prints a table; the exit
status is 1 if a promise was broken. It needs root, see `machine`.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

from attrs import define, field

from tests.integration.crowd import Follower, Wishing
from tests.integration.daemon import Daemon
from tests.integration.machine import (
    STOP_LIMIT,
    Disk,
    alive,
    end_all,
    enter,
    rise,
    send,
    stat,
    terminate,
    within,
)
from tests.integration.witness import ENDED, Client, Ledger, Witness

OPTIONS = ("--kill-grace=1", "--max-running-per-target=1", "--poll-timeout=5")
FREE = 1500
"""Free inodes while no fault takes any."""
OPEN = 40
"""Limit of unfinished tasks, above which no client creates another."""
KILL_LIMIT = 90.0
"""Seconds in which a task must end after a kill was accepted, during any fault."""
LEFT = 120.0
"""Seconds in which every task must end after the last fault."""


@define(eq=False)
class Chaos:
    """One daemon, its clients, and the faults that hit it."""

    folder: Path
    seed: int
    seconds: float
    ledger: Ledger = field(init=False)
    witness: Witness = field(init=False)
    disk: Disk = field(init=False)
    daemon: Daemon = field(init=False)
    client: Client = field(init=False)
    faults: Counter[str] = field(factory=Counter)
    """How often each fault happened while a task ran."""
    idle: Counter[str] = field(factory=Counter)
    """How often each fault happened while no task ran."""
    recoveries: list[float] = field(factory=list)
    """Seconds until the daemon served again, one figure for each of its ends."""
    refusals: int = 0
    """Starts of the daemon that failed and were repeated."""
    hurt: set[str] = field(factory=set)
    """Marks of tasks whose shim a fault has ended."""
    frozen: dict[str, int] = field(factory=dict)
    """Shims that are stopped and that no thread continues, by the marks of their tasks."""
    quiet: threading.Event = field(factory=threading.Event)
    """Set when no fault may begin and no client may create a task any more."""
    over: threading.Event = field(factory=threading.Event)
    """Set when all threads must return."""
    wishing: Wishing = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.ledger = Ledger(self.folder)
        self.witness = Witness(self.ledger)
        # A task takes eight inodes, and two tasks can start in a second.
        inodes = 5000 + int(self.seconds * 30)
        self.disk = Disk(self.folder / "image", self.folder / "disk", 512, inodes)
        self.disk.mount()
        self.disk.ballast(FREE)
        command = ("--command", str(self.ledger.command))
        state = self.disk.at / "state"
        self.daemon = Daemon(self.folder, *command, *OPTIONS, state=state)
        self.client = Client(self.daemon, self.witness)
        self.wishing = Wishing(self.chance("wishes"))

    def chance(self, name: str) -> random.Random:
        """Return the random numbers of one thread, by the seed and its name."""
        return random.Random(f"{self.seed} {name}")

    def fault(self, name: str) -> None:
        """Count a fault that is about to happen."""
        (self.faults if self.ledger.running() else self.idle)[name] += 1

    def pause(self, seconds: float) -> bool:
        """Wait this long. Return False as soon as `quiet` is set."""
        return not self.quiet.wait(seconds)

    # -- the whole run

    def run(self) -> None:
        """Run all threads for the given time, then wait for the ends of all tasks."""
        jobs: list[Callable[[], None]] = [
            self.supervise,
            self.attack,
            self.attack_disk,
            self.kill,
            self.look_for_survivors,
            *(lambda n=n: self.create(n) for n in range(4)),
            *(self.follower(n).run for n in range(4)),
        ]
        threads = [threading.Thread(target=self.guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        self.quiet.wait(self.seconds)
        self.quiet.set()
        try:
            self.settle()
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def guarded(self, job: Callable[[], None]) -> None:
        """Run a thread, and record its exception, which would otherwise go unnoticed."""
        try:
            job()
        except BaseException as e:
            self.witness.violation("the test itself failed", str(job), repr(e))
            self.quiet.set()
            raise

    def supervise(self) -> None:
        """Start the daemon each time that it has ended, as systemd does."""
        while not self.over.is_set():
            if self.daemon.process.poll() is None:
                self.over.wait(0.02)
                continue
            began = time.monotonic()
            while not self.over.is_set():
                if not rise(self.daemon):
                    self.recoveries.append(time.monotonic() - began)
                    break
                self.refusals += 1
                self.over.wait(0.5)

    # -- clients

    def open(self) -> list[int]:
        """Return the accepted tasks whose end no client has seen yet."""
        told = self.witness.told
        accepted = list(self.witness.accepted)
        return [n for n in accepted if n not in told or told[n]["status"] not in ENDED]

    def create(self, number: int) -> None:
        """Create tasks: with a key, repeat until an answer comes; without one, try once."""
        chance = self.chance(f"client {number}")
        while self.pause(chance.uniform(0.1, 1.2)):
            if len(self.open()) > OPEN:
                continue
            wish = self.wishing.next()
            while self.client.post(wish) is None and wish.keyed and not self.over.is_set():
                time.sleep(chance.uniform(0.02, 0.3))

    def follower(self, number: int) -> Follower:
        """Return a client that follows tasks. Every second client uses events."""
        chance = self.chance(f"follower {number}")
        return Follower(self.client, chance, self.over, events=number % 2 == 0)

    def kill(self) -> None:
        """Kill a task now and then, and soon those that never end by themselves."""
        chance = self.chance("kills")
        begun: dict[int, float] = {}
        while self.pause(chance.uniform(0.2, 0.6)):
            now = time.monotonic()
            tasks = [n for n in self.open() if n not in self.witness.kills]
            for number in tasks:
                begun.setdefault(number, now)
                kind = self.witness.wishes[self.witness.accepted[number]].kind
                if kind in {"freeze", "deaf"} and now - begun[number] > 4:
                    self.killed(number)
            if tasks and chance.random() < 0.12:
                self.killed(chance.choice(tasks))
            for number, since in list(self.witness.kills.items()):
                if since and now - since > KILL_LIMIT and number in self.open():
                    # Perhaps no client has looked: a daemon that starts sends no news.
                    looked = self.client.look(number)
                    if looked is not None and number in self.open():
                        mark = self.witness.accepted[number]
                        told = self.witness.told[number]
                        how = f"{told['status']}, version {told['version']}"
                        text = f"after {now - since:.0f} s: {how}; {self.evidence(number)}"
                        self.witness.violation("a kill that is not done", mark, text)
                        self.thaw(mark)  # otherwise its target stays occupied

    def evidence(self, number: int) -> str:
        """Return the evidence about a task: its files, shim, and lines in the log."""
        folder = self.daemon.state / "tasks" / str(number)
        with suppress(OSError):
            files = {path.name: path.stat().st_size for path in folder.iterdir()}
            entry = self.ledger.entry(self.witness.accepted[number])
            shims = [f"{shim}: {stat(shim)}" for *_, shim in entry.starts]
            said = [
                line
                for line in self.daemon.log.read_text(errors="replace").splitlines()
                if re.search(rf"\b[Tt]asks? {number}\b", line)
            ]
            return f"{files}; shims {shims}; daemon {self.daemon.process.pid}; {said[-8:]}"
        return "its files cannot be read"

    def killed(self, number: int) -> None:
        """Send a kill until it is answered."""
        while not self.client.kill(number) and not self.over.is_set():
            time.sleep(0.1)

    def look_for_survivors(self) -> None:
        """Look for processes of each task as soon as the daemon reports its end."""
        while not self.over.is_set() or self.witness.ending:
            if not self.witness.ending:
                self.over.wait(0.02)
                continue
            number = self.witness.ending.pop(0)
            mark = self.witness.told[number]["variables"]["mark"]
            if not self.ledger.entry(mark).living:
                continue
            task = self.client.look(number, "?output=none")
            while task is None and not self.over.is_set():
                time.sleep(0.1)
                task = self.client.look(number, "?output=none")
            if task is not None:
                self.witness.survivors(task)

    # -- faults

    def attack(self) -> None:
        """Attack the daemon, the launcher and shims, each equally often."""
        chance = self.chance("attacks")
        numbers = (SIGKILL, SIGTERM, SIGSTOP)
        kinds = [(who, n) for who in ("daemon", "launcher", "shim") for n in numbers]
        bag: list[tuple[str, signal.Signals]] = []
        while self.pause(chance.uniform(0.2, 2.5)):
            if not bag:
                bag = chance.sample(kinds, len(kinds))
            who, number = bag.pop()
            within(3, lambda: bool(self.ledger.running()) or self.quiet.is_set())
            getattr(self, f"attack_{who}")(number, chance)

    def attack_daemon(self, number: signal.Signals, chance: random.Random) -> None:
        """Kill, stop or terminate the daemon."""
        process = self.daemon.process
        born = stat(process.pid)[2]
        if process.poll() is not None:
            return
        self.fault(f"daemon {number.name}")
        if number is SIGKILL:
            process.kill()
        elif number is SIGSTOP:
            process.send_signal(number)
            self.thaw_after(chance.uniform(0.3, 4), process.pid, born)
        elif not terminate(process):
            text = f"not {STOP_LIMIT:.0f} s after SIGTERM"
            self.witness.violation("a daemon that does not end", str(process.pid), text)

    def attack_launcher(self, number: signal.Signals, chance: random.Random) -> None:
        """Kill, stop or terminate the launcher, a child of the daemon that is no shim."""
        found = self.launchers()
        if not found:
            return
        pid, born = chance.choice(found)
        self.fault(f"launcher {number.name}")
        if send(pid, born, number) and number is SIGSTOP:
            self.thaw_after(chance.uniform(0.3, 4), pid, born)

    def launchers(self) -> list[tuple[int, int]]:
        """Return the children of the daemon that are no shims, and their times of start."""
        daemon = self.daemon.process.pid
        shims = {
            shim for entry in self.ledger.entries().values() for *_, shim in entry.starts
        }

        def children() -> set[tuple[int, int]]:
            pids = {int(name) for name in os.listdir("/proc") if name.isdigit()} - shims
            stats = {pid: stat(pid) for pid in pids if alive(pid)}
            return {(pid, born) for pid, (_, up, born) in stats.items() if up == daemon}

        def works_on_a_task(pid: int) -> bool:
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return True
            return b"/tasks/" in line

        found = {child for child in children() if not works_on_a_task(child[0])}
        time.sleep(0.5)  # by then a shim has recorded its task, or has ended
        return sorted(found & children())

    def attack_shim(self, number: signal.Signals, chance: random.Random) -> None:
        """Kill, stop or terminate the shim of a task that runs."""
        found = []
        for mark, entry in self.ledger.running().items():
            task, pid, _, shim = entry.starts[-1]
            if stat(pid)[1] == shim and mark not in self.frozen:
                found.append((mark, task, shim, stat(shim)[2]))
        if not found:
            return
        mark, task, shim, born = chance.choice(sorted(found))
        self.fault(f"shim {number.name}")
        if number is not SIGSTOP:
            self.hurt.add(mark)
            send(shim, born, number)
        elif chance.random() < 0.6:
            send(shim, born, number)
            self.thaw_after(chance.uniform(0.3, 4), shim, born)
        elif send(shim, born, number):
            # No thread continues it until a client kills the task.
            self.frozen[mark] = shim
            self.killed(task)

    def thaw_after(self, seconds: float, pid: int, born: int) -> None:
        """Continue a stopped process after some seconds."""
        self.quiet.wait(seconds)
        send(pid, born, SIGCONT)

    def thaw(self, mark: str) -> None:
        """Continue the stopped shim of a task."""
        for _, pid, born, shim in self.ledger.entry(mark).starts:
            if stat(pid)[1:] == (shim, born):  # its number can belong to another process
                send(shim, stat(shim)[2], SIGCONT)

    def attack_disk(self) -> None:
        """Take all space or all inodes for a while."""
        chance = self.chance("disk")
        while self.pause(chance.uniform(3, 20)):
            self.disk.lighten(FREE)
            within(3, lambda: bool(self.ledger.running()) or self.quiet.is_set())
            kind = chance.choice(("a full disk", "no inodes"))
            left = chance.randint(0, 4)
            self.fault(kind)
            if kind == "a full disk":
                self.disk.fill()
            else:
                self.disk.use_up(left)
            self.pause(20 if chance.random() < 0.1 else chance.uniform(0.5, 5))
            self.disk.free()

    # -- the end

    def settle(self) -> None:
        """Wait for the end of every task, then judge all of them."""
        until = time.monotonic() + LEFT
        while time.monotonic() < until and (left := self.unfinished()):
            for number, task in left.items():
                # Only a kill ends these tasks: they have stopped their shims themselves.
                if self.witness.wishes[task["variables"]["mark"]].kind == "freeze":
                    self.killed(number)
            time.sleep(0.2)
        for task in self.unfinished().values():
            mark = task["variables"]["mark"]
            self.witness.violation("a task that never ended", mark, f"{task}")
            self.thaw(mark)
        if self.unknown() > 1 + self.bare_lost() // 4:
            text = f"{self.unknown()} of {self.bare_lost()}"
            self.witness.violation("what killed shims have left", "bare", text)
        for task in self.client.judge(sorted(self.all_tasks()), self.hurt):
            mark = task["variables"]["mark"]
            if task["status"] == "finished" and self.witness.wishes[mark].kind == "server":
                self.come_to_its_end(mark)

    def come_to_its_end(self, mark: str) -> None:
        """Wait for the process that a task has left, and check that it ends by itself."""
        within(LEFT, lambda: not self.ledger.entry(mark).living)
        if not self.ledger.entry(mark).done:
            text = "it was ended, though nobody killed it"
            self.witness.violation("what a finished task left", mark, text)

    def unfinished(self) -> dict[int, dict[str, Any]]:
        """Return the tasks that have not ended."""
        return {n: t for n, t in self.all_tasks().items() if t["status"] not in ENDED}

    def all_tasks(self) -> dict[int, dict[str, Any]]:
        """Return all tasks, including those whose number no client was told."""
        until = time.monotonic() + LEFT
        while time.monotonic() < until:
            found = self.client.tasks()
            if found is not None:
                return found
            time.sleep(0.1)
        self.witness.violation("a wrong answer", "the list of tasks", "none")
        return {}

    def unknown(self) -> int:
        """Return how many tasks have left processes that nothing identifies as theirs."""
        return len(self.witness.unknown)

    def bare_lost(self) -> int:
        """Return how many tasks can have left some, as their shims were killed."""
        told, wishes = self.witness.told, self.witness.wishes
        return sum(
            wishes[mark].kind == "bare" and told[number]["status"] == "lost"
            for number, mark in self.witness.accepted.items()
            if number in told
        )

    def table(self) -> str:
        """Return the figures as a table."""
        told = self.witness.told
        states = Counter(told[n]["status"] for n in self.witness.accepted if n in told)
        kinds = Counter(self.witness.wishes[m].kind for m in self.witness.accepted.values())
        starts = [len(e.starts) for e in self.ledger.entries().values() if e.starts]
        longest = max(self.recoveries, default=0.0)
        rows: list[tuple[str, object]] = [
            ("tasks accepted", len(self.witness.accepted)),
            *((f"  {state}", count) for state, count in sorted(states.items())),
            ("starts", sum(starts)),
            ("tasks that started", len(starts)),
            *((f"  accepted: {kind}", count) for kind, count in sorted(kinds.items())),
            ("kills asked for", len(self.witness.kills)),
            ("faults while a task ran", sum(self.faults.values())),
            *((f"  {name}", count) for name, count in sorted(self.faults.items())),
            ("faults while none ran", sum(self.idle.values())),
            ("recoveries of the daemon", f"{len(self.recoveries)}, within {longest:.1f} s"),
            ("starts of the daemon that failed", self.refusals),
            (
                "left by a killed shim, and unknown",
                f"{self.unknown()} of {self.bare_lost()}",
            ),
            ("violations", sum(map(len, self.witness.violations.values()))),
        ]
        for what, whose in sorted(self.witness.violations.items()):
            rows.append((f"  {what}", len(whose)))
        if not any(name.startswith("launcher") for name in self.faults):
            rows.append(("  (there was no launcher)", ""))
        lines = [f"{name:<42} {value}" for name, value in rows]
        for what, whose in sorted(self.witness.violations.items()):
            lines.append(f"\n{what}:")
            lines += [f"  {mark}: {text[:2000]}" for mark, text in list(whose.items())[:5]]
        return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run for as long as the command line says. Return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="is kept, else one is made and removed")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        folder = chosen.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        chaos = Chaos(folder, chosen.seed, chosen.minutes * 60)
        chaos.run()
        end_all()
        chaos.daemon.process.wait()
        print(f"seed {chosen.seed}, {(time.monotonic() - began) / 60:.1f} minutes")
        print(chaos.table(), flush=True)
        chaos.disk.unmount()
        return int(bool(chaos.witness.violations))


if __name__ == "__main__":
    enter("tests.integration.chaos", sys.argv[1:])
    sys.exit(main(sys.argv[1:]))
