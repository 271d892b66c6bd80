"""Acme's providers and handlers for `langchain_pocket_auth`."""

from importlib.resources import files
from pathlib import Path

from ._legacy import AcmeLegacyHandler, LegacyContext
from ._rows import ACME, AcmeAdminHandler

PROVIDERS = Path(str(files(__package__) / "providers.toml"))
"""Rows of further providers: `PocketAuth(providers=[PROVIDERS])`."""

__all__ = [
    "ACME",
    "PROVIDERS",
    "AcmeAdminHandler",
    "AcmeLegacyHandler",
    "LegacyContext",
]
