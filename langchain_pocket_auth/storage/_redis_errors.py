"""What errors of Redis and of its driver mean, in words of ours."""

from __future__ import annotations

import re
from typing import TypeAlias

from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import RedisClusterException, RedisError
from redis.exceptions import TimeoutError as NoAnswer

from .._errors import ConfigurationError, PocketAuthError, StorageUnavailable

FAILURES = (RedisError, RedisClusterException, OSError)
BROKEN = (NotConnected, NoAnswer)
"""After these a command may have been done, or not."""
UNSENT = (RedisClusterException,)
"""The client of a cluster found no node to send to."""

_Said: TypeAlias = tuple[tuple[str, str], ...]

# Patterns of the error's class and text: 6.2 wraps what goes wrong in a script, and
# the driver takes the code off the texts that it knows.
_TO_CONFIGURE: _Said = (
    (
        r"AuthenticationError|NOAUTH|WRONGPASS",
        "Redis refuses the user name or password of the storage URL",
    ),
    (
        r"NoPermission|NOPERM|can't (run this command|access)",
        (
            "the user of the storage URL may not do in Redis what is needed: allow "
            "@scripting, @hash, @connection, TIME, PTTL, PEXPIREAT, PERSIST, SCAN, "
            "INFO and, in a cluster, CLUSTER and COMMAND, for keys with our prefix"
        ),
    ),
    (
        r"MovedError|AskError|MOVED|SELECT is not allowed in cluster",
        (
            "this Redis is part of a cluster: use redis+cluster:// or "
            "rediss+cluster://, without the number of a database"
        ),
    ),
    (
        r"Cluster mode is not enabled|cluster support disabled",
        "this Redis is no cluster: use redis:// or rediss://",
    ),
    (
        r"WRONGTYPE",
        (
            "in Redis something else is stored under our keys: choose another prefix "
            "or database"
        ),
    ),
    (r"DB index is out of range", "this Redis has no database of that number"),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        (
            "the certificate of Redis does not pass: name the file of its authority "
            "with ?ssl_ca_certs=/path/to/ca.pem in the storage URL"
        ),
    ),
)
_OUTAGES: _Said = (
    # So it is for a while after a failover, until the name leads to the other.
    (r"READONLY|ReadOnly", "it is a replica; name the primary"),
    (r"OutOfMemory|\bOOM\b", "its memory is full (maxmemory)"),
    (r"BusyLoading|LOADING", "it is still reading its data"),
    (r"MISCONF", "it cannot save to its disk"),
    (r"ClusterDown|MasterDown|NotCovered|cannot be connected", "the cluster is down"),
    (r"^TimeoutError", "no answer in time"),
    (r"^ConnectionError", "it cannot be reached, or broke the connection"),
)
_NOT_SENT = "connecting to"


def explained(error: Exception, *, writes: bool) -> PocketAuthError:
    """Say who has to act; nothing of *error*'s text is in it."""
    # A cluster's client keeps what a node said as the cause.
    errors = filter(None, (error, error.__cause__))
    told = "; ".join(f"{type(each).__name__}: {each}" for each in errors)
    for pattern, text in _TO_CONFIGURE:
        if re.search(pattern, told):
            return ConfigurationError(text)
    known = (text for pattern, text in _OUTAGES if re.search(pattern, told))
    what = next(known, type(error).__name__)
    if writes and isinstance(error, BROKEN) and _NOT_SENT not in told:
        what += "; whether the last write has happened is not known"
    return StorageUnavailable(f"the Redis store does not answer: {what}")
