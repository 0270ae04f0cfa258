"""Tests of parsing requests and writing responses."""

import json
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from pulsar_api.errors import InvalidInput
from pulsar_api.output.files import Output
from pulsar_api.tasks.model import Status, TaskQuery, TaskSnapshot, TaskSpec
from pulsar_api.web import decoding, encoding, json_stream
from tests.fakes import person

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


def parse(kind: str, body: bytes, **query: str) -> decoding.NewTask:
    """Parse a request for a task."""
    return decoding.parse_new_task(kind, body, query)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, b'{"action": "deploy", "variables": {"a": "1"}}'),
        (
            "Application/JSON; charset=utf-8",
            b'{"action": " deploy\\t", "variables": {"a": 1}}',
        ),
        (FORM, b"action=deploy&variables%5Ba%5D=1"),
        (FORM + ";charset=UTF-8", b"variables[a]=1&action=+deploy"),
    ],
)
def test_json_and_forms_are_equivalent(kind: str, body: bytes) -> None:
    """Numbers become text, and spaces around the action are removed."""
    assert parse(kind, body) == decoding.NewTask("deploy", {"a": "1"})


def test_the_action_of_the_body_beats_that_of_the_query() -> None:
    """Old clients used both places."""
    assert parse("", b"", action="a").action == "a"
    assert parse(FORM, b"", action="a").action == "a"
    assert parse(JSON, b'{"action": "b"}', action="a").action == "b"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b'"deploy"', "body"),
        (b"17", "body"),
        (b"{", "body"),
        (b'{"action": NaN}', "body"),
        (b"\xff{}", "body"),
        (b"[" * 100_000, "body"),
        (b"{}", "action"),
        (b'{"action": null}', "action"),
        (b'{"action": 3}', "action"),
        (b'{"action": ["a"]}', "action"),
        (b'{"action": "a", "variables": []}', "variables"),
        (b'{"action": "a", "variables": {"k": true}}', "variables.k"),
        (b'{"action": "a", "variables": {"k": null}}', "variables.k"),
        (b'{"action": "a", "variables": {"k": {}}}', "variables.k"),
    ],
)
def test_an_invalid_field_is_refused_by_name(body: bytes, field: str) -> None:
    """The error has the name of the field."""
    with pytest.raises(InvalidInput) as raised:
        parse(JSON, body)
    assert raised.value.field == field


def test_a_number_with_too_many_digits_is_refused() -> None:
    """Python raises an error of another class for it."""
    with pytest.raises(InvalidInput):
        parse(JSON, b'{"action": "a", "variables": {"k": 1%s}}' % (b"0" * 5000))


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "x" * 999]
)
def test_other_media_types_are_refused(kind: str) -> None:
    """The message lists the supported ones."""
    with pytest.raises(decoding.UnsupportedMedia, match="application/json"):
        parse(kind, b"action=deploy")


@pytest.mark.parametrize(
    "body",
    [b"action=%ff", b"action=\xff", b"&".join([b"a=b"] * 501), b"variables=x&action=a"],
)
def test_a_malformed_form_is_refused(body: bytes) -> None:
    """Examples are invalid UTF-8, too many fields and malformed variables."""
    with pytest.raises(InvalidInput):
        parse(FORM, body)


@given(st.dictionaries(st.text(max_size=10), st.text(max_size=10)))
def test_a_form_can_hold_any_text(fields: dict[str, str]) -> None:
    """Decoding returns the text that the client encoded."""
    fields = {k: v for k, v in fields.items() if all(ord(c) < 0xD800 for c in k + v)}
    body = urlencode(
        [("action", "a"), *((f"variables[{k}]", v) for k, v in fields.items())]
    )
    assert parse(FORM, body.encode()).variables == fields


@given(st.binary(max_size=200))
def test_any_body_is_parsed_or_refused(body: bytes) -> None:
    """No other exception is raised."""
    for kind in (JSON, FORM):
        with suppress(InvalidInput):
            parse(kind, body)


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "", "\u0663", "9" * 30, "1001"])
def test_numbers_in_a_query_are_limited(text: str) -> None:
    """The error names the parameter and its limits."""
    with pytest.raises(InvalidInput, match="from 0 to 1000"):
        decoding.parse_number({"limit": text}, "limit", 1, 1000)


@pytest.mark.parametrize("text", ["-1", "31", "x", "", "nan", "inf"])
def test_seconds_in_a_query_are_limited(text: str) -> None:
    """The daemon lets no request wait longer."""
    with pytest.raises(InvalidInput, match="from 0 to 30"):
        decoding.parse_seconds({"timeout": text}, "timeout", 30.0)


def test_seconds_can_have_a_fraction() -> None:
    """The default is the maximum."""
    assert decoding.parse_seconds({"timeout": "0.5"}, "timeout", 30.0) == 0.5
    assert decoding.parse_seconds({}, "timeout", 30.0) == 30.0


def test_a_query_for_tasks_is_parsed() -> None:
    """It uses every filter of the API."""
    query = decoding.parse_query(b"limit=5&before=9&status=failed&app=a&env=e&user=u")
    expected = TaskQuery(5, 9, Status.FAILED, "a", "e", "u")
    assert decoding.parse_task_query(query) == expected
    assert decoding.parse_task_query({}) == TaskQuery()


