"""What the URL of a Redis says."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.connection import parse_url

from .._errors import ConfigurationError

TIMEOUT_S = 5.0
"""For a connection, for an answer, and for a free connection of the pool."""
MAX_CONNECTIONS = 20
HEALTH_CHECK_S = 30
"""A connection that was idle for longer is tried before it is used."""

_KNOWN = "redis://, rediss://, unix://, redis+cluster:// or rediss+cluster://"
_OPTIONS = {"db", "max_connections", "socket_timeout"}
_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
_PARTS = {"host", "port", "path", "username", "password", "connection_class"}


def settings_of(url: str) -> tuple[bool, dict[str, Any]]:
    """
    Return whether *url* is a cluster's, and what a connection is made of.

    Raises:
        ConfigurationError: The URL is wrong. No part of it is in the text.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    cluster = scheme.endswith("+cluster")
    scheme = scheme.removesuffix("+cluster")
    unix = scheme == "unix"
    said, path = _read(scheme, rest) if not (cluster and unix) else ({}, "")
    if not said or (unix and not path):
        raise ConfigurationError(
            f"this storage URL cannot be read: it begins with {_KNOWN}, and, as in "
            "every URL, :/?#[]@% in a name or password are percent-encoded"
        )
    known = _OPTIONS | (_TLS_OPTIONS if scheme == "rediss" else set())
    if said.keys() - known - _PARTS:
        raise ConfigurationError(
            f"of a {scheme}:// URL these options are known: {', '.join(sorted(known))}"
            " (certificates are always checked; name an authority of your own with "
            "ssl_ca_certs)"
        )
    if not unix and not re.fullmatch(r"/?\d*", path):
        raise ConfigurationError(
            f"the path of a {scheme}:// URL is the number of a database, such as /0"
        )
    if cluster and said.pop("db", 0):
        raise ConfigurationError("a Redis cluster has no databases: leave the number")
    usual: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_S,
        "max_connections": MAX_CONNECTIONS,
        "protocol": 2,  # needs no HELLO, which proxies may not know
    }
    if not unix:
        usual |= {"host": "localhost", "socket_keepalive": True}
    else:
        del said["port"]
    if scheme == "rediss":
        usual |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    settings = usual | said
    if settings["max_connections"] < 1 or settings["socket_timeout"] <= 0:
        raise ConfigurationError(
            "max_connections and socket_timeout of the storage URL are above 0"
        )
    return cluster, settings


def _read(scheme: str, rest: str) -> tuple[dict[str, Any], str]:
    """Return the parts and the path; nothing if the driver cannot read it."""
    url = f"{scheme}://{rest}"
    with suppress(ValueError):  # whose text may quote a password
        return {"port": 6379} | dict(parse_url(url)), urlsplit(url).path
    return {}, ""
