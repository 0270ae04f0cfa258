"""Compares the notes of tasks with the answers that clients got.

Each task notes in a file outside of the daemon's state that it began, which processes it
made, and how it ended. A `Witness` compares every answer of the daemon with the answers
before it, and in the end with that file.
"""

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from tests.integration.daemon import Answer, Daemon
from tests.integration.machine import alive

ENDED = frozenset({"finished", "failed", "killed", "lost"})
APP = "site"
NEVER = "accepted, never started, failed"
TICKS = 0.2
"""Seconds between two lines of a `server`."""

# The shell itself writes each line in one call, so that no write can come before the first.
# The file need not be synced: only the disk of the daemon loses its power.
_SCRIPT = r"""#!/bin/sh
born() {
  read -r stat < /proc/$1/stat && set -- ${stat##*) } && born=${20} state=$1
} 2>/dev/null
say() { echo "$*" >> "@ledger@"; }
mark=$PULSAR_VAR_mark
born $$
case $1 in
'') say S "$mark" "$PULSAR_TASK_ID" $$ "$born" $PPID ;;
*) say C "$mark" $$ "$born" ;;
esac
case $1 in
child) exec sleep "$2" ;;
bare) exec env -i sleep "$2" ;;
server) i=0; while [ $i -lt "$2" ]; do echo "tick $i"; i=$((i+1)); sleep @ticks@; done
  say D "$mark"; exit ;;
esac
place=@folder@/target-$PULSAR_APP-$PULSAR_ENV
if [ -n "$PULSAR_VAR_alone" ]; then
  mine=$born
  if read -r other was 2>/dev/null < "$place" && born "$other" && [ "$born" = "$was" ]
  then [ "$state" = Z ] || say O "$mark" "$other"; fi
  echo "$$ $mine" > "$place"
fi
if [ -n "$PULSAR_VAR_sealed" ]; then
  [ "$PULSAR_VAR_token" = "token-of-$mark" ] || say X "$mark"
  echo "sealed $PULSAR_VAR_token"
fi
case $PULSAR_VAR_kind in
print) i=0; while [ $i -lt "$PULSAR_VAR_lines" ]; do
  echo "$mark $i"; i=$((i+1)); [ $((i % 40)) = 0 ] && sleep 0.05; done ;;
flood) yes "$mark" | head -n "$PULSAR_VAR_lines" ;;
deaf) trap '' TERM ;;
child) "$0" child "$PULSAR_VAR_more" & ;;
server) "$0" server "$PULSAR_VAR_lines" & ;;
bare) setsid "$0" bare "$PULSAR_VAR_more" & ;;
freeze) kill -STOP $PPID ;;
gate) until [ -e @folder@/gate ]; do sleep 0.05; done ;;
esac
sleep "$PULSAR_VAR_seconds"
say E "$mark" "$PULSAR_VAR_code"
exit "$PULSAR_VAR_code"
"""


@frozen
class Wish:
    """A task to ask for. ``mark`` identifies it, whatever number it gets."""

    mark: str
    env: str
    kind: str = "sleep"
    seconds: float = 0.0
    code: int = 0
    lines: int = 100
    more: float = 5.0
    """Seconds for which a process that the task leaves goes on."""
    keyed: bool = True
    sealed: bool = False
    """Whether the task has a secret variable, which it needs."""
    alone: bool = True
    """Whether the task expects that no other runs on its target."""

    @property
    def body(self) -> str:
        """Return the body of the POST."""
        variables = {
            "mark": self.mark,
            "kind": self.kind,
            "seconds": f"{self.seconds:.3f}",
            "code": self.code,
            "lines": self.lines,
            "more": f"{self.more:.3f}",
            "sealed": "yes" if self.sealed else "",
            "alone": "yes" if self.alone else "",
        }
        if self.sealed:
            variables["token"] = f"token-of-{self.mark}"
        return json.dumps({"action": "run", "variables": variables})

    def prints(self) -> str:
        """Return the whole output of the task if it comes to its end."""
        begin = "sealed ***\n" if self.sealed else ""
        if self.kind == "print":
            return begin + "".join(f"{self.mark} {n}\n" for n in range(self.lines))
        if self.kind == "flood":
            return begin + f"{self.mark}\n" * self.lines
        return begin

    def may_print(self, text: str) -> bool:
        """Return whether a text can be the beginning of the output."""
        whole = self.prints()
        if self.kind == "server":
            whole += "".join(f"tick {n}\n" for n in range(self.lines))
        return whole.startswith(text)


