"""The checks inside the virtual machine of ``python -m tests.vm``.

They run as root under Debian's own Python, so they import only the standard library. Each
check prints one line of JSON.
"""

import json
import os
import pwd
import re
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

Check = Callable[[], object]
"""Returns its findings as JSON, or raises `AssertionError`."""

URL = "http://127.0.0.1:8081"
UNIT = "pulsar-api.service"
DROP_INS = Path("/etc/systemd/system") / f"{UNIT}.d"
SETTINGS = Path("/etc/pulsar-api.toml")
RUN_AS_CONF = Path("/opt/vm/run-as.conf")
PATIENCE = 120.0
"""Seconds to wait for an event before the check fails."""

ACCOUNT = "deploy"
"""The account of tasks. It is part of the image."""

MIB = 1 << 20
MEMORY_MAX, CPU_QUOTA, TASKS_MAX = 64 * MIB, 0.2, 20
COMMAND = """command = "sh -c 'eval \\"$PULSAR_VAR_run\\"'"\n"""
TABLES = f"""
[[run-as]]
on = ["memory/*"]
user = "{ACCOUNT}"
memory-max = "{MEMORY_MAX // MIB}M"

[[run-as]]
on = ["cpu/*"]
user = "{ACCOUNT}"
cpu-quota = "{CPU_QUOTA:.0%}"

[[run-as]]
on = ["processes/*"]
user = "{ACCOUNT}"
tasks-max = {TASKS_MAX}

[[run-as]]
on = ["all/*"]
user = "{ACCOUNT}"
memory-max = "{MEMORY_MAX // MIB}M"
cpu-quota = "{CPU_QUOTA:.0%}"
tasks-max = {TASKS_MAX}

[[run-as]]
on = ["free/*"]
user = "{ACCOUNT}"
"""
PLAIN_TABLE = f'[[run-as]]\non = ["*"]\nuser = "{ACCOUNT}"\n'


def call(*command: str) -> str:
    """Run a program, and return its output without the last newline."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stderr}"
    return done.stdout.rstrip("\n")


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return the value of a condition as soon as it is true."""
    until = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < until, f"timed out waiting for {what}"
        time.sleep(0.2)  # each try costs the daemon time, too
    return value


def ask(path: str, body: Mapping[str, object] | None = None) -> Any:
    """Return the response to a GET, or to a POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return json.load(response)


def run(app: str, script: str) -> int:
    """Start a task that runs a shell script, and return its number."""
    body = {"action": "run", "variables": {"run": script}}
    number: int = ask(f"/{app}/live", body)["taskId"]
    return number


def running(app: str, script: str) -> int:
    """Start a task, wait for its first output, and return its number."""
    number = run(app, script)
    wait_for(lambda: ask(f"/task/{number}")["outputSize"], f"output of task {number}")
    return number


def python(source: str) -> str:
    """Return a shell script that runs a Python program in its own process."""
    assert "'" not in source
    return f"exec python3 -ISs -c '{source}'"


def ended(number: int) -> Any:
    """Wait for the end of a task, and return the task with its output."""

    def over() -> Any:
        answer = ask(f"/task/{number}/state")
        return answer.get("task")

    return wait_for(over, f"the end of task {number}")


def kill(numbers: Iterable[int]) -> None:
    """Kill tasks, and wait until their account has no processes."""
    for number in numbers:
        ask(f"/task/{number}/kill", {})
        task = ended(number)
        assert task["status"] == "killed", task
        assert not task["heldBy"], task
    wait_for(lambda: not processes(ACCOUNT), f"the end of all processes of {ACCOUNT}")


def processes(user: str) -> list[int]:
    """Return the living processes of a user."""
    uid = pwd.getpwnam(user).pw_uid
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (folder / "status").read_text()
            if f"\nUid:\t{uid}\t" in status and "\nState:\tZ" not in status:
                found.append(int(folder.name))
    return found


def born(pid: int) -> str:
    """Return the start of a process in the kernel's clock ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def cgroup(number: int) -> Path:
    """Return the cgroup of a task's command, which must hold this task only."""
    pid = ask(f"/task/{number}")["pid"]
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    inside = next(line[3:] for line in lines if line.startswith("0::"))
    assert f"/{UNIT}/" in inside, f"the command is in {inside}"
    return Path("/sys/fs/cgroup") / inside.lstrip("/")


def count(path: Path, name: str) -> int:
    """Return a number from a flat-keyed file of cgroups(7)."""
    found = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE)
    assert found is not None, path
    return int(found[1])


def unit(name: str) -> str:
    """Return a property of the unit."""
    return call("systemctl", "show", "--value", "--property", name, UNIT)


