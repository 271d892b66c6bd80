"""`pocket-auth new-provider`: a row to start from."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from pydantic import ValidationError

from .._errors import ConfigurationError
from .._http import secure_url
from .._rows import Provider
from ._terminal import Setup, complain

_HEAD = """\
# A provider for PocketAuth: keys are RFC 8414's, and what is not said is the default.
# Save it as {id}.toml, put your app's registration into the environment
# (POCKET_AUTH_CLIENTS__{ID}__CLIENT_ID, POCKET_AUTH_CLIENTS__{ID}__CLIENT_SECRET), and:
#   PocketAuth(providers=["{id}.toml"])
#   pocket-auth --provider-file {id}.toml providers show {id}
#   pocket-auth --provider-file {id}.toml login {id}

[{id}]
display_name = {name}
"""
_DISCOVERED = """\
# The endpoints are read from here (RFC 8414, OpenID Connect Discovery).
issuer = {issuer}
"""
_ENDPOINTS = """\
authorization_endpoint = "https://{host}/oauth/authorize"
token_endpoint = "https://{host}/oauth/token"
# revocation_endpoint = "https://{host}/oauth/revoke"  # RFC 7009
# device_authorization_endpoint = "https://{host}/oauth/device"  # RFC 8628
"""
_TAIL = """\

# How the app authenticates itself: client_secret_basic, client_secret_post, none.
# token_endpoint_auth_method = "client_secret_post"
# code_challenge_method = "unsupported"  # if PKCE is refused; default: S256
# redirect_uri_prefixes = ["https://"]  # if others are refused
# authorization_parameters = {{ access_type = "offline" }}

# scoped = false  # if there are no scopes
# scope_separator = ","
# required_scopes = ["offline_access"]  # asked for every time
# recommended_scopes = ["read"]  # asked for where a tool names none

# What API calls look like; default: "Authorization: Bearer <token>".
# api_base_url = "https://api.{host}"
# api_credential = {{ header = "X-API-Key" }}  # or query = "key", or prefix = "Token "
# api_headers = {{ Accept-Version = "1" }}

# For people: where these facts were read.
# docs = "https://{host}/docs/oauth"

# A key that a person types in, instead of OAuth or beside it.
# [{id}.token]
# docs = "https://{host}/docs/api-keys"
# [{id}.token.fields]
# token = {{ label = "API key", secret = true }}
"""


def new_provider(
    context: typer.Context,
    provider: Annotated[str, typer.Argument(help="Its id: a-z, 0-9, '-' and '_'.")],
    issuer: Annotated[
        str | None, typer.Option(help="Where its endpoints can be discovered.")
    ] = None,
) -> None:
    """Print a provider's row for a TOML file, ready to be filled in."""
    row = template(provider, issuer)
    if Setup.of(context).catalog().find(provider) is not None:
        complain(f"{provider} is known already: this row would take its place.")
    typer.echo(row, nl=False)


def template(provider: str, issuer: str | None) -> str:
    """
    Return the text of a row, which loads as it is.

    Raises:
        ConfigurationError: The id or the issuer cannot be one.
    """
    if issuer:
        secure_url(issuer, "the issuer")
    endpoint = None if issuer else "https://localhost/"
    try:
        Provider(
            id=provider,
            issuer=issuer,
            authorization_endpoint=endpoint,
            token_endpoint=endpoint,
        )
    except ValidationError as error:
        wrong = "; ".join(line["msg"] for line in error.errors())
        raise ConfigurationError(f"{provider}: {wrong}") from None
    middle = _DISCOVERED if issuer else _ENDPOINTS
    return (_HEAD + middle + _TAIL).format(
        id=provider,
        ID=provider.upper(),
        name=json.dumps(provider.replace("_", " ").replace("-", " ").title()),
        # A JSON string is a basic string of TOML.
        issuer=json.dumps(issuer),
        host=f"{provider.replace('_', '-')}.example",
    )
