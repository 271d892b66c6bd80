"""The checks of `pocket-auth doctor`."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from .._catalog import Catalog
from .._errors import (
    ConfigurationError,
    PocketAuthError,
    ProviderUnavailable,
    UnknownProvider,
)
from .._placement import fill
from .._rows import Client, Provider
from ._serve import answers
from ._terminal import Setup

if TYPE_CHECKING:
    from .._pocket import PocketAuth
    from .._settings import Settings

RELEASE_YEAR = 2026  # no clock that is right says less
CLOCK_LIMIT = timedelta(seconds=60)  # ID tokens and assertions are good for minutes
PROBE_TTL = timedelta(minutes=1)  # should the probe not be deleted


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; the text of what is wrong names the remedy."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str

    def as_dict(self) -> dict[str, str]:
        """Return it for programs."""
        return asdict(self)


def failed(name: str, error: PocketAuthError) -> Check:
    """Return what an error says."""
    return Check(name, "failed", str(error))


async def examine(setup: Setup, *, online: bool) -> list[Check]:
    """Look at everything; without *online* no other machine is asked."""
    try:
        settings = setup.settings()
        catalog = setup.catalog()
    except ConfigurationError as error:
        return [failed("settings", error)]
    found = [_settings(setup), *_unknown_settings(), _clock()]
    try:
        pocket = setup.pocket()
    except ConfigurationError as error:  # the address, or a malformed key
        return [*found, failed("settings", error)]
    try:
        if settings.public_url:
            found += await _public(settings, online=online)
        else:
            found.append(await _port(pocket.base_url))
        found += [check async for check in _kept(settings, pocket)]
        for name, client in settings.clients.items():
            found += _registered(catalog, pocket, name, client)
            if online and (row := catalog.find(name)):
                found += await _clock_of(row, client)
    finally:
        await pocket.aclose()
    return found


def _settings(setup: Setup) -> Check:
    file = setup.settings_file
    text = f"read from the environment{f' and {file}' if file else ''}"
    return Check("settings", "ok", text)


def _unknown_settings() -> Iterator[Check]:
    from .._settings import Settings

    known = [f"POCKET_AUTH_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith("POCKET_AUTH_") and not any(
            name.upper() == one or name.upper().startswith(f"{one}__") for one in known
        ):
            text = f"{name} is no setting and is ignored; there are {', '.join(known)}"
            yield Check("settings", "warning", text)


# ------------------------------------------------------------------ the callback server


async def _public(settings: Settings, *, online: bool) -> list[Check]:
    """Look at what everybody reaches; the pocket that was made has proved the rest."""
    url, found = settings.public_url or "", []
    if (settings.storage or "").startswith("sqlite:"):
        found.append(
            Check(
                "replicas",
                "warning",
                "a SQLite file is shared by the processes of one machine only: with "
                "replicas on several, set POCKET_AUTH_STORAGE to postgresql://... or "
                "redis://...",
            )
        )
    if not online:
        text = f"{url} is well-formed; --online looks whether it is served"
        return [*found, Check("public_url", "ok", text)]
    if await answers(f"{url}/connect/doctor"):
        return [*found, Check("public_url", "ok", f"{url} is served by PocketAuth")]
    text = (
        f"{url} is not served by PocketAuth, as far as this machine can see: mount "
        "pocket.router in the app behind it"
    )
    return [*found, Check("public_url", "warning", text)]


async def _port(base_url: str) -> Check:
    parts = urlsplit(base_url)
    outcome = await answers(f"{base_url}/connect/doctor")
    if outcome:
        return Check("port", "ok", f"{base_url} is served by PocketAuth right now")
    if parts.scheme == "https" or parts.path:
        return Check(
            "port",
            "warning",
            f"{base_url} is not served by PocketAuth right now: mount pocket.router in "
            "the app behind it, or run `pocket-auth serve --port` with the port that "
            "it forwards to",
        )
    host = "::1" if parts.hostname == "::1" else "127.0.0.1"
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, parts.port or 80))
        except OSError as error:
            return Check(
                "port",
                "failed",
                f"callbacks to {base_url} would not reach PocketAuth "
                f"({error.strerror}): end what uses that port, or set "
                "POCKET_AUTH_BASE_URL to another that is registered as redirect URI",
            )
    return Check("port", "ok", f"{base_url} is free")


# ------------------------------------------------------------------- keys and the store


async def _kept(settings: Settings, pocket: PocketAuth) -> AsyncIterator[Check]:
    from .._service import default_storage

    in_memory = settings.storage == "memory://"
    yield _keys(settings, in_memory=in_memory)
    try:
        await _round_trip(settings.storage or default_storage())
        # Opens it as agents do, and proves that the keys fit.
        await pocket.list_session_state(owner="doctor")
    except PocketAuthError as error:
        yield failed("store", error)
    else:
        if in_memory:
            text = "memory://: connections are gone when the process ends"
            yield Check("store", "warning", text)
        else:
            text = "opens with the keys; a record was written, read back and deleted"
            yield Check("store", "ok", text)


def _keys(settings: Settings, *, in_memory: bool) -> Check:
    from .._seal import KeyRing
    from .._service import key_path

    if settings.keys:
        return Check("keys", "ok", "read from POCKET_AUTH_KEYS or the settings file")
    if in_memory:
        return Check("keys", "ok", "one that lives as long as the process")
    path = settings.keys_file or key_path()
    if not settings.keys_file and not path.exists():
        return Check("keys", "ok", f"{path} is made when it is first needed")
    try:
        KeyRing.file(path, make=False)
    except ConfigurationError as error:
        return failed("keys", error)
    return Check("keys", "ok", f"read from {path}, which nobody else can read")


async def _round_trip(url: str) -> None:
    from .._errors import StorageUnavailable
    from ..storage import storage_from_url

    backend, key = storage_from_url(url), ("doctor", secrets.token_hex(8))
    value = secrets.token_bytes(16)
    await backend.open()
    try:
        await backend.put(key, value, version=1, expected=None, ttl=PROBE_TTL)
        record = await backend.get(key)
        gone = await backend.delete(key, expected=1)
    finally:
        await backend.close()
    if record is None or record.value != value or not gone:
        raise StorageUnavailable(
            "the store lost a record between two calls: look into its own log"
        )


# -------------------------------------------------------------------------------- time


def _clock() -> Check:
    now = datetime.now(UTC)
    if now.year < RELEASE_YEAR:
        return Check(
            "clock",
            "failed",
            f"this machine says it is {now:%Y-%m-%d}, before this version was made: "
            "set its clock, or no token's lifetime is right",
        )
    return Check("clock", "ok", f"{now:%Y-%m-%d %H:%M:%S} UTC")


async def _clock_of(row: Provider, client: Client) -> list[Check]:
    from .._http import Http

    if row.token_endpoint is None:
        return []
    name, http = f"clock of {row.id}", Http()
    defaults = {k: v.default for k, v in row.variables.items() if v.default}
    try:
        url = fill(row.token_endpoint, defaults | client.variables)
        answer = await http.request("GET", url, provider=row.id)
    except ConfigurationError:
        return []  # told where the registration is looked at
    except ProviderUnavailable as error:
        return [Check(name, "warning", str(error))]
    finally:
        await http.close()
    if answer.date is None:
        return [Check(name, "warning", "it does not say what time it is")]
    apart = abs(datetime.now(UTC) - answer.date)
    if apart > CLOCK_LIMIT:
        return [
            Check(
                name,
                "failed",
                f"it differs from this machine's by {apart.total_seconds():.0f} "
                "seconds: set this machine's clock (NTP)",
            )
        ]
    return [Check(name, "ok", "it is this machine's")]


# ------------------------------------------------------------------- app registrations


def _registered(
    catalog: Catalog, pocket: PocketAuth, name: str, client: Client
) -> Iterator[Check]:
    label = f"app {name}"
    try:
        row = catalog.get(name)
        request = pocket.make_request([], row.handler_name(_method(row, client)))
    except UnknownProvider as error:
        # One that is near is a slip; any other may be a handler in the app's code.
        slip = "did you mean" in str(error)
        text = f"{error}; a file of providers is named with --provider-file"
        yield Check(label, "failed" if slip else "warning", text)
    except ConfigurationError as error:
        yield failed(label, error)
    else:
        uri = getattr(request, "redirect_uri", None)
        yield Check(label, "ok", f"register {uri} there" if uri else "complete")


def _method(row: Provider, client: Client) -> str:
    """Return which of a provider's ways the app is registered for."""
    if client.client_id and "oauth2" in row.methods:
        return "oauth2"
    return row.methods[0] if row.methods else "oauth2"
