"""Tests of TLS: identities from certificate files, and errors about unusable files."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12
from OpenSSL import SSL

from pulsar_api.config.loading import load
from pulsar_api.config.settings import Settings
from pulsar_api.errors import SettingsError
from pulsar_api.network import certificates
from tests.certificates import (
    Authority,
    Issued,
    certificates_pem,
    key_pem,
    public_pem,
    self_signed,
)

PHRASE = b"open sesame"
REFUSED = r"no shared cipher|handshake failure"


@pytest.fixture(scope="module")
def issued() -> Issued:
    """Return a certificate with its chain."""
    return Authority().issue()


@pytest.fixture
def folder(tmp_path: Path, issued: Issued) -> Path:
    """Return a folder with one identity in all formats."""
    contents = {
        "key": key_pem(issued.key),
        "locked": key_pem(issued.key, PHRASE),
        "old": key_pem(issued.key, PHRASE, old=True),
        "public": public_pem(issued.key),
        "cert": issued.cert_pem(),
        "phrase": PHRASE,
        "wrong": b"wrong",
        "nothing": b"",
        "nul": b"open\0sesame",
        "latin": b"\xe9\xff",
        "long": b"x" * 5000,
        "pfx": issued.pfx(),
        "locked-pfx": issued.pfx(PHRASE),
        "garbage": b"\x30\x82garbage",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def of(folder: Path, **names: str) -> Settings:
    """Return settings that name files of a folder."""
    return load({f"ssl-{option}": str(folder / name) for option, name in names.items()}, {})


def identity(settings: Settings) -> certificates.Identity:
    """Return the identity from the settings, which must exist."""
    found = certificates.load(settings)
    assert found is not None
    return found


def refusal(settings: Settings) -> str:
    """Return the error message for refused files."""
    with pytest.raises(SettingsError) as caught:
        certificates.load(settings)
    return str(caught.value)


def talk(server: SSL.Context, client: SSL.Context | None = None) -> SSL.Connection:
    """Return the client's end of a handshake in memory.

    The client trusts all certificates.
    """
    here = SSL.Connection(client or SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    here.set_connect_state()
    there = SSL.Connection(server, None)
    there.set_accept_state()
    ends = [(here, there), (there, here)]
    for _ in range(6):
        for one, other in ends:
            with suppress(SSL.WantReadError):
                one.do_handshake()
            with suppress(SSL.WantReadError):
                other.bio_write(one.bio_read(65536))
    return here


def is_whole(found: certificates.Identity, issued: Issued) -> bool:
    """Check that nothing was lost or swapped in the file."""
    same_key = key_pem(found.key) == key_pem(issued.key)
    chain = (found.certificate, *found.chain)
    return same_key and chain == (issued.certificate, *issued.between)


class TestPEM:
    def test_without_a_certificate_there_is_no_identity(self) -> None:
        """The daemon then serves plain HTTP."""
        assert certificates.load(load({}, {})) is None

    def test_key_and_certificate_come_with_the_appended_chain(
        self, folder: Path, issued: Issued
    ) -> None:
        """The first certificate is that of the server. The others lead to the authority."""
        assert is_whole(identity(of(folder, key="key", cert="cert")), issued)

    def test_the_appended_chain_is_sent_to_clients(
        self, folder: Path, issued: Issued
    ) -> None:
        """A client that knows only the authority can verify it."""
        options = identity(of(folder, key="key", cert="cert")).options()
        sent = talk(options.getContext()).get_peer_cert_chain()
        assert sent is not None
        expected = [issued.certificate, *issued.between]
        assert [c.to_cryptography() for c in sent] == expected

    @pytest.mark.parametrize("key", ["locked", "old"])
    def test_a_passphrase_opens_its_key(
        self, folder: Path, issued: Issued, key: str
    ) -> None:
        """The format of today and that of old OpenSSL are supported."""
        found = identity(of(folder, key=key, cert="cert", passphrase="phrase"))
        assert is_whole(found, issued)

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
    def test_a_line_end_does_not_belong_to_a_passphrase(
        self, folder: Path, issued: Issued, end: bytes
    ) -> None:
        """Editors and echo append one."""
        (folder / "phrase").write_bytes(PHRASE + end)
        found = identity(of(folder, key="locked", cert="cert", passphrase="phrase"))
        assert is_whole(found, issued)

    def test_a_space_belongs_to_a_passphrase(self, folder: Path) -> None:
        """Only line ends are removed."""
        (folder / "phrase").write_bytes(PHRASE + b" ")
        text = refusal(of(folder, key="locked", cert="cert", passphrase="phrase"))
        assert text.endswith("the passphrase is wrong")

    def test_a_passphrase_for_an_open_key_is_ignored(
        self, folder: Path, issued: Issued
    ) -> None:
        """The key may have lost its passphrase."""
        found = identity(of(folder, key="key", cert="cert", passphrase="phrase"))
        assert is_whole(found, issued)

    def test_key_and_certificate_can_be_in_one_file(
        self, folder: Path, issued: Issued
    ) -> None:
        """Both orders are accepted, as in other servers."""
        for parts in (["key", "cert"], ["cert", "key"]):
            both = b"".join((folder / part).read_bytes() for part in parts)
            (folder / "both").write_bytes(both)
            assert is_whole(identity(of(folder, key="both", cert="both")), issued)

    @pytest.mark.parametrize("wrong", ["wrong", "nul", "latin", "long"])
    def test_a_wrong_passphrase_is_reported(self, folder: Path, wrong: str) -> None:
        """The file can hold any bytes."""
        text = refusal(of(folder, key="locked", cert="cert", passphrase=wrong))
        path = folder / "locked"
        assert text == f"--ssl-key: cannot use {path}: the passphrase is wrong"

    @pytest.mark.parametrize(
        "given", [{}, {"passphrase": "nothing"}], ids=["none", "empty"]
    )
    def test_a_missing_passphrase_is_reported(
        self, folder: Path, given: dict[str, str]
    ) -> None:
        """An empty file counts as missing. The daemon never asks a terminal."""
        text = refusal(of(folder, key="locked", cert="cert", **given))
        assert text == (
            f"--ssl-key: {folder / 'locked'} has a passphrase; name the file that holds it "
            "by --ssl-passphrase"
        )

    @pytest.mark.parametrize("key", ["cert", "public", "garbage", "nothing"])
    def test_a_file_without_a_private_key_is_refused(self, folder: Path, key: str) -> None:
        """Often the two files are swapped."""
        text = refusal(of(folder, key=key, cert="cert"))
        expected = "it is not a private key in PEM form"
        assert text == f"--ssl-key: cannot use {folder / key}: {expected}"

    @pytest.mark.parametrize("cert", ["key", "public", "garbage", "nothing"])
    def test_a_file_without_a_certificate_is_refused(self, folder: Path, cert: str) -> None:
        """The message names it."""
        text = refusal(of(folder, key="key", cert=cert))
        assert text == f"--ssl-cert: {folder / cert} holds no certificate in PEM form"

    def test_a_key_that_does_not_match_its_certificate_is_refused(
        self, folder: Path
    ) -> None:
        """It happens when half of a renewal is copied."""
        other = ec.generate_private_key(ec.SECP256R1())
        (folder / "key").write_bytes(key_pem(other))
        text = refusal(of(folder, key="key", cert="cert"))
        path = folder / "cert"
        why = "the key does not match the certificate; use the key that it was issued for"
        assert text == f"--ssl-cert: {path}: {why}"

    def test_an_authority_before_the_certificate_does_not_match_the_key(
        self, folder: Path, issued: Issued
    ) -> None:
        """The chain comes after the certificate."""
        turned = certificates_pem(*issued.between, issued.certificate)
        (folder / "cert").write_bytes(turned)
        text = refusal(of(folder, key="key", cert="cert"))
        assert text.endswith(
            "the key does not match the certificate; use the key that it was issued for"
        )

    @pytest.mark.parametrize("option", ["key", "cert", "passphrase"])
    def test_an_unreadable_file_is_named(self, folder: Path, option: str) -> None:
        """The message quotes the error of the system."""
        names = {"key": "locked", "cert": "cert", "passphrase": "phrase"}
        (folder / "folder").mkdir()
        for name, why in (
            ("missing", "No such file or directory"),
            ("folder", "Is a directory"),
        ):
            text = refusal(of(folder, **{**names, option: name}))
            assert text == f"--ssl-{option}: cannot read {folder / name}: {why}"

    @pytest.mark.parametrize("left", [-5, -200])
    def test_a_truncated_chain_is_refused(self, folder: Path, left: int) -> None:
        """A file that is half written must not count as a certificate without a chain."""
        data = (folder / "cert").read_bytes()
        (folder / "cert").write_bytes(data[:left])
        text = refusal(of(folder, key="key", cert="cert"))
        path = folder / "cert"
        assert text == f"--ssl-cert: {path} holds an incomplete certificate"


class TestPKCS12:
    def test_a_pfx_holds_key_certificate_and_chain(
        self, folder: Path, issued: Issued
    ) -> None:
        assert is_whole(identity(of(folder, pfx="pfx")), issued)

    def test_a_passphrase_opens_its_pfx(self, folder: Path, issued: Issued) -> None:
        """The passphrase is in the same kind of file as for PEM."""
        found = identity(of(folder, pfx="locked-pfx", passphrase="phrase"))
        assert is_whole(found, issued)

    def test_a_pfx_overrides_key_and_certificate(
        self, folder: Path, issued: Issued
    ) -> None:
        """Their files are not read."""
        settings = of(folder, pfx="pfx", key="missing", cert="garbage")
        assert is_whole(identity(settings), issued)

    def test_an_empty_passphrase_file_means_no_passphrase(
        self, folder: Path, issued: Issued
    ) -> None:
        """Other programs export such files as "no password"."""
        assert is_whole(identity(of(folder, pfx="pfx", passphrase="nothing")), issued)

    @pytest.mark.parametrize(
        "names",
        [
            {"pfx": "locked-pfx"},
            {"pfx": "garbage"},
            {"pfx": "cert"},
            {"pfx": "nothing"},
            *(
                {"pfx": "locked-pfx", "passphrase": p}
                for p in ("wrong", "nul", "latin", "long")
            ),
        ],
        ids=lambda names: "-".join(names.values()),
    )
    def test_a_pfx_that_cannot_be_opened_is_refused(
        self, folder: Path, names: dict[str, str]
    ) -> None:
        """The format does not tell a wrong passphrase from a broken file."""
        text = refusal(of(folder, **names))
        assert text == (
            f"--ssl-pfx: cannot open {folder / names['pfx']}: it is not a PKCS #12 file, "
            "or the passphrase (--ssl-passphrase) is wrong or missing"
        )

    def test_a_pfx_without_a_key_is_refused(self, folder: Path, issued: Issued) -> None:
        """Such files are meant for clients."""
        data = pkcs12.serialize_key_and_certificates(
            None, None, None, [issued.certificate], NoEncryption()
        )
        (folder / "pfx").write_bytes(data)
        text = refusal(of(folder, pfx="pfx"))
        assert text == f"--ssl-pfx: {folder / 'pfx'} must hold a key and its certificate"

    def test_an_unreadable_pfx_is_named(self, folder: Path) -> None:
        """The message quotes the error of the system."""
        text = refusal(of(folder, pfx="missing"))
        path = folder / "missing"
        assert text == f"--ssl-pfx: cannot read {path}: No such file or directory"


class TestKeys:
    @pytest.mark.parametrize(
        "key",
        [
            rsa.generate_private_key(65537, 2048),
            ec.generate_private_key(ec.SECP384R1()),
            ed25519.Ed25519PrivateKey.generate(),
        ],
        ids=["rsa", "ec", "ed25519"],
    )
    def test_every_usual_kind_of_key_can_serve(self, tmp_path: Path, key: Any) -> None:
        """A client completes the handshake and sees the certificate."""
        one = self_signed(key)
        (tmp_path / "key").write_bytes(key_pem(key))
        (tmp_path / "cert").write_bytes(one.cert_pem())
        options = identity(of(tmp_path, key="key", cert="cert")).options()
        seen = talk(options.getContext()).get_peer_certificate()
        assert seen is not None
        assert seen.to_cryptography() == one.certificate

    @pytest.mark.parametrize("kind", ["short", "dsa", "x25519"])
    def test_a_key_that_no_client_could_use_is_refused(
        self, tmp_path: Path, kind: str
    ) -> None:
        """The daemon fails at its start instead of at each connection."""
        if kind == "x25519":
            key: Any = x25519.X25519PrivateKey.generate()
            one = Authority().issue(key.public_key())
        else:
            key = (
                rsa.generate_private_key(65537, 1024)
                if kind == "short"
                else dsa.generate_private_key(2048)
            )
            one = self_signed(key)
        (tmp_path / "key").write_bytes(key_pem(key))
        (tmp_path / "cert").write_bytes(one.cert_pem())
        assert refusal(of(tmp_path, key="key", cert="cert")).startswith("--ssl-")


class TestCiphers:
    @pytest.mark.parametrize(
        "suite",
        ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES256-SHA", "ECDHE-ECDSA-AES128-CCM"],
    )
    def test_a_weak_cipher_suite_is_refused(self, folder: Path, suite: str) -> None:
        """A client of TLS 1.2 without a better one cannot connect."""
        client = SSL.Context(SSL.TLS_CLIENT_METHOD)
        client.set_max_proto_version(SSL.TLS1_2_VERSION)
        client.set_cipher_list(suite.encode())
        options = identity(of(folder, key="key", cert="cert")).options()
        with pytest.raises(SSL.Error, match=REFUSED):
            talk(options.getContext(), client)

    def test_an_rsa_key_never_encrypts_a_secret(self, tmp_path: Path) -> None:
        """Such suites have no forward secrecy. With key agreement the same key serves."""
        one = self_signed(rsa.generate_private_key(65537, 2048))
        (tmp_path / "pfx").write_bytes(one.pfx())
        context = identity(of(tmp_path, pfx="pfx")).options().getContext()
        client = SSL.Context(SSL.TLS_CLIENT_METHOD)
        client.set_max_proto_version(SSL.TLS1_2_VERSION)
        assert talk(context, client).get_cipher_name() == "ECDHE-RSA-AES256-GCM-SHA384"
        client = SSL.Context(SSL.TLS_CLIENT_METHOD)
        client.set_max_proto_version(SSL.TLS1_2_VERSION)
        client.set_cipher_list(b"AES256-GCM-SHA384")
        with pytest.raises(SSL.Error, match=REFUSED):
            talk(context, client)


class TestClientAuthorities:
    def test_authorities_are_read_from_one_file(self, folder: Path, issued: Issued) -> None:
        """It can hold any number. If no file is named, clients need no certificate."""
        other = Authority("other").root
        (folder / "cas").write_bytes(certificates_pem(*issued.between, other))
        found = identity(of(folder, pfx="pfx", **{"client-ca": "cas"}))
        assert found.client_authorities == (*issued.between, other)
        assert identity(of(folder, pfx="pfx")).client_authorities == ()

    @pytest.mark.parametrize("name", ["key", "public", "garbage", "nothing", "pfx"])
    def test_a_file_without_a_certificate_is_refused(self, folder: Path, name: str) -> None:
        """The message names it."""
        text = refusal(of(folder, pfx="pfx", **{"client-ca": name}))
        path = folder / name
        assert text == f"--ssl-client-ca: {path} holds no certificate in PEM form"

    def test_a_client_is_told_the_accepted_authorities(
        self, folder: Path, issued: Issued
    ) -> None:
        """A browser then offers matching certificates."""
        (folder / "cas").write_bytes(certificates_pem(*issued.between))
        context = identity(of(folder, pfx="pfx", **{"client-ca": "cas"})).options()
        client = SSL.Context(SSL.TLS_CLIENT_METHOD)
        client.set_max_proto_version(SSL.TLS1_2_VERSION)
        client.use_certificate(issued.certificate)
        client.use_privatekey(issued.key)
        (name,) = talk(context.getContext(), client).get_client_ca_list()
        assert name.CN == "root 2"


class TestFiles:
    def test_watched_files_include_passphrase_and_authorities(self, folder: Path) -> None:
        """Only files that are read count, and not overridden ones."""
        more = {"passphrase": "phrase", "client-ca": "cert"}
        pem = of(folder, key="locked", cert="cert", **more)
        wanted = ["locked", "cert", "phrase", "cert"]
        assert certificates.files(pem) == tuple(folder / name for name in wanted)
        pfx = of(folder, pfx="pfx", key="key", cert="cert")
        assert certificates.files(pfx) == (folder / "pfx",)

    def test_watched_files_include_those_of_the_development(self) -> None:
        """They are treated like any others."""
        assert certificates.files(load({"dev": 1}, {})) == certificates.development_files()


class TestDevelopment:
    def test_the_development_certificate_has_its_names(self) -> None:
        """They are *.pulsar.local and localhost."""
        found = identity(load({"dev": 1}, {}))
        extension = found.certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        names = extension.value.get_values_for_type(x509.DNSName)
        assert {"*.pulsar.local", "localhost"} <= set(names)

    def test_the_published_identity_is_a_development_identity(self) -> None:
        """It can be refused where others could be deceived with it."""
        assert certificates.is_development(identity(load({"dev": 1}, {})))

    def test_the_development_key_is_recognised_in_any_file(self, tmp_path: Path) -> None:
        """Certificate and format can differ, because the key decides."""
        mine = identity(load({"dev": 1}, {}))
        (tmp_path / "pfx").write_bytes(self_signed(mine.key).pfx())
        assert certificates.is_development(identity(of(tmp_path, pfx="pfx")))

    def test_an_own_key_is_not_a_development_key(self, folder: Path) -> None:
        """Only the published key is refused."""
        assert not certificates.is_development(identity(of(folder, key="key", cert="cert")))

    def test_the_development_files_exist(self) -> None:
        """The key comes first, then the certificate."""
        key, certificate = certificates.development_files()
        assert b"PRIVATE KEY" in key.read_bytes()
        assert b"BEGIN CERTIFICATE" in certificate.read_bytes()
