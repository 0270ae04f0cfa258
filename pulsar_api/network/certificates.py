"""Loads certificate files and makes TLS options of them."""

import re
from pathlib import Path
from typing import Any

from attrs import evolve, frozen
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from OpenSSL import SSL, crypto
from twisted.internet.ssl import AcceptableCiphers, CertificateOptions, TLSVersion

from pulsar_api.config.settings import Settings
from pulsar_api.errors import SettingsError

_USABLE = (
    rsa.RSAPrivateKey,
    ec.EllipticCurvePrivateKey,
    ed25519.Ed25519PrivateKey,
    ed448.Ed448PrivateKey,
)
# What is recorded today must not be readable with a key that is stolen tomorrow, and what
# is changed on the way must be noticed: keys agreed on for each connection, and AEAD. The
# suites of TLS 1.3 are all of that kind. No DHE: its clients know ECDHE as well.
_CIPHERS = AcceptableCiphers.fromOpenSSLCipherString("ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL")
_Format = serialization.PublicFormat.SubjectPublicKeyInfo
_DER = serialization.Encoding.DER


@frozen
class Identity:
    """A private key, its certificate, and the chain to a known authority."""

    key: Any  # one of cryptography's many private key types
    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...] = ()
    client_authorities: tuple[x509.Certificate, ...] = ()
    """CAs that have to issue the certificates of clients; empty if clients need none."""

    def names(self) -> frozenset[str]:
        """Return the host names of the certificate, such as ``*.example.com``."""
        try:
            found = self.certificate.extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            )
        except x509.ExtensionNotFound:
            return frozenset()
        names = found.value.get_values_for_type(x509.DNSName)
        return frozenset(name.lower() for name in names)

    def options(self) -> CertificateOptions:
        """Return options for a server: TLS 1.2 and 1.3 with forward secrecy.

        Sessions are not resumed, so that no ticket outlives a removed key or authority.
        """
        # Twisted accepts cryptography's objects, which its annotations do not say.
        any_: Any = CertificateOptions
        options: CertificateOptions = any_(
            privateKey=self.key,
            certificate=self.certificate,
            extraCertChain=list(self.chain),
            raiseMinimumTo=TLSVersion.TLSv1_2,
            acceptableCiphers=_CIPHERS,
            verify=bool(self.client_authorities),
            requireCertificate=bool(self.client_authorities),
            caCerts=[crypto.X509.from_cryptography(c) for c in self.client_authorities],
        )
        if self.client_authorities:
            context = options.getContext()
            for authority in self.client_authorities:
                context.add_client_ca(
                    authority
                )  # browsers choose a certificate by these names
            store = context.get_cert_store()
            assert store is not None
            # An intermediate authority is trusted without its root.
            store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        return options


