"""The pages beside the code: every link leads somewhere, and the engine's page knows every path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kw_lightning.nn.engine.paths import PATHS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *(page for folder in ("kw_lightning", "recipes", ".docs") for page in (ROOT / folder).rglob("*.md")),
]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        if not place.exists() or (anchor and anchor not in headings(place)):
            lost.append(target)
    assert lost == []


def test_the_engines_page_has_a_row_for_every_path() -> None:
    page = (ROOT / "kw_lightning/nn/engine/README.md").read_text(encoding="utf-8")
    table = page.partition("## Paths")[2].partition("##")[0]
    assert [path.name for path in PATHS if f"`{path.name}`" not in table] == []
