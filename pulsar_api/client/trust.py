"""Which certificates the client trusts, and why it has not trusted one."""

from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates
from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_ASN1
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.web.client import BrowserLikePolicyForHTTPS


def policy_for(ca_file: Path | None) -> BrowserLikePolicyForHTTPS:
    """Return a policy that trusts the certificates of a PEM file; None: the system's.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no certificate, or a damaged one.
    """
    if ca_file is None:
        return BrowserLikePolicyForHTTPS()
    found = [
        Certificate.load(one.public_bytes(Encoding.DER), FILETYPE_ASN1)
        for one in load_pem_x509_certificates(ca_file.read_bytes())
    ]
    return BrowserLikePolicyForHTTPS(trustRootFromCertificates(found))


def tls_reason(error: BaseException) -> str:
    """Return why a certificate was not trusted; "" if the error is another one."""
    reasons = getattr(error, "reasons", [])
    for failure in reasons:
        value = getattr(failure, "value", failure)
        if isinstance(value, SSL.Error):
            words = [part for entry in value.args[:1] for part in entry]
            text = ", ".join(part[-1] for part in words if part and part[-1])
            return f"TLS: {text or value!r}"
        if type(value).__name__ == "VerificationError":
            return "TLS: the certificate is for another host name"
    return ""
