"""TLS as clients see it: who the daemon is, which versions it speaks, and where it may."""

import os
import re
import shutil
import socket
import ssl
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import pulsar_api
from tests.certificates import Authority, Issued, certificates_pem, key_pem, self_signed
from tests.integration.conftest import Start
from tests.integration.daemon import CERTIFICATE, PATIENCE, Daemon
from tests.integration.refused import refusal

PHRASE = b"open sesame"
DEV_KEY = CERTIFICATE.with_suffix(".key")
NEVER = "everybody has the key of the development certificate; take your own"

TLS10, TLS11, TLS12 = 0x0301, 0x0302, 0x0303
HANDSHAKE, ALERT = 22, 21
PROTOCOL_VERSION = 70  # RFC 8446, section 6


@pytest.fixture(scope="module")
def authority() -> Authority:
    """Return an authority, of which clients know only the root."""
    return Authority()


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    """Return what the authority gave to the daemon."""
    return authority.issue()


@pytest.fixture
def files(tmp_path: Path, authority: Authority, issued: Issued) -> Path:
    """Return a folder with the daemon's identity in all its forms."""
    stranger = Authority("stranger").issue()
    contents = {
        "root": certificates_pem(authority.root),
        "key": key_pem(issued.key),
        "locked": key_pem(issued.key, PHRASE),
        "cert": issued.cert_pem(),
        "pfx": issued.pfx(),
        "locked-pfx": issued.pfx(PHRASE),
        "phrase": PHRASE + b"\n",
        "stranger.key": key_pem(stranger.key),
        "stranger.cert": stranger.cert_pem(),
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


Serve = Callable[..., Daemon]


@pytest.fixture
def serve(start: Start, files: Path) -> Serve:
    """Return a function that starts a daemon with files of the folder by their names."""

    def begin(
        *options: str, environ: Mapping[str, str] | None = None, **names: str
    ) -> Daemon:
        given = [f"--ssl-{option}={files / name}" for option, name in names.items()]
        return start(*given, *options, trust=files / "root", environ=environ)

    return begin


def seen(daemon: Daemon, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLSocket:
    """Return a connection after its handshake, in which the daemon was asked for a name."""
    sock = daemon.open_socket()
    return context.wrap_socket(sock, server_hostname=name)


def trusting(root: Path) -> ssl.SSLContext:
    """Return a client that knows one authority and nobody else."""
    return ssl.create_default_context(cafile=root)


def hello(version: int) -> bytes:
    """Return what a client says first that knows nothing newer than a version."""
    suites = struct.pack("!4H", 0xC009, 0xC00A, 0xC02B, 0x002F)
    groups = struct.pack("!HHHH", 10, 4, 2, 23)
    points = struct.pack("!HHBB", 11, 2, 1, 0)
    signatures = struct.pack("!HHHH", 13, 4, 2, 0x0403)
    extensions = groups + points + signatures
    body = struct.pack("!H", version) + os.urandom(32) + b"\0"
    body += struct.pack("!H", len(suites)) + suites + b"\1\0"
    body += struct.pack("!H", len(extensions)) + extensions
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return struct.pack("!BHH", HANDSHAKE, TLS10, len(message)) + message


def answer(daemon: Daemon, version: int) -> bytes:
    """Return the first seven bytes of the answer to a client of a version."""
    with socket.create_connection((daemon.host, daemon.port), PATIENCE) as sock:
        sock.sendall(hello(version))
        with sock.makefile("rb") as stream:
            return stream.read(7)


class TestCertificates:
    def test_a_client_that_knows_only_the_authority_is_served(self, serve: Serve) -> None:
        """The chain that is appended in the certificate file leads there."""
        daemon = serve(key="key", cert="cert")
        assert daemon.scheme == "https"
        assert daemon.get("/tasks").status == 200

    def test_a_client_that_knows_another_authority_is_not_deceived(
        self, serve: Serve, files: Path
    ) -> None:
        """The control: these clients do look."""
        daemon = serve(key="key", cert="cert")
        with pytest.raises(ssl.SSLCertVerificationError):
            seen(daemon, trusting(files / "stranger.cert"))

    def test_a_key_with_a_passphrase_serves(self, serve: Serve) -> None:
        """The passphrase is in a file."""
        daemon = serve(key="locked", cert="cert", passphrase="phrase")
        assert daemon.get("/tasks").status == 200

    def test_a_pfx_serves(self, serve: Serve) -> None:
        """With everything in it, the chain too."""
        assert serve(pfx="pfx").get("/tasks").status == 200

    def test_a_pfx_with_a_passphrase_serves(self, serve: Serve) -> None:
        """The passphrase is in the same kind of file."""
        daemon = serve(pfx="locked-pfx", passphrase="phrase")
        assert daemon.get("/tasks").status == 200

    def test_a_pfx_overrides_key_and_certificate(
        self, serve: Serve, files: Path, issued: Issued
    ) -> None:
        """Whoever has both sees the certificate of the PKCS #12 file."""
        daemon = serve(pfx="pfx", key="stranger.key", cert="stranger.cert")
        with seen(daemon, trusting(files / "root")) as sock:
            presented = sock.getpeercert(binary_form=True)
        assert presented == ssl.PEM_cert_to_DER_cert(
            certificates_pem(issued.certificate).decode()
        )

    def test_a_passphrase_can_be_one_of_systemds_credentials(
        self, start: Start, files: Path
    ) -> None:
        """LoadCredential= puts it in a folder; its name is enough."""
        daemon = start(
            f"--ssl-pfx={files / 'locked-pfx'}",
            "--ssl-passphrase=phrase",
            trust=files / "root",
            environ={**os.environ, "CREDENTIALS_DIRECTORY": str(files)},
        )
        assert daemon.get("/tasks").status == 200

    def test_a_settings_file_names_the_same_files(
        self, start: Start, files: Path, tmp_path: Path
    ) -> None:
        """Nothing about TLS needs a command line."""
        config = tmp_path / "pulsar-api.toml"
        config.write_text(f"ssl-key = '{files / 'key'}'\nssl-cert = '{files / 'cert'}'\n")
        daemon = start("--config", str(config), trust=files / "root")
        assert daemon.scheme == "https"

    def test_an_endpoint_serves_tls_too(self, serve: Serve) -> None:
        """--listen replaces the port, not the certificate."""
        daemon = serve("--listen", "tcp:0:interface=127.0.0.1", pfx="pfx")
        assert daemon.scheme == "https"

    def test_everybody_is_served_with_a_certificate_of_ones_own(self, serve: Serve) -> None:
        """The counterpart of what is refused below."""
        daemon = serve("--interface=0.0.0.0", "--allow-anonymous", key="key", cert="cert")
        assert daemon.get("/tasks").status == 200

    def test_a_client_without_tls_does_no_harm(self, serve: Serve) -> None:
        """It is cut off, and the next one is served."""
        daemon = serve(key="key", cert="cert")
        with daemon.open_socket() as sock:
            sock.sendall(b"GET /tasks HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with sock.makefile("rb") as stream:
                assert not stream.read().startswith(b"HTTP/")
        assert daemon.get("/tasks").status == 200
        assert "Traceback" not in daemon.log.read_text()


class TestVersions:
    @pytest.mark.parametrize(
        ("version", "name"),
        [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")],
        ids=["1.2", "1.3"],
    )
    def test_tls_1_2_and_1_3_are_spoken(
        self, serve: Serve, files: Path, version: ssl.TLSVersion, name: str
    ) -> None:
        """By clients that know only the one or the other."""
        daemon = serve(key="key", cert="cert")
        context = trusting(files / "root")
        context.minimum_version = context.maximum_version = version
        with seen(daemon, context) as sock:
            assert sock.version() == name

    def test_nothing_older_is_spoken(self, serve: Serve) -> None:
        """A client of TLS 1.1 or 1.0 is told that it is its version that is refused."""
        daemon = serve(key="key", cert="cert")
        for version in (TLS11, TLS10):
            kind, _, length, _, why = struct.unpack("!BHHBB", answer(daemon, version))
            assert (kind, length, why) == (ALERT, 2, PROTOCOL_VERSION)
        # The same words with the newer version are understood.
        assert answer(daemon, TLS12)[0] == HANDSHAKE

    def test_http_1_1_is_what_is_agreed_on(self, serve: Serve, files: Path) -> None:
        """Also with a client that would like HTTP/2."""
        daemon = serve(key="key", cert="cert")
        context = trusting(files / "root")
        context.set_alpn_protocols(["h2", "http/1.1"])
        with seen(daemon, context) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1"


class TestDevelopment:
    @pytest.mark.parametrize("name", ["localhost", "api.pulsar.local"])
    def test_dev_serves_tls_for_its_names(self, start: Start, name: str) -> None:
        """Whoever trusts its certificate gets through under both."""
        daemon = start("--dev")
        assert daemon.scheme == "https"
        with seen(daemon, trusting(CERTIFICATE), name) as sock:
            presented = sock.getpeercert(binary_form=True)
        assert presented is not None
        names = x509.load_der_x509_certificate(
            presented
        ).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        found = names.value.get_values_for_type(x509.DNSName)
        assert {"*.pulsar.local", "localhost"} <= set(found)

    def test_dev_says_loudly_that_it_is_for_development(self, start: Start) -> None:
        """In capitals, as a warning, where one looks for the address."""
        log = start("--dev").log.read_text()
        assert re.search(r"#warn\] .*DEVELOPMENT CERTIFICATE", log)

    def test_dev_writes_to_the_terminal(self, start: Start) -> None:
        """What it logs is on its standard output."""
        assert "listens on https://127.0.0.1:" in start("--dev").log.read_text()

    def test_the_warning_depends_on_the_key_not_on_the_option(self, start: Start) -> None:
        """Named like one's own it is still everybody's."""
        daemon = start("--ssl-key", str(DEV_KEY), "--ssl-cert", str(CERTIFICATE))
        assert "DEVELOPMENT CERTIFICATE" in daemon.log.read_text()

    def test_a_certificate_of_ones_own_brings_no_warning(self, serve: Serve) -> None:
        """A warning that always comes is none."""
        log = serve(key="key", cert="cert").log.read_text()
        assert "DEVELOPMENT" not in log

    def test_a_package_without_the_development_files_serves_tls(
        self, serve: Serve, tmp_path: Path
    ) -> None:
        """Who packages it may leave a published key out; that is no reason to fail."""
        package = tmp_path / "package" / "pulsar_api"
        shutil.copytree(Path(pulsar_api.__file__).parent, package)
        shutil.rmtree(package / "ssl", ignore_errors=True)
        environ = {**os.environ, "PYTHONPATH": str(package.parent)}
        daemon = serve(pfx="pfx", environ=environ)
        assert daemon.get("/tasks").status == 200
        said = refusal(tmp_path, "--dev", environ=environ)
        assert said == "--dev: the certificate of *.pulsar.local is not installed"

    @pytest.mark.parametrize("allowed", [(), ("--allow-anonymous",)], ids=["", "anonymous"])
    @pytest.mark.parametrize(
        "place",
        [
            ("--interface", "0.0.0.0"),
            ("--interface", "192.0.2.1"),
            ("--listen", "tcp:{port}"),
            ("--listen", "tcp:{port}:interface=0.0.0.0"),
            ("--listen", "haproxy:tcp:{port}"),
        ],
        ids=" ".join,
    )
    def test_dev_is_refused_where_others_are(
        self, tmp_path: Path, place: Sequence[str], allowed: Sequence[str]
    ) -> None:
        """Its key protects nothing; nobody can allow what nobody can want."""
        said = refusal(tmp_path, "--dev", *place, *allowed, ways=("python", "background"))
        assert said.startswith("will not listen on ")
        assert said.endswith(NEVER)

    @pytest.mark.parametrize("place", ["--interface=0.0.0.0", "--listen=tcp:{port}"])
    @pytest.mark.parametrize("form", ["pem", "pfx", "another certificate"])
    def test_the_development_key_is_refused_in_every_form(
        self, tmp_path: Path, form: str, place: str
    ) -> None:
        """By --ssl-key, in a PKCS #12 file, and under a certificate of another name."""
        one = self_signed(load_pem_private_key(DEV_KEY.read_bytes(), None))
        (tmp_path / "pfx").write_bytes(one.pfx())
        (tmp_path / "cert").write_bytes(one.cert_pem())
        names = {
            "pem": (f"--ssl-key={DEV_KEY}", f"--ssl-cert={CERTIFICATE}"),
            "pfx": (f"--ssl-pfx={tmp_path / 'pfx'}",),
            "another certificate": (
                f"--ssl-key={DEV_KEY}",
                f"--ssl-cert={tmp_path / 'cert'}",
            ),
        }
        given = (*names[form], place, "--allow-anonymous")
        said = refusal(tmp_path, *given, ways=("python", "background"))
        assert said.startswith("will not listen on ")
        assert said.endswith(NEVER)
