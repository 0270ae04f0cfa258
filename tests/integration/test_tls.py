"""Tests of TLS as clients see it: certificates, versions, and refused addresses."""

import datetime as dt
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import pulsar_api
from tests.certificates import Authority, Issued, certificates_pem, key_pem, self_signed
from tests.integration.conftest import Start
from tests.integration.daemon import CERTIFICATE, PATIENCE, Daemon, next_answer
from tests.integration.refused import refusal, told

PHRASE = b"open sesame"
DEV_KEY = CERTIFICATE.with_suffix(".key")
NEVER = "the key of the development certificate is public; use another one"

TLS10, TLS11, TLS12 = 0x0301, 0x0302, 0x0303
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
HANDSHAKE, ALERT = 22, 21
PROTOCOL_VERSION = 70  # RFC 8446, section 6


@pytest.fixture(scope="module")
def authority() -> Authority:
    """Return an authority whose root the clients trust."""
    return Authority()


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    """Return the key and certificates that the authority issued to the daemon."""
    return authority.issue()


@pytest.fixture
def files(tmp_path: Path, authority: Authority, issued: Issued) -> Path:
    """Return a folder with the daemon's key and certificate in all formats."""
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
    """Return a function that starts a daemon with named files of the folder."""

    def begin(
        *options: str, environ: Mapping[str, str] | None = None, **names: str
    ) -> Daemon:
        given = [f"--ssl-{option}={files / name}" for option, name in names.items()]
        return start(*given, *options, trust=files / "root", environ=environ)

    return begin


