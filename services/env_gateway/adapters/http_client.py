"""The TLS context of all clients over HTTP, made when the fork server loads the adapters.

Reading the certificates takes several times as long as the rest of a short session.
"""

import httpx

TLS = httpx.create_ssl_context()
