"""Ports, passwords, certificates, and export lines of the local backends."""

import ipaddress
import socket
import stat
import subprocess
from pathlib import Path

from cryptography import x509
from hypothesis import given, strategies as st

from tools.backends import certificates, ports, secret
from tools.backends.dev_stack import exports


def test_a_port_in_use_is_not_free() -> None:
    port = ports.free()
    assert ports.is_free(port)
    with socket.create_server((ports.HOST, port)):
        assert not ports.is_free(port)
    assert ports.is_free(port)


def test_a_chosen_port_is_outside_the_range_of_client_ports() -> None:
    first_client_port = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(20000 <= ports.free() < max(first_client_port, 32768) for _ in range(20))


def test_excluded_ports_are_not_chosen() -> None:
    excluded = [port for port in ports.CHOICE if port != 23456]
    if ports.is_free(23456):
        assert ports.free(*excluded) == 23456


def test_a_password_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    first, second = secret.kept(tmp_path / "one"), secret.kept(tmp_path / "two")
    assert secret.kept(tmp_path / "one") == first != second
    assert len(first) == 32
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600


def test_both_certificates_are_signed_by_the_authority_and_made_once(tmp_path: Path) -> None:
    certificates.make(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    certificates.make(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    authority, server, client = (
        x509.load_pem_x509_certificate(before[name]) for name in ("ca.pem", "server.pem", "client.pem")
    )
    for issued in (server, client):
        issued.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("127.0.0.1") in names.get_values_for_type(x509.IPAddress)
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600 for name in ("server.key", "client.key"))


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40))
def test_a_shell_reads_exported_values_unchanged(value: str) -> None:
    program = "\n".join([*exports({"NAME": value}), 'printf %s "$NAME"'])
    assert subprocess.run(["sh", "-c", program], capture_output=True, check=True).stdout == value.encode()