@pytest.mark.parametrize("query", [{"limit": "0"}, {"status": "ended"}, {"before": "x"}])
def test_an_invalid_query_for_tasks_is_refused(query: dict[str, str]) -> None:
    """Each of them has one wrong parameter."""
    with pytest.raises(InvalidInput):
        decoding.parse_task_query(query)


@pytest.mark.parametrize("name", ["text", "app", "env", "user"])
def test_nul_in_a_filter_or_a_form_is_refused(name: str) -> None:
    """The error names the parameter.

    A search in a log accepts NUL, because logs can contain it.
    """
    for query in (f"limit=1&{name}=a%00b", f"{name}=%00"):
        with pytest.raises(InvalidInput, match=rf"^{name}: "):
            decoding.parse_task_query(decoding.parse_query(query.encode()))
        with pytest.raises(InvalidInput, match=rf"^{name}: "):
            decoding.parse_form("application/x-www-form-urlencoded", query.encode())
    assert decoding.parse_needle(decoding.parse_query(b"text=%00")) == "\0"


def test_an_idempotency_key_can_be_quoted() -> None:
    """The draft of the standard writes it in quotes, and many clients do not."""
    assert decoding.parse_key(None) is None
    assert decoding.parse_key(["abc-1"]) == decoding.parse_key(['"abc-1"']) == "abc-1"


@pytest.mark.parametrize("given", [[""], ["a b"], ["x" * 256], ["\u00e4"], ["a", "b"]])
def test_an_invalid_idempotency_key_is_refused(given: list[str]) -> None:
    """A request may have one, of at most 255 visible characters."""
    with pytest.raises(InvalidInput, match="Idempotency-Key"):
        decoding.parse_key(given)


SNAPSHOT = TaskSnapshot(
    id=47,
    spec=TaskSpec("fuboo", "production", "shell", {"k": "v"}, person("alice")),
    created_at=1_700_000_000.25,
    status=Status.FAILED,
    command="true",
    pid=48691,
    output_size=4,
)


def written(
    tmp_path: Path, data: bytes, part: encoding.Part | None = None
) -> dict[str, object]:
    """Return the JSON of a task with this output, parsed."""
    (tmp_path / "output").write_bytes(data)
    snapshot = evolve(SNAPSHOT, output_size=len(data))
    output = Output(tmp_path)
    part = part or encoding.Part.chosen("full", snapshot, output)
    value = json.loads(b"".join(encoding.task_pieces(snapshot, "http://x", output, part)))
    assert isinstance(value, dict)
    return value


def test_a_task_has_every_documented_field(tmp_path: Path) -> None:
    """Fields of the published API come first, then those of this daemon."""
    value = written(tmp_path, b"hi \xc3\xa4")
    assert value == {
        "id": 47,
        "status": "failed",
        "app": "fuboo",
        "env": "production",
        "action": "shell",
        "exitCode": None,
        "output": "hi \u00e4",
        "pid": 48691,
        "version": 6,
        "outputSize": 5,
        "command": "true",
        "signal": None,
        "reason": None,
        "variables": {"k": "v"},
        "user": "alice",
        "waitingFor": None,
        "heldBy": [],
        "stillRunning": [],
        "notes": [],
        "createdAt": "2023-11-14T22:13:20.250Z",
        "startedAt": None,
        "endedAt": None,
        "cpuSeconds": None,
        "memoryPeak": None,
        "url": "http://x/web#job/47",
    }


@given(data=st.binary(max_size=300))
def test_any_output_is_valid_json(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """It is the text of its bytes, decoded as a whole."""
    folder = tmp_path_factory.mktemp("task")
    assert written(folder, data)["output"] == data.decode("utf-8", "replace")


def test_a_tail_says_where_it_begins(tmp_path: Path) -> None:
    """It begins at the start of a character."""
    data = "\u20ac".encode() * 2000
    (tmp_path / "output").write_bytes(data)
    snapshot = evolve(SNAPSHOT, output_size=len(data))
    part = encoding.Part.chosen("tail", snapshot, Output(tmp_path))
    value = written(tmp_path, data, part)
    assert value["outputOffset"] == 1902
    assert value["output"] == "\u20ac" * 1366


def test_an_omitted_output_is_an_empty_field(tmp_path: Path) -> None:
    """Its offset is the end of the output."""
    part = encoding.Part.chosen("none", SNAPSHOT, Output(tmp_path))
    value = written(tmp_path, b"abcd", part)
    assert (value["output"], value["outputOffset"]) == ("", 4)


def test_a_problem_names_the_field() -> None:
    """It follows RFC 9457, and repeats the sentence where old clients look."""
    value = json.loads(
        encoding.problem(400, "invalid-input", "Invalid input", "app: no", "app")
    )
    assert value == {
        "type": "urn:pulsar-api:problem:invalid-input",
        "title": "Invalid input",
        "status": 400,
        "detail": "app: no",
        "error": "app: no",
        "field": "app",
    }


def test_an_object_is_written_in_pieces() -> None:
    """Joined, they are the JSON of the whole value."""
    inner = json_stream.pieces({}, text=json_stream.Text(iter(['a"', "\n", "é"])))
    written = json_stream.pieces({"a": 1}, none=json_stream.Text([]), inner=inner)
    value = json.loads(b"".join(written))
    assert value == {"a": 1, "none": "", "inner": {"text": 'a"\né'}}
    assert b"".join(json_stream.pieces({})) == b"{}"
