"""What a row means for whoever registers an app or looks for a key, as values."""

from __future__ import annotations

from typing import Any

from .._placement import Placed, Placement, placeholders
from .._row_parts import Form
from .._rows import Provider
from ..handlers._of_rows import handlers_of
from ..handlers._row import RowHandler

_ENDPOINTS = (
    "issuer",
    "authorization_endpoint",
    "token_endpoint",
    "refresh_endpoint",
    "revocation_endpoint",
    "device_authorization_endpoint",
    "registration_endpoint",
    "jwks_uri",
)


def facts_of(row: Provider, base_url: str) -> dict[str, Any]:
    """
    Return all that one needs to know to use a provider; JSON but for a date.

    A fact is named as in the row. What a method's `unverified` names was stated
    from general knowledge.
    """
    methods = {}
    for kind in handlers_of(row):
        handler = kind()
        method, form = handler.method, row.form(handler.method)
        facts = _of_form(row, form) if form else _of_oauth(row, method, base_url)
        methods[method] = {
            "handler": handler.name,
            "description": handler.description,
            "scoped": handler.scoped,
            **facts,
            "settings": _of_fields(row, form) if form else _of_app(handler),
            "env_keys": list(handler.environment()),
            "unverified": _unverified(row, method if form else None, facts),
        }
    return {
        "id": row.id,
        "name": row.label,
        "aliases": list(row.aliases),
        "category": row.category,
        "methods": methods,
        "unsupported": row.unsupported,
        "docs": row.docs,
        "checked": row.checked,
        "sources": row.sources,
        "unverified": list(row.unverified),
    }


def _unverified(row: Provider, form: str | None, facts: dict[str, Any]) -> list[str]:
    found = []
    for name in facts:
        of_row = form is None or (getattr(row.form(form), name, None) is None)
        if (name if of_row else f"{form}.{name}") in row.unverified:
            found.append(name)
    return found


def _of_oauth(row: Provider, method: str, base_url: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if method == "oauth2":
        found["redirect_uri"] = f"{base_url}/auth/{row.id}/oauth2/callback"
        found["redirect_uri_prefixes"] = list(row.redirect_uri_prefixes)
    found |= {name: url for name in _ENDPOINTS if (url := getattr(row, name))}
    if row.revocation:
        found["revocation"] = f"{row.revocation.method} {row.revocation.endpoint}"
    found["token_endpoint_auth_method"] = row.token_endpoint_auth_method
    if method == "oauth2":
        found["code_challenge_method"] = row.code_challenge_method
        # The issuer says it where everything is discovered.
        offered = row.device_authorization_endpoint is not None
        found["device_flow"] = None if row.is_discovered else offered
    if row.scoped:
        found["required_scopes"] = list(row.required_scopes)
        found["recommended_scopes"] = list(row.recommended_scopes)
        found["scope_separator"] = row.scope_separator
        found["scope_parameter"] = row.scope_parameter
    return found | _api(row, row)


def _of_form(row: Provider, form: Form) -> dict[str, Any]:
    fields = {
        name: field.model_dump(include={"label", "secret", "required", "pattern"})
        for name, field in form.fields.items()
    }
    found: dict[str, Any] = {"fields": fields, "docs": form.docs or row.docs}
    if form.note:
        found["note"] = form.note
    return found | _api(row, form)


def _api(row: Provider, spec: Provider | Form) -> dict[str, Any]:
    """Say where the API takes the credential, as templates."""
    found: dict[str, Any] = {"api_credential": _credential(spec.api_credential)}
    if spec.api_headers:
        found["api_headers"] = dict(spec.api_headers)
    if spec.api_query:
        found["api_query"] = dict(spec.api_query)
    if url := spec.api_base_url or row.api_base_url:
        found["api_base_url"] = url
    return found


def _credential(place: Placement) -> str:
    if place.signature:
        return "signed requests: the tool signs with the values of to_dict()"
    if place.url:
        return f"URLs begin with {place.url}"
    if place.username is not None:
        # In base64 nobody could read the templates.
        return f"Authorization: Basic {place.username}:{place.password}"
    names = placeholders(*place.templates) | {"token"}
    shown = Placed(place, {name: f"{{{name}}}" for name in names})
    headers, query = shown.rendered_headers(), shown.rendered_query()
    return ", ".join(
        [f"{name}: {value}" for name, value in headers.items()]
        + [f"?{name}={value}" for name, value in query.items()]
    )


def _setting(row: Provider, name: str, **more: Any) -> dict[str, Any]:
    name = f"POCKET_AUTH_CLIENTS__{row.id}__{name}".upper()
    return {"name": name, "description": "", "default": None} | more


def _of_fields(row: Provider, form: Form) -> list[dict[str, Any]]:
    return [
        _setting(row, name, description=field.label, required=False)
        for name, field in form.fields.items()
    ]


def _of_app(handler: RowHandler) -> list[dict[str, Any]]:
    """Return the settings of the app's registration."""
    row = handler.row
    # Where the server registers apps by itself (RFC 7591), nothing has to be set.
    needed = row.registration_endpoint is None and not row.is_discovered
    found = [_setting(row, "client_id", required=needed)]
    if row.token_endpoint_auth_method != "none" and not handler.members:
        found.append(_setting(row, "client_secret", required=needed))
    found += [
        _setting(row, name, description=text, required=True)
        for name, text in handler.members.items()
    ]
    return found + [
        _setting(
            row,
            name,
            description=variable.description,
            default=variable.default,
            required=variable.default is None and variable.callback_parameter is None,
            unverified=f"variables.{name}" in row.unverified,
        )
        for name, variable in row.variables.items()
    ]
