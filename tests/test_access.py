"""Credentials as they are sent, and what becomes of a flood of wrong ones."""

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.gate import Credentials, Gate
from pulsar_api.errors import NotAuthenticated
from pulsar_api.web.access import (
    REFUSALS,
    Access,
    parse_authorization,
    session_id,
)
from pulsar_api.web.origin import Origins
from pulsar_api.web.signin import START, local

CASE = SynchronousTestCase()
NAME = st.text(st.characters(exclude_characters=":", exclude_categories=["Cs"]))
PASSWORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(NAME, PASSWORD)
@example("a", "b:c")
def test_what_basic_authentication_says_is_understood(user: str, password: str) -> None:
    """Any text in UTF-8, as RFC 7617 has it; only the first colon counts."""
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    found = parse_authorization(f"Basic {text}")
    if password == "x-oauth-basic":
        assert found == Credentials("", user)
    elif len(text) <= 4096:
        assert found == Credentials(user, password)


@given(st.text(max_size=50) | st.binary(max_size=50).map(lambda b: b.decode("latin-1")))
@example("Basic")
@example("Basic " + "=" * 8)
@example("Bearer " + "x" * 5000)
def test_whatever_is_sent_is_credentials_or_nothing(text: str) -> None:
    """Never an error."""
    found = parse_authorization(text)
    assert found is None or isinstance(found, Credentials)
    id = session_id(text)
    assert id is None or isinstance(id, str)


@pytest.mark.parametrize(
    ("cookie", "id"),
    [
        ("pulsar=abc", "abc"),
        ("a=b; pulsar=abc; c=d", "abc"),
        ("__Host-pulsar=abc; pulsar=other", "abc"),
        ("xpulsar=abc", None),
        ("pulsar", None),
        ("", None),
    ],
)
def test_the_cookie_of_a_session(cookie: str, id: str | None) -> None:
    """Among others; over HTTPS the one that only this host can have set."""
    assert session_id(cookie) == id


@given(st.text(max_size=20).map(lambda text: f"/{text}") | st.text(max_size=20))
@example("//evil.example")
@example("/\\evil.example")
@example("/\t/evil.example")
def test_after_a_sign_in_one_stays_here(target: str) -> None:
    """Whatever a browser makes of it: one slash, then neither slash nor backslash."""
    found = local(target)
    assert found in {target, START}
    assert found.startswith("/")
    assert not found.startswith(("//", "/\\"))
    assert found.isascii()
    assert found.isprintable()
    assert " " not in found


def test_a_flood_of_wrong_credentials_does_not_fill_the_audit_log(tmp_path: Path) -> None:
    """Each minute has so many lines, and one that says how many more there were."""
    clock = Clock()
    log = AuditLog(tmp_path / "audit.log", clock.seconds)
    service: Any = None  # it is not asked
    gate = Gate([], clock)
    access = Access(service, log, Origins(), clock, gate)

    def guess(number: int) -> None:
        address = f"192.0.{number >> 8}.{number & 255}"
        shown = Credentials("", f"guess {number}")
        asked = Deferred.fromCoroutine(access.caller(shown, address))
        CASE.failureResultOf(asked, NotAuthenticated)

    for number in range(3 * REFUSALS):
        guess(number)
    clock.advance(60)
    guess(0)
    entries = list(log.read())
    assert len(entries) == REFUSALS + 2
    assert entries[REFUSALS]["times"] == 2 * REFUSALS
    assert "times" not in entries[-1]
    access.release()
    assert len(list(log.read())) == REFUSALS + 2
