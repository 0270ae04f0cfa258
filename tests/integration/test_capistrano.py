"""Tasks that run real Capistrano, and substitutes for pulsar 0.3 and pulsar 1."""

import json
import os
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.conftest import Start
from tests.integration.daemon import Daemon, marked, problem, wait_for

# -- Capistrano

CAPFILE = """
require 'capistrano/setup'
set :scm, nil
set :format_options, log_file: nil, color: false, truncate: false

task :live do
  puts 'one'
  sleep 0.02 until File.exist?(ENV['go'])
  puts 'two'
end

task :boom do
  raise 'the deployment went wrong'
end

task :local_failure do
  run_locally { execute :sh, '-c', "'echo before; exit 7'" }
end

task :nap do
  run_locally { execute :sleep, 60 }
end

# In hexadecimal, so that no encoding and no line end can hide anything.
task :show do
  ENV.each { |key, value| puts "#{key} #{value.unpack1('H*')}" if key.start_with?('v_') }
end

desc 'Says where it runs'
task :where do
  puts Dir.pwd, fetch(:stage), fetch(:tier), ENV['PULSAR_ACTION'], ENV['PULSAR_TASK_ID']
end

task :greet, [:a, :b] do |_, args|
  puts "a=#{args[:a].inspect} b=#{args[:b].inspect}"
end
"""


