"""Tests that malformed names start nothing, and that allowed values arrive unchanged."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes, urlencode

import pytest

from tests.integration.daemon import Answer, Daemon, next_answer, problem

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"

NASTY = [
    # options of the next program
    *("-", "-x", "--help", "--conf-repo=x$(id)", "-c", "+x"),
    # words and commands of a shell
    *(";", "a;b", "a;touch x", "$(touch x)", "`touch x`", "$HOME", "${IFS}", "'; id; '"),
    *("a|b", "a&b", "a&&b", "a>b", "a<b", "a b", "a\tb", "~", "~root", "!x", "#x", "a=b"),
    *("'", '"', "\\", "a\\"),
    # line breaks, ends of strings, control characters
    *("a\n", "\na", "a\nb", "a\r\nX-Header: y", "a\0b", "\0", "a\x7f", "\x1b[31m"),
    # paths
    *(".", "..", "../x", "a/b", "/etc/passwd", "%2F", "a%2Fb", "%2e%2e", ".hidden"),
    # globs and lists
    *("*", "a*", "?", "[a]", "a[b]", "{a,b}", "a,b", ","),
    # placeholders of templates and formats
    *("{app}", "{config_repo}", "{variables}", "{0}", "%s", "%(x)s"),
    # other alphabets, and characters that look like ASCII
    *("é", "\N{FULLWIDTH LATIN SMALL LETTER A}", "\N{CYRILLIC SMALL LETTER A}"),
    *("a\N{ZERO WIDTH SPACE}", "\N{RIGHT-TO-LEFT OVERRIDE}a", "\ufeffa"),
    *("\N{ARABIC-INDIC DIGIT THREE}", "𝄞"),
    "-" * 10_000,
]
NAMES = [*NASTY, "a..b", "x" * 10_000]
KEYS = [*NASTY, "1a", "", "a b"]
NO_TEXT = [
    *(b"\xff", b"a\xff", b"\x80", b"\xc0\xaf", b"\xc3", b"\xed\xa0\x80"),
    *(b"\xf5\x80\x80\x80", b"\xfe\xff", b"a\xe9", b"\xff\xfea\0"),
]
NO_OBJECT = [
    *("", " ", "[]", "[1]", '["action"]', "null", "true", "false", "0", "-1", "1.5"),
    *('"action"', '"{}"', "NaN", "Infinity", "{", "}", "{]", '{"action": "x"', "{'a': 1}"),
    *('{"action": "x",}', '{"action": "x"} x', '{action: "x"}', '\ufeff{"action": "x"}'),
    *('{"action": "x", "n": NaN}', '{"action": "x", "n": -Infinity}', '{"action": "x\n"}'),
    *('{"action": "x", "n": 01}', '{"action": "x", "n": 1' + "0" * 5000 + "}"),
    *("[" * 100_000, '{"action":' * 50_000, '{"action": "x", "n": ' + "[" * 100_000),
    *('{"variables": {"a": ' * 30_000, "\0", "action=x"),
]
NO_NAME = [
    "1",
    "1.5",
    "true",
    "false",
    "null",
    "[]",
    '["x"]',
    "{}",
    '{"x": "y"}',
    '"\\ud800"',
]
NO_VALUE = [
    *("true", "false", "null", "[]", '["x"]', "{}", '{"x": "y"}', "[[[[]]]]"),
    *(
        '"\\u0000"',
        '"a\\u0000b"',
        '"\\ud800"',
        '"\\udc80"',
        '"a\\udfff"',
        '"\\udc00\\ud800"',
    ),
    *("1e999", "-1e999"),
]

PRINT = """\
#!/bin/sh
touch {marker}
cat /proc/$$/cmdline
printf '\\0'
cat /proc/$$/environ
"""


class Printer:
    """A daemon whose only program prints its arguments and environment, byte for byte."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.marker = folder / "marker"
        """This file exists as soon as the program has run."""
        self.program = folder / "print arguments"
        self.program.write_text(PRINT.format(marker=shlex.quote(str(self.marker))))
        self.program.chmod(0o755)
        template = (
            f"{shlex.quote(str(self.program))} {{app}} {{env}} {{action}} {{variables}}"
        )
        self.daemon = Daemon(folder, *options, "--command", template)

    def traces(self) -> tuple[set[str], set[str], bool]:
        """Return the recorded tasks, those with a folder, and whether the program ran."""
        tasks = set(self.daemon.get("/tasks?limit=1000").json()["tasks"])
        folders = {path.name for path in self.daemon.state.glob("tasks/*")}
        return tasks, folders, self.marker.exists()

    def post(self, path: str, body: str | bytes = b"", kind: str = "") -> Answer:
        """Send a POST with a path that is not encoded or changed."""
        headers = {"Content-Type": kind} if kind else {}
        body = body.encode() if isinstance(body, str) else body
        return self.daemon.request("POST", path, body, headers)

    def given(self, answer: Answer) -> tuple[list[bytes], dict[bytes, bytes]]:
        """Return the arguments and the environment of the program in a new task."""
        assert answer.status == 200, answer.body
        number = answer.json()["id"]
        assert self.daemon.ended(number)["status"] == "finished"
        data = self.daemon.output_file(number).read_bytes()
        # No argument in these tests is empty, so two NULs are their end.
        shell, script, *arguments = data.partition(b"\0\0")[0].split(b"\0")
        assert (shell, script) == (b"/bin/sh", bytes(self.program))
        environment = data.partition(b"\0\0")[2].rstrip(b"\0").split(b"\0")
        pairs = (line.partition(b"=") for line in environment)
        return arguments, {key: value for key, _, value in pairs}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printer]:
    """Return a daemon on which no test creates a task."""
    printer = Printer(tmp_path_factory.mktemp("refusing"))
    yield printer
    printer.daemon.stop()