def development_files() -> tuple[Path, Path]:
    """Return key and certificate for ``*.pulsar.local`` and ``localhost``.

    The key is public, so they are for development on loopback only.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "ssl", package.parent / "ssl"):
        if (folder / "pulsar.local.key").exists():
            return folder / "pulsar.local.key", folder / "pulsar.local.crt"
    raise SettingsError("--dev: the certificate of *.pulsar.local is not installed")


def files(settings: Settings) -> tuple[Path, ...]:
    """Return the files that an identity is loaded from."""
    if settings.dev:
        names: tuple[str | Path | None, ...] = development_files()
    elif settings.ssl_pfx:
        names = (settings.ssl_pfx, settings.ssl_passphrase)
    else:
        names = (settings.ssl_key, settings.ssl_cert, settings.ssl_passphrase)
    return tuple(Path(name) for name in (*names, settings.ssl_client_ca) if name)


def load(settings: Settings) -> Identity | None:
    """Return the identity of the settings; None for plain HTTP.

    Raises:
        SettingsError: A file cannot be read, or the files do not fit together.
    """
    if not settings.secure:
        return None
    identity = _load_own(settings)
    if settings.ssl_client_ca:
        path = Path(settings.ssl_client_ca)
        found = tuple(_certificates("--ssl-client-ca", path))
        identity = evolve(identity, client_authorities=found)
        _accepted(identity, f"--ssl-client-ca: {path}")
    return identity


def _load_own(settings: Settings) -> Identity:
    phrase = None
    if settings.ssl_passphrase:
        data = _read("--ssl-passphrase", Path(settings.ssl_passphrase))
        # The library takes a passphrase up to the first NUL.
        phrase = data.rstrip(b"\r\n").partition(b"\0")[0] or None
    if settings.dev:
        key, certificate = development_files()
        return _from_pem(key, certificate, None)
    if settings.ssl_pfx:
        return _from_pfx(Path(settings.ssl_pfx), phrase)
    assert settings.ssl_key is not None
    assert settings.ssl_cert is not None
    return _from_pem(Path(settings.ssl_key), Path(settings.ssl_cert), phrase)


def is_development(identity: Identity) -> bool:
    """Return whether this is the public key for development."""
    try:
        _, path = development_files()
    except SettingsError:
        return False  # installed without these files
    own = x509.load_pem_x509_certificate(path.read_bytes())
    return _public(own.public_key()) == _public(identity.certificate.public_key())


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise SettingsError(f"{option}: cannot read {path}: {e.strerror}") from None


def _public(key: Any) -> bytes:
    data: bytes = key.public_bytes(_DER, _Format)
    return data


def _from_pem(key_path: Path, cert_path: Path, phrase: bytes | None) -> Identity:
    key_data = _read("--ssl-key", key_path)
    encrypted = b"ENCRYPTED" in key_data
    if encrypted and phrase is None:
        raise SettingsError(
            f"--ssl-key: {key_path} has a passphrase; name the file that holds it by "
            "--ssl-passphrase"
        )
    try:
        key = serialization.load_pem_private_key(key_data, phrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = (
            "the passphrase is wrong"
            if encrypted
            else "it is not a private key in PEM form"
        )
        raise SettingsError(f"--ssl-key: cannot use {key_path}: {why}") from None
    first, *chain = _certificates("--ssl-cert", cert_path)
    return _fitting(Identity(key, first, tuple(chain)), f"--ssl-cert: {cert_path}")


def _certificates(option: str, path: Path) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, at least one."""
    data = _read(option, path)
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise SettingsError(f"{option}: {path} holds no certificate in PEM form") from None
    # The loader silently skips a certificate that is cut off at the end of the file.
    if len(found) != len(re.findall(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----", data)):
        raise SettingsError(f"{option}: {path} holds an incomplete certificate")
    return found


def _from_pfx(path: Path, phrase: bytes | None) -> Identity:
    data = _read("--ssl-pfx", path)
    try:
        key, certificate, chain = pkcs12.load_key_and_certificates(data, phrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingsError(
            f"--ssl-pfx: cannot open {path}: it is not a PKCS #12 file, or the passphrase "
            "(--ssl-passphrase) is wrong or missing"
        ) from None
    if key is None or certificate is None:
        raise SettingsError(f"--ssl-pfx: {path} must hold a key and its certificate")
    return _fitting(Identity(key, certificate, tuple(chain)), f"--ssl-pfx: {path}")


def _fitting(identity: Identity, where: str) -> Identity:
    if not isinstance(identity.key, _USABLE):
        raise SettingsError(f"{where}: the key must be RSA, EC, Ed25519 or Ed448")
    if _public(identity.key.public_key()) != _public(identity.certificate.public_key()):
        raise SettingsError(
            f"{where}: the key does not match the certificate; use the key that it was "
            "issued for"
        )
    _accepted(identity, where)
    return identity


def _accepted(identity: Identity, where: str) -> None:
    try:
        identity.options().getContext()
    except (SSL.Error, crypto.Error) as e:
        # For example the key is too short, and every connection would fail.
        why = e.args[0][0][2] if e.args and e.args[0] else "no reason given"
        raise SettingsError(f"{where}: TLS rejects it: {why}") from None
