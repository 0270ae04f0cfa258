"""Tests of secrets: which variables are secret, and in which forms programs print them."""

import base64
import json
import os
import re
import subprocess
from collections.abc import Callable
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pulsar_api.shim.masker import Masker, masked
from pulsar_api.tasks.secret_forms import PATTERNS, forms, is_secret, notes
from tests import needs
from tests.shim.test_masker import in_pieces, simply, split


def _lower(found: re.Match[str]) -> str:
    return found[0].lower()


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "as it is": lambda value: value.encode(),
    "base64": lambda value: base64.b64encode(value.encode()),
    "base64, URL-safe": lambda value: base64.urlsafe_b64encode(value.encode()),
    "base64 of a line": lambda value: base64.b64encode(value.encode() + b"\n"),
    "MIME": lambda value: base64.encodebytes(value.encode()).rstrip(),
    "percent": lambda value: quote(value, "").encode(),
    "path": lambda value: quote(value).encode(),
    "form": lambda value: quote_plus(value).encode(),
    "query": lambda value: urlencode({"k": value}).encode(),
    "percent, lower": lambda value: re.sub("%..", _lower, quote(value, "")).encode(),
    "JSON": lambda value: json.dumps(value).encode(),
    "JSON in UTF-8": lambda value: json.dumps(value, ensure_ascii=False).encode(),
    "JSON of PHP": lambda value: json.dumps(value).replace("/", "\\/").encode(),
    "lines": lambda value: value.replace("\n", "\r\n").encode(),
}

# No "*", which is in every mask, and no white space at the ends, which programs strip.
INNER = st.characters(exclude_categories=["Cs"], exclude_characters="*\0\r")
VALUE = st.builds(
    lambda a, b, c: a + b + c,
    st.sampled_from("aZ0+/%é日"),
    st.text(INNER, min_size=2, max_size=40),
    st.sampled_from("bY9-_&'\"😀"),
)
FILLER = st.binary(max_size=30)


@given(
    st.lists(VALUE, min_size=1, max_size=4),
    st.lists(st.tuples(FILLER, st.integers(0), st.sampled_from(sorted(ENCODINGS)))),
    FILLER,
    st.lists(st.integers(0, 2000), max_size=6),
)
@settings(max_examples=needs.trials(100, 1000))
def test_every_form_of_a_secret_is_masked_and_the_rest_is_unchanged(
    values: list[str],
    said: list[tuple[bytes, int, str]],
    last: bytes,
    places: list[int],
) -> None:
    """The output has several secrets in any encoding, between any bytes, in any pieces."""
    texts = list(forms(values))
    printed = [(gap, ENCODINGS[how](values[n % len(values)])) for gap, n, how in said]
    whole = b"".join(gap + text for gap, text in printed) + last
    seen = in_pieces(texts, split(whole, places))
    assert seen == simply(texts, whole)
    assume(not any(b"*" in text for text in texts))
    for value in values:
        for text in (value.encode(), base64.b64encode(value.encode()).rstrip(b"=")):
            assert text not in seen.replace(b"***", b"\0")


@pytest.mark.parametrize("how", ENCODINGS)
def test_a_secret_is_masked_wherever_the_output_is_cut(how: str) -> None:
    """The cut is at any byte, or at the very end, also with another secret inside."""
    value = "p\"s/w+ör&d 'x' " + "0123456789" * 9
    text = ENCODINGS[how](value)
    texts = list(forms([value, "0123456789"]))
    for place in range(len(text) + 1):
        masker = Masker(texts)
        seen = masker.feed(b"is: " + text[:place]) + masker.feed(text[place:])
        seen += masker.close()
        clean = seen.replace(b'"', b"").replace(b"k=", b"")
        # A few bits of the last three bytes stay if they are encoded with other bytes.
        assert clean.removeprefix(b"is: ***").rstrip(b"=") in {b"", b"o", b"K", b"g"}, how


@pytest.mark.parametrize("user", ["", "a", "ab", "abc", "x-token-auth", "ü"])
@pytest.mark.parametrize("more", ["", ":", ":x", ":xy", ":x-oauth-basic"])
def test_a_basic_header_is_masked(user: str, more: str) -> None:
    """At most its edges are left, whatever stands before and after the secret."""
    value = "hunter22-and-more"
    header = base64.b64encode(f"{user}:{value}{more}".encode())
    seen = in_pieces(list(forms([value])), [header])
    before, mask, behind = seen.partition(b"***")
    assert mask
    left = base64.b64decode(before + b"A" * (-len(before) % 4))
    assert value[:2].encode() not in left
    known = len(f"{user}:") * 8 // 6
    assert len(before) <= known + 2
    assert len(behind.rstrip(b"=")) <= len(more) * 8 // 6 + 2


@pytest.mark.parametrize("command", [["base64"], ["base64", "-w64"], ["base64", "-w0"]])
def test_a_file_with_the_secret_in_base64_is_masked(command: list[str]) -> None:
    """Programs break base64 into lines."""
    value = base64.b85encode(os.urandom(200)).decode()
    coded = subprocess.run(command, input=value.encode(), capture_output=True, check=True)
    seen = in_pieces(list(forms([value])), [coded.stdout])
    assert len(seen) < 8
    assert seen.startswith(b"***")


def test_each_line_of_a_key_is_masked() -> None:
    """It may be by itself, indented, or with other line ends. Very short lines stay."""
    value = "-----BEGIN KEY-----\nabcdEFGH\n12\n-----END KEY-----\n"
    texts = list(forms([value]))
    assert in_pieces(texts, [value.encode()]) in {b"***", b"***\n"}
    assert in_pieces(texts, [value.replace("\n", "\r\n").encode()]) in {b"***", b"***\r\n"}
    assert in_pieces(texts, [b"> abcdEFGH\n> 12\n"]) == b"> ***\n> 12\n"


