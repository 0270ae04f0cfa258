"""Renewal: which certificate new connections get, while files change under the daemon."""

import datetime as dt
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from twisted.internet.task import Clock
from twisted.logger import (
    FilteringLogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
    globalLogPublisher,
)

from pulsar_api.config.loading import load
from pulsar_api.errors import SettingsError
from pulsar_api.network import certificates
from pulsar_api.network.renewal import LOOK, SETTLE, Renewal
from tests.certificates import Authority, Issued, certificates_pem, key_pem, self_signed

AUTHORITY = Authority()
MOMENT = LOOK + SETTLE
"""Seconds after which a change has been seen and taken."""
KEPT = "the old one stays: "


@define(eq=False)
class World:
    """A folder, a clock, what was logged, and what is tried on them."""

    folder: Path
    said: list[str]
    clock: Clock = field(factory=Clock)
    date: float = field(factory=lambda: dt.datetime.now(dt.UTC).timestamp())

    def write(self, issued: Issued) -> None:
        """Write key and certificate in place."""
        (self.folder / "key").write_bytes(key_pem(issued.key))
        (self.folder / "cert").write_bytes(issued.cert_pem())

    def begin(self, **more: Any) -> Renewal:
        """Start on what the folder holds."""
        names = more or {"key": "key", "cert": "cert"}
        given = {f"ssl-{k}": str(self.folder / v) for k, v in names.items()}
        renewal = Renewal(load(given, {}), self.clock, lambda: self.date)
        renewal.startService()
        return renewal

    def pass_by(self, seconds: float) -> None:
        """Let time pass, in small steps."""
        self.clock.pump([0.25] * int(seconds / 0.25))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Return a folder with a good certificate, and hear everything from warnings on."""
    said: list[str] = []

    def hear(event: LogEvent) -> None:
        if event["log_namespace"] == "pulsar_api.network.renewal":
            said.append(f"{event['log_level'].name}: {formatEvent(event)}")

    observer = FilteringLogObserver(
        hear,  # type: ignore[arg-type]
        [LogLevelFilterPredicate(LogLevel.info)],
    )
    globalLogPublisher.addObserver(observer)
    made = World(tmp_path, said)
    made.write(long())
    yield made
    globalLogPublisher.removeObserver(observer)


def long() -> Issued:
    """Return a certificate that nothing is to be said about."""
    return AUTHORITY.issue(left=dt.timedelta(days=90))


def in_place(world: World, new: Issued) -> None:
    """Overwrite both files."""
    world.write(new)


def by_rename(world: World, new: Issued) -> None:
    """Put new files in their place."""
    for name, data in (("key", key_pem(new.key)), ("cert", new.cert_pem())):
        (world.folder / "new").write_bytes(data)
        (world.folder / "new").replace(world.folder / name)


@pytest.mark.parametrize("change", [in_place, by_rename])
def test_a_new_certificate_is_taken(
    world: World, change: Callable[[World, Issued], None]
) -> None:
    """Within the time of one look, however the files were replaced."""
    renewal = world.begin()
    new = long()
    change(world, new)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate
    (line,) = world.said
    serial = f"{new.certificate.serial_number:x}"
    assert line.startswith(f"info: TLS: new connections get the certificate {serial}, good")


def test_a_link_that_leads_elsewhere_is_a_change(world: World) -> None:
    """As certbot does it: the files that it led to stay as they were."""
    new = long()
    for name, one in (("1", long()), ("2", new)):
        (world.folder / name).mkdir()
        World(world.folder / name, []).write(one)
    for name in ("key", "cert"):
        (world.folder / name).unlink()
        (world.folder / name).symlink_to(f"1/{name}")
    renewal = world.begin()
    for name in ("key", "cert"):
        (world.folder / "new").symlink_to(f"2/{name}")
        (world.folder / "new").replace(world.folder / name)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate


def test_a_pfx_and_its_passphrase_are_taken(world: World) -> None:
    """One after the other: the moment between is nobody's business."""
    (world.folder / "pfx").write_bytes(long().pfx(b"old"))
    (world.folder / "phrase").write_bytes(b"old\n")
    renewal = world.begin(pfx="pfx", passphrase="phrase")
    new = long()
    (world.folder / "pfx").write_bytes(new.pfx(b"new!"))
    world.pass_by(MOMENT)
    (world.folder / "phrase").write_bytes(b"new!\n")
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate
    assert [line.split(":")[0] for line in world.said] == ["info"]


def test_new_client_authorities_are_taken(world: World) -> None:
    """Who may connect changes without a restart, too."""
    (world.folder / "ca").write_bytes(certificates_pem(AUTHORITY.root))
    renewal = world.begin(key="key", cert="cert", **{"client-ca": "ca"})
    other = Authority("other")
    (world.folder / "ca").write_bytes(certificates_pem(other.root))
    world.pass_by(MOMENT)
    assert renewal.identity.client_authorities == (other.root,)


def test_the_state_between_key_and_certificate_is_neither_used_nor_told(
    world: World,
) -> None:
    """They do not fit each other for as long as one look."""
    renewal = world.begin()
    old, new = renewal.identity, long()
    (world.folder / "key").write_bytes(key_pem(new.key))
    world.pass_by(MOMENT)
    assert renewal.identity is old
    assert world.said == []
    (world.folder / "cert").write_bytes(new.cert_pem())
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate
    assert [line.split(":")[0] for line in world.said] == ["info"]


