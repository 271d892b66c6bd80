"""`pocket-auth serve`: connect pages and callbacks in the foreground."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from .._errors import ConfigurationError, ProviderUnavailable
from ._terminal import Setup, say


def serve(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option(help="Of this machine; default: that of base_url.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default: that of base_url.")] = None,
) -> None:
    """Serve connect pages and callbacks, until Ctrl-C, for agents of the same store."""
    from .._loop import LOOP
    from .._settings import DEFAULT_BASE_URL, check_base_url
    from ..server import BackgroundServer

    setup = Setup.of(context)
    settings = setup.kept_settings()
    if settings.public_url:
        raise ConfigurationError(
            "with POCKET_AUTH_PUBLIC_URL your own app serves: only it knows who is "
            "signed in. Three lines of it: `pocket = PocketAuth(verify_user="
            "your_dependency)`, `app = FastAPI()`, `app.include_router(pocket.router)`"
        )
    base_url = check_base_url(settings.base_url or DEFAULT_BASE_URL)
    parts = urlsplit(base_url)
    behind = parts.scheme == "https" or bool(parts.path)
    if behind and port is None:
        raise ConfigurationError(
            f"base_url is {base_url}, which something in front of this server has to "
            "answer at: say the --port that it forwards to"
        )
    name = host or (parts.hostname if not behind else None) or "127.0.0.1"
    shown = f"[{name}]" if ":" in name else name
    listening = check_base_url(f"http://{shown}:{port or parts.port or 80}")
    # Nobody in front: links have to name the port that is listened at.
    pocket = setup.pocket(base_url=base_url if behind else listening)
    server = BackgroundServer(listening, pocket.router, LOOP.generation, None)
    # A stop that is not typed ends it as one that is.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        LOOP.run_sync(server.start())
        say(f"Serving {pocket.base_url} (at {listening}). Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)  # Ctrl-C ends it, on Windows too
    finally:
        signal.signal(signal.SIGTERM, before)
        LOOP.run_sync(server.stop())
        pocket.close()


async def answers(url: str) -> str | None:
    """
    Look who answers at an address of this machine, changing nothing.

    Returns:
        What a page of ours tells (`unknown`, `pending`, ...); `""`: something else
        answers; `None`: nothing does.
    """
    from .._http import Http

    http = Http()
    try:
        page: Any = await http.request("GET", url, provider="base_url")
    except ProviderUnavailable:
        return None
    finally:
        await http.close()
    text = page.body.decode("utf-8", "replace")
    found: str = text.partition('name="pocket-auth-outcome" content="')[2]
    return found.partition('"')[0]
