"""What another's certificate is checked against."""

import ssl
from pathlib import Path

from palimpsest.common.user_error import UserError


def tls_context(ca_file: Path | None, *, key: str) -> ssl.SSLContext:
    """A context that trusts the certificates in this file, or else the system's. UserError names the key."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one, too
        raise UserError(
            f"{key} = {str(ca_file)!r} holds no certificates that can be used ({error.strerror or error}): name a PEM "
            f"file with the certificate of the authority that signed the server's"
        ) from None