@pytest.fixture
def refusing(shared: Printer) -> Iterator[Printer]:
    """Return a daemon that must neither create a task nor log a traceback."""
    log = shared.daemon.log
    begin = log.stat().st_size
    # This is empty, unless an earlier test failed and left something.
    before = shared.traces()
    yield shared
    assert shared.traces() == before
    assert b"Traceback" not in log.read_bytes()[begin:]


@pytest.fixture(scope="module")
def printer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printer]:
    """Return a daemon that runs tasks."""
    printer = Printer(tmp_path_factory.mktemp("running"))
    yield printer
    printer.daemon.stop()
    assert "Traceback" not in printer.daemon.log.read_text()


def short(value: object) -> str:
    """Return the id of a parameter."""
    return ascii(value)[:40]


def refused(answer: Answer, field: str) -> None:
    """Check that a response is a 4xx problem for a field."""
    assert 400 <= answer.status < 500, answer.body
    problem(answer, answer.status, field)


# -- names


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_nasty_names_in_the_url_answer_4xx(refusing: Printer, name: str) -> None:
    """Each name is tried as app and as env, with every byte percent-encoded."""
    encoded = quote(name, safe="")
    refused(refusing.post(f"/{encoded}/production?action=run"), "app")
    refused(refusing.post(f"/site/{encoded}?action=run"), "env")


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_nasty_actions_answer_4xx(refusing: Printer, name: str) -> None:
    """They are tried in JSON (escaped and not), in a form, and in the query."""
    site = "/site/production"
    for escaped in (True, False):
        body = json.dumps({"action": name}, ensure_ascii=escaped)
        refused(refusing.post(site, body, JSON), "action")
        # An action in the body is not replaced by an allowed one in the query.
        refused(refusing.post(f"{site}?action=run", body, JSON), "action")
    refused(refusing.post(site, urlencode({"action": name}), FORM), "action")
    refused(refusing.post(f"{site}?{urlencode({'action': name})}"), "action")


