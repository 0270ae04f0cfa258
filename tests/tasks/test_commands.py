"""Tests of commands: the exact arguments of each preset, and refused values."""

import re
import shlex
import subprocess

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from pulsar_api.errors import InvalidInput, SettingsError
from pulsar_api.tasks.accounts import Accounts
from pulsar_api.tasks.commands import Commands, Names, shown
from pulsar_api.tasks.model import Account, Command, TaskSpec
from pulsar_api.tasks.presets import PRESETS, Template, parse_template, preset_for
from pulsar_api.tasks.targets import Target
from tests.fakes import person

SPEC = TaskSpec(
    "site", "production", "deploy", {"branch": "main", "tag": "a b"}, person("alice")
)
BASE = {"PATH": "/bin", "HOME": "/home/d", "NOTIFY_SOCKET": "/run/x", "PULSAR_VAR_old": "1"}


def commands(name: str, repo: str | None = "/conf") -> Commands:
    """Return the commands of a preset or template."""
    return Commands(parse_template(name), BASE, repo)


@pytest.mark.parametrize(
    ("name", "repo", "arguments", "directory"),
    [
        (
            "pulsar-0.3",
            "/conf",
            (
                "pulsar --conf-repo /conf --conf-branch master site production deploy "
                "-s branch=main -s 'tag=a b'"
            ),
            None,
        ),
        (
            "pulsar-0.3",
            None,
            (
                "pulsar --conf-branch master site production deploy "
                "-s branch=main -s 'tag=a b'"
            ),
            None,
        ),
        ("pulsar-1", "/conf", "pulsar task site production deploy -c /conf", None),
        ("pulsar-1", None, "pulsar task site production deploy", None),
        (
            "capistrano",
            "/conf",
            "cap -f /conf/apps/site/Capfile production deploy branch=main 'tag=a b'",
            "/conf/apps/site",
        ),
        ("scripts", "/conf", "/conf/apps/site/deploy", "/conf/apps/site"),
        (
            "run --for={user} '{app} on {env}' --repo={config_repo} {id} {variables}",
            None,
            "run --for=alice 'site on production' 7 branch=main 'tag=a b'",
            None,
        ),
    ],
)
def test_each_preset_is_this_list_of_arguments(
    name: str, repo: str | None, arguments: str, directory: str | None
) -> None:
    """The list is exact, with and without a configuration repository."""
    command = commands(name, repo).command(SPEC, 7)
    assert command.arguments == tuple(shlex.split(arguments))
    assert command.directory == directory


def test_a_task_finds_its_own_facts_in_its_environment() -> None:
    """These are its name, number, user and variables."""
    environment = commands("scripts").command(SPEC, 7).environment
    ours = {k: v for k, v in environment.items() if k.startswith("PULSAR_")}
    assert ours == {
        "PULSAR_APP": "site",
        "PULSAR_ENV": "production",
        "PULSAR_ACTION": "deploy",
        "PULSAR_TASK_ID": "7",
        "PULSAR_USER": "alice",
        "PULSAR_VAR_branch": "main",
        "PULSAR_VAR_tag": "a b",
    }


def test_a_task_does_not_get_the_variables_of_the_daemon() -> None:
    """Variables from systemd and those of an outer task are left out."""
    environment = commands("scripts").command(SPEC, 7).environment
    assert "NOTIFY_SOCKET" not in environment
    assert "PULSAR_VAR_old" not in environment
    assert environment["HOME"] == "/home/d"


def test_only_pulsar_1_gets_variables_under_their_own_names() -> None:
    """It accepts variables in no other way."""
    assert commands("pulsar-1").command(SPEC, 7).environment["branch"] == "main"
    assert "branch" not in commands("pulsar-0.3").command(SPEC, 7).environment


def test_ruby_programs_print_at_once() -> None:
    """Existing options stay. RAKEOPT is not set, because cap would read it as options."""
    base = {**BASE, "RUBYOPT": "-W0", "RUBYLIB": "/lib", "RAKEOPT": "-e x"}
    environment = (
        evolve(commands("capistrano"), environment=base).command(SPEC, 1).environment
    )
    assert environment["RUBYOPT"] == "-W0 -rpulsar_live"
    assert environment["RUBYLIB"].endswith("pulsar_api/ruby:/lib")
    assert "RAKEOPT" not in environment
    assert "RUBYOPT" not in commands("scripts").command(SPEC, 1).environment


