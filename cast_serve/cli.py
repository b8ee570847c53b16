"""The `cast` command: assembles the commands that the packages register, and turns InputError into one sentence."""

from importlib.metadata import entry_points

import typer

from conversion.command import run

COMMANDS = "cast.commands"
# What serve does not know goes on to the engine.
PASSING = {"serve": {"allow_extra_args": True, "ignore_unknown_options": True}}
ORDER = ["train", "convert", "serve", "bench", "eval", "pipeline", "info", "tune", "scaling-law", "export-genai"]


def build_app() -> typer.Typer:
    """Collect every command of the entry-point group; a command's module must import nothing heavy at its top."""
    app = typer.Typer(
        help="Train, convert, serve and measure 2:4 sparse language models.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    found = {entry.name: entry for entry in entry_points(group=COMMANDS)}
    for name in sorted(found, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER)):
        app.command(name, context_settings=PASSING.get(name))(found[name].load())
    return app


def main() -> None:
    run(lambda: build_app()())


if __name__ == "__main__":
    main()
