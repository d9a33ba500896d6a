"""Folders of Python modules that stand for other implementations."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path, **files: str) -> None:
    """Modules by their name, `__` for a folder."""
    for name, text in files.items():
        file = folder / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for file in list(folder.rglob("*.py")):
        (file.parent / "__init__.py").touch()
