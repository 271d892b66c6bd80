"""The command `pocket-auth`."""
# Annotations are evaluated where they stand: typer is an extra, imported when run.

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the command; the exit code is 2 if typer is not installed."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        sys.stderr.write(
            'The command needs more: pip install "langchain-pocket-auth[cli]"\n'
        )
        raise SystemExit(2) from None
    make_app()()


def make_app() -> "typer.Typer":
    """Return the command and its subcommands."""
    import typer

    from . import (
        _connections,
        _doctor,
        _keys,
        _login,
        _new_provider,
        _providers,
        _serve,
    )
    from ._terminal import Reporting, Setup

    # A pretty traceback would show local variables, and with them secrets.
    app = typer.Typer(
        cls=Reporting,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def version(value: bool) -> None:
        if value:
            from importlib.metadata import version

            typer.echo(version("langchain-pocket-auth"))
            raise typer.Exit

    @app.callback()
    def root(
        context: typer.Context,
        settings: Annotated[
            Path | None,
            typer.Option(help="A TOML file with settings, below the environment."),
        ] = None,
        provider_file: Annotated[
            list[Path] | None,
            typer.Option(help="A TOML file with own providers; may be repeated."),
        ] = None,
        _: Annotated[
            bool,
            typer.Option(
                "--version", callback=version, is_eager=True, help="Print the version."
            ),
        ] = False,
    ) -> None:
        """Let agents act for their end users at third-party services."""
        context.obj = Setup(settings, tuple(provider_file or ()))

    @app.command()
    def demo(
        yes: Annotated[
            bool, typer.Option("--yes", help="Agree without asking you.")
        ] = False,
        port: Annotated[
            int | None, typer.Option(help="Port of the connect link; default: any.")
        ] = None,
    ) -> None:
        """Play the main job from end to end, on this machine, without an account."""
        from ..demo import run

        raise typer.Exit(run(yes=yes, port=port))

    app.add_typer(_providers.app, name="providers")
    app.command()(_new_provider.new_provider)
    app.command()(_login.login)
    app.command()(_connections.logout)
    app.command()(_connections.connections)
    app.add_typer(_keys.app, name="keys")
    app.command()(_doctor.doctor)
    app.command()(_serve.serve)
    return app