def test_pulsar_1_must_print_a_last_line() -> None:
    """It exits with 0 even after a failure."""
    command = commands("pulsar-1").command(SPEC, 1)
    assert command.last_line == "Executed task deploy for site on production!"
    assert commands("pulsar-0.3").command(SPEC, 1).last_line is None


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("1.0.2\n", "pulsar-1"),
        ("2.1", "pulsar-1"),
        ("0.3.5", "pulsar-0.3"),
        ("", "pulsar-0.3"),
        ("error: no such option", "pulsar-0.3"),
    ],
)
def test_the_version_chooses_the_preset(said: str, name: str) -> None:
    """Without a usable version the old preset is used."""
    assert preset_for(said) == name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("'", "cannot be split"),
        ("", "must begin with a program"),
        ("{app} x", "must begin with a program"),
        ("deploy {nonsense}", "{nonsense} is unknown"),
        ("deploy --v={variables}", "an argument of its own"),
    ],
)
def test_a_wrong_template_is_refused(text: str, why: str) -> None:
    """The refusal comes at the start of the daemon, not at the first deployment."""
    with pytest.raises(SettingsError, match=re.escape(why)):
        parse_template(text)


BAD_NAMES = [
    "",
    "-x",
    "--conf-repo=x$(id)",
    "a;b",
    "$(id)",
    "`id`",
    "a\nb",
    "a\n",
    "a\0b",
    "..",
    "a..b",
    "a/b",
    "*",
    "a,b",
    "a b",
    "\u00e4",
    "x" * 10_000,
    ".hidden",
]


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("field", ["app", "env", "action"])
@pytest.mark.parametrize("bad", BAD_NAMES)
def test_names_that_a_program_could_misread_are_refused(
    name: str, field: str, bad: str
) -> None:
    """Every preset refuses them, and the error names the field."""
    with pytest.raises(InvalidInput) as raised:
        commands(name).command(evolve(SPEC, variables={}, **{field: bad}), 1)  # type: ignore[arg-type]
    assert raised.value.field == field


@pytest.mark.parametrize("action", ["deploy[x]", "deploy[a,b c]", "db:seed[x:1,y.z/w]"])
def test_only_capistrano_accepts_arguments_of_an_action(action: str) -> None:
    """They are part of the single argument that names the task."""
    spec = evolve(SPEC, action=action, variables={})
    assert commands("capistrano").command(spec, 1).arguments[-1] == action
    for name in ("pulsar-0.3", "pulsar-1", "scripts", "run {action}"):
        with pytest.raises(InvalidInput):
            commands(name).command(spec, 1)


@pytest.mark.parametrize("arguments", ["", "[]", "[now]"])
def test_the_arguments_of_an_action_do_not_change_the_account(arguments: str) -> None:
    """Rake reads ``deploy[]`` as ``deploy``, and so do the settings."""
    deploy, other = (Account(name, 1, 1, (1,), "/") for name in ("deploy", "other"))
    accounts = Accounts((((Target("*", "*", "deploy"),), deploy), ((Target(),), other)))
    made = evolve(commands("capistrano"), accounts=accounts)
    spec = evolve(SPEC, action=f"deploy{arguments}")
    assert made.command(spec, 1).account == deploy
    only = evolve(made, accounts=Accounts(accounts.tables[:1]))
    only.check(spec)


@pytest.mark.parametrize(
    "action", ["d[", "d]", "d[x]y", "d[[x]]", "d[a\nB=1]", "d[a=1]", "[x]"]
)
def test_other_brackets_are_refused(action: str) -> None:
    """Rake would read some of them as settings, and run nothing."""
    with pytest.raises(InvalidInput, match="action"):
        commands("capistrano").command(evolve(SPEC, action=action), 1)


