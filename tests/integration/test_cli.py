"""The command ``pulsar-api`` as people and scripts use it, with a real daemon."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.integration import zygote
from tests.integration.conftest import Start
from tests.integration.daemon import (
    CERTIFICATE,
    PATIENCE,
    PULSAR_API,
    SHELL,
    Daemon,
    shim_of,
    wait_for,
)


@pytest.fixture
def daemon(returning: Daemon) -> Daemon:
    """Return a daemon that runs lines of shell."""
    return returning


def environ_of(daemon: Daemon, **more: str) -> dict[str, str]:
    """Return an environment with the URL of a daemon."""
    given = {"PULSAR_API_URL": f"http://localhost:{daemon.port}", **more}
    return {**os.environ, "XDG_CONFIG_HOME": str(daemon.folder), **given}


def call(
    daemon: Daemon, *arguments: str, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return zygote.run(
        [*PULSAR_API, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environ_of(daemon) if environ is None else environ,
        stdin=subprocess.DEVNULL,
    )


def run(daemon: Daemon, line: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell as a task."""
    return call(daemon, "run", "site", "production", "run", "-v", f"run={line}", *options)


def test_run_prints_both_streams_and_exits_as_the_task(daemon: Daemon) -> None:
    """Standard output has the task's standard output, and nothing else."""
    done = run(daemon, "echo out; echo ä >&2; exit 3")
    assert (done.returncode, done.stdout) == (3, "out\n")
    assert "\nä\n" in done.stderr
    assert done.stderr.endswith("pulsar-api: task 1 failed, exit code 3\n")
    assert run(daemon, "true").returncode == 0


def test_each_outcome_has_its_exit_status(daemon: Daemon) -> None:
    """Scripts can distinguish them. The help lists them."""
    assert run(daemon, "kill -9 $$").returncode == 124
    detached = run(daemon, "exec sleep 60", "--detach")
    assert (detached.returncode, detached.stdout) == (0, "2\n")
    killed = call(daemon, "kill", "2")
    assert (killed.returncode, killed.stdout) == (0, "")
    assert call(daemon, "wait", "2").returncode == 121
    assert call(daemon, "log", "--follow", "2").returncode == 121
    refused = call(daemon, "show", "99")
    assert (refused.returncode, refused.stderr) == (
        122,
        "pulsar-api: There is no task 99.\n",
    )
    assert run(daemon, "exec sleep 60", "--detach").stdout == "3\n"
    wait_for(lambda: daemon.task(3)["pid"], "the start")
    os.kill(shim_of(daemon.output_file(3).parent), signal.SIGKILL)
    assert call(daemon, "wait", "3").returncode == 120
    wrong = call(daemon, "run", "site")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: pulsar-api run")
    assert call(daemon, "run", "a", "b", "c", "-v", "novalue").returncode == 2
    daemon.kill()
    gone = call(daemon, "tasks")
    assert gone.returncode == 123
    assert f"http://localhost:{daemon.port} cannot be reached" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_shell_script_can_rely_on_exit_status(daemon: Daemon, tmp_path: Path) -> None:
    """If ``head`` closes the pipe early, that is no error."""
    program = tmp_path / "pulsar-api"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{PULSAR_API[2]}' \"$@\"\n")
    program.chmod(0o755)
    script = """
    set -u
    PATH=$1:$PATH
    pulsar-api run site prod run -v run='exit 3' 2>/dev/null; echo "failed $?"
    pulsar-api run site prod run -v run=true 2>/dev/null && echo good
    pulsar-api run site prod run -v run='seq 100000' 2>/dev/null | head -n 1
    """
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env=environ_of(daemon),
    )
    assert (done.stdout, done.stderr) == ("failed 3\ngood\n1\n", "")
    assert daemon.ended(3)["exitCode"] == 0


def test_tasks_and_show_print_tables_and_json(daemon: Daemon) -> None:
    """Tables are for people, JSON is for programs."""
    run(daemon, "echo one; exit 3")
    run(daemon, "true")
    lines = call(daemon, "tasks").stdout.splitlines()
    assert lines[0].split() == ["ID", "STATUS", "TARGET", "ACTION", "CREATED", "TOOK"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["2", "finished", "site/production", "run"],
        ["1", "failed", "site/production", "run"],
    ]
    assert "\x1b" not in "".join(lines)
    failed = call(daemon, "tasks", "--status", "failed", "--json").stdout
    assert [json.loads(line)["id"] for line in failed.splitlines()] == [1]
    assert call(daemon, "tasks", "--status", "odd").returncode == 122
    shown = call(daemon, "show", "1").stdout
    assert re.search(r"^status +failed$", shown, re.MULTILINE)
    assert re.search(r"^exit code +3$", shown, re.MULTILINE)
    assert json.loads(call(daemon, "show", "1", "--json").stdout)["exitCode"] == 3
    assert json.loads(call(daemon, "wait", "1", "--json").stdout)["status"] == "failed"
    assert json.loads(call(daemon, "kill", "1", "--json").stdout)["status"] == "failed"
    events = run(daemon, "echo one; exit 3", "--json")
    values = [json.loads(line) for line in events.stdout.splitlines()]
    assert values[-1]["event"] == "end"
    assert [v["text"] for v in values if v["event"] == "output"] == ["one\n"]
    assert (events.returncode, events.stderr) == (3, "")


