"""
What a test of an agent with OAuth needs: the other side, a person, and checks.

`AuthorizationServer` is a strict authorization server with a protected API,
`Browser` a person at a browser, `assert_no_leak` and `LeakWatch` look for
secrets where they must not be, and `StorageConformance` is the contract of a
storage. The server needs `langchain-pocket-auth[testing]`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._browser import Browser, FlowStuck
    from ._conformance import StorageConformance
    from ._leaks import LeakWatch, assert_no_leak
    from ._model import ScriptedModel
    from ._ports import free_port
    from ._server import AuthorizationServer

__all__ = [
    "AuthorizationServer",
    "Browser",
    "FlowStuck",
    "LeakWatch",
    "ScriptedModel",
    "StorageConformance",
    "assert_no_leak",
    "free_port",
]

_MODULES = {
    "AuthorizationServer": "._server",
    "Browser": "._browser",
    "FlowStuck": "._browser",
    "LeakWatch": "._leaks",
    "ScriptedModel": "._model",
    "StorageConformance": "._conformance",
    "assert_no_leak": "._leaks",
    "free_port": "._ports",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    conformance = f"{__name__}._conformance"
    if name == "StorageConformance" and conformance not in sys.modules:
        import pytest

        pytest.register_assert_rewrite(conformance)
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
