"""Which handler serves which way of a row."""

from __future__ import annotations

from .._rows import JWT_BEARER, Method, Provider
from ._client_credentials import ClientCredentialsHandler
from ._form import FormHandler
from ._oauth2 import OAuth2Handler
from ._row import RowHandler
from ._service_account import JwtBearerHandler
from ._special import SPECIAL


def handlers_of(row: Provider) -> list[type[RowHandler]]:
    """Return the handler classes of a row, the default first."""
    return [_kind(row, method).of(row, method) for method in row.methods]


def _kind(row: Provider, method: Method) -> type[RowHandler]:
    if special := SPECIAL.get((row.id, method)):
        return special
    if method == "oauth2":
        return OAuth2Handler
    if method == "client_credentials":
        return ClientCredentialsHandler
    if method == "keypair" and JWT_BEARER in row.grant_types_supported:
        return JwtBearerHandler
    return FormHandler