def test_control_characters_in_variables_are_escaped(daemon: Daemon) -> None:
    """Otherwise the author of a variable could control the terminal of another user."""
    run(daemon, "true", "-v", "odd=\x1b[2J\x07\nreason      all is well")
    shown = call(daemon, "show", "1").stdout
    assert "\x1b" not in shown
    assert re.search(r"^  odd +\\x1b\[2J\\x07\\nreason +all is well$", shown, re.MULTILINE)


def test_log_of_invalid_utf8_ends(daemon: Daemon) -> None:
    """The task still runs, and the invalid byte is shown as U+FFFD."""
    run(daemon, r"printf 'a\377b\n'; echo end; exec sleep 60", "--detach")
    wait_for(lambda: daemon.task(1)["outputSize"] == 8, "the lines")
    assert call(daemon, "log", "1").stdout == "a\ufffdb\nend\n"
    call(daemon, "kill", "1")


def test_log_prints_the_output(daemon: Daemon) -> None:
    """Options select one stream, or JSON. A running task shows the output so far."""
    run(daemon, "echo out; echo err >&2")
    done = call(daemon, "log", "1")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert call(daemon, "log", "1", "--stderr").stdout == "err\n"
    values = call(daemon, "log", "1", "--json").stdout.splitlines()
    assert [json.loads(line)["stream"] for line in values] == ["stdout", "stderr"]
    run(daemon, "echo begin; exec sleep 60", "--detach")
    wait_for(lambda: daemon.task(2)["outputSize"] == 6, "the first line")
    assert call(daemon, "log", "2").stdout == "begin\n"
    call(daemon, "kill", "2")


def test_repeated_key_starts_one_task(daemon: Daemon) -> None:
    """The second call follows the task of the first."""
    for _ in range(2):
        done = run(daemon, "echo once", "--idempotency-key", "release-1")
        assert (done.returncode, done.stdout) == (0, "once\n")
    assert len(call(daemon, "tasks", "--json").stdout.splitlines()) == 1


def test_run_continues_over_restarts_of_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """After two restarts every line is there once."""
    go = tmp_path / "go"
    os.mkfifo(go)
    line = f"run=seq 100; read x < {go}; seq 101 200; exit 3"
    command = [*PULSAR_API, "run", "site", "production", "run", "-v", line]
    with zygote.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ_of(daemon)
    ) as running:
        wait_for(lambda: daemon.get("/task/1").status == 200, "the task")
        wait_for(lambda: daemon.task(1)["outputSize"] > 290, "its first lines")
        for _ in range(2):
            daemon.kill()
            daemon.start()
        go.write_text("go\n")
        out = running.communicate(timeout=PATIENCE)[0]
    assert out.decode() == "".join(f"{n}\n" for n in range(1, 201))
    assert running.returncode == 3


