"""How much one owner and one address may do, so that nobody floods the store."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from time import monotonic

from starlette.requests import HTTPConnection

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    What is allowed within a minute, in each process that serves.

    Attributes:
        starts: Attempts that are begun for one owner.
        refusals: Answers with a 4xx status to one address. A person makes a handful;
            who guesses links or answers makes many.
        names: How many owners, and how many addresses, are counted at once; then the
            one that began longest ago is forgotten.
    """

    starts: int = 20
    refusals: int = 60
    names: int = 10_000


class Counter:
    """Counts within windows of a minute that begin with a name's first count."""

    def __init__(self, limit: int, names: int) -> None:
        self._limit, self._names = limit, names
        self._counts: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, name: Hashable) -> None:
        """Count once more."""
        now = monotonic()
        begun, count = self._counts.get(name, (now, 0))
        if now - begun >= WINDOW_S:
            del self._counts[name]
            begun, count = now, 0
        self._counts[name] = (begun, count + 1)
        while len(self._counts) > self._names:
            self._counts.popitem(last=False)

    def wait_s(self, name: Hashable) -> int:
        """Return for how many seconds *name* has to wait; 0: not at all."""
        begun, count = self._counts.get(name, (0.0, 0))
        left = begun + WINDOW_S - monotonic()
        return math.ceil(left) if count >= self._limit and left > 0 else 0


def address_of(request: HTTPConnection) -> str | None:
    """
    Return what stands for a request's sender; `None`: nobody that can be limited.

    It is what the server says (uvicorn's `--proxy-headers` with the proxies that are
    trusted): a header read here could be anybody's. One that is not of the internet
    is a proxy's, behind which everybody would be locked out, or this machine's.
    """
    try:
        address = ip_address(request.client.host if request.client else "")
    except ValueError:
        return None  # a socket of this machine
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            address = address.ipv4_mapped
        elif address.is_global:
            # Whoever has one has the 2^64 beside it.
            return str(ip_network((address, 64), strict=False))
    return str(address) if address.is_global else None
