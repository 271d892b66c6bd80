"""`pocket-auth connections` and `logout`: the accounts in this machine's store."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from .._providers import canonical
from ._terminal import (
    REFUSED,
    Json,
    Owner,
    Profile,
    Setup,
    complain,
    local,
    print_json,
    print_table,
    say,
)

_COLUMNS = ("provider", "handler", "profile", "account", "scopes", "state", "expires")
_STATES = {
    "SKIP_AUTH": "connected",
    "DO_REFRESH": "renewed when used",
    "DO_AUTH": "has to be connected again",
}


def logout(
    context: typer.Context,
    provider: Annotated[str, typer.Argument(help="The provider's id.")],
    profile: Profile = "default",
    owner: Owner = None,
    handler: Annotated[
        str | None, typer.Option(help="Default: all of the provider's.")
    ] = None,
) -> None:
    """Disconnect an account: forget it here, revoke it there where that is possible."""
    pocket = Setup.of(context).pocket()

    async def work() -> bool:
        try:
            return await pocket.delete_session(
                canonical(provider),
                profile=profile,
                auth_handler_name=handler,
                owner=owner,
            )
        finally:
            await pocket.aclose()

    if not asyncio.run(work()):
        complain(f"There was no connection of {provider} (profile {profile}).")
        raise typer.Exit(REFUSED)
    say(f"Disconnected: {provider}.")


def connections(
    context: typer.Context,
    owner: Owner = None,
    as_json: Json = False,
) -> None:
    """List the connected accounts, without their tokens."""
    pocket = Setup.of(context).pocket()

    async def work() -> list[dict[str, Any]]:
        try:
            return await pocket.list_session_state(owner=owner)
        finally:
            await pocket.aclose()

    found = [_listed(state) for state in asyncio.run(work())]
    if as_json:
        print_json(found)
    elif found:
        print_table(_COLUMNS, map(_cells, found))
    else:
        complain("No account is connected: pocket-auth login <provider>")


def _listed(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "provider": state["provider"],
        "handler": state["handler"],
        "profile": state["profile"],
        "account": state["account"],
        "scopes": state["scope"],
        "state": state["state"].name,
        "expires_at": state["expires_at"],
    }


def _cells(listed: dict[str, Any]) -> list[str]:
    return [
        listed["provider"],
        listed["handler"],
        listed["profile"],
        listed["account"] or "-",
        " ".join(listed["scopes"]) or "-",
        _STATES.get(listed["state"], listed["state"]),
        local(listed["expires_at"]) if listed["expires_at"] else "-",
    ]