def test_the_length_of_an_action_with_arguments_is_limited() -> None:
    """The limit is that of every action."""
    with pytest.raises(InvalidInput, match="200"):
        commands("capistrano").check(evolve(SPEC, action=f"d[{'x' * 200}]"))


@pytest.mark.parametrize("key", ["", "1a", "-s", "a b", "a=b", "\u00e4", "a\n", "x\0"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_keys_that_are_not_names_are_refused(name: str, key: str) -> None:
    """Every preset refuses them."""
    with pytest.raises(InvalidInput, match="variables"):
        commands(name).check(evolve(SPEC, variables={key: "x"}))


@pytest.mark.parametrize(
    "key",
    ["PATH", "HOME", "BASH_ENV", "RUBYOPT", "LD_PRELOAD", "GIT_SSH_COMMAND", "PULSAR_APP"],
)
@pytest.mark.parametrize("name", ["pulsar-1", "capistrano"])
def test_variables_that_change_how_programs_work_are_refused(name: str, key: str) -> None:
    """They matter for presets that set variables under their own names."""
    with pytest.raises(InvalidInput, match=key):
        commands(name).check(evolve(SPEC, variables={key: "x"}))
    commands("scripts").check(evolve(SPEC, variables={key: "x"}))


def test_rake_takes_only_words_as_keys() -> None:
    """Rake would read any other key as a task."""
    with pytest.raises(InvalidInput, match=r"variables\.a-b"):
        commands("capistrano").check(evolve(SPEC, variables={"a-b": "x"}))
    commands("scripts").check(evolve(SPEC, variables={"a-b.c": "x"}))


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({f"k{i}": "" for i in range(101)}, "at most 100"),
        ({"k": "x" * 70_000}, "65536 bytes"),
        ({"k": "a\0b"}, "NUL"),
        ({"k": "\ud800"}, "surrogate"),
    ],
)
def test_variables_are_limited(variables: dict[str, str], why: str) -> None:
    """The limits are for their number, their size, and values that an exec accepts."""
    with pytest.raises(InvalidInput, match=why):
        commands("scripts").check(evolve(SPEC, variables=variables))


def test_patterns_come_from_the_settings() -> None:
    """A name can never begin an option, whatever the pattern."""
    names = Names(app=re.compile(r"\S+"), forbidden_actions=frozenset({"shell"}))
    loose = evolve(commands("run {app}"), names=names)
    assert loose.command(evolve(SPEC, app="a/b"), 1).arguments == ("run", "a/b")
    with pytest.raises(InvalidInput, match="must not begin with -"):
        loose.command(evolve(SPEC, app="-x"), 1)
    with pytest.raises(InvalidInput, match="forbid"):
        loose.check(evolve(SPEC, action="shell"))


_ALL = re.compile(r"(?s:.*)")
ANYTHING = Names(_ALL, _ALL, _ALL, _ALL)
"""The settings of an operator who wants to allow everything."""
NO_NAMES = [
    *("", "-x", "--config", "-"),
    *("deploy\0LD_PRELOAD=/tmp/x.so", "a\nTask 5 finished:", "a\rb", "a\x1b[2K", "a\x7f"),
    *("a\x85b", "a\u2028b", "\u202eyolped", "\ud800", "a\udfff"),
]


def everything_allowed(name: str) -> Commands:
    """Return the commands of a preset, with patterns that match everything."""
    return evolve(commands(name), names=ANYTHING)


@pytest.mark.parametrize("name", [*PRESETS, "run --for={user} {app} {env} {action}"])
@pytest.mark.parametrize("field", ["app", "env", "action", "user"])
@pytest.mark.parametrize("bad", NO_NAMES, ids=ascii)
def test_no_pattern_allows_a_dangerous_name(name: str, field: str, bad: str) -> None:
    """A name has no NUL, no line end, nothing invisible, and begins no option."""
    loose = everything_allowed(name)

    def called(text: str) -> TaskSpec:
        value = person(text) if field == "user" else text
        return evolve(SPEC, variables={}, **{field: value})  # type: ignore[arg-type]

    with pytest.raises(InvalidInput) as raised:
        loose.check(called(bad))
    assert raised.value.field == field
    loose.check(called("to be - ö; $(id)"))


