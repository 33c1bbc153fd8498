"""Certificates of a control plane: an authority, the API server's, and one for each user."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey


def ca(folder: Path) -> Path:
    """Path of the authority's certificate."""
    return folder / "ca.pem"


def server(folder: Path) -> Path:
    """Path of the API server's certificate; its key lies beside it, with the suffix `.key`."""
    return folder / "server.pem"


def client(folder: Path, user: str) -> Path:
    """Path of a user's certificate; its key lies beside it, with the suffix `.key`."""
    return folder / f"{user.replace(':', '-')}.pem"


def make(folder: Path, users: Sequence[tuple[str, str]]) -> None:
    """Write all certificates and keys. users: names and groups; an empty group is none."""
    folder.mkdir(parents=True, exist_ok=True)
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("test authority", "")
    authority = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca(folder).write_bytes(authority.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    _issue(server(folder), _name("kube-apiserver", ""), name, key, ExtendedKeyUsageOID.SERVER_AUTH)
    for user, group in users:
        _issue(client(folder, user), _name(user, group), name, key, ExtendedKeyUsageOID.CLIENT_AUTH)


def _issue(path: Path, subject: x509.Name, issuer: x509.Name, signer: Key, purpose: x509.ObjectIdentifier) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        _builder(subject, issuer, key)
        .add_extension(address, critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: Key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )


def _name(common: str, group: str) -> x509.Name:
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common), *groups])