@pytest.fixture(scope="module")
def cap_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration repository with the app ``shop``."""
    app = tmp_path_factory.mktemp("config repo") / "apps" / "shop"
    (app / "config" / "deploy").mkdir(parents=True)
    (app / "Capfile").write_text(CAPFILE)
    (app / "config" / "deploy.rb").write_text("set :application, 'shop'\n")
    (app / "config" / "deploy" / "production.rb").write_text("set :tier, 'gold'\n")
    return app.parents[1]


@pytest.fixture(scope="module")
def cap(tmp_path_factory: pytest.TempPathFactory, cap_repo: Path) -> Iterator[Daemon]:
    """Return a daemon that runs Capistrano, shared by all tests."""
    folder = tmp_path_factory.mktemp("cap")
    daemon = Daemon(folder, "--command", "capistrano", "--config-repo", str(cap_repo))
    yield daemon
    daemon.stop()


def refused(daemon: Daemon, path: str, value: object, field: str) -> None:
    """Check that a request is refused because of a field, and creates no task."""
    before = daemon.get("/tasks?output=none").json()
    problem(daemon.post(path, value), 400, field)
    assert daemon.get("/tasks?output=none").json() == before


def cap_output(cap: Daemon, action: str, **variables: object) -> str:
    """Run an action that must succeed and return its output."""
    number = cap.run("shop", "production", action, **variables)
    ended = cap.ended(number)
    output = cap.task(number)["output"]
    assert isinstance(output, str)
    assert (ended["status"], ended["exitCode"]) == ("finished", 0), output
    return output


def test_capistrano_output_arrives_line_by_line(cap: Daemon, tmp_path: Path) -> None:
    """A long-poll has line one before the task can print line two."""
    go = tmp_path / "go"
    number = cap.run("shop", "production", "live", go=str(go))
    version, text = 0, ""
    while "one\n" not in text:
        poll = cap.get(f"/task/{number}/output?since={version}&offset=0").json()
        assert poll["changed"]
        version, text = poll["task"]["version"], poll["task"]["output"]
    assert poll["task"]["status"] == "running"
    assert "two" not in text
    go.touch()
    assert cap.ended(number)["status"] == "finished"
    assert cap.task(number)["output"] == "one\ntwo\n"


def test_capistrano_runs_in_the_folder_of_the_app(cap: Daemon, cap_repo: Path) -> None:
    """It finds its stages there, gets app, env and action, and leaves no log."""
    folder = cap_repo / "apps" / "shop"
    lines = cap_output(cap, "where").splitlines()
    newest = next(iter(cap.get("/tasks?limit=1").json()["tasks"]))
    assert lines == [str(folder), "production", "gold", "where", newest]
    assert sorted(os.listdir(folder)) == ["Capfile", "config"]


@pytest.mark.parametrize(
    ("action", "word"),
    [
        ("boom", "the deployment went wrong"),
        ("local_failure", "before"),
        ("no_such_task", "no_such_task"),
    ],
)
def test_failing_capistrano_fails_the_task(cap: Daemon, action: str, word: str) -> None:
    """The task has the exit code, and the output explains it."""
    number = cap.run("shop", "production", action)
    ended = cap.ended(number)
    assert (ended["status"], ended["exitCode"]) == ("failed", 1)
    assert word in cap.task(number)["output"]


def test_unknown_app_or_stage_fails_the_task(cap: Daemon) -> None:
    """The reason names a missing app. Capistrano reports a missing stage itself."""
    number = cap.run("missing", "production", "where")
    ended = cap.ended(number)
    assert (ended["status"], ended["exitCode"]) == ("failed", None)
    assert ended["reason"].startswith("cannot enter ")
    number = cap.run("shop", "nowhere", "where")
    ended = cap.ended(number)
    assert (ended["status"], ended["exitCode"]) == ("failed", 1)


def test_kill_ends_local_processes_of_capistrano(cap: Daemon) -> None:
    """Neither Ruby nor its ``sleep`` lives when the daemon reports the end of the task."""
    mark = uuid4().hex
    number = cap.run("shop", "production", "nap", mark=mark)

    def processes() -> list[bytes]:
        found = []
        for pid in marked(f"PULSAR_VAR_mark={mark}"):
            with suppress(OSError):  # it has just ended
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        return found

    wait_for(lambda: any(b"sleep\x0060" in line for line in processes()), "the sleep")
    assert cap.get(f"/task/{number}/kill").status == 200
    ended = cap.ended(number)
    assert processes() == []
    assert ended["status"] == "killed"
    assert ended["reason"].startswith("Killed by 127.0.0.1")


VALUES = {
    "v_spaces": " two  spaces ",
    "v_quotes": 'it\'s "quoted" \\ back',
    "v_lines": "one\ntwo\n",
    "v_shell": "$(touch pwned) `touch pwned` ; touch pwned | & > pwned",
    "v_glob": "* ? [a] {a,b} ~",
    "v_equals": "a=b=c",
    "v_option": "--help",
    "v_empty": "",
    "v_text": "žluťoučký ✓ 😀",
}


def test_variables_reach_capistrano_unchanged(cap: Daemon, cap_repo: Path) -> None:
    """Spaces, quotes, line ends and shell syntax are only text."""
    lines = cap_output(cap, "show", **VALUES, v_number=3).splitlines()
    found = dict(line.partition(" ")[::2] for line in lines)
    wanted = {**VALUES, "v_number": "3"}
    assert found == {key: value.encode().hex() for key, value in wanted.items()}
    assert list(cap_repo.glob("**/pwned")) == []


@pytest.mark.parametrize(
    ("action", "printed"),
    [
        ("greet", "a=nil b=nil"),
        ("greet[one]", 'a="one" b=nil'),
        ("greet[one,two]", 'a="one" b="two"'),
        ("greet[v1.2-rc+1,to @all]", 'a="v1.2-rc+1" b="to @all"'),
    ],
)
def test_arguments_in_the_action_reach_capistrano(
    cap: Daemon, action: str, printed: str
) -> None:
    """Rake expects them in brackets as part of the name."""
    assert cap_output(cap, action) == f"{printed}\n"


def test_tasks_of_capistrano_are_listed(cap: Daemon) -> None:
    """The list has those with a description, as ``cap --tasks`` prints them."""
    found = cap.get("/shop/production/tasks").json()
    assert found["where"] == "Says where it runs"
    assert "nap" not in found
    assert cap.get("/unknown/production/tasks").json() == {}


@pytest.mark.parametrize(
    "action",
    ["greet[a", "greet[a]b", "greet[$(id)]", "greet[a;b]", "greet[a\nb]", "-T", "[a]"],
)
def test_malformed_action_is_refused(cap: Daemon, action: str) -> None:
    """The answer names the field, and no task is created."""
    refused(cap, "/shop/production", {"action": action}, "action")


DANGEROUS = ["BASH_ENV", "RUBYOPT", "PATH", "LD_PRELOAD", "GEM_HOME", "HOME"]


@pytest.mark.parametrize("name", DANGEROUS)
def test_variable_that_affects_programs_is_refused(cap: Daemon, name: str) -> None:
    """Rake puts variables into the environment under their own names."""
    request = {"action": "show", "variables": {name: "/nowhere"}}
    refused(cap, "/shop/production", request, f"variables.{name}")


@pytest.mark.parametrize("name", ["a-b", "a.b", "a b", "a=b", "1a", "é", ""])
def test_variable_that_rake_takes_for_a_task_is_refused(cap: Daemon, name: str) -> None:
    """Rake sees a variable in an argument only if a word stands before the equals sign."""
    request = {"action": "show", "variables": {name: "x"}}
    refused(cap, "/shop/production", request, f"variables.{name}")


# -- pulsar, by substitutes: the tests check their arguments, and how output is judged

DONE = "Executed task deploy for site on production!"


def install(folder: Path, version: str, text: str) -> dict[str, str]:
    """Put a ``pulsar`` into a folder and return an environment that finds it there.

    ``version`` is the shell code for ``--version``, ``text`` that for all other calls.
    """
    path = folder / "pulsar"
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$*" = --version ]; then echo x >> "{folder}/asked"; {version}\n'
        "exit; fi\n"
        f"{text}\n"
    )
    path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


ARGUMENTS = "printf '%s\\0' \"$@\""
"""Shell code that prints the arguments without loss."""


def arguments_of(daemon: Daemon, **variables: object) -> list[str]:
    """Return the arguments that the command of a task received."""
    number = daemon.run("site", "production", "deploy", **variables)
    daemon.ended(number)
    text = daemon.output_file(number).read_text()
    return text.split("\0")[:-1]


AS_03 = ["--conf-repo", "git@example:conf", "--conf-branch", "live"]
AS_1 = ["task", "site", "production", "deploy", "-c", "git@example:conf"]


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("echo 0.3.5", [*AS_03, "site", "production", "deploy"]),
        ("echo 'pulsar version 0.2'", [*AS_03, "site", "production", "deploy"]),
        ("echo 1.0.2", AS_1),
        ("echo 'Pulsar 12.4.0 (ruby 3.1)'", AS_1),
        ("echo 1.0 >&2; exit 1", [*AS_03, "site", "production", "deploy"]),
        ("echo 'what?'", [*AS_03, "site", "production", "deploy"]),
        (":", [*AS_03, "site", "production", "deploy"]),
    ],
)
def test_pulsar_version_decides_the_arguments(
    start: Start, tmp_path: Path, version: str, wanted: list[str]
) -> None:
    """The daemon asks once. Without a usable answer it assumes 0.3. It logs the choice."""
    daemon = start(
        *("--config-repo", "git@example:conf", "--config-branch", "live"),
        environ=install(tmp_path, version, ARGUMENTS),
    )
    assert arguments_of(daemon) == wanted
    assert arguments_of(daemon) == wanted
    assert (tmp_path / "asked").read_text() == "x\n"
    name = "pulsar-1" if wanted == AS_1 else "pulsar-0.3"
    assert f"using {name}" in daemon.log.read_text()


def test_missing_pulsar_fails_the_task_with_a_reason(start: Start, tmp_path: Path) -> None:
    """The daemon itself starts without it."""
    environ = {**os.environ, "PATH": f"{tmp_path}:{tmp_path}/none"}
    daemon = start(environ=environ)
    ended = daemon.ended(daemon.run("site", "production", "deploy"))
    assert ended["status"] == "failed"
    assert ended["reason"] == "cannot start pulsar: not found in PATH"


def test_task_waits_until_the_pulsar_version_is_known(start: Start, tmp_path: Path) -> None:
    """Its POST is neither lost nor refused, and the task suits the version."""
    go = tmp_path / "go"
    wait = f'while ! [ -e "{go}" ]; do sleep 0.01; done; echo 1.0'
    environ = install(tmp_path, wait, ARGUMENTS)
    daemon = start("--config-repo", "git@example:conf", environ=environ)
    body = json.dumps({"action": "deploy"})
    headers = {"Content-Type": "application/json"}
    with closing(daemon.connect()) as connection:
        connection.request("POST", "/site/production", body, headers)
        wait_for(lambda: daemon.has_read(connection.sock), "the daemon to read it")
        assert daemon.get("/tasks").json()["tasks"] == {}
        go.touch()
        answer = connection.getresponse()
        assert answer.status == 200
        number = json.loads(answer.read())["taskId"]
    daemon.ended(number)
    assert daemon.output_file(number).read_text().split("\0")[:-1] == AS_1


def test_pulsar_03_gets_variables_as_settings(start: Start, tmp_path: Path) -> None:
    """Each variable is one argument after ``-s``, whatever its value contains."""
    environ = install(tmp_path, "exit 9", ARGUMENTS)
    daemon = start("--command", "pulsar-0.3", environ=environ)
    # Without a repository the flag is absent too, as pulsar has its own settings.
    wanted = ["--conf-branch", "master", "site", "production", "deploy"]
    found = arguments_of(daemon, **VALUES)
    assert found[:5] == wanted
    pairs = list(zip(found[5::2], found[6::2], strict=True))
    assert pairs == [("-s", f"{key}={value}") for key, value in VALUES.items()]
    assert not (tmp_path / "asked").exists()


@pytest.fixture(scope="module")
def pulsar_1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon whose pulsar 1 runs the variable ``answer`` as shell code."""
    folder = tmp_path_factory.mktemp("pulsar")
    environ = install(folder, "exit 9", 'eval "$answer"')
    daemon = Daemon(folder, "--command", "pulsar-1", environ=environ)
    yield daemon
    daemon.stop()


