"""Tests of commands under accounts of their own, and of hostile ones. They need root."""

import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

import pulsar_api
from pulsar_api.execution.programs import COMPILED, FORMER
from pulsar_api.tasks.accounts import NEEDED, capabilities
from tests.integration import zygote
from tests.integration.daemon import PATIENCE, PULSAR_API, SHELL, Daemon, wait_for
from tests.integration.refused import TWISTD

pytestmark = pytest.mark.needs("root", "setpriv")

OWN, SHOP, TOYS = "backup", "games", "news"
"""Accounts of every Debian: the daemon's, if it is not root, and those of two apps."""

TABLES = f"""
[[run-as]]
on = ["shop/*"]
user = "{SHOP}"
umask = "027"

[[run-as]]
on = ["toys/*"]
user = "{TOYS}"
home = "/var/tmp"
"""

PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")
"""A Python that every account can run. That of the tests can be in a private folder."""

_SAME = "python{}.{}".format(*sys.version_info)
SAME_PYTHON = shutil.which(_SAME, path="/usr/bin:/usr/local/bin") or sys.executable
"""One that every account can run, of the version of the tests if there is one."""

HOSTILE = Path(__file__).with_name("hostile.py")

Start = Callable[..., Daemon]


READ = "+dac_read_search"
"""Lets an ordinary user read this Python and this code, which only root may enter."""


def capable(user: str, may: str = f"+setuid,+setgid,+kill,{READ}") -> tuple[str, ...]:
    """Return the command line that starts a program as a user with capabilities."""
    return (
        *("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"),
        *(f"--inh-caps={may}", f"--ambient-caps={may}"),
    )


@pytest.fixture(params=["root", OWN])
def start(request: pytest.FixtureRequest, place: Path) -> Iterator[Start]:
    """Return a function that starts a daemon, as root and as an ordinary user."""
    daemons: list[Daemon] = []
    user = request.param

    def begin(*options: str, tables: str = TABLES) -> Daemon:
        (place / "settings.toml").write_text(tables)
        home = place / "home"
        home.mkdir(mode=0o755)
        shutil.chown(home, user)
        before = () if user == "root" else capable(user)
        program = (*before, sys.executable, "-m", "pulsar_api")
        config = ("--config", str(place / "settings.toml"), "--kill-grace", "1")
        state = home / "state"
        made = Daemon(
            place, "--command", SHELL, *config, *options, program=program, state=state
        )
        daemons.append(made)
        return made

    yield begin
    for daemon in daemons:
        daemon.stop()


def attempts(daemon: Daemon, app: str, *arguments: object) -> dict[str, str]:
    """Run the hostile program as a task, and return the result of each attempt."""
    words = " ".join(map(str, arguments))
    number = daemon.run(
        app,
        "live",
        "run",
        run=f"{PYTHON} -ISs - {words} <<'END'\n{HOSTILE.read_text()}\nEND\n",
    )
    task = daemon.ended(number)
    text = daemon.get(f"/task/{number}/log").body.decode()
    assert task["exitCode"] == 0, text
    found: dict[str, str] = json.loads(text.splitlines()[-1])
    return found


def test_a_hostile_task_gets_access_to_nothing(start: Start) -> None:
    """It attacks the daemon, its own shim, and tasks of other accounts."""
    daemon = start("--max-running-per-target", "1")
    hidden = "the-secret-of-another"
    other = daemon.run(
        "toys", "live", "run", run="echo here; exec sleep 60", password=hidden
    )
    wait_for(lambda: "here" in daemon.task(other)["output"], "the other task")
    victim = daemon.task(other)["pid"]
    waiting = daemon.run(
        "toys", "live", "run", run="exit ${#PULSAR_VAR_password}", password=hidden
    )
    (secrets,) = (daemon.state / "secrets").iterdir()
    assert hidden in secrets.read_text()
    numbers = (daemon.process.pid, victim, daemon.launcher())
    tried = attempts(daemon, "shop", daemon.state, *numbers, secrets)
    assert len(tried) > 40
    assert {what: how for what, how in tried.items() if not how.startswith("refused")} == {}
    assert daemon.task(other)["status"] == "running"
    assert daemon.post(f"/task/{other}/kill").status == 200
    assert daemon.ended(other)["status"] == "killed"
    assert daemon.ended(waiting)["exitCode"] == len(hidden)