@pytest.mark.parametrize("name", [*PRESETS, "run {variables}"])
@pytest.mark.parametrize("bad", [*NO_NAMES, "x=1\0FORGED", "a=b", "=", "LD_PRELOAD=x"])
def test_no_pattern_allows_a_dangerous_key(name: str, bad: str) -> None:
    """Nor does one allow a sign that would split a key into a name and a value."""
    with pytest.raises(InvalidInput) as raised:
        everything_allowed(name).check(evolve(SPEC, variables={bad: "1"}))
    assert raised.value.field == f"variables.{bad}"


@pytest.mark.parametrize("field", ["app", "env"])
def test_a_listing_checks_names_like_a_task(field: str) -> None:
    """A listing runs a program with them, too."""
    for bad in NO_NAMES:
        names = {"app": "site", "env": "production", field: bad}
        with pytest.raises(InvalidInput) as raised:
            everything_allowed("scripts").listing(**names)
        assert raised.value.field == field


values = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50
)
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@given(st.dictionaries(keys, values, max_size=5))
def test_each_value_is_exactly_one_argument(variables: dict[str, str]) -> None:
    """Its characters do not matter."""
    spec = evolve(SPEC, variables=variables)
    arguments = commands("pulsar-0.3").command(spec, 1).arguments
    expected = [part for k, v in variables.items() for part in ("-s", f"{k}={v}")]
    assert list(arguments[8:]) == expected
    own = commands("run {variables}").command(spec, 1)
    assert own.arguments == ("run", *(f"{k}={v}" for k, v in variables.items()))


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_each_name_becomes_exactly_one_argument_or_is_refused(
    app: str, env: str, action: str
) -> None:
    """An accepted name arrives unchanged, and never begins an option."""
    spec = TaskSpec(app, env, action)
    try:
        arguments = commands("run {app} {env} {action}").command(spec, 1).arguments
    except InvalidInput:
        return
    assert arguments == ("run", app, env, action)
    assert not any(argument.startswith("-") for argument in arguments)


def test_a_command_is_shown_as_one_line() -> None:
    """The line is quoted for people."""
    command = Commands(Template(("a", "b c", "$d")), {}).command(SPEC, 1)
    assert shown(command) == "a 'b c' '$d'"


def test_a_shown_command_is_one_line_whatever_its_values() -> None:
    """Unprintable characters are escaped, so that a log has one line per command."""
    data = [bytes([n]) for n in range(1, 256)]
    texts = [n.decode("utf-8", "surrogateescape") for n in data]
    texts += ["", "a\nTask 5 finished:", "\r'\\\n", "\x85 \u2028", "ü\t𝄞", "\u202e1"]
    line = shown(Command(("printf", r"%s\0", *texts), {}))
    assert line.isprintable()
    told = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    expected = [text.encode("utf-8", "surrogateescape") for text in texts]
    assert told.split(b"\0")[:-1] == expected


@pytest.mark.parametrize("name", list(PRESETS))
def test_secrets_are_arguments_only_if_the_program_accepts_nothing_else(name: str) -> None:
    """The environment has them, and the shown command has a mask."""
    asked = evolve(SPEC, variables={"DB_TOKEN": "abc d", "stage": "x"})
    spec, secrets = commands(name).split(asked)
    assert spec.variables == {"DB_TOKEN": "***", "stage": "x"}
    assert spec.secret_names == {"DB_TOKEN"}
    assert secrets == {"DB_TOKEN": "abc d"}
    made = commands(name).command(spec, 1, secrets)
    assert made.environment["PULSAR_VAR_DB_TOKEN"] == "abc d"
    own_name = made.environment.get("DB_TOKEN") == "abc d"
    assert own_name is (name in {"pulsar-1", "capistrano"})
    assert ("abc d" in shown(made)) is (name == "pulsar-0.3")
    assert "abc d" not in repr(made) or name == "pulsar-0.3"
    assert "abc d" not in shown(commands(name).command(spec, 1))
