"""Creates the store's minio client with its credentials, timeouts and trusted certificates."""

import configparser
import os
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    EnvMinioProvider,
    IamAwsProvider,
    MinioClientConfigProvider,
    Provider,
)
from urllib3.exceptions import HTTPError

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.common.proxies import outside_pool
from palimpsest.common.tls import tls_context
from palimpsest.common.user_error import UserError

CONNECT_S, READ_S = 5.0, 20.0
STS = "https://sts.amazonaws.com"
"""The token service of a web identity, unless AWS_ENDPOINT_URL_STS names another."""
METADATA_S = 2.0
"""Timeout of the address that serves credentials of a machine's role, in seconds; it is nearby or does not exist."""


class NoCredentials(Exception):
    """No provider has credentials."""


def credentials() -> Provider:
    """Return a provider: the environment, else the usual files, else the machine's role or web identity.

    The provider raises NoCredentials on use if none of them has credentials.
    """
    return _FirstOf()


def client(config: SnapshotStoreConfig, provider: Provider, *, connections: int, tries: int) -> Minio:
    """Return a client that tries each request `tries` times; with one try, no request is sent twice."""
    url = urlsplit(config.endpoint)
    retries = urllib3.Retry(
        tries - 1,
        backoff_factor=0.2,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )
    pool = outside_pool(
        config.endpoint,
        maxsize=connections,
        timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S),
        retries=retries,
        ssl_context=tls_context(config.ca_file, key="snapshot_store.ca_file"),
    )
    try:
        if url.scheme not in ("http", "https") or url.path not in ("", "/"):
            raise ValueError("it is not http://HOST:PORT or https://HOST:PORT")
        minio = Minio(
            url.netloc,
            secure=url.scheme == "https",
            region=config.region,
            credentials=provider,
            http_client=pool,
        )
    except ValueError as error:
        raise UserError(f"snapshot_store.endpoint = {config.endpoint!r} cannot be used: {error}") from None
    if config.path_style:
        minio.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    else:
        minio.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    return minio


class _FirstOf(Provider):
    """Environment, then files, then the machine's role or web identity."""

    def __init__(self) -> None:
        web_identity = "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ
        # Set only for a web identity: otherwise it would replace the address of the machine's role.
        sts = os.environ.get("AWS_ENDPOINT_URL_STS") if web_identity else None
        # Without a web identity the credentials come from an address of this machine.
        limits: dict[str, Any] = {"timeout": METADATA_S, "retries": urllib3.Retry(1)}
        pool = outside_pool(sts or STS, **limits) if web_identity else urllib3.PoolManager(**limits)
        role = IamAwsProvider(custom_endpoint=sts, http_client=pool)
        files: list[Provider] = [AWSConfigProvider(), MinioClientConfigProvider()]
        self._chain = ChainedProvider([EnvAWSProvider(), EnvMinioProvider(), *files, role])

    def retrieve(self) -> Credentials:
        try:
            return self._chain.retrieve()
        except (ValueError, LookupError, OSError, HTTPError, configparser.Error) as error:
            raise NoCredentials(f"{type(error).__name__}: {error}") from None