def test_a_task_has_the_identity_of_its_account(start: Start) -> None:
    """It has the account's home and umask, and no group of the daemon."""
    daemon = start()
    script = "id -un; id -gn; id -Gn; umask; echo $HOME $USER $LOGNAME; echo x >/dev/stderr"
    for app, name, mask, home in (
        ("shop", SHOP, "0027", pwd.getpwnam(SHOP).pw_dir),
        ("toys", TOYS, "0022", "/var/tmp"),
    ):
        number = daemon.run(app, "live", "run", run=script)
        assert daemon.ended(number)["status"] == "finished"
        said = daemon.get(f"/task/{number}/log").body.decode().splitlines()
        assert sorted(said) == sorted(
            [name, name, name, mask, f"{home} {name} {name}", "x"]
        )


def test_no_command_has_a_capability(start: Start) -> None:
    """A set-uid program gives it none either, unless the settings allow sudo."""
    daemon = start()
    number = daemon.run(
        "shop", "live", "run", run="grep -E '^(Cap|NoNew)' /proc/self/status"
    )
    daemon.ended(number)
    lines = daemon.get(f"/task/{number}/log").body.decode().split()
    sets = dict(zip(lines[::2], lines[1::2], strict=True))
    assert sets.pop("NoNewPrivs:") == "1"
    sets.pop("CapBnd:")
    assert len(sets) == 4
    assert {int(value, 16) for value in sets.values()} == {0}


@pytest.fixture
def readable(place: Path) -> dict[str, str]:
    """Return an environment with a copy of the package that every account can read.

    Without accounts the shims of an ordinary user may read no more than that user.
    """
    package = Path(pulsar_api.__file__).parent
    shutil.copytree(package, place / package.name)
    subprocess.run(["chmod", "-R", "a+rX", str(place / package.name)], check=True)
    # The plugin of twistd is beside the package, all else in the library.
    path = f"{place}:{package.parent}:{sysconfig.get_path('purelib')}"
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.parametrize(
    ("before", "tables"),
    [
        pytest.param((), "", id="root"),
        pytest.param((), TABLES, id="root-with-accounts"),
        pytest.param(capable(OWN), "", id="capable-user"),
        pytest.param(capable(OWN), TABLES, id="capable-user-with-accounts"),
        pytest.param(capable(OWN, READ), "", id="user"),
    ],
)
def test_only_commands_of_root_without_accounts_have_capabilities(
    place: Path, readable: dict[str, str], before: tuple[str, ...], tables: str
) -> None:
    """The daemon logs a warning about these at each start."""
    (place / "settings.toml").write_text(tables)
    home = place / "home"
    home.mkdir(mode=0o755)
    shutil.chown(home, OWN if before else "root")
    daemon = Daemon(
        *(place, "--command", SHELL, "--config", str(place / "settings.toml")),
        environ=readable,
        program=(*before, SAME_PYTHON, "-m", "pulsar_api"),
        state=home / "state",
    )
    as_root = not before and not tables
    mine = capabilities(Path("/proc/self/status"))["CapEff"] if as_root else 0
    wanted = {"CapInh": 0, "CapPrm": mine, "CapEff": mine, "CapAmb": 0}
    try:
        for starts in (1, 2):
            run = "grep -E '^Cap(Inh|Prm|Eff|Amb):' /proc/self/status"
            number = daemon.run("shop", "live", "run", run=run)
            assert daemon.ended(number)["exitCode"] == 0
            words = daemon.get(f"/task/{number}/log").body.decode().split()
            found = zip(words[::2], words[1::2], strict=True)
            assert {name.rstrip(":"): int(value, 16) for name, value in found} == wanted
            warnings = daemon.log.read_text().count("TASKS RUN AS ROOT")
            assert warnings == (starts if as_root else 0)
            daemon.stop()
            daemon.start()
    finally:
        daemon.stop()


