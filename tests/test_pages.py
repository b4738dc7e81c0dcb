"""The pages beside the code: every link leads somewhere, and the engine's page knows every path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kw_lightning.nn.engine.paths import PATHS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "kw_lightning").rglob("*.md"),
    *(ROOT / "recipes").rglob("*.md"),
    *(ROOT / ".docs").rglob("*.md"),
    ROOT / ".github" / "CONTRIBUTING.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target.partition("#")[0]).exists()] == []


def test_the_engines_page_has_a_row_for_every_path() -> None:
    page = (ROOT / "kw_lightning/nn/engine/README.md").read_text(encoding="utf-8")
    table = page.partition("## Paths")[2].partition("##")[0]
    assert [path.name for path in PATHS if f"`{path.name}`" not in table] == []
