"""`pocket-auth doctor`: what is in order, what is not, and what to do about it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ._checks import examine
from ._terminal import REFUSED, Json, Setup, print_facts, print_json


def doctor(
    context: typer.Context,
    online: Annotated[
        bool,
        typer.Option("--online", help="Compare the clock with those of providers."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check settings, callback address, keys, store, clock and app registrations."""
    checks = asyncio.run(examine(Setup.of(context), online=online))
    if as_json:
        print_json([check.as_dict() for check in checks])
    else:
        lines = [(f"{check.status:8} {check.name}", check.text) for check in checks]
        print_facts("What was looked at", lines)
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(REFUSED)