def configure(
    tables: str = "", *, user: str = "pulsar-api", capabilities: bool = True
) -> None:
    """Run the daemon with these ``[[run-as]]`` as this user, restarting it if needed."""
    own = "" if user == "pulsar-api" else f"[Service]\nUser={user}\n"
    wanted = {
        SETTINGS: COMMAND + tables,
        DROP_INS / "run-as.conf": RUN_AS_CONF.read_text() if capabilities else "",
        DROP_INS / "user.conf": own,
    }
    if {path: path.read_text() if path.exists() else "" for path in wanted} == wanted:
        serves()
        return
    DROP_INS.mkdir(exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text)
    call("systemctl", "daemon-reload")
    call("systemctl", "reset-failed", UNIT)  # reset the limit on starts
    restart()


def restart() -> None:
    """Restart the unit, and return when the daemon serves."""
    call("systemctl", "restart", UNIT)
    serves()


def serves(starts: str = "0") -> None:
    """Return when the daemon answers. Fail at once if it has restarted more often."""
    look = 0.0

    def answers() -> bool:
        nonlocal look
        with suppress(OSError):
            return "tasks" in ask("/tasks?limit=1")
        if time.monotonic() > look + 3:  # not every time, because this is slow without KVM
            assert unit("NRestarts") == starts, journal()
            assert unit("ActiveState") == "active", journal()
            look = time.monotonic()
        return False

    wait_for(answers, "the first answer of the daemon")


def journal() -> str:
    """Return the last lines about the unit."""
    return call("journalctl", "--unit", UNIT, "--lines", "8", "--output", "cat")


def unit_starts_at_boot_and_runs_a_task() -> object:
    """The shipped unit starts, and a task runs as the daemon's user."""
    wait_for(lambda: unit("ActiveState") == "active", "the unit")
    serves()
    task = ended(run("site", "echo hello; id -un"))
    assert (task["status"], task["exitCode"]) == ("finished", 0), task
    assert task["output"] == "hello\npulsar-api\n", task
    assert (unit("Type"), unit("NRestarts")) == ("exec", "0")
    return call("systemctl", "--version").splitlines()[0], os.uname().release