@pytest.mark.parametrize("key", KEYS, ids=short)
def test_nasty_keys_of_variables_answer_400(refusing: Printer, key: str) -> None:
    """They are tried in JSON and in a form.

    The field names the variable, shortened if long.
    """
    json_body = json.dumps({"action": "run", "variables": {key: "x"}})
    form_body = urlencode({"action": "run", f"variables[{key}]": "x"})
    for body, kind in ((json_body, JSON), (form_body, FORM)):
        answer = refusing.post("/site/production", body, kind)
        found = problem(answer, 400, answer.json()["field"])
        assert found["field"].startswith(f"variables.{key[:50]}")


def test_half_a_surrogate_pair_in_a_key_answers_400(refusing: Printer) -> None:
    """JSON can express it, but a response cannot repeat it."""
    for key in ("\\ud800", "a\\udfff", "\\udc80"):
        body = f'{{"action": "run", "variables": {{"{key}": "x"}}}}'
        answer = refusing.post("/site/production", body, JSON)
        assert answer.status == 400, answer.body
        found = problem(answer, 400, answer.json()["field"])
        assert found["field"].startswith("variables")


def test_raw_bytes_in_the_url_answer_400(refusing: Printer) -> None:
    """A client should percent-encode them, but an attacker need not."""
    daemon = refusing.daemon
    for app in (b"\xff", "é".encode(), b"a\x01b", b"a\\b", b"*", b"$(id)", b"`id`", b"a;b"):
        with daemon.open_socket() as sock:
            sock.sendall(
                b"POST /" + app + b"/production?action=run HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 0\r\n\r\n"
            )
            answer = next_answer(sock)
        assert answer.status == 400
        problem(answer, 400, answer.json().get("field"))


@pytest.mark.parametrize(
    "path",
    [
        "//production",
        "/site/",
        "/site//production",
        "/site/production/more",
        "/site",
        "/./site/production",
        "/x/../site/production",
        "/site/%2e%2e/production",
        "/site%2Fproduction",
        "/site%2fproduction/x%2f..",
        "/;/production/x",
    ],
)
def test_paths_of_another_form_answer_4xx(refusing: Printer, path: str) -> None:
    """The daemon does not join, cut or normalise a path until it has two names."""
    answer = refusing.post(f"{path}?action=run")
    assert answer.status in {400, 404, 405}
    problem(answer, answer.status, answer.json().get("field"))


# -- limits that settings cannot lift

ALL = "".join(f"{name}-pattern = '(?s:.*)'\n" for name in ("app", "env", "action"))


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printer]:
    """Return a daemon whose settings allow every name."""
    folder = tmp_path_factory.mktemp("loose")
    (folder / "all.toml").write_text(f"{ALL}variable-pattern = '(?s:.*)'\n")
    printer = Printer(folder, "--config", str(folder / "all.toml"))
    yield printer
    printer.daemon.stop()
    assert "Traceback" not in printer.daemon.log.read_text()


UNNAMEABLE = [
    *("deploy\0LD_PRELOAD=/tmp/x.so", "\0", "-x", "--config", "", "a\nTask 1 killed: x"),
    *("a\r\nb", "\x1b]0;x\x07", "a\x85b", "a\u2028b"),
]


@pytest.mark.parametrize("name", UNNAMEABLE, ids=short)
def test_a_pattern_that_allows_everything_allows_no_forgery(
    loose: Printer, name: str
) -> None:
    """A name cannot add a variable, an option or a line of the log.

    Each response has the field.
    """
    encoded = quote(name, safe="")
    site = "/site/production"
    if name:
        refused(loose.post(f"/{encoded}/production?action=run"), "app")
        refused(loose.post(f"/site/{encoded}?action=run"), "env")
    refused(loose.post(site, json.dumps({"action": name}), JSON), "action")
    refused(loose.post(f"{site}?action={encoded}"), "action")
    for key in (name, "x=1\0FORGED", "a=b"):
        body = json.dumps({"action": "run", "variables": {key: "1"}})
        refused(loose.post(site, body, JSON), f"variables.{key}")
        form = urlencode({"action": "run", f"variables[{key}]": "1"})
        refused(loose.post(site, form, FORM), f"variables.{key}")
    if "\0" in name:
        refused(loose.daemon.get(f"/tasks?user={encoded}"), "user")
    assert not loose.marker.exists()


