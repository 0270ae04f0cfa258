"""Certificates that are exchanged under a daemon that serves, by its files and SIGHUP."""

import hashlib
import json
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

import pytest
from attrs import define, field

from tests.certificates import Authority, Issued, certificates_pem, key_pem
from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, Daemon, Poll, wait_for

SWAPS = int(os.environ.get("PULSAR_SWAPS", "5"))
CLIENTS = 10
RATE = 5.0
"""Requests a second of each client."""
AUTHORITY = Authority()
KEPT = "the old one stays: "


def pem(folder: Path, issued: Issued) -> None:
    """Put a key and its certificate in their places, one after the other."""
    for name, data in (("key", key_pem(issued.key)), ("cert", issued.cert_pem())):
        (folder / "new").write_bytes(data)
        (folder / "new").replace(folder / name)


def pfx(folder: Path, issued: Issued) -> None:
    """Write a PKCS #12 file over the old one."""
    (folder / "pfx").write_bytes(issued.pfx(b"open sesame"))


FORMS: dict[str, tuple[Callable[[Path, Issued], None], Sequence[str]]] = {
    "pem": (pem, ("key", "cert")),
    "pfx": (pfx, ("pfx", "passphrase")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a certificate in both forms."""
    (tmp_path / "passphrase").write_bytes(b"open sesame\n")
    (tmp_path / "root").write_bytes(certificates_pem(AUTHORITY.root))
    first = AUTHORITY.issue()
    pem(tmp_path, first)
    pfx(tmp_path, first)
    return tmp_path


def options(folder: Path, form: str = "pem") -> list[str]:
    """Return the options that name the files of a format."""
    return [f"--ssl-{name}={folder / name}" for name in FORMS[form][1]]


def presented(daemon: Daemon) -> str:
    """Return the fingerprint of what a new connection is shown, and let go of it."""
    context = ssl.create_default_context(cafile=daemon.trust)
    with (
        daemon.open_socket() as sock,
        context.wrap_socket(sock, server_hostname="localhost") as secure,
    ):
        return hashlib.sha256(secure.getpeercert(binary_form=True) or b"").hexdigest()


def fingerprint(issued: Issued) -> str:
    """Return the fingerprint of a certificate."""
    der = ssl.PEM_cert_to_DER_cert(certificates_pem(issued.certificate).decode())
    return hashlib.sha256(der).hexdigest()


def served(daemon: Daemon, issued: Issued) -> float:
    """Wait until new connections are shown a certificate; return after how many seconds."""
    begin = time.monotonic()
    wanted = fingerprint(issued)
    wait_for(lambda: presented(daemon) == wanted, "the new certificate")
    return time.monotonic() - begin


def hang_up(daemon: Daemon, said: str) -> None:
    """Send SIGHUP, and wait until the daemon has said something once more."""
    before = daemon.log.read_text().count(said)
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: daemon.log.read_text().count(said) > before, said)


@define(eq=False)
class Client(threading.Thread):
    """Sends requests at a steady rate, each on a new connection or all on one."""

    daemon_: Daemon
    keeps: bool
    ends: threading.Event
    answered: int = 0
    failed: list[str] = field(factory=list)

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def run(self) -> None:
        """Go on until told to end; a failure is noted and the next request is sent."""
        due = time.monotonic()
        connection = self.daemon_.connect()
        while not self.ends.wait(max(0.0, due - time.monotonic())):
            due += 1 / RATE
            try:
                if not self.keeps:
                    connection.close()
                    connection = self.daemon_.connect()
                elif self.answered:
                    assert connection.sock is not None, "the connection was closed"
                connection.request("GET", "/tasks?limit=1")
                response = connection.getresponse()
                json.loads(response.read())
                assert response.status == 200
                self.answered += 1
            except (OSError, HTTPException, AssertionError, ValueError) as e:
                self.failed.append(repr(e))
        connection.close()


@pytest.fixture
def crowd() -> Iterator[Callable[[Daemon], list[Client]]]:
    """Return a function that sets clients on a daemon; half of them keep connections."""
    ends = threading.Event()
    with ExitStack() as stack:

        def begin(daemon: Daemon) -> list[Client]:
            clients = [Client(daemon, n % 2 == 0, ends) for n in range(CLIENTS)]
            for client in clients:
                client.start()
                stack.callback(client.join)
                stack.callback(ends.set)
            return clients

        yield begin


@pytest.mark.parametrize("form", list(FORMS))
def test_no_request_fails_while_certificates_are_replaced(
    form: str,
    folder: Path,
    start: Start,
    crowd: Callable[[Daemon], list[Client]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Open connections continue, and new ones get the new certificate."""
    daemon = start(*options(folder, form), trust=folder / "root")
    clients = crowd(daemon)
    begin = time.monotonic()
    seconds = []
    for _ in range(SWAPS):
        new = AUTHORITY.issue()
        FORMS[form][0](folder, new)
        seconds.append(served(daemon, new))
    lasted = time.monotonic() - begin
    clients[0].ends.set()
    for client in clients:
        client.join()
    answered = sum(client.answered for client in clients)
    with capsys.disabled():
        print(
            f"\n{form}: {SWAPS} swaps in {lasted:.1f} s, each served after "
            f"{min(seconds):.2f} to {max(seconds):.2f} s; {answered} requests, "
            f"{answered / lasted:.0f} a second"
        )
    assert [client.failed for client in clients] == [[]] * CLIENTS
    assert all(client.answered for client in clients)
    assert daemon.log.read_text().count("new connections get the certificate") == SWAPS
    assert KEPT not in daemon.log.read_text()


def test_a_waiting_request_is_answered_on_its_old_connection(
    folder: Path, start: Start
) -> None:
    """A long-poll and a followed log last longer than a replacement."""
    more = ("--command", SHELL, "--poll-timeout", "600")
    daemon = start(*options(folder), *more, trust=folder / "root")
    gate = folder / "gate"
    os.mkfifo(gate)
    number = daemon.sh(f"echo begin; cat {gate}; echo end")
    follows = daemon.connect()
    follows.request("GET", f"/task/{number}/log?follow=1")
    log = follows.getresponse()
    assert log.readline() == b"begin\n"
    poll = Poll(daemon, f"/task/{number}/state?timeout=600")
    new = AUTHORITY.issue()
    pem(folder, new)
    served(daemon, new)
    assert poll.waits()
    gate.write_text("through the gate\n")
    assert poll.answer().json()["task"]["status"] == "finished"
    assert log.read() == b"through the gate\nend\n"
    follows.close()


def test_sighup_reads_the_files_at_once(folder: Path, start: Start) -> None:
    """The files need not have changed."""
    daemon = start(*options(folder), trust=folder / "root")
    hang_up(daemon, "new connections get the certificate")
    new = AUTHORITY.issue()
    pem(folder, new)
    hang_up(daemon, "new connections get the certificate")
    assert presented(daemon) == fingerprint(new)
    assert daemon.get("/tasks").status == 200


def test_a_damaged_certificate_keeps_the_old_one_and_is_logged(
    folder: Path, start: Start
) -> None:
    """The log has one line for each fault. The next good certificate is used."""
    daemon = start(*options(folder), trust=folder / "root")
    old = presented(daemon)
    good = (folder / "cert").read_bytes()
    (folder / "cert").write_bytes(good[:-100])
    wait_for(lambda: KEPT in daemon.log.read_text(), "the complaint")
    assert presented(daemon) == old
    # SIGHUP logs the new fault at once, so all earlier looks at the files are over by then.
    (folder / "cert").write_bytes(key_pem(AUTHORITY.issue().key))
    hang_up(daemon, KEPT)
    assert presented(daemon) == old
    lines = [line for line in daemon.log.read_text().splitlines() if KEPT in line]
    assert [line.partition(KEPT)[2] for line in lines] == [
        f"--ssl-cert: {folder / 'cert'} holds an incomplete certificate",
        f"--ssl-cert: {folder / 'cert'} holds no certificate in PEM form",
    ]
    assert all("#error]" in line for line in lines)
    assert "Traceback" not in daemon.log.read_text()
    new = AUTHORITY.issue()
    pem(folder, new)
    served(daemon, new)
    assert daemon.get("/tasks").status == 200


def test_unreadable_certificate_files_keep_the_old_certificate(
    folder: Path, start: Start
) -> None:
    """A daemon that has given up its privileges can meet this."""
    daemon = start(*options(folder), trust=folder / "root")
    old = presented(daemon)
    (folder / "key").rename(folder / "away")
    wait_for(lambda: KEPT in daemon.log.read_text(), "the complaint")
    assert presented(daemon) == old


def test_sighup_without_tls_is_harmless(daemon: Daemon) -> None:
    """The daemon logs that there is no certificate."""
    for _ in range(3):
        hang_up(daemon, "SIGHUP: there is no certificate")
    assert daemon.get("/tasks").status == 200


def test_tasks_do_not_inherit_the_handling_of_sighup(start: Start) -> None:
    """A task gets SIGHUP as usual."""
    daemon = start("--command", SHELL)
    number = daemon.sh("grep SigIgn /proc/self/status")
    daemon.ended(number)
    ignored = int(daemon.task(number)["output"].split()[1], 16)
    assert not ignored & 1 << signal.SIGHUP - 1


def test_replaced_client_authorities_are_used(folder: Path, start: Start) -> None:
    """The next connection of an old client is refused, and a new client is accepted."""
    other = Authority("other")
    mine, theirs = AUTHORITY.issue(), other.issue()
    for name, one in (("mine", mine), ("theirs", theirs)):
        (folder / name).write_bytes(key_pem(one.key) + one.cert_pem())
    (folder / "ca").write_bytes(certificates_pem(AUTHORITY.root))
    daemon = start(
        *options(folder),
        f"--ssl-client-ca={folder / 'ca'}",
        trust=folder / "root",
        identity=folder / "mine",
    )

    def is_served() -> bool:
        try:
            return daemon.get("/tasks").status == 200
        except OSError:
            return False

    (folder / "ca").write_bytes(certificates_pem(other.root))
    wait_for(lambda: not is_served(), "the old one to be refused")
    daemon.identity = folder / "theirs"
    assert is_served()
