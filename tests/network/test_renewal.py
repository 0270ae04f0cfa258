"""Tests of the certificate that new connections get while its files change."""

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
"""Seconds after which a change has been noticed and used."""
KEPT = "the old one stays: "


@define(eq=False)
class World:
    """A folder with certificate files, a clock, and the logged messages."""

    folder: Path
    said: list[str]
    clock: Clock = field(factory=Clock)
    date: float = field(factory=lambda: dt.datetime.now(dt.UTC).timestamp())

    def write(self, issued: Issued) -> None:
        """Write key and certificate in place."""
        (self.folder / "key").write_bytes(key_pem(issued.key))
        (self.folder / "cert").write_bytes(issued.cert_pem())

    def begin(self, **more: Any) -> Renewal:
        """Start with the files of the folder."""
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
    """Yield a folder with a good certificate. Its log has all messages from info on."""
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
    """Return a certificate that expires so late that no warning is due."""
    return AUTHORITY.issue(left=dt.timedelta(days=90))


def in_place(world: World, new: Issued) -> None:
    """Overwrite both files."""
    world.write(new)


def by_rename(world: World, new: Issued) -> None:
    """Replace both files by new ones."""
    for name, data in (("key", key_pem(new.key)), ("cert", new.cert_pem())):
        (world.folder / "new").write_bytes(data)
        (world.folder / "new").replace(world.folder / name)


@pytest.mark.parametrize("change", [in_place, by_rename])
def test_a_new_certificate_is_used(
    world: World, change: Callable[[World, Issued], None]
) -> None:
    """It is used after the next check, whichever way the files were replaced."""
    renewal = world.begin()
    new = long()
    change(world, new)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate
    (line,) = world.said
    serial = f"{new.certificate.serial_number:x}"
    assert line.startswith(f"info: TLS: new connections get the certificate {serial}, good")


def test_a_changed_link_is_a_change(world: World) -> None:
    """Certbot replaces links, and leaves the old files as they were."""
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


def test_a_new_pfx_and_its_passphrase_are_used(world: World) -> None:
    """They are replaced one after the other, and the time in between logs no error."""
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


def test_new_client_authorities_are_used(world: World) -> None:
    """They need no restart."""
    (world.folder / "ca").write_bytes(certificates_pem(AUTHORITY.root))
    renewal = world.begin(key="key", cert="cert", **{"client-ca": "ca"})
    other = Authority("other")
    (world.folder / "ca").write_bytes(certificates_pem(other.root))
    world.pass_by(MOMENT)
    assert renewal.identity.client_authorities == (other.root,)


def test_a_key_without_its_certificate_is_neither_used_nor_reported(
    world: World,
) -> None:
    """They do not match for the duration of one check."""
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


def test_a_lasting_mistake_is_reported_once(world: World) -> None:
    """The old certificate stays in use."""
    renewal = world.begin()
    old = renewal.identity
    (world.folder / "key").write_bytes(key_pem(long().key))
    world.pass_by(60)
    path = world.folder / "cert"
    why = "the key does not match the certificate; use the key that it was issued for"
    text = f"{KEPT}--ssl-cert: {path}: {why}"
    assert world.said == [f"error: TLS: the new certificate is not used, {text}"]
    assert renewal.identity is old


def test_each_wrong_change_is_reported(world: World) -> None:
    """An operator who tries again gets a message for each try."""
    world.begin()
    for _ in range(3):
        (world.folder / "key").write_bytes(key_pem(long().key))
        world.pass_by(MOMENT + LOOK)
    assert [KEPT in line for line in world.said] == [True] * 3


def test_a_good_certificate_after_a_wrong_one_is_used(world: World) -> None:
    """No other action is needed."""
    renewal = world.begin()
    (world.folder / "cert").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    world.pass_by(60)
    assert len(world.said) == 1
    new = long()
    world.write(new)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate


def test_missing_files_change_nothing(world: World) -> None:
    """The error is logged, and the certificate in memory stays in use."""
    renewal = world.begin()
    old = renewal.identity
    (world.folder / "key").unlink()
    world.pass_by(60)
    path = world.folder / "key"
    (line,) = world.said
    assert line.endswith(f"{KEPT}--ssl-key: cannot read {path}: No such file or directory")
    assert renewal.identity is old


def test_a_file_that_is_being_written_is_not_read(world: World) -> None:
    """It is read once it has not changed for a moment."""
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


def test_a_requested_renewal_reads_at_once(world: World) -> None:
    """SIGHUP causes it. Errors are logged at once."""
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
    """The same certificate stays in use."""
    renewal = world.begin()
    old = renewal.identity.certificate
    renewal.renew()
    assert renewal.identity.certificate == old


def test_the_development_certificate_is_never_used_as_a_renewal(world: World) -> None:
    """The daemon may listen on an address where it would be refused at the start."""
    renewal = world.begin()
    old = renewal.identity
    key = load_pem_private_key(certificates.development_files()[0].read_bytes(), None)
    world.write(self_signed(key))
    world.pass_by(60)
    (line,) = world.said
    assert line.endswith(f"{KEPT}the key of the development certificate is public")
    assert renewal.identity is old


def test_the_development_certificate_can_be_replaced(world: World) -> None:
    """The new one is better."""
    key = load_pem_private_key(certificates.development_files()[0].read_bytes(), None)
    world.write(self_signed(key))
    renewal = world.begin()
    world.write(long())
    world.pass_by(MOMENT)
    assert not certificates.is_development(renewal.identity)


def test_a_wrong_certificate_at_the_start_is_an_error(world: World) -> None:
    """There is no old one that could stay in use."""
    (world.folder / "cert").write_bytes(b"")
    with pytest.raises(SettingsError):
        world.begin()


def test_a_relative_path_keeps_its_meaning(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon can change its directory after the start."""
    monkeypatch.chdir(world.folder)
    given = {"ssl-key": "./key", "ssl-cert": "./cert"}
    renewal = Renewal(load(given, {}), world.clock, lambda: world.date)
    renewal.startService()
    os.chdir("/")
    new = long()
    world.write(new)
    world.pass_by(MOMENT)
    assert renewal.identity.certificate == new.certificate


def test_a_certificate_that_expires_soon_is_reported_at_the_start(world: World) -> None:
    """The message comes two weeks before."""
    world.write(AUTHORITY.issue(left=dt.timedelta(days=13)))
    world.begin()
    world.pass_by(60)
    (line,) = world.said
    assert line.startswith("warn: TLS: the certificate will expire: it is good until 2")


def test_an_expired_certificate_is_used_and_reported(world: World) -> None:
    """Some clients ignore the date, and others report it themselves."""
    one = AUTHORITY.issue(left=dt.timedelta(hours=-1))
    world.write(one)
    renewal = world.begin()
    (line,) = world.said
    assert line.startswith("warn: TLS: the certificate has expired: it is good until 2")
    assert renewal.identity.certificate == one.certificate


def test_the_approaching_expiry_is_reported_once(world: World) -> None:
    """A renewed certificate gets a message of its own."""
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


def test_a_stopped_renewal_checks_no_more(world: World) -> None:
    """No delayed call stays."""
    renewal = world.begin()
    renewal.stopService()
    assert world.clock.getDelayedCalls() == []