def test_a_value_of_several_lines_is_one_line_of_the_log(loose: Printer) -> None:
    """The program gets the value unchanged. The log and the task show it escaped."""
    value = "1\nTask 7 killed: x\r\x1b[2K"
    body = json.dumps({"action": "let's go", "variables": {"to be": value}})
    arguments, _ = loose.given(loose.post("/my%20site/production", body, JSON))
    expected = ["my site", "production", "let's go", f"to be={value}"]
    assert arguments == [text.encode() for text in expected]
    lines = loose.daemon.log.read_text().split("\n")
    assert not any(line.lstrip().startswith("Task 7") for line in lines)
    assert not any("\r" in line or "\x1b" in line for line in lines)
    [task] = loose.daemon.get("/tasks").json()["tasks"].values()
    assert task["command"].endswith(r" $'to be=1\nTask 7 killed: x\r\033[2K'")
    loose.marker.unlink()


# -- bytes, bodies, types


@pytest.mark.parametrize("data", NO_TEXT, ids=short)
def test_invalid_utf_8_answers_4xx_everywhere(refusing: Printer, data: bytes) -> None:
    """The daemon never guesses an encoding, neither in the URL nor in a form or JSON."""
    encoded = quote_from_bytes(data, safe="")
    site = "/site/production"
    refused(refusing.post(f"/{encoded}/production?action=run"), "app")
    refused(refusing.post(f"/site/{encoded}?action=run"), "env")
    refused(refusing.post(f"{site}?action={encoded}"), "query")
    refused(refusing.post(f"{site}?action=run&x={encoded}"), "query")
    refused(refusing.post(f"{site}?action=run", f"action={encoded}", FORM), "body")
    form = f"action=run&variables[a]={encoded}"
    refused(refusing.post(site, form, FORM), "body")
    refused(refusing.post(site, f"action=run&variables[{encoded}]=x", FORM), "body")
    refused(refusing.post(site, b"action=run&variables[a]=" + data, FORM), "body")
    refused(refusing.post(site, b'{"action": "' + data + b'"}', JSON), "body")
    body = b'{"action": "run", "variables": {"a": "' + data + b'"}}'
    refused(refusing.post(site, body, JSON), "body")
    refused(refusing.post(f"{site}?action=run", data, JSON), "body")


@pytest.mark.parametrize("body", NO_OBJECT, ids=short)
def test_a_body_that_is_no_json_object_answers_4xx(refusing: Printer, body: str) -> None:
    """Deep nesting does not matter, nor a query that alone would be enough."""
    refused(refusing.post("/site/production", body, JSON), "body")
    refused(refusing.post("/site/production?action=run", body, JSON), "body")


@pytest.mark.parametrize("value", NO_NAME)
def test_an_action_that_is_no_string_answers_4xx(refusing: Printer, value: str) -> None:
    """A number is not converted to a string, and null is not replaced by the query."""
    body = f'{{"action": {value}}}'
    refused(refusing.post("/site/production", body, JSON), "action")
    refused(refusing.post("/site/production?action=run", body, JSON), "action")


@pytest.mark.parametrize("value", ["1", "true", "null", "[]", '["a=b"]', '"a=b"', '""'])
def test_variables_that_are_no_object_answer_4xx(refusing: Printer, value: str) -> None:
    """The field is ``variables``."""
    body = f'{{"action": "run", "variables": {value}}}'
    refused(refusing.post("/site/production", body, JSON), "variables")
    form = urlencode({"action": "run", "variables": value})
    refused(refusing.post("/site/production", form, FORM), "variables")


@pytest.mark.parametrize("value", NO_VALUE)
def test_a_value_that_is_no_string_or_number_answers_4xx(
    refusing: Printer, value: str
) -> None:
    """Strings with NUL or half a surrogate pair and infinite numbers are refused too."""
    body = f'{{"action": "run", "variables": {{"good": "x", "bad": {value}}}}}'
    refused(refusing.post("/site/production", body, JSON), "variables.bad")


