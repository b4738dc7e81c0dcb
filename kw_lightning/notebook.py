"""What a notebook shows of an object: the text that a terminal would show, escaped."""

from __future__ import annotations

import html
import io
from typing import Any

WIDTH = 140  # of tables, in characters
_STYLE = "white-space: pre; overflow-x: auto; line-height: 1.25; max-height: 40rem"


def text_html(title: str, text: str) -> str:
    """Return a title and a text of several lines below it."""
    return f'<div><span><b>{html.escape(title)}</b></span><pre style="{_STYLE}">{html.escape(text)}</pre></div>'


def rich_html(*shown: Any) -> str:
    """Return what rich prints of texts and tables, without colours."""
    from rich.console import Console

    written = io.StringIO()
    screen = Console(
        file=written, width=WIDTH, force_terminal=True, color_system=None, markup=False, force_jupyter=False
    )
    screen.print(*shown, sep="\n")
    return f'<pre style="{_STYLE}">{html.escape(written.getvalue())}</pre>'
