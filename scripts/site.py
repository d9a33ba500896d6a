"""The documentation as a site: the same Markdown files that are read on GitHub, with their links turned round.

A hook of mkdocs. Links between the files are relative to the checkout; what lies outside `docs/` gets a place in the
site here, and a link to anything else fails the strict build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]  # the extra docs brings it

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {"flexprefill_fa/tools/needle/model/README.md": "needle_model.md", "LICENSE": "LICENSE.txt"}
PAGES |= {str(plot.relative_to(ROOT)): plot.name for plot in (ROOT / "bench" / "results").glob("*.png")}
"""Place in the site by path in the checkout, for files outside docs/."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = next((source for source, target in PAGES.items() if target == here), f"docs/{here}")

    def turned(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        target = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else match[1])
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _LINK.sub(turned, markdown)