def test_a_daemon_without_accounts_passes_no_capability_on(place: Path) -> None:
    """Its tasks can change its shims and the files that they read."""
    (place / "state").mkdir()
    shutil.chown(place / "state", OWN)
    daemon = Daemon(place, program=(*capable(OWN), sys.executable, "-m", "pulsar_api"))
    try:
        found = capabilities(Path(f"/proc/{daemon.process.pid}/status"))
    finally:
        daemon.kill()
    assert (found["CapAmb"], found["CapInh"]) == (0, 0)
    assert found["CapEff"] & NEEDED == NEEDED


def test_the_version_of_pulsar_is_read_under_an_account(
    start: Start, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account of a task can own programs in PATH."""
    program = place / "bin" / "pulsar"
    program.parent.mkdir(mode=0o755)
    program.write_text(
        "#!/bin/sh\necho 1.0 $(id -un) $HOME $(grep CapEff /proc/self/status)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    daemon = start("--command", "pulsar")

    def found() -> re.Match[str] | None:
        return re.search("says (.*): using pulsar-1", daemon.log.read_text())

    said = wait_for(found, "the version")
    assert said is not None
    home = pwd.getpwnam(SHOP).pw_dir
    assert said[1] == f"1.0 {SHOP} {home} CapEff: {0:016}"


def test_accounts_without_authentication_are_logged_as_a_risk(start: Start) -> None:
    """Each task could ask the daemon to start tasks of other accounts."""
    assert "EVERY TASK CAN START" in start().log.read_text()


def test_accounts_with_authentication_log_no_warning(start: Start) -> None:
    """Tasks have no credentials for the daemon."""
    daemon = start("--auth-provider", "tokens")
    assert "EVERY TASK CAN START" not in daemon.log.read_text()


def test_a_target_without_account_is_refused(start: Start) -> None:
    """No task runs as the daemon."""
    daemon = start()
    answer = daemon.post("/games/live", {"action": "run", "variables": {"run": "id"}})
    assert (answer.status, answer.json()["field"]) == (400, "app")
    assert "run-as" in answer.json()["detail"]
    assert daemon.get("/tasks").json()["tasks"] == {}


def test_a_task_of_an_account_survives_the_daemon_and_is_killed(start: Start) -> None:
    """The next daemon adopts it and ends all its processes, also those that ignore TERM."""
    daemon = start()
    run = "trap '' TERM; (trap '' TERM; setsid sleep 300 & echo $!; wait) & wait"
    number = daemon.run("shop", "live", "run", run=run)

    def said() -> str:
        return str(daemon.task(number)["output"]).strip()

    child = int(wait_for(said, "the child"))
    assert os.stat(f"/proc/{child}").st_uid == pwd.getpwnam(SHOP).pw_uid
    daemon.kill()
    daemon.start()
    assert daemon.task(number)["status"] == "running"
    assert daemon.post(f"/task/{number}/kill").status == 200
    task = daemon.ended(number)
    assert (task["status"], task["heldBy"]) == ("killed", [])
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the end of the child")


def stop_before_exec(state: Path, user: str) -> int:
    """Stop the next process of a user before it runs its program, and return its id."""
    uid = pwd.getpwnam(user).pw_uid

    def stopped() -> int:
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if (
                    f"\nUid:\t{uid}\t" in Path(f"/proc/{name}/status").read_text()
                    and bytes(state) in Path(f"/proc/{name}/cmdline").read_bytes()
                ):
                    os.kill(int(name), signal.SIGSTOP)
                    return int(name)
        return 0

    return wait_for(stopped, "a process before its program")


@pytest.fixture
def slow_program(place: Path) -> Iterator[Path]:
    """Return a program whose start is delayed by a lease, see fcntl(2)."""
    path = place / "program"
    shutil.copy("/bin/true", path)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # a process waits for the lease
    with path.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield path
    signal.signal(signal.SIGIO, before)


def test_a_command_that_is_stopped_before_it_runs_is_killed(
    start: Start, slow_program: Path
) -> None:
    """Another task of its account can stop it. Its shim still obeys a kill."""
    daemon = start("--command", str(slow_program))
    number = daemon.run("shop", "live", "run")
    child = stop_before_exec(daemon.state, SHOP)
    daemon.post(f"/task/{number}/kill")
    assert daemon.ended(number)["status"] == "killed"
    assert not Path(f"/proc/{child}").exists()


def test_an_inaccessible_program_fails_with_the_reason(start: Start, place: Path) -> None:
    """The account of the task counts, not that of the daemon."""
    shut = place / "shut"
    shut.mkdir(mode=0o700)
    (shut / "program").write_text("#!/bin/sh\n")
    (shut / "program").chmod(0o755)
    daemon = start("--command", f"{shut}/program")
    number = daemon.run("shop", "live", "run")
    task = daemon.ended(number)
    assert task["status"] == "failed"
    assert task["reason"].endswith("program: Permission denied")


@pytest.fixture
def mortal(place: Path) -> Iterator[Daemon]:
    """Return a daemon of an ordinary user that cannot signal the processes of root.

    Its launcher and shims have no capability, so they need a Python and a shim that
    everybody can read. Accounts for tasks would need CAP_KILL.
    """
    package = Path(pulsar_api.__file__).parent
    shutil.copytree(package, place / "code" / package.name)
    subprocess.run(["chmod", "-R", "a+rX", place / "code"], check=True)
    (place / "settings.toml").write_text("allow-sudo = true\n")
    home = place / "home"
    home.mkdir()
    shutil.chown(home, OWN)
    daemon = Daemon(
        place,
        *("--command", SHELL, "--config", str(place / "settings.toml")),
        *("--kill-grace=1", "--max-running-per-target=1"),
        program=(*capable(OWN, READ), str(PYTHON), "-m", "pulsar_api"),
        environ={**os.environ, "PYTHONPATH": os.pathsep.join((f"{place}/code", *sys.path))},
        state=home / "state",
    )
    yield daemon
    daemon.stop()


def root_process(name: str) -> int:
    """Return the process of root that sleeps for so long, 0 if there is none."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if words[:2] == [b"sleep", name.encode()] and path.stat().st_uid == 0:
                return int(path.name)
    return 0


def free_by_http(daemon: Daemon) -> list[int]:
    """Free shop/live by HTTP; return the tasks that held it."""
    answer = daemon.post("/targets/shop/live/free")
    assert answer.status == 200, answer.body
    freed: list[int] = answer.json()["freed"]
    return freed


def free_by_command(daemon: Daemon) -> list[int]:
    """Free shop/live by the command line; return the tasks that held it."""
    command = [*PULSAR_API, "free", "shop", "live", "--json", "--url", daemon.base]
    done = zygote.run(command, check=True, capture_output=True, timeout=PATIENCE)
    found = json.loads(done.stdout)
    assert (found["app"], found["env"]) == ("shop", "live")
    freed: list[int] = found["freed"]
    return freed


@pytest.mark.parametrize("free", [free_by_http, free_by_command])
def test_admin_frees_a_target_that_a_process_of_root_holds(
    mortal: Daemon, place: Path, browser: Chrome, free: Callable[[Daemon], list[int]]
) -> None:
    """The task, the next task and the page name the process that could not be killed."""
    program = place / "become-root"
    shutil.copyfile(shutil.which("setpriv") or "", program)
    program.chmod(0o4755)
    name = f"3600.{os.getpid()}"
    become_root = f"exec {program} --reuid 0 --clear-groups sleep {name}"
    number = mortal.run("shop", "live", "run", run=become_root)
    process = wait_for(lambda: root_process(name), "the process of root")
    try:
        mortal.post(f"/task/{number}/kill")
        task = mortal.ended(number)
        left = {"pid": process, "command": "sleep", "user": "root"}
        assert (task["status"], task["heldBy"]) == ("killed", [left])
        assert task["stillRunning"] == []
        second = mortal.run("shop", "live", "run", run="echo second")
        assert mortal.task(second)["status"] == "created"
        named = f"{process} sleep (root)"
        why = f"task {number}, of which these still run: {named}"
        assert mortal.task(second)["waitingFor"] == why
        browser.get(f"{mortal.base}/web#job/{number}")
        # In one step: the page replaces its elements when the task changes.
        first = "return document.querySelector('.remarks li')?.innerText"
        text = wait_for(lambda: browser.execute_script(first), "the remark")
        said = f"These processes did not end and still hold shop live: {named}."
        assert text.startswith(said)
        assert free(mortal) == [number]
        assert mortal.ended(second)["status"] == "finished"
        task = mortal.task(number)
        assert (task["heldBy"], task["stillRunning"]) == ([], [left])
        assert root_process(name) == process
        assert free(mortal) == []
    finally:
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ('user = "root"', "tasks must not run as root"),
        ('user = "nobody-has-this-name"', "the user nobody-has-this-name does not exist"),
        ('user = "games"\ngroup = "nobodys"', "the group nobodys does not exist"),
        ('user = "games"\ngroup = "root"', "group of root"),
        ('user = "games"\numask = "9"', "umask"),
        ('user = "games"\nnice = 3', "'nice' is unknown"),
        ('group = "games"', "user"),
    ],
)
def test_an_impossible_account_is_refused_at_the_start(
    place: Path, table: str, why: str
) -> None:
    """One line names the reason, before anything starts."""
    refused(place, f'[[run-as]]\non = ["shop/*"]\n{table}\n', why)


