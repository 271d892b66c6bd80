"""`pocket-auth connections` and `logout`: the accounts in this machine's store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from .._connections import Connection

_COLUMNS = [
    "provider",
    "handler",
    "profile",
    "account",
    "scopes",
    "state",
    "expires",
    "used",
]
_STATES = {
    "ok": "connected",
    "expiring": "connected, cannot be renewed",
    "needs_reconnect": "has to be connected again",
    "unreadable": "cannot be read, log out",
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

    async def work() -> list[Connection]:
        try:
            return await pocket.connections(owner)
        finally:
            await pocket.aclose()

    found = [_listed(connection) for connection in asyncio.run(work())]
    if as_json:
        print_json(found)
    elif found:
        print_table(_COLUMNS, map(_cells, found))
    else:
        complain("No account is connected: pocket-auth login <provider>")


def _listed(connection: Connection) -> dict[str, Any]:
    return {
        "id": connection.id,
        "provider": connection.provider,
        "handler": connection.handler,
        "profile": connection.profile,
        "account": connection.account,
        "scopes": connection.scopes,
        "health": connection.health,
        "reason": connection.reason,
        "connected_at": connection.connected_at,
        "expires_at": connection.expires_at,
        "last_used": connection.last_used,
    }


def _cells(listed: dict[str, Any]) -> list[str]:
    return [
        listed["provider"],
        listed["handler"],
        listed["profile"],
        listed["account"] or "-",
        " ".join(listed["scopes"]) or "-",
        _STATES[listed["health"]],
        local(listed["expires_at"]) if listed["expires_at"] else "-",
        f"{listed['last_used'] or '-'}",
    ]
