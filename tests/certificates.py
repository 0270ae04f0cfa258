"""Certificates as operators get them, from an authority with an intermediate one."""

import datetime as dt
from typing import Any

from attrs import define, field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM
_DAY = dt.timedelta(days=1)


def key_pem(key: Any, passphrase: bytes | None = None, *, old: bool = False) -> bytes:
    """Return a private key as a file. ``old`` selects the format of OpenSSL before 1.0."""
    forms = serialization.PrivateFormat
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    form = forms.TraditionalOpenSSL if old else forms.PKCS8
    data: bytes = key.private_bytes(_PEM, form, encryption)
    return data


def public_pem(key: Any) -> bytes:
    """Return the public half of a key as a file."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    data: bytes = key.public_key().public_bytes(_PEM, form)
    return data


def certificates_pem(*certificates: x509.Certificate) -> bytes:
    """Return certificates as one file."""
    return b"".join(c.public_bytes(_PEM) for c in certificates)


@frozen
class Issued:
    """A key, its certificate, and the intermediate ones, nearest first."""

    key: Any  # one of cryptography's many private key types
    certificate: x509.Certificate
    between: tuple[x509.Certificate, ...] = ()

    def cert_pem(self) -> bytes:
        """Return the certificate with its chain appended."""
        return certificates_pem(self.certificate, *self.between)

    def pfx(self, passphrase: bytes | None = None) -> bytes:
        """Return key, certificate and chain as a PKCS #12 file."""
        encryption: serialization.KeySerializationEncryption
        if passphrase is None:
            encryption = serialization.NoEncryption()
        else:
            encryption = serialization.BestAvailableEncryption(passphrase)
        return pkcs12.serialize_key_and_certificates(
            b"pulsar-api", self.key, self.certificate, self.between, encryption
        )


def _certificate(
    name: str,
    public: Any,
    issuer: str,
    issuer_key: Any,
    *,
    authority: bool,
    left: dt.timedelta = _DAY,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + left)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if not authority:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        builder = builder.add_extension(names, critical=False)
    own_hash = isinstance(issuer_key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(issuer_key, None if own_hash else hashes.SHA256())


def self_signed(key: Any) -> Issued:
    """Return a self-signed certificate for ``localhost``."""
    certificate = _certificate(
        "localhost", key.public_key(), "localhost", key, authority=False
    )
    return Issued(key, certificate)


@define(eq=False)
class Authority:
    """A root that signs an intermediate authority, which signs for ``localhost``."""

    name: str = "root"
    root: x509.Certificate = field(init=False)
    _between: Issued = field(init=False)

    def __attrs_post_init__(self) -> None:
        key, between_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.root = _certificate(
            self.name, key.public_key(), self.name, key, authority=True
        )
        between = _certificate(
            f"{self.name} 2", between_key.public_key(), self.name, key, authority=True
        )
        self._between = Issued(between_key, between)

    def issue(self, public: Any = None, left: dt.timedelta = _DAY) -> Issued:
        """Return a new key and its certificate, which expires after ``left``.

        With ``public``, the certificate is for that public key instead.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(
            "localhost",
            public or key.public_key(),
            f"{self.name} 2",
            self._between.key,
            authority=False,
            left=left,
        )
        return Issued(key, certificate, (self._between.certificate,))