def seen(daemon: Daemon, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLSocket:
    """Return a connection to the daemon after its handshake, for a given server name."""
    sock = daemon.open_socket()
    return context.wrap_socket(sock, server_hostname=name)


def trusting(root: Path) -> ssl.SSLContext:
    """Return the context of a client that trusts one authority."""
    return ssl.create_default_context(cafile=root)


def hello(version: int) -> bytes:
    """Return the first message of a client that supports no newer version."""
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
    """Return the first seven bytes of the response to such a client."""
    with socket.create_connection((daemon.host, daemon.port), PATIENCE) as sock:
        sock.sendall(hello(version))
        with sock.makefile("rb") as stream:
            return stream.read(7)


class TestCertificates:
    def test_a_client_that_trusts_the_root_is_served(self, serve: Serve) -> None:
        """The certificate file has the intermediate certificates."""
        daemon = serve(key="key", cert="cert")
        assert daemon.scheme == "https"
        assert daemon.get("/tasks").status == 200

    def test_a_client_that_trusts_another_root_refuses_the_daemon(
        self, serve: Serve, files: Path
    ) -> None:
        """So the clients of these tests do verify certificates."""
        daemon = serve(key="key", cert="cert")
        with pytest.raises(ssl.SSLCertVerificationError):
            seen(daemon, trusting(files / "stranger.cert"))

    def test_a_key_with_a_passphrase_serves(self, serve: Serve) -> None:
        """The passphrase is in a file."""
        daemon = serve(key="locked", cert="cert", passphrase="phrase")
        assert daemon.get("/tasks").status == 200

    def test_a_pfx_file_serves(self, serve: Serve) -> None:
        """It has the key, the certificate and the chain."""
        assert serve(pfx="pfx").get("/tasks").status == 200

    def test_a_pfx_file_with_a_passphrase_serves(self, serve: Serve) -> None:
        """The passphrase is in a file."""
        daemon = serve(pfx="locked-pfx", passphrase="phrase")
        assert daemon.get("/tasks").status == 200

    def test_a_pfx_overrides_key_and_certificate(
        self, serve: Serve, files: Path, issued: Issued
    ) -> None:
        """A daemon with both presents the certificate of the PKCS #12 file."""
        daemon = serve(pfx="pfx", key="stranger.key", cert="stranger.cert")
        with seen(daemon, trusting(files / "root")) as sock:
            presented = sock.getpeercert(binary_form=True)
        assert presented == ssl.PEM_cert_to_DER_cert(
            certificates_pem(issued.certificate).decode()
        )

    def test_a_passphrase_can_be_a_credential_of_systemd(
        self, start: Start, files: Path
    ) -> None:
        """With ``LoadCredential=`` its name is enough."""
        daemon = start(
            f"--ssl-pfx={files / 'locked-pfx'}",
            "--ssl-passphrase=phrase",
            trust=files / "root",
            environ={**os.environ, "CREDENTIALS_DIRECTORY": str(files)},
        )
        assert daemon.get("/tasks").status == 200

    def test_a_settings_file_can_name_the_certificate(
        self, start: Start, files: Path, tmp_path: Path
    ) -> None:
        """TLS needs no option on the command line."""
        config = tmp_path / "pulsar-api.toml"
        config.write_text(f"ssl-key = '{files / 'key'}'\nssl-cert = '{files / 'cert'}'\n")
        daemon = start("--config", str(config), trust=files / "root")
        assert daemon.scheme == "https"

    def test_an_endpoint_serves_tls(self, serve: Serve) -> None:
        """The option ``--listen`` replaces the port, not the certificate."""
        daemon = serve("--listen", "tcp:0:interface=127.0.0.1", pfx="pfx")
        assert daemon.scheme == "https"

    def test_a_certificate_of_ones_own_can_serve_all_interfaces(self, serve: Serve) -> None:
        """The development certificate cannot, see below."""
        daemon = serve("--interface=0.0.0.0", "--allow-anonymous", key="key", cert="cert")
        assert daemon.get("/tasks").status == 200

    def test_a_client_without_tls_is_disconnected(self, serve: Serve) -> None:
        """The next client is served."""
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
    def test_tls_1_2_and_1_3_are_supported(
        self, serve: Serve, files: Path, version: ssl.TLSVersion, name: str
    ) -> None:
        """Each client supports only one of them."""
        daemon = serve(key="key", cert="cert")
        context = trusting(files / "root")
        context.minimum_version = context.maximum_version = version
        with seen(daemon, context) as sock:
            assert sock.version() == name

    def test_older_versions_get_a_protocol_version_alert(self, serve: Serve) -> None:
        """Clients of TLS 1.0 and 1.1 learn that their version is refused."""
        daemon = serve(key="key", cert="cert")
        for version in (TLS11, TLS10):
            kind, _, length, _, why = struct.unpack("!BHHBB", answer(daemon, version))
            assert (kind, length, why) == (ALERT, 2, PROTOCOL_VERSION)
        # The same message with a newer version is accepted.
        assert answer(daemon, TLS12)[0] == HANDSHAKE

    def test_alpn_selects_http_1_1(self, serve: Serve, files: Path) -> None:
        """The client also offers HTTP/2."""
        daemon = serve(key="key", cert="cert")
        context = trusting(files / "root")
        context.set_alpn_protocols(["h2", "http/1.1"])
        with seen(daemon, context) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1"


@pytest.mark.needs("sslscan")
class TestScan:
    """The results of `sslscan`, an independent program."""

    @pytest.mark.parametrize("kind", ["ec", "rsa"])
    def test_ciphers_have_forward_secrecy_and_aead(
        self, start: Start, tmp_path: Path, kind: str
    ) -> None:
        """Old versions, compression and renegotiation are off."""
        key: Any = ec.generate_private_key(ec.SECP256R1())
        if kind == "rsa":
            key = rsa.generate_private_key(65537, 2048)
        one = self_signed(key)
        (tmp_path / "pfx").write_bytes(one.pfx())
        (tmp_path / "cert").write_bytes(one.cert_pem())
        daemon = start(f"--ssl-pfx={tmp_path / 'pfx'}", trust=tmp_path / "cert")
        text = subprocess.run(
            ["sslscan", "--xml=-", f"{daemon.host}:{daemon.port}"],
            capture_output=True,
            check=True,
            timeout=PATIENCE,
        ).stdout
        scan = ET.fromstring(text).find("ssltest")
        assert scan is not None, text
        protocols = {
            f"{p.get('type')}{p.get('version')}": p.get("enabled") == "1"
            for p in scan.iter("protocol")
        }
        assert {p for p, enabled in protocols.items() if enabled} == {"tls1.2", "tls1.3"}
        assert {"ssl2", "ssl3", "tls1.0", "tls1.1"} < set(protocols)
        suites = [
            (c.get("sslversion", ""), c.get("cipher", "")) for c in scan.iter("cipher")
        ]
        assert {version for version, _ in suites} == {"TLSv1.2", "TLSv1.3"}
        for version, name in suites:
            assert version == "TLSv1.3" or name.startswith("ECDHE-"), name
            assert "GCM" in name or name.endswith(("POLY1305", "POLY1305_SHA256")), name
        for name in ("compression", "renegotiation"):
            assert [e.get("supported") for e in scan.iter(name)] in ([], ["0"]), name
        weak = [e.get("vulnerable") for e in scan.iter("heartbleed")]
        assert weak
        assert set(weak) == {"0"}

    def test_compression_and_session_resumption_are_off(
        self, serve: Serve, files: Path
    ) -> None:
        """The key of a ticket could decrypt recorded connections later."""
        daemon = serve(key="key", cert="cert")
        for version in VERSIONS:
            context = trusting(files / "root")
            context.minimum_version = context.maximum_version = version
            with seen(daemon, context) as sock:
                sock.sendall(b"GET /tasks HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert next_answer(sock).status == 200
                assert sock.compression() is None
                session = sock.session
            with context.wrap_socket(
                daemon.open_socket(), server_hostname="localhost", session=session
            ) as sock:
                assert not sock.session_reused


class TestClientCertificates:
    @pytest.fixture
    def locked(self, files: Path, start: Start, authority: Authority) -> Daemon:
        """Return a daemon that requires a client certificate of the authority."""
        for name, one in (
            ("right", authority.issue()),
            ("wrong", Authority(authority.name).issue()),
            ("old", authority.issue(left=dt.timedelta(hours=-1))),
        ):
            (files / name).write_bytes(key_pem(one.key) + one.cert_pem())
        return start(
            f"--ssl-pfx={files / 'pfx'}",
            f"--ssl-client-ca={files / 'root'}",
            trust=files / "root",
            identity=files / "right",
        )

    @pytest.mark.parametrize("version", list(VERSIONS), ids=["1.2", "1.3"])
    @pytest.mark.parametrize("who", ["right", "wrong", "old", None])
    def test_a_client_needs_a_certificate_of_the_authority(
        self, locked: Daemon, files: Path, who: str | None, version: ssl.TLSVersion
    ) -> None:
        """Other clients are refused in the handshake, before the daemon reads any HTTP."""
        context = trusting(files / "root")
        context.minimum_version = context.maximum_version = version
        if who is not None:
            context.load_cert_chain(files / who)
        # In TLS 1.3 the client finishes first and learns of the refusal when it reads.
        got = b""
        refused = None
        try:
            with seen(locked, context) as sock:
                sock.sendall(b"GET /tasks HTTP/1.1\r\nHost: localhost\r\n\r\n")
                got = sock.recv(12)
        except OSError as e:
            refused = e
        if who == "right":
            assert got == b"HTTP/1.1 200"
        else:
            assert got == b""
            assert isinstance(refused, ssl.SSLError)
            assert "alert" in str(refused).lower()
        assert locked.get("/tasks").status == 200
        assert "Traceback" not in locked.log.read_text()

    def test_an_intermediate_authority_is_enough(
        self, files: Path, start: Start, authority: Authority
    ) -> None:
        """The file need not have the root above it."""
        mine = authority.issue()
        (files / "between").write_bytes(certificates_pem(*mine.between))
        alone = key_pem(mine.key) + certificates_pem(mine.certificate)
        (files / "mine").write_bytes(alone)
        daemon = start(
            *(f"--ssl-key={files / 'key'}", f"--ssl-cert={files / 'cert'}"),
            f"--ssl-client-ca={files / 'between'}",
            trust=files / "root",
            identity=files / "mine",
        )
        assert daemon.get("/tasks").status == 200


class TestHSTS:
    NAME = "Strict-Transport-Security"

    @pytest.fixture
    def config(self, tmp_path: Path) -> str:
        """Return a settings file with a time for HSTS."""
        (tmp_path / "hsts.toml").write_text("hsts = 31536000\n")
        return str(tmp_path / "hsts.toml")

    def test_every_response_over_tls_has_hsts(self, start: Start, config: str) -> None:
        """Errors have it too, even those before a request is parsed."""
        daemon = start("--dev", "--config", config)
        answers = [
            daemon.get("/tasks"),
            daemon.get("/task/9"),
            daemon.get("/nowhere/at/all"),
            daemon.get("/pulsar/index.html"),
            daemon.request("POST", "/site/production", b"", {"Content-Length": "2000000"}),
            daemon.request("GET", "/" + "x" * 20000),
        ]
        assert [a.status for a in answers] == [200, 404, 404, 200, 413, 400]
        for answer in answers:
            assert answer.headers.get_all(self.NAME) == ["max-age=31536000"]

    def test_responses_without_tls_have_no_hsts(self, start: Start, config: str) -> None:
        """Browsers would ignore it, and a proxy sends its own."""
        daemon = start("--config", config)
        for path in ("/tasks", "/" + "x" * 20000):
            assert self.NAME not in daemon.get(path).headers

    def test_hsts_is_off_by_default(self, start: Start) -> None:
        """A browser that has received it cannot be told otherwise."""
        assert self.NAME not in start("--dev").get("/tasks").headers


class TestDevelopment:
    @pytest.mark.parametrize("name", ["localhost", "api.pulsar.local"])
    def test_dev_serves_tls_for_its_names(self, start: Start, name: str) -> None:
        """A client that trusts the certificate connects under both names."""
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

    def test_dev_logs_a_warning_about_its_certificate(self, start: Start) -> None:
        """The warning is in capitals, near the address."""
        log = start("--dev").log.read_text()
        assert re.search(r"#warn\] .*DEVELOPMENT CERTIFICATE", log)

    def test_dev_logs_to_standard_output(self, start: Start) -> None:
        assert "listens on https://127.0.0.1:" in start("--dev").log.read_text()

    def test_the_warning_depends_on_the_key(self, start: Start) -> None:
        """The published key brings the warning without ``--dev`` too."""
        daemon = start("--ssl-key", str(DEV_KEY), "--ssl-cert", str(CERTIFICATE))
        assert "DEVELOPMENT CERTIFICATE" in daemon.log.read_text()

    def test_a_certificate_of_ones_own_logs_no_warning(self, serve: Serve) -> None:
        """Nobody would read a warning that always comes."""
        log = serve(key="key", cert="cert").log.read_text()
        assert "DEVELOPMENT" not in log

    def test_a_package_without_the_development_files_serves_tls(
        self, serve: Serve, tmp_path: Path
    ) -> None:
        """A packager can leave the published key out. Only ``--dev`` then fails."""
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
    def test_dev_is_refused_on_public_addresses(
        self, tmp_path: Path, place: Sequence[str], allowed: Sequence[str]
    ) -> None:
        """Its key is public, so even ``--allow-anonymous`` does not permit it."""
        said = told(tmp_path / "own", "--dev", *place, *allowed)
        assert said.startswith("will not listen on ")
        assert said.endswith(NEVER)

    @pytest.mark.parametrize("place", ["--interface=0.0.0.0", "--listen=tcp:{port}"])
    @pytest.mark.parametrize("form", ["pem", "pfx", "another certificate"])
    def test_the_development_key_is_refused_in_every_form(
        self, tmp_path: Path, form: str, place: str
    ) -> None:
        """The key is in PEM, in PKCS #12, and under a certificate of another name."""
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
        said = told(tmp_path / "own", *given)
        assert said.startswith("will not listen on ")
        assert said.endswith(NEVER)
