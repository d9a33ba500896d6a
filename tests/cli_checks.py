"""What tests of the commands ask of a refusal."""

from __future__ import annotations

from typer.testing import Result


def assert_refused(result: Result, *parts: str) -> None:
    """One line on stderr, with these parts, and exit status 2."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