def test_nul_in_a_value_of_a_form_answers_4xx(refusing: Printer) -> None:
    """No program can receive NUL in an argument."""
    form = "action=run&variables[bad]=a%00b"
    refused(refusing.post("/site/production", form, FORM), "variables.bad")


def test_a_body_of_another_content_type_is_refused(refusing: Printer) -> None:
    """JSON needs the media type of JSON, and a form needs that of forms."""
    body = '{"action": "run"}'
    site = "/site/production"
    for kind in ("", "text/plain", "text/json", "application/xml", "multipart/form-data"):
        problem(refusing.post(site, body, kind), 415)
        problem(refusing.post(f"{site}?action=run", body, kind), 415)
    refused(refusing.post(site, body, FORM), "action")
    refused(refusing.post(site, "action=run", JSON), "body")


# -- bounds


def test_one_more_than_the_limits_answers_4xx(refusing: Printer) -> None:
    """Names, the number and size of variables, and the fields of a query are limited."""
    site = "/site/production"

    def variables(values: Mapping[str, object]) -> Answer:
        body = json.dumps({"action": "run", "variables": values})
        return refusing.post(site, body, JSON)

    refused(refusing.post(f"/{'x' * 101}/production?action=run"), "app")
    refused(refusing.post(f"/site/{'x' * 101}?action=run"), "env")
    refused(refusing.post(f"{site}?action={'x' * 201}"), "action")
    refused(variables({f"v{i}": "" for i in range(101)}), "variables")
    refused(variables({"a": "x" * 65536}), "variables")
    refused(variables({"a": "é" * 32768}), "variables")
    refused(variables({"a" * 65537: ""}), "variables")
    refused(variables({"a": "x" * 32768, "b": "x" * 32768}), "variables")
    query = "&".join(f"q{i}=x" for i in range(1000))
    refused(refusing.post(f"{site}?action=run&{query}"), "query")
    refused(refusing.post(site, f"action=run&{query}", FORM), "body")


def test_names_and_variables_of_exactly_the_limits_arrive(printer: Printer) -> None:
    """Names have 100 characters, an action has 200; there are 100 variables with 64 KiB."""
    app, env, action = "A" + ".-_z9" * 19 + "Abcd", "_" * 100, "a:b." * 50
    values = {f"v{i:02}": "" for i in range(99)}
    values["last"] = "x" * (65536 - 99 * 3 - 4)
    body = json.dumps({"action": action, "variables": values})
    arguments, environment = printer.given(printer.post(f"/{app}/{env}", body, JSON))
    assert arguments[:3] == [app.encode(), env.encode(), action.encode()]
    assert arguments[3:] == [f"{key}={value}".encode() for key, value in values.items()]
    assert environment[b"PULSAR_VAR_last"] == values["last"].encode()
    arguments, _ = printer.given(printer.post("/0/_", json.dumps({"action": "9"}), JSON))
    assert arguments == [b"0", b"_", b"9"]
    key = "k" * 10_000
    body = json.dumps({"action": "run", "variables": {key: "x"}})
    arguments, _ = printer.given(printer.post("/site/production", body, JSON))
    assert arguments[3:] == [f"{key}=x".encode()]


# -- allowed values arrive unchanged


VALUES = [
    *("", " ", "  a  b  ", "\t", "'", '"', "''", '"$x"', "\\", "a\\nb", "\\0", "`id`"),
    *(
        "$(id)",
        "$HOME",
        "${IFS}",
        "; id",
        "| id",
        "&& id",
        "> x",
        "# x",
        "!!",
        "~",
        "*",
        "?",
    ),
    *("-", "-x", "--", "--help", "--conf-repo=x$(id)", "=", "a=b=c", "==", "key=value"),
    *("\n", "a\nb", "\r\n", "a\n", "\n\n\n", "\x01\x07\x08\x1b[31m\x7f", "\u0085\u2028"),
    *(
        "ünï€𝄞",
        "\N{RIGHT-TO-LEFT OVERRIDE}",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
        "é",
        "e\u0301",
    ),
    *(
        "{app}",
        "{variables}",
        "{key}",
        "{0}",
        "{",
        "}",
        "%s",
        "%(x)s",
        "%00",
        "%0A",
        "+",
        "&",
    ),
    *("../../etc/passwd", "C:\\x", "x" * 10_000, "€" * 3_000, "null", "true", "[1]"),
]


