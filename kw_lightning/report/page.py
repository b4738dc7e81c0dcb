"""One self-contained HTML page out of parts: style, script and pictures inside, nothing fetched, every text escaped.

The page's own policy (Content-Security-Policy) lets no other script run and no request leave it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table as RichTable
from rich.text import Text as Plain

from kw_lightning.errors import printable
from kw_lightning.report.charts import Chart

NARROW = 4  # columns


@dataclass(frozen=True)
class Tile:
    """A figure with its name, and what stands small below it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table of texts, whose first `left` columns stand at the left; folded ones show their title alone at first."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    folded: bool = False

    def rich(self) -> RichTable:
        """Return it for a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for place, name in enumerate(self.head):
            table.add_column(name, justify="left" if place < self.left else "right")
        for row in self.rows:
            table.add_row(*map(Plain, row))
        return table


@dataclass(frozen=True)
class Picture:
    """An image with its words; `mood` is "wrong" for an answer that is not right."""

    source: str | None
    alternative: str
    caption: str
    detail: str = ""
    mood: str = ""


@dataclass(frozen=True)
class Gallery:
    """Images in rows."""

    title: str
    images: Sequence[Picture]


@dataclass(frozen=True)
class Text:
    """A long text, folded."""

    title: str
    text: str


@dataclass(frozen=True)
class Part:
    """A part of a page with a heading of its own; what is empty is left out."""

    title: str
    words: str = ""
    tiles: Sequence[Tile] = ()
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[Text] = ()

    @property
    def narrow(self) -> list[Table]:
        """Return the tables that stand beside charts."""
        return [table for table in self.tables if len(table.head) <= NARROW and not table.folded]

    @property
    def broad(self) -> list[Table]:
        """Return the tables that take the whole width, and those that are folded."""
        return [table for table in self.tables if len(table.head) > NARROW or table.folded]

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing under the heading."""
        return not (self.tiles or self.charts or self.galleries or self.tables or self.texts)


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: its heading.
        description: a sentence below it.
        notes: what is missing and why, a line each.
        parts: those that are not empty are shown.
        footer: the last line.
    """

    title: str
    description: str
    notes: Sequence[str]
    parts: Sequence[Part]
    footer: str

    def html(self) -> str:
        """Return the page."""
        script, style = (_file(name) for name in ("page.js", "page.css"))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        shown = Page(
            printable(self.title),
            self.description,
            self.notes,
            [part for part in self.parts if not part.is_empty],
            self.footer,
        )
        # the package's own files are the only texts that are taken as they stand
        own = {"script": Markup(script), "style": Markup(style), "script_hash": Markup(digest)}
        text = _environment().get_template("page.html").render(page=shown, **own)
        return text.encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    loader = PackageLoader("kw_lightning.report", "")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_seen, trim_blocks=True, lstrip_blocks=True
    )


def _seen(value: object) -> object:
    """Return a text without what is not seen but moves a cursor or turns the direction of writing."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value)


def _file(name: str) -> str:
    return (files("kw_lightning.report") / name).read_text(encoding="utf-8")