def test_pulsar_1_gets_variables_in_its_environment(pulsar_1: Daemon) -> None:
    """They have their own names, and are not among the arguments."""
    found = arguments_of(pulsar_1, answer=f"{ARGUMENTS}; env -0", **VALUES)
    assert found[:4] == ["task", "site", "production", "deploy"]
    environment = dict(entry.partition("=")[::2] for entry in found[4:])
    assert VALUES.items() <= environment.items()
    assert environment["PULSAR_APP"] == "site"
    # This library makes Ruby print each line at once.
    assert "-rpulsar_live" in environment["RUBYOPT"].split()
    folders = environment["RUBYLIB"].split(":")
    assert any((Path(folder) / "pulsar_live.rb").is_file() for folder in folders)


@pytest.mark.parametrize("name", [*DANGEROUS, "PULSAR_CONF_REPO", "PULSAR_APP"])
def test_pulsar_1_variable_that_affects_programs_is_refused(
    pulsar_1: Daemon, name: str
) -> None:
    """No task is created."""
    request = {"action": "deploy", "variables": {name: "x"}}
    refused(pulsar_1, "/site/production", request, f"variables.{name}")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (f"echo begin; echo '{DONE}'", "finished"),
        (f"echo '{DONE}'; echo warning >&2", "finished"),
        (f"printf '{DONE}'", "finished"),
        (f"echo '{DONE}'; exit 1", "failed"),
        (f"echo '{DONE}'; echo 'but then it failed'", "failed"),
        (f"echo '{DONE}' >&2", "failed"),
        (f"echo ' {DONE}'", "failed"),
        ("echo 'Executed task deploy for other on production!'", "failed"),
        (":", "failed"),
    ],
)
def test_last_line_decides_whether_pulsar_1_succeeded(
    pulsar_1: Daemon, answer: str, status: str
) -> None:
    """Pulsar 1 always exits with 0. Its last line on stdout announces success."""
    number = pulsar_1.run("site", "production", "deploy", answer=answer)
    ended = pulsar_1.ended(number)
    assert ended["status"] == status
    if status == "failed" and ended["exitCode"] == 0:
        assert ended["reason"] == (
            "The exit code is 0, but the last line of stdout is not the expected one."
        )
    else:
        assert ended["reason"] is None