def test_what_stays_wrong_is_told_once(world: World) -> None:
    """Not every two seconds; and the old certificate serves on."""
    renewal = world.begin()
    old = renewal.identity
    (world.folder / "key").write_bytes(key_pem(long().key))
    world.pass_by(60)
    path = world.folder / "cert"
    why = "the key does not match the certificate; use the key that it was issued for"
    text = f"{KEPT}--ssl-cert: {path}: {why}"
    assert world.said == [f"error: TLS: the new certificate is not used, {text}"]
    assert renewal.identity is old


def test_each_wrong_change_is_told(world: World) -> None:
    """Once per change: who tries again wants to know again."""
    world.begin()
    for _ in range(3):
        (world.folder / "key").write_bytes(key_pem(long().key))
        world.pass_by(MOMENT + LOOK)
    assert [KEPT in line for line in world.said] == [True] * 3


def test_after_a_wrong_one_a_good_one_is_taken(world: World) -> None:
    """Nothing has to be done but to put it there."""
    renewal = world.begin()
    (world.folder / "cert").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    world.pass_by(60)
    assert len(world.said) == 1
    new = long()
    world.write(new)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate


def test_files_that_vanish_change_nothing(world: World) -> None:
    """It is told, and what is in memory serves on."""
    renewal = world.begin()
    old = renewal.identity
    (world.folder / "key").unlink()
    world.pass_by(60)
    path = world.folder / "key"
    (line,) = world.said
    assert line.endswith(f"{KEPT}--ssl-key: cannot read {path}: No such file or directory")
    assert renewal.identity is old


def test_a_file_that_is_being_written_is_not_read(world: World) -> None:
    """Not before it has been left alone for a moment."""
    renewal = world.begin()
    new = long()
    (world.folder / "key").write_bytes(key_pem(new.key))
    data = new.cert_pem()
    for end in range(0, len(data), 20):
        (world.folder / "cert").write_bytes(data[:end])
        world.pass_by(0.25)
    assert world.said == []
    (world.folder / "cert").write_bytes(data)
    world.pass_by(MOMENT)
    assert renewal.identity.chain == new.between


def test_a_renewal_reads_at_once(world: World) -> None:
    """Who sends SIGHUP does not wait for a look, and is told at once what is wrong."""
    renewal = world.begin()
    new = long()
    world.write(new)
    renewal.renew()
    assert renewal.identity.certificate == new.certificate
    (world.folder / "key").write_bytes(b"")
    renewal.renew()
    world.pass_by(60)
    assert [line.split(":")[0] for line in world.said] == ["info", "error"]
    assert renewal.identity.certificate == new.certificate


def test_a_renewal_without_a_change_is_harmless(world: World) -> None:
    """The same certificate serves on."""
    renewal = world.begin()
    old = renewal.identity.certificate
    renewal.renew()
    assert renewal.identity.certificate == old


def test_the_development_certificate_is_never_a_renewal(world: World) -> None:
    """It could be on an address where the start refuses it."""
    renewal = world.begin()
    old = renewal.identity
    key = load_pem_private_key(certificates.development_files()[0].read_bytes(), None)
    world.write(self_signed(key))
    world.pass_by(60)
    (line,) = world.said
    assert line.endswith(f"{KEPT}the key of the development certificate is public")
    assert renewal.identity is old


def test_from_the_development_certificate_to_a_good_one(world: World) -> None:
    """That is an improvement."""
    key = load_pem_private_key(certificates.development_files()[0].read_bytes(), None)
    world.write(self_signed(key))
    renewal = world.begin()
    world.write(long())
    world.pass_by(MOMENT)
    assert not certificates.is_development(renewal.identity)


def test_nothing_good_to_begin_with_is_an_error(world: World) -> None:
    """There is no old one that could stay."""
    (world.folder / "cert").write_bytes(b"")
    with pytest.raises(SettingsError):
        world.begin()


def test_a_relative_path_means_the_same_in_another_folder(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon may go to another one after its start."""
    monkeypatch.chdir(world.folder)
    given = {"ssl-key": "./key", "ssl-cert": "./cert"}
    renewal = Renewal(load(given, {}), world.clock, lambda: world.date)
    renewal.startService()
    os.chdir("/")
    new = long()
    world.write(new)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate


def test_an_end_that_is_near_is_told_at_the_start(world: World) -> None:
    """Two weeks are enough to do something."""
    world.write(AUTHORITY.issue(left=dt.timedelta(days=13)))
    world.begin()
    world.pass_by(60)
    (line,) = world.said
    assert line.startswith("warn: TLS: the certificate will expire: it is good until 2")


def test_an_expired_certificate_serves_and_is_told(world: World) -> None:
    """Some clients do not look; those that do say so themselves."""
    one = AUTHORITY.issue(left=dt.timedelta(hours=-1))
    world.write(one)
    renewal = world.begin()
    (line,) = world.said
    assert line.startswith("warn: TLS: the certificate has expired: it is good until 2")
    assert renewal.identity.certificate == one.certificate


def test_an_end_that_comes_near_is_told_once(world: World) -> None:
    """A daemon runs longer than a certificate; a renewed one begins anew."""
    world.begin()
    world.pass_by(60)
    assert world.said == []
    world.date += 80 * 86400
    world.pass_by(60)
    world.date += 20 * 86400
    world.pass_by(60)
    assert ["will expire" in s or "has expired" in s for s in world.said] == [True] * 2
    world.date -= 100 * 86400
    world.write(AUTHORITY.issue(left=dt.timedelta(days=1)))
    world.pass_by(MOMENT)
    assert [line.split(":")[0] for line in world.said[2:]] == ["info", "warn"]


def test_a_stopped_one_looks_no_more(world: World) -> None:
    """Nothing is left behind."""
    renewal = world.begin()
    renewal.stopService()
    assert world.clock.getDelayedCalls() == []
