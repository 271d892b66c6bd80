"""Ports for tests."""

from __future__ import annotations

import random
import socket

# Below where systems take the ports of outgoing connections from (32768 on Linux,
# 49152 elsewhere): one of those could sit there before the server does.
_RANGE = range(20000, 30000)


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    for port in random.sample(_RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port found")