def test_a_daemon_that_cannot_change_the_user_refuses_accounts(place: Path) -> None:
    """Its tasks would run as the daemon, or not at all."""
    refused(place, TABLES, "CAP_SETUID", capable(OWN, READ))


def test_state_folder_holds_no_program_that_a_task_could_replace(place: Path) -> None:
    """Without accounts a task can write there; an older version left its programs."""
    state = place / "state"
    state.mkdir()
    for name in (*COMPILED, *FORMER):
        (state / name).write_text("forged")
    daemon = Daemon(place, "--command", SHELL, state=state)
    try:
        assert daemon.ended(daemon.sh("exit 3"))["exitCode"] == 3
        assert list(state.glob("*.pyc")) == []
    finally:
        daemon.stop()


def test_the_account_of_the_daemon_is_refused_for_tasks(place: Path) -> None:
    """Tasks under it could change the daemon's state."""
    table = f'[[run-as]]\non = ["*"]\nuser = "{OWN}"\n'
    refused(place, table, "the daemon runs as this user", capable(OWN))


@pytest.mark.parametrize(
    ("user", "why"), [(OWN, "CAP_SETUID"), (SHOP, "the daemon runs as this user")]
)
def test_accounts_are_checked_after_twistd_has_changed_the_user(
    place: Path, user: str, why: str
) -> None:
    """The option ``--uid`` takes privileges that the daemon had at first."""
    twistd = (TWISTD, "--nodaemon", "--pidfile=", f"--uid={user}", f"--gid={user}")
    refused(place, TABLES, why, program=(*twistd, "pulsar-api"))


def refused(
    place: Path,
    tables: str,
    why: str,
    before: Any = (),
    program: Any = (sys.executable, "-m", "pulsar_api"),
) -> None:
    """Start a daemon with settings that must be refused for a reason."""
    (place / "settings.toml").write_text(tables)
    state = place / "state"
    state.mkdir()
    state.chmod(0o777)
    program = (*before, *program, "--state-dir", str(state))
    found = subprocess.run(
        (*program, "--port", "0", "--config", str(place / "settings.toml")),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    assert found.returncode == 1
    assert why in found.stderr + found.stdout
