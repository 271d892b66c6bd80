"""`pocket-auth keys`: make a key, and put a new one in front."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from .._errors import ConfigurationError
from ._terminal import REFUSED, Setup, complain, say

app = typer.Typer(no_args_is_help=True, help="Keys that seal what is stored.")


@app.command()
def new() -> None:
    """Print a new key for POCKET_AUTH_KEYS; put it first, so that it seals."""
    from .._seal import new_key

    typer.echo(new_key())


@app.command()
def rotate(context: typer.Context) -> None:
    """Put a new key in front of those of the key file; the older ones stay, to open."""
    from .._seal import KeyRing, new_key
    from .._service import key_path

    if written := Setup.of(context).settings().keys:
        KeyRing.parse(written.get_secret_value())
        complain(
            "The keys come from POCKET_AUTH_KEYS (or the settings file), which a "
            "command cannot change. Put this in front of their present value and keep "
            "the rest, which opens what is stored; then restart what uses it:"
        )
        typer.echo(f"{new_key()},")
        raise typer.Exit(REFUSED)
    path = key_path()
    had = path.exists()
    KeyRing.file(path)  # made if there is none; refused if others can read it
    if had:
        put_first(path, new_key())
    say(f"{path}: a new key seals from now on.")
    if had:
        complain(
            "Records are sealed with it when they are next written; the older keys "
            "stay in the file for those that are not. Restart what runs already: it "
            "cannot open what is sealed with the new key."
        )


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