@define
class Entry:
    """The notes of one task in the file."""

    starts: list[tuple[int, int, int, int]] = field(factory=list)
    """Number of the task, process number, its time of start, and its parent."""
    children: list[tuple[int, int]] = field(factory=list)
    ends: list[int] = field(factory=list)
    shared: int = 0
    """How often a process of another task lived on the same target at its start."""
    unsealed: int = 0
    """How often the secret had a wrong value."""
    done: bool = False
    """Whether the process that the task left has come to its own end."""

    @property
    def living(self) -> list[int]:
        """Return the living processes of the task."""
        mine = [(pid, born) for _, pid, born, _ in self.starts] + self.children
        return [pid for pid, born in mine if alive(pid, born)]

    @property
    def runs(self) -> bool:
        """Return whether the first process of the task lives."""
        return any(alive(pid, born) for _, pid, born, _ in self.starts)


class Ledger:
    """The file with the notes of the tasks, and the command that writes them."""

    def __init__(self, folder: Path) -> None:
        self.gate = folder / "gate"
        """Tasks of the kind ``gate`` go on as soon as this file exists."""
        self.path = folder / "ledger"
        self.path.touch()
        self.command = folder / "task"
        script = _SCRIPT.replace("@ledger@", str(self.path)).replace("@ticks@", str(TICKS))
        self.command.write_text(script.replace("@folder@", str(folder)))
        self.command.chmod(0o755)
        self._entries: defaultdict[str, Entry] = defaultdict(Entry)
        self._read = 0
        self._lock = threading.Lock()

    def entry(self, mark: str) -> Entry:
        """Return the notes of a task."""
        with self._lock:
            self._news()
            return self._entries[mark]

    def entries(self) -> dict[str, Entry]:
        """Return the notes of all tasks, by their marks."""
        with self._lock:
            self._news()
            return dict(self._entries)

    def running(self) -> dict[str, Entry]:
        """Return the tasks whose first process lives and has not come to its end."""
        found = self.entries().items()
        return {m: e for m, e in found if e.starts and not e.ends and e.runs}

    def _news(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            what, mark, *rest = line.split(" ")
            entry = self._entries[mark]
            if what == "S":
                number, pid, born, parent = map(int, rest)
                entry.starts.append((number, pid, born, parent))
            elif what == "C":
                entry.children.append((int(rest[0]), int(rest[1])))
            elif what == "E":
                entry.ends.append(int(rest[0]))
            entry.shared += what == "O"
            entry.unsealed += what == "X"
            entry.done |= what == "D"


class Witness:
    """Records what clients were told, and notes contradictions."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.wishes: dict[str, Wish] = {}
        self.accepted: dict[int, str] = {}
        """The mark of each task whose number a client was told."""
        self.told: dict[int, dict[str, Any]] = {}
        """Each task in the answer with the highest version."""
        self.kills: dict[int, float] = {}
        """When a kill was first answered, or 0 until then."""
        self.violations: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.unknown: dict[str, str] = {}
        """Processes of killed shims that nothing identifies as those of a task.

        Such a process has no environment and a session of its own, made since its shim last
        looked at it. See "What a killed shim may leave" in ``docs/faults.rst``.
        """
        self.ending: list[int] = []
        """Tasks whose end a client has just been told for the first time."""
        self._lock = threading.Lock()

    def violation(self, what: str, whose: str, text: str) -> None:
        """Note a broken promise, once for each task."""
        with self._lock:
            self.violations[what].setdefault(whose, text)

    def accept(self, wish: Wish, number: int) -> None:
        """Note that a client was told the number of a task."""
        with self._lock:
            before = self.accepted.setdefault(number, wish.mark)
            others = [n for n, mark in self.accepted.items() if mark == wish.mark]
        if before != wish.mark:
            text = f"{number} was the number of {before}"
            self.violation("a number used twice", wish.mark, text)
        if len(others) > 1:
            self.violation("a key with two tasks", wish.mark, f"{others}")

    def known(self, number: int) -> dict[str, Any] | None:
        """Return what clients know of a task before a request that is about to be sent."""
        with self._lock:
            return self.told.get(number)

    def saw(self, task: dict[str, Any], known: dict[str, Any] | None) -> None:
        """Compare an answer with what clients knew when the request was sent."""
        number, status = task["id"], task["status"]
        mark = task["variables"]["mark"]
        if known is not None:
            self._compare(mark, task, known)
        with self._lock:
            before = self.told.get(number)
            if before is None or before["version"] <= task["version"]:
                self.told[number] = task
            if status in ENDED and (before is None or before["status"] not in ENDED):
                self.ending.append(number)

    def _compare(self, mark: str, task: dict[str, Any], known: dict[str, Any]) -> None:
        was, now = known["status"], task["status"]
        if task["version"] < known["version"]:
            text = f"{known['version']} {was} -> {task['version']} {now}"
            self.violation("a version fell", mark, text)
        if known["variables"]["mark"] != mark:
            text = f"{task['id']} was {known['variables']['mark']}"
            self.violation("a number used twice", mark, text)
        if was == "running" and now == "created":
            self.violation("running became created", mark, _shown(known, task))
        if was in ENDED and any(known[k] != task[k] for k in ("status", "exitCode")):
            self.violation("an end changed", mark, _shown(known, task))
        texts = known.get("output"), task.get("output")
        if was in ENDED and None not in texts and texts[0] != texts[1]:
            sizes = [len(text or "") for text in texts]
            self.violation("the output of an ended task changed", mark, f"{sizes}")

    def judge(self, task: dict[str, Any], hurt: Collection[str] | None) -> None:
        """Compare the end of a task with its own notes.

        ``hurt`` holds the marks of tasks whose shim was ended. None stands for every task.
        """
        mark = task["variables"]["mark"]
        entry, wish = self.ledger.entry(mark), self.wishes[mark]
        self.survivors(task)
        for what, text in _untrue(task, entry, wish):
            if what == NEVER and task["id"] not in self.accepted:
                continue  # no client knows of it
            self.violation(what, mark, f"{text}: {_shown(task)}, {entry}")
        may_be_lost = hurt is None or mark in hurt
        if task["status"] == "lost" and entry.ends and not may_be_lost:
            text = f"it ended, and its shim was let alone: {_shown(task)}, {entry}"
            self.violation("an end that is not true", mark, text)
        if task["status"] == "killed" and task["id"] not in self.kills and not may_be_lost:
            text = f"nobody asked for it: {_shown(task)}"
            self.violation("an end that is not true", mark, text)

    def survivors(self, task: Mapping[str, Any]) -> None:
        """Look for processes of an ended task that its record does not list as running."""
        mark = task["variables"]["mark"]
        left = [*(task.get("stillRunning") or ()), *(task.get("heldBy") or ())]
        named = {process["pid"] for process in left}
        found = [pid for pid in self.ledger.entry(mark).living if pid not in named]
        if task["status"] in ENDED and found:
            kind = self.wishes[mark].kind
            text = f"{found} of a {kind}: {task['status']} {task['reason'] or ''}"
            if kind == "bare" and task["status"] == "lost":
                self.unknown[mark] = text
            else:
                self.violation("a process of an ended task", mark, text)


def _untrue(task: Mapping[str, Any], entry: Entry, wish: Wish) -> Iterator[tuple[str, str]]:
    status, code = task["status"], task["exitCode"]
    untrue = "an end that is not true"
    mine = [number for number, *_ in entry.starts if number == task["id"]]
    if len(entry.starts) > 1:
        yield "a double start", f"{len(entry.starts)} starts"
    if entry.shared:
        yield "a target shared", f"with {entry.shared} others"
    if entry.unsealed:
        yield "a secret that is wrong", "in its environment"
    if mine and task["startedAt"] is None:
        yield untrue, "it began, and startedAt is null"
    if status not in ENDED:
        yield "a task that never ended", status
    elif status in {"finished", "failed"} and code is not None:
        if not mine or entry.ends[-1:] != [code] or code != wish.code:
            yield untrue, f"it ends with {wish.code}"
        if (status == "finished") != (code == 0):
            yield untrue, "status and exit code differ"
    elif status in {"finished", "failed"} and not mine:
        yield NEVER, task["reason"] or ""
    elif status in {"finished", "failed"}:
        yield untrue, "it has no exit code"
    text = task.get("output")
    if text is None:
        return
    if status in ENDED and len(text) != task["outputSize"]:
        yield "a size that is wrong", f"{task['outputSize']} for {len(text)} bytes"
    if status == "lost":
        # After a power cut a file can end in zeros: its size was safe, its last block not.
        text = text.rstrip("\0")
    if not wish.may_print(text):
        yield "an output that is wrong", f"{len(text)} bytes"
    elif status == "finished" and len(text) < len(wish.prints()):
        yield "an output that is not whole", f"{len(text)} of {len(wish.prints())} bytes"


def _shown(*tasks: Mapping[str, Any]) -> str:
    names = ("id", "status", "exitCode", "version", "reason", "startedAt")
    return " -> ".join(" ".join(f"{name}={t[name]}" for name in names) for t in tasks)


@frozen
class Client:
    """A client of a daemon that can be away at any moment. The witness sees each answer."""

    daemon: Daemon
    witness: Witness
    timeout: float = 10.0

    def ask(
        self,
        method: str,
        path: str,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer | None:
        """Return the answer, or None if none came."""
        connection = self.daemon.connect(self.timeout)
        try:
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()

    def post(self, wish: Wish) -> int | None:
        """Ask once for a task. Return its number, or None if it was not accepted."""
        self.witness.wishes[wish.mark] = wish
        headers = {"Content-Type": "application/json"}
        if wish.keyed:
            headers["Idempotency-Key"] = wish.mark
        answer = self.ask("POST", f"/{APP}/{wish.env}", wish.body, headers)
        if answer is None or answer.status in {409, 503, 507}:
            return None
        if answer.status != 200:
            text = f"{answer.status} {answer.body[:300]!r}"
            self.witness.violation("a wrong answer", wish.mark, text)
            return None
        number: int = answer.json()["taskId"]
        self.witness.accept(wish, number)
        return number

    def look(self, number: int, path: str = "") -> dict[str, Any] | None:
        """Return a task, or None without an answer or after a poll without a change."""
        known = self.witness.known(number)
        answer = self.ask("GET", f"/task/{number}{path}")
        return self._heard(answer, number, known)

    def kill(self, number: int) -> bool:
        """Ask once for a kill. Return whether it was answered."""
        with suppress(KeyError):
            if self.witness.told[number]["status"] in ENDED:
                return True
        self.witness.kills.setdefault(number, 0.0)
        known = self.witness.known(number)
        answer = self.ask("POST", f"/task/{number}/kill?output=none")
        if self._heard(answer, number, known, whole=False) is None:
            return False
        self.witness.kills[number] = self.witness.kills[number] or time.monotonic()
        return True

    def _heard(
        self,
        answer: Answer | None,
        number: int,
        known: dict[str, Any] | None,
        *,
        whole: bool = True,
    ) -> dict[str, Any] | None:
        if answer is None or answer.status == 503:
            return None
        if answer.status != 200:
            text = f"{answer.status} {answer.body[:300]!r}"
            self.witness.violation("a wrong answer", f"task {number}", text)
            return None
        try:
            value = answer.json()
        except ValueError:
            return None  # cut off by the end of the daemon
        task: dict[str, Any] | None = value.get("task") if "changed" in value else value
        if task is None:
            return None
        if not whole or task.get("outputOffset"):
            task.pop("output", None)
        self.witness.saw(task, known)
        return task

    def tasks(self) -> dict[int, dict[str, Any]] | None:
        """Return all tasks by number, without output, or None if the daemon is away."""
        found: dict[int, dict[str, Any]] = {}
        path = "/tasks?limit=1000&output=none"
        while True:
            known = dict(self.witness.told)
            answer = self.ask("GET", path + (f"&before={min(found)}" if found else ""))
            if answer is None or answer.status != 200:
                return None
            page = answer.json()["tasks"]
            for number, task in page.items():
                del task["output"]
                self.witness.saw(task, known.get(int(number)))
                found[int(number)] = task
            if len(page) < 1000:
                return found

    def judge(
        self, numbers: Iterable[int], hurt: Collection[str] | None
    ) -> list[dict[str, Any]]:
        """Judge the given tasks, which must be all tasks, and return them."""
        witness = self.witness
        found = []
        for number in numbers:
            task = self.look(number)
            if task is None:
                witness.violation("a wrong answer", f"task {number}", "none")
                continue
            found.append(task)
            witness.judge(task, hurt)
        marks = Counter(task["variables"]["mark"] for task in found)
        for mark, count in marks.items():
            if count > 1:
                witness.violation("a key with two tasks", mark, f"{count} tasks")
        for number, mark in witness.accepted.items():
            if mark not in marks:
                text = f"{number}: {witness.told.get(number)}"
                witness.violation("a task that is gone", mark, text)
        return found