def test_secrets_in_the_trace_of_a_shell_are_masked() -> None:
    """``set -x`` quotes its arguments."""
    value = "it's a secret"
    traced = subprocess.run(
        ["bash", "-xc", 'true "$V"'], env={"V": value}, capture_output=True, check=True
    )
    assert b"secret" in traced.stderr
    assert b"secret" not in in_pieces(list(forms([value])), [traced.stderr])


@pytest.mark.parametrize("value", ["", "a", "ab", "abc", "日本語"])
def test_a_short_secret_is_not_masked_and_a_note_says_so(value: str) -> None:
    """It would be masked in the middle of other words."""
    assert forms([value]) == ()
    (note,) = notes({"pin": value, "password": "abcd"})
    assert note == notes({"pin": "x"})[0]
    assert note.startswith("variables.pin: ")


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("password", True),
        ("DB_PASSWORD", True),
        ("githubToken", True),
        ("client.Secret", True),
        ("ssh-key", True),
        ("branch", False),
        ("pass", False),
    ],
)
def test_the_name_of_a_variable_can_make_it_secret(name: str, *, secret: bool) -> None:
    """The pattern can match in either case, anywhere in the name."""
    assert is_secret(name, PATTERNS) is secret
    assert is_secret(name, ()) is False
    assert is_secret(name, ("*",)) is True


WRITTEN = [
    ("p*ss word~1", "p*ss+word%7E1"),
    ("pa$$word&1@x", "pa$$word&1%40x"),
    ("YWJjZGVmZ2g9==", "YWJjZGVmZ2g9\\u003d\\u003d"),
    ("ab+cd<ef'gh", "ab\\u002Bcd\\u003Cef\\u0027gh"),
    ("it's my secret", "it'\"'\"'s my secret"),
    ("p$s w&rd1", "p\\$s\\ w\\&rd1"),
    ("hunter22\n", "hunter22"),
    ("  hunter22", "hunter22"),
]


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_secrets_as_common_programs_write_them_are_masked(value: str, text: str) -> None:
    """The programs are URLSearchParams, Go, Gson, .NET, shlex and printf %q."""
    assert masked(f"a {text} b".encode(), forms([value])) == b"a *** b"


def test_white_space_round_a_secret_stays() -> None:
    """Masking a line end would join two lines, and hide the last line of pulsar."""
    texts = forms(["\nhunter22\n"])
    assert masked(b"hunter22\nnext\n", texts) == b"***\nnext\n"
    assert masked(b"    a\n", forms(["    "])) == b"    a\n"


def test_lines_are_masked_however_they_are_indented() -> None:
    """Tools that print a file of keys indent it in their own way."""
    secret = "users:\n- user:\n    password: hunter2hunter2\n"
    text = b"  users:\n- user:\npassword: hunter2hunter2\n"
    assert b"hunter2" not in masked(text, forms([secret]))


@pytest.mark.parametrize("size", [82, 83, 84])
def test_base64_in_lines_is_masked_whatever_follows(size: int) -> None:
    """The lines are those of base64(1)."""
    secret = "".join(chr(ord("a") + n % 26) for n in range(size))
    for behind in ("", "\n", ":x-oauth-basic\n"):
        text = base64.encodebytes((secret + behind).encode())
        letters = masked(text, forms([secret])).replace(b"***", b"").replace(b"\n", b"")
        assert len(letters) <= 24  # the bytes that follow, and a letter shared with them


@pytest.mark.parametrize(
    ("value", "told"),
    [("abc", True), ("ab  \n", True), ("abcd", False), ("a\nbcde", True), ("", True)],
)
def test_a_note_names_a_secret_that_is_too_short(value: str, *, told: bool) -> None:
    """The same holds for one of several lines."""
    assert len(notes({"key": value})) == told


@pytest.mark.parametrize("value", ["true", "FALSE", " null\n", "undefined", "8080"])
def test_common_word_is_not_masked_and_a_note_says_so(value: str) -> None:
    """Masks all over the log would reveal it."""
    assert forms([value]) == ()
    (note,) = notes({"key": value})
    assert note.startswith("variables.key: a common word or a number of four digits, so")


def test_common_line_is_not_masked_and_a_note_says_so() -> None:
    """The other lines are masked, and so is the whole value."""
    value = "hunter22\n  true\nhunter33"
    texts = forms([value])
    assert masked(b"true hunter22 hunter33", texts) == b"true *** ***"
    assert masked(value.encode(), texts) == b"***"
    (note,) = notes({"key": value})
    assert note.startswith("variables.key: a line of it is a common word")


@pytest.mark.parametrize("value", ["truely", "12345", "80 80", "nullify", "true false"])
def test_a_secret_that_only_contains_a_common_word_is_masked(value: str) -> None:
    """It is not common itself."""
    assert masked(value.encode(), forms([value])) == b"***"
    assert notes({"key": value}) == []


def test_number_of_forms_is_bounded_and_a_note_says_so() -> None:
    """With very many lines, each is masked as it is, and the whole value in every form."""
    lines = [f"{n:04x}'" for n in range(4096, 4096 + 10_000)]
    value, short = "\n".join(lines), "it's\nthe <key>"
    texts = forms([value, short])
    assert len(texts) < len(lines) + 300
    printed = [*lines[::100], json.dumps(value), r"'it'\''s' the\ \<key\>"]
    expected = [*["***"] * 100, '"***"', "'***' ***"]
    assert masked(" ".join(printed).encode(), texts).decode() == " ".join(expected)
    (note,) = notes({"long": value, "short": short})
    assert note.startswith("variables.long: the secrets have more than 500 lines")
