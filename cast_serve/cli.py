"""The `cast` command: assembles the commands that the packages register, and turns InputError into one sentence."""

import sys
from importlib import metadata
from typing import Annotated

import typer

from conversion.command import run
from conversion.errors import InputError

COMMANDS = "cast.commands"
# What serve does not know goes on to the engine.
PASSING = {"serve": {"allow_extra_args": True, "ignore_unknown_options": True}}
EXTRAS = {
    "permute": "train",
    "train": "train",
    "convert": "convert",
    "serve": "serve",
    "bench": "bench",
    "eval": "train",
    "pipeline": "train,convert,serve,bench",
    "info": "convert",
    "tune": "train,gpu",
    "scaling-law": "train",
    "export-genai": "genai",
}
"""The commands in the order of --help, and what each must be installed with."""


def build_app() -> typer.Typer:
    """Collect every command of the entry-point group; a command's module must import nothing heavy at its top."""
    app = typer.Typer(
        help="Train, convert, serve and measure 2:4 sparse language models.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_options)
    found = {entry.name: entry for entry in metadata.entry_points(group=COMMANDS)}
    for name in sorted(found, key=[*EXTRAS, *found].index):
        app.command(name, context_settings=PASSING.get(name))(found[name].load())
    return app


def _say_version(asked: bool) -> None:
    if asked:
        print(f"cast-serve {metadata.version('cast-serve')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    run(_run)


def _run() -> None:
    try:
        build_app()()
    except ModuleNotFoundError as error:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        if command not in EXTRAS:
            raise
        raise InputError(
            f"cast {command} needs the package '{error.name}': pip install 'cast-serve[{EXTRAS[command]}]'"
        ) from None


if __name__ == "__main__":
    main()
