"""Which requests use the proxy of the environment: those to the outside, and never those between our services.

The variables are http_proxy, https_proxy, all_proxy and no_proxy, in lower or upper case.
"""

import ssl
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import urllib3

from palimpsest.common.user_error import UserError

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
"""Hosts that no request reaches through a proxy."""


def proxy_of(url: str) -> str | None:
    """Return the URL of the proxy for requests to this URL; None for no proxy.

    >>> proxy_of("http://127.0.0.1:9000") is None
    True
    """
    parts, proxies = urlsplit(url), getproxies()
    if parts.hostname in THIS_MACHINE or proxy_bypass(parts.netloc):
        return None
    found = proxies.get(parts.scheme) or proxies.get("all")
    return None if found is None else found if "://" in found else f"http://{found}"


def outside_pool(url: str, **arguments: Any) -> urllib3.PoolManager:
    """Return urllib3's pool for requests to this URL, through the proxy of the environment if there is one.

    Raises UserError if the proxy is neither an http nor an https proxy.
    """
    proxy = proxy_of(url)
    if proxy is None:
        return urllib3.PoolManager(**arguments)
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"the proxy for {url} is a {parts.scheme} proxy, which cannot be used: set an http or https proxy, or name "
            f"{urlsplit(url).hostname} in no_proxy"
        )
    user = parts.username
    headers = urllib3.make_headers(proxy_basic_auth=f"{user}:{parts.password or ''}") if user else {}
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **arguments)


def our_client(**arguments: Any) -> httpx.Client:
    """Return httpx's client for requests to our services. It ignores the environment."""
    return httpx.Client(trust_env=False, **arguments)


def outside_client(context: ssl.SSLContext, **arguments: Any) -> httpx.Client:
    """Return httpx's client for requests to the outside. It obeys the environment, but not for this machine."""
    direct = {f"all://{'[::1]' if host == '::1' else host}": None for host in THIS_MACHINE}
    return httpx.Client(verify=context, mounts=direct, **arguments)