def tasks_go_on_while_the_unit_restarts() -> object:
    """After five restarts and a crash no output is missing, and the limits are set."""
    configure(TABLES)
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 1; done"
    numbers = [running("all", script) for _ in range(3)]
    pids = [ask(f"/task/{number}")["pid"] for number in numbers]
    births = [born(pid) for pid in pids]
    seconds = []
    for turn in range(6):
        daemon, begin = unit("MainPID"), time.monotonic()
        if turn == 2:
            call("systemctl", "daemon-reload")
        if turn < 5:
            restart()
        else:
            call("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
            wait_for(lambda: unit("NRestarts") == "1", "the restart after a crash")
            wait_for(lambda: unit("ActiveState") == "active", "the start after a crash")
            serves("1")
        seconds.append(round(time.monotonic() - begin, 1))
        assert unit("MainPID") not in {daemon, "0"}
        assert [born(pid) for pid in pids] == births
        for number in numbers:
            assert ask(f"/task/{number}")["status"] == "running"
            path = cgroup(number)
            wait_for(partial(limited, path), f"the limits of {path}, turn {turn}")
    kill(numbers)
    for number in numbers:
        lines = ask(f"/task/{number}")["output"].split()
        assert lines == [str(i) for i in range(len(lines))], lines
    return {"seconds": seconds}


def limited(path: Path) -> bool:
    """Return whether all limits are set that the kernel supports."""
    wanted = {
        "memory.max": str(MEMORY_MAX),
        "cpu.max": f"{int(CPU_QUOTA * 100_000)} 100000",
        "pids.max": str(TASKS_MAX),
    }
    with suppress(FileNotFoundError):
        return all((path / name).read_text().strip() == it for name, it in wanted.items())
    return False


def too_much_memory_ends_that_task_alone() -> object:
    """The kernel kills the command; the daemon and another task live."""
    configure(TABLES)
    other = running("memory", "echo here; exec sleep 300")
    daemon = unit("MainPID")
    task = ended(run("memory", python(f'print(len(b"x" * {4 * MEMORY_MAX}))')))
    assert task["status"] == "failed", task
    assert 9 in {task["signal"], (task["exitCode"] or 0) - 128} or (
        task["signal"] == "SIGKILL"
    ), task
    assert not task["output"], task
    assert unit("MainPID") == daemon
    assert ask(f"/task/{other}")["status"] == "running"
    kill([other])
    return {name: task.get(name) for name in ("signal", "reason", "memoryPeak")}


def a_task_that_spins_gets_its_quota() -> object:
    """Its processor time over some seconds is near the quota, not a whole core."""
    configure(TABLES)
    number = running("cpu", "echo here; while :; do :; done")
    stat = cgroup(number) / "cpu.stat"
    begin, used = time.monotonic(), count(stat, "usage_usec")
    time.sleep(6)
    share = (count(stat, "usage_usec") - used) / 1e6 / (time.monotonic() - begin)
    throttled = count(stat, "nr_throttled")
    kill([number])
    assert CPU_QUOTA / 2 <= share <= CPU_QUOTA + 0.05, share
    assert throttled > 0
    return {"share": round(share, 3), "throttled": throttled}


def a_fork_bomb_stops_at_its_limit() -> object:
    """It reaches its limit of processes, others can start, and a kill ends them all."""
    configure(TABLES)
    bomb = (
        "import os, time\nprint(1, flush=True)\nwhile True:\n"
        " try: os.fork()\n except OSError: time.sleep(0.1)\n"
    )
    number = running("processes", python(bomb))
    path = cgroup(number)
    wait_for(lambda: count(path / "pids.events", "max"), "a refused fork")
    most = int((path / "pids.current").read_text())
    assert most == TASKS_MAX, most
    assert len(processes(ACCOUNT)) <= TASKS_MAX
    assert ended(run("processes", "echo ok"))["output"] == "ok\n"
    kill([number])
    wait_for(lambda: not path.exists(), "the end of its cgroup")
    return {"most": most}


def a_task_says_what_it_used() -> object:
    """``cpuSeconds`` and ``memoryPeak`` match the measurements of the program itself."""
    configure(TABLES)
    source = (
        f'import time\nheld = b"x" * {24 * MIB}\n'
        "while time.process_time() < 2: pass\nprint(time.process_time())\n"
    )
    task = ended(run("free", python(source)))
    assert task["status"] == "finished", task
    used = float(task["output"])
    assert used - 0.1 <= task["cpuSeconds"] <= used + 1.5, task
    assert 24 * MIB <= task["memoryPeak"] <= 24 * MIB + 40 * MIB, task
    return {"used": used, **{name: task[name] for name in ("cpuSeconds", "memoryPeak")}}


def commands_have_no_capability() -> object:
    """Only a daemon that runs as root without ``[[run-as]]`` is an exception."""
    ways = [
        ("pulsar-api", False, False),
        ("root", False, False),
        ("root", False, True),
        ("pulsar-api", True, False),
        ("pulsar-api", True, True),
    ]
    table = []
    for user, ambient, run_as in ways:
        configure(PLAIN_TABLE if run_as else "", user=user, capabilities=ambient)
        said = ended(run("free", "id -un; grep ^Cap /proc/self/status"))["output"]
        name, *words = said.split()
        sets = dict(zip(words[::2], words[1::2], strict=True))
        row = {"daemon": user, "ambient": ambient, "run-as": run_as, "command": name}
        table.append(row | {key.rstrip(":"): value for key, value in sets.items()})
    for row in table:
        assert row["command"] == (ACCOUNT if row["run-as"] else row["daemon"]), table
        held = any(int(str(row[f"Cap{of}"]), 16) for of in ("Inh", "Prm", "Eff", "Amb"))
        assert held == (row["daemon"] == "root" and not row["run-as"]), table
    return table


CHECKS: tuple[Check, ...] = (
    unit_starts_at_boot_and_runs_a_task,
    commands_have_no_capability,
    tasks_go_on_while_the_unit_restarts,
    too_much_memory_ends_that_task_alone,
    a_task_that_spins_gets_its_quota,
    a_fork_bomb_stops_at_its_limit,
    a_task_says_what_it_used,
)


def name(check: Check) -> str:
    """Return the name of a check."""
    return getattr(check, "__name__", "")


def report(check: Check) -> dict[str, object]:
    """Run a check, and return its line."""
    begin = time.monotonic()
    try:
        found, error = check(), ""
    except Exception as e:  # noqa: BLE001 - the other checks shall run
        place = traceback.extract_tb(e.__traceback__)[-1].lineno
        found, error = None, f"line {place}: {e!r}"
    seconds = round(time.monotonic() - begin, 1)
    return {"check": name(check), "seconds": seconds, "found": found, "error": error}


def main() -> int:
    """Run the checks that the kernel's command line names, all if it names none."""
    words = Path("/proc/cmdline").read_text().split()
    chosen = [word.partition("=")[2] for word in words if word.startswith("vm_check=")]
    for check in CHECKS:
        if not chosen or name(check) in chosen:
            print(json.dumps(report(check)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