def test_url_comes_from_option_environment_or_file(
    daemon: Daemon, start: Start, tmp_path: Path
) -> None:
    """The option has precedence over the environment, which has it over the file."""
    own = start("--dev", "--command", SHELL, "--port=0")
    folder = tmp_path / "pulsar-api"
    folder.mkdir()
    file = folder / "client.toml"
    file.write_text(f"url = 'https://localhost:{own.port}'\nca_file = '{CERTIFICATE}'\n")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PULSAR_API")}
    plain["XDG_CONFIG_HOME"] = str(tmp_path)
    done = call(daemon, "run", "a", "b", "run", "-v", "run=true", environ=plain)
    assert done.returncode == 0
    assert f"https://localhost:{own.port}/" in done.stderr
    elsewhere = {**plain, "PULSAR_API_URL": daemon.base}
    assert call(daemon, "tasks", "--json", environ=elsewhere).stdout == ""
    option = ("tasks", "--json", "--url", f"https://localhost:{own.port}")
    assert call(daemon, *option, environ=elsewhere).stdout != ""
    file.write_text(f"url = 'https://localhost:{own.port}'\n")
    untrusted = call(daemon, "tasks", environ=plain)
    assert untrusted.returncode == 123
    assert "TLS" in untrusted.stderr
    file.write_text("url = ")
    broken = call(daemon, "tasks", environ=plain)
    assert (broken.returncode, str(file) in broken.stderr) == (123, True)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, daemon: Daemon, *arguments: str, **environ: str) -> None:
        self.master, slave = pty.openpty()
        self.process = zygote.Popen(
            [*PULSAR_API, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ_of(daemon, **environ),
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def sees(self, text: str) -> None:
        """Wait until the command has printed a text."""
        until = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    data = os.read(self.master, 4096)
                except OSError:
                    data = b""
                assert data, f"the end came before {text!r}: {self.seen}"
                self.seen += data.decode()

    def types(self, text: str) -> None:
        """Type a text."""
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Type Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(PATIENCE)
        os.close(self.master)
        return status


RUN = ("run", "site", "production", "run", "-v")


def test_ctrl_c_asks_whether_to_kill(daemon: Daemon) -> None:
    """The answer "k" kills it, others follow on. A second Ctrl-C leaves it running."""
    terminal = Terminal(daemon, *RUN, "run=echo ready; exec sleep 60")
    terminal.sees("ready")
    terminal.interrupt()
    terminal.sees("kill task 1, or leave it running?")
    terminal.types("what\n")
    terminal.sees("the task goes on")
    terminal.interrupt()
    terminal.types("k\n")
    terminal.sees("task 1 killed")
    assert terminal.end() == 121
    terminal = Terminal(daemon, *RUN, "run=echo ready; exec sleep 60")
    terminal.sees("ready")
    terminal.interrupt()
    terminal.sees("kill task 2")
    terminal.interrupt()
    terminal.sees("task 2 goes on; follow it by pulsar-api log --follow 2")
    assert terminal.end() == 130
    terminal = Terminal(daemon, "wait", "2")
    terminal.sees("…")
    terminal.interrupt()
    terminal.sees("kill task 2")
    terminal.types("l\n")
    assert terminal.end() == 130
    assert daemon.task(2)["status"] == "running"
    call(daemon, "kill", "2")


def test_sigint_without_a_terminal_leaves_the_task_running(daemon: Daemon) -> None:
    """Without a terminal the command cannot ask, so it kills nothing."""
    command = [*PULSAR_API, *RUN, "run=echo ready; exec sleep 60"]
    with zygote.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ_of(daemon),
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, out) == (130, "")
    assert "goes on" in err
    assert daemon.task(1)["status"] == "running"
    call(daemon, "kill", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [("wait", "1"), ("kill", "1"), ("log", "-f", "1")])
def test_interrupted_command_exits_with_130(
    daemon: Daemon, command: tuple[str, ...], number: signal.Signals
) -> None:
    """The task goes on."""
    run(daemon, "trap '' TERM; echo ready; sleep 61", "--detach")
    wait_for(lambda: daemon.task(1)["output"], "the start")
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        with zygote.Popen(
            [*PULSAR_API, *command], stdin=subprocess.DEVNULL, env=environ_of(daemon)
        ) as waiting:
            folder = Path(f"/proc/{waiting.pid}/fd")

            def connected() -> bool:
                with suppress(OSError):  # descriptors vanish meanwhile
                    return any(
                        os.readlink(f).startswith("socket:") for f in folder.iterdir()
                    )
                return False

            try:
                wait_for(connected, "its connection")
                waiting.send_signal(number)
                assert waiting.wait(PATIENCE) == 130
            finally:
                waiting.kill()
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    daemon.post("/task/1/kill")


def test_terminal_shows_colours_and_elapsed_time(daemon: Daemon) -> None:
    """The time appears while a task prints nothing. ``NO_COLOR`` turns colours off."""
    terminal = Terminal(daemon, *RUN, "run=sleep 4.5; echo done")
    terminal.sees("… ")
    terminal.sees("done")
    terminal.sees("task 1 finished")
    assert re.search(r"… \d+ s.*\r\x1b\[Kdone", terminal.seen, re.DOTALL)
    assert terminal.end() == 0
    coloured = Terminal(daemon, "tasks")
    coloured.sees("\x1b[32mfinished")
    assert coloured.end() == 0
    plain = Terminal(daemon, "tasks", NO_COLOR="1")
    plain.sees("finished")
    assert plain.end() == 0
    assert "\x1b" not in plain.seen


def test_shell_completes_commands(daemon: Daemon, tmp_path: Path) -> None:
    """``register-python-argcomplete`` sets this environment up for bash."""
    program = shutil.which("pulsar-api", path=Path(sys.executable).parent)
    assert program is not None
    found = tmp_path / "completions"
    environ: dict[str, Any] = {
        **environ_of(daemon),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "COMP_LINE": "pulsar-api ta",
        "COMP_POINT": "13",
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " ",
    }
    subprocess.run([program], env=environ, check=True, timeout=PATIENCE)
    assert found.read_text().strip() == "tasks"


def test_help_lists_commands_and_exit_status() -> None:
    """Each command has a help of its own."""

    def help_of(*words: str) -> str:
        done = zygote.run(
            [*PULSAR_API, *words, "--help"], capture_output=True, text=True, check=True
        )
        text: str = done.stdout
        return text

    text = help_of()
    for name in ("run", "tasks", "show", "log", "wait", "kill", "demo", "end-tasks"):
        assert re.search(rf"^    {name}\b", text, re.MULTILINE)
        assert f"usage: pulsar-api {name}" in help_of(name)
    for status in (120, 121, 122, 123, 124, 130):
        assert str(status) in text
