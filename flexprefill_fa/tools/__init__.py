"""The `flexprefill` command: generate, demo, eval, fidelity and inspect. The library imports nothing from here."""

import sys


def main() -> None:
    """Run the command line; the entry point of the `flexprefill` script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"error: the command needs rich and typer: pip install 'flexprefill-fa[cli]' ({error})", file=sys.stderr)
        sys.exit(2)
    from flexprefill_fa.tools.cli import app

    app()
