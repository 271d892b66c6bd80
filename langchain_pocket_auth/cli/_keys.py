"""`pocket-auth keys`: make a key, put a new one in front, let an old one go."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from .._errors import ConfigurationError
from ._terminal import REFUSED, Json, Setup, complain, print_json, print_table, say

if TYPE_CHECKING:
    from .._rewrap import Rewrapped
    from .._vault import Vault

T = TypeVar("T")
_COLUMNS = ("key", "records", "use")
app = typer.Typer(no_args_is_help=True, help="Keys that seal what is stored.")


@app.command()
def new() -> None:
    """Print a new key for POCKET_AUTH_KEYS or a key file; the first one seals."""
    from .._seal import new_key

    typer.echo(new_key())


@app.command()
def rotate(context: typer.Context) -> None:
    """Put a new key in front of those of the key file, and seal everything with it."""
    from .._seal import KeyRing, new_key
    from .._service import key_path

    setup = Setup.of(context)
    source = setup.settings().key_source()
    if isinstance(source, str):
        KeyRing.parse(source)
        complain(
            "The keys come from POCKET_AUTH_KEYS (or the settings file), which a "
            "command cannot change. First add this behind their present value, "
            "everywhere, and restart what uses it: a replica without the new key "
            "cannot open what the others seal with it. When all have it, put it in "
            "front, restart again, and run `pocket-auth keys rewrap`:"
        )
        typer.echo(f",{new_key()}")
        raise typer.Exit(REFUSED)
    path = source or key_path()
    had = source is not None or path.exists()
    # Made if there is none and none is named; refused if others can read it.
    KeyRing.file(path, make=source is None)
    if had:
        put_first(path, new_key())
    say(f"{path}: a new key seals from now on.")
    if not had or setup.settings().storage == "memory://":
        return
    complain(
        "Restart what runs already: it cannot open what is sealed with the new key, "
        "and says so; nothing is lost by that."
    )
    _rewrap(setup)


@app.command()
def rewrap(context: typer.Context) -> None:
    """Seal all that is stored with the first key; if it was ended, it goes on."""
    _rewrap(Setup.of(context))


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Count what is sealed with which key, and tell which can be dropped."""
    from .._rewrap import survey

    async def look(vault: Vault) -> tuple[Rewrapped, dict[str, str]]:
        found, used = await survey(vault), await vault.used_keys()
        return found, {
            key_id: _use(found.after.get(key_id, 0), number=n, used=key_id in used)
            for n, key_id in enumerate(vault.key_ids)
        }

    found, uses = asyncio.run(_in_vault(Setup.of(context), look))
    keys = [(key_id, found.after.get(key_id, 0), use) for key_id, use in uses.items()]
    if as_json:
        listed = [dict(zip(_COLUMNS, key, strict=True)) for key in keys]
        print_json({"keys": listed, "unreadable": found.unreadable})
    else:
        print_table(_COLUMNS, keys)
    _end(found)


def _use(records: int, *, number: int, used: bool) -> str:
    if number == 0:
        return "seals"
    if records:
        return "opens what `keys rewrap` has not sealed anew"
    if used:
        return "none; after `keys rewrap` it can be dropped"
    return "none; can be put first, or dropped"


def _rewrap(setup: Setup) -> None:
    from .._rewrap import rewrap

    async def work(vault: Vault) -> tuple[Rewrapped, tuple[str, ...]]:
        return await rewrap(vault, on_progress=_show), vault.key_ids

    found, (first, *others) = asyncio.run(_in_vault(setup, work))
    moved = sum(found.before.get(key_id, 0) for key_id in others)
    say(f"{moved} of {sum(found.before.values())} records were under another key.")
    left = [key_id for key_id in others if key_id in found.after]
    for key_id in others:
        if key_id not in left:
            say(f"{key_id} can be dropped.")
    if left:
        complain(
            f"Something still seals with {', '.join(left)}: give it the keys in this "
            f"order, {first} first, restart it, and run `pocket-auth keys rewrap` "
            "again."
        )
    _end(found, acts=bool(left))


def _end(found: Rewrapped, *, acts: bool = False) -> None:
    if found.unreadable:
        complain(
            f"{found.unreadable} records do not open with these keys, and are left as "
            "they are: their key was dropped too early, or they were changed."
        )
    if acts or found.unreadable:
        raise typer.Exit(REFUSED)


def _show(seen: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{seen} records", nl=False, err=True)


async def _in_vault(setup: Setup, work: Callable[[Vault], Awaitable[T]]) -> T:
    """Do *work* with what is stored; no `PocketAuth`, which may need the app's code."""
    from .._seal import KeyRing
    from .._service import default_storage, key_path
    from .._vault import Vault
    from ..storage import storage_from_url

    settings = setup.kept_settings()
    source = settings.key_source()
    if isinstance(source, str):
        ring = KeyRing.parse(source)
    else:
        ring = KeyRing.file(source or key_path(), make=source is None)
    backend = storage_from_url(settings.storage or default_storage())
    vault = Vault(backend, ring, lambda: datetime.now(UTC))
    await vault.open()
    try:
        return await work(vault)
    finally:
        await vault.close()


def put_first(path: Path, key: str) -> None:
    """
    Write *key* in front of a key file's, in one step.

    Raises:
        ConfigurationError: It cannot be written, or is being rotated right now.
    """
    aside = path.with_name(f"{path.name}.new")
    try:
        # Its name is always the same: of two that rotate at once one is refused, and
        # no key that sealed something already is lost.
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as out:
                out.write(f"{key}\n{path.read_text()}")
                out.flush()
                os.fsync(out.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _keep(path.parent)
    except FileExistsError:
        raise ConfigurationError(
            f"{aside} is there: another rotation runs, or has died; in that case "
            "delete it and try again"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror}): mend that, or set "
            "POCKET_AUTH_KEYS instead"
        ) from None


def _keep(folder: Path) -> None:
    """Let a renaming outlast a power cut: what the new key sealed needs it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
