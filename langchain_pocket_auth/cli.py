"""The command `pocket-auth`."""
# Annotations are evaluated where they stand: typer is an extra, imported when run.

import json
import sys
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

    # A pretty traceback would show local variables, and with them secrets.
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    keys = typer.Typer(no_args_is_help=True, help="Keys that seal what is stored.")
    app.add_typer(keys, name="keys")

    def version(value: bool) -> None:
        if value:
            from importlib.metadata import version

            typer.echo(version("langchain-pocket-auth"))
            raise typer.Exit

    @app.callback()
    def root(
        _: Annotated[
            bool,
            typer.Option(
                "--version", callback=version, is_eager=True, help="Print the version."
            ),
        ] = False,
    ) -> None:
        """Let agents act for their end users at third-party services."""

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
        from .demo import run

        raise typer.Exit(run(yes=yes, port=port))

    @app.command()
    def providers(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """List the providers that are known, by id and name."""
        from ._catalog import Catalog

        catalog = Catalog()
        names = {provider: catalog.get(provider).label for provider in catalog}
        if as_json:
            listed = [{"id": id_, "name": name} for id_, name in names.items()]
            typer.echo(json.dumps(listed, ensure_ascii=False, indent=2))
            return
        width = max(map(len, names), default=0)
        for id_, name in names.items():
            typer.echo(f"{id_:{width}}  {name}")

    @keys.command()
    def new() -> None:
        """Print a new key for POCKET_AUTH_KEYS; put it first, so that it seals."""
        from ._seal import new_key

        typer.echo(new_key())

    return app


if __name__ == "__main__":
    main()
