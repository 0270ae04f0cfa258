"""Tests of credentials in requests, and of floods of wrong ones."""

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.auth.audit import REFUSALS, AuditLog
from pulsar_api.auth.authenticator import Authenticator, Credentials
from pulsar_api.errors import NotAuthenticated
from pulsar_api.web import cookies
from pulsar_api.web.authentication import Access, parse_authorization
from pulsar_api.web.origin import Origins, _address
from pulsar_api.web.signin import START, local

CASE = SynchronousTestCase()
NAME = st.text(st.characters(exclude_characters=":", exclude_categories=["Cs"]))
PASSWORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(NAME, PASSWORD)
@example("a", "b:c")
def test_basic_authentication_is_parsed(user: str, password: str) -> None:
    """Any text in UTF-8 is accepted (RFC 7617). Only the first colon counts."""
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
def test_any_header_gives_credentials_or_none(text: str) -> None:
    """No header raises an error."""
    found = parse_authorization(text)
    assert found is None or isinstance(found, Credentials)
    assert all(isinstance(value, str) for value in cookies.parse(text).values())


@pytest.mark.parametrize(
    "others",
    [
        "",
        "a=b; ",
        "foo[bar]=1; ",
        "a b=1; ",
        'x={"j": "v, w"}; ',
        "flag; ",
        'y="un; ',
        "path=/x; expires=never; ",
        "big=" + "x" * 5000 + "; ",
        "=; ;; ",
        "xpulsar=other; ",
    ],
)
def test_a_cookie_does_not_hide_another(others: str) -> None:
    """A host with many programs has many cookies, and some are malformed."""
    assert cookies.parse(f"{others}pulsar=abc; z=1")["pulsar"] == "abc"
    assert cookies.parse(f"pulsar=abc; {others}")["pulsar"] == "abc"


@given(st.text(max_size=20).map(lambda text: f"/{text}") | st.text(max_size=20))
@example("//evil.example")
@example("/\\evil.example")
@example("/\t/evil.example")
def test_the_page_after_a_sign_in_is_on_this_site(target: str) -> None:
    """Browsers also read two slashes, or a slash and a backslash, as another site."""
    found = local(target)
    assert found in {target, START}
    assert found.startswith("/")
    assert not found.startswith(("//", "/\\"))
    assert found.isascii()
    assert found.isprintable()
    assert " " not in found


def test_a_flood_of_wrong_credentials_does_not_fill_the_audit_log(tmp_path: Path) -> None:
    """Each minute has a limited number of lines, and one with the number of the others."""
    clock = Clock()
    log = AuditLog(tmp_path / "audit.log", clock.seconds)
    service: Any = None  # the provider is not asked
    authenticator = Authenticator([], clock)
    access = Access(service, log, Origins(), clock, authenticator)

    def guess(number: int) -> None:
        address = f"192.0.{number >> 8}.{number & 255}"
        wrong = Credentials("", f"guess {number}")
        asked = Deferred.fromCoroutine(access.caller(wrong, address))
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


def test_an_address_from_a_proxy_can_have_a_port() -> None:
    """It can be IPv6, or IPv4 in the notation of IPv6."""
    for said, heard in (
        ("192.0.2.1:5000", "192.0.2.1"),
        ("[2001:db8::1]:5000", "2001:db8::1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("nonsense", "unix"),
    ):
        assert (_address(said) or "unix") == heard


def test_the_names_of_a_certificate_can_change() -> None:
    """New names count after a renewal, wildcards included."""
    names = {"old.example"}
    origins = Origins(more_names=lambda: frozenset(names))
    assert not origins._is_ours("new.example")
    names.update(["new.example", "*.wild.example"])
    for host in ("old.example", "new.example:8443", "a.b.wild.example"):
        assert origins._is_ours(host)
    assert not origins._is_ours("wild.example.evil")
