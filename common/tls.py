"""TLS context that verifies the certificate of a server."""

import ssl
from pathlib import Path

from palimpsest.common.user_error import UserError


def tls_context(ca_file: Path | None, *, key: str) -> ssl.SSLContext:
    """Return a context that trusts the certificates in this file, or those of the system if it is None.

    Raises UserError, which names the key, if the file holds no usable certificates.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # includes ssl.SSLError
        raise UserError(
            f"{key} = {str(ca_file)!r} holds no usable certificates ({error.strerror or error}): name a PEM file with "
            f"the certificate of the authority that signed the server's certificate"
        ) from None