def checked(
    given: tuple[list[bytes], dict[bytes, bytes]], values: Mapping[str, str]
) -> None:
    """Check that each variable is one argument and one environment variable."""
    arguments, environment = given
    assert arguments[:3] == [b"site", b"production", b"run"]
    assert arguments[3:] == [f"{key}={value}".encode() for key, value in values.items()]
    found = {k: v for k, v in environment.items() if k.startswith(b"PULSAR_VAR_")}
    wanted = {f"PULSAR_VAR_{key}".encode(): v.encode() for key, v in values.items()}
    assert found == wanted


@pytest.mark.parametrize("kind", [JSON, FORM])
def test_any_text_arrives_as_one_argument_byte_for_byte(
    printer: Printer, kind: str
) -> None:
    """No shell, template or encoding changes it."""
    values = {f"v{i}": value for i, value in enumerate(VALUES)}
    assert len(values) <= 100
    if kind == FORM:
        fields = {f"variables[{key}]": value for key, value in values.items()}
        answer = printer.post("/site/production?action=run", urlencode(fields), FORM)
    else:
        body = json.dumps({"action": "run", "variables": values})
        answer = printer.post("/site/production", body, JSON)
    checked(printer.given(answer), values)
    assert printer.daemon.task(answer.json()["id"])["variables"] == values


def test_json_escapes_and_numbers_arrive_decoded(printer: Printer) -> None:
    """A surrogate pair becomes one character, and a number becomes its text."""
    body = (
        '{"action": "run", "variables": {"a": "\\ud83d\\ude00", "b": "\\u0041\\/\\"",'
        ' "c": 0, "d": -5, "e": 1.5, "f": 1000000000000000000000000000000, "g.h-i": "x"}}'
    )
    values = {
        "a": "😀",
        "b": 'A/"',
        "c": "0",
        "d": "-5",
        "e": "1.5",
        "f": "1" + "0" * 30,
        "g.h-i": "x",
    }
    checked(printer.given(printer.post("/site/production", body, JSON)), values)


def test_no_variable_changes_the_environment_of_the_program(printer: Printer) -> None:
    """Each variable is in the environment only as ``PULSAR_VAR_`` and its name."""
    names = "PATH HOME IFS ENV BASH_ENV LD_PRELOAD RUBYOPT PULSAR_APP PYTHONPATH".split()
    values: dict[str, Any] = dict.fromkeys(names, "/evil")
    plain = printer.given(printer.post("/site/production?action=run"))[1]
    body = json.dumps({"action": "run", "variables": values})
    given = printer.given(printer.post("/site/production", body, JSON))
    checked(given, values)
    rest = {k: v for k, v in given[1].items() if not k.startswith(b"PULSAR_VAR_")}
    own = {b"PULSAR_TASK_ID": b"", b"PULSAR_TASK_FOLDER": b""}
    assert {**rest, **own} == {**plain, **own}
    assert rest[b"PULSAR_APP"] == b"site"


def test_the_marker_shows_that_the_program_ran(printer: Printer) -> None:
    """The program makes the marker, so other tests can check that nothing ran."""
    printer.given(printer.post("/site/production?action=run"))
    tasks, folders, ran = printer.traces()
    assert tasks == folders
    assert ran


def test_no_name_of_the_corpus_is_allowed() -> None:
    """An allowed name in it would make the tests above meaningless."""
    assert not [n for n in NASTY if re.fullmatch(r"\w[\w.-]*", n, re.ASCII)]
