"""The documentation site: the pages of the repository where they stand, and the reference from the docstrings.

Nothing is copied: the repository's root is the source, and a page's links are those that it has in the repository.
Build it with `.docs/build [FOLDER]`; `.docs/build FOLDER -b linkcheck` tries the links that lead out, which needs the
network.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "kw_lightning"
author = "The kw_lightning maintainers"
version = release = metadata.version("kw-lightning")
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    ".docs/**.md",
    ".github/CONTRIBUTING.md",
    "kw_lightning/**.md",
    "recipes/**.md",
]
exclude_patterns = [".docs/out"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.githubpages"]
templates_path: list[str] = []

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
suppress_warnings = [
    "misc.highlighting_failure",  # of blocks that show a part of a file, with … for the rest
    "ref.python",  # several classes have an attribute of one name
]

autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
# Names of other libraries have no page here, and private ones none at all.
nitpick_ignore_regex = [("py:.*", r".*")]

html_theme = "furo"
html_title = f"kw_lightning {release}"
html_copy_source = True
html_show_sphinx = False

CHAPTERS: dict[str, list[str]] = {
    "Tutorials": [".docs/tutorials/own_images", ".docs/tutorials/own_module", ".docs/tutorials/published"],
    "Guides": [
        "recipes/README",
        "recipes/family",
        "recipes/adapters",
        "recipes/keras/README",
        "recipes/examples/README",
        "kw_lightning/fit/README",
        "kw_lightning/sweep/README",
        "kw_lightning/report/README",
        "kw_lightning/inference/README",
        "kw_lightning/export/README",
        "kw_lightning/bench/README",
        "recipes/studies/README",
    ],
    "How it works": ["kw_lightning/nn/README", "kw_lightning/nn/engine/README", ".docs/glossary", ".docs/reference"],
    "The project": [".github/CONTRIBUTING", "CHANGELOG", "kw_lightning/fit/data/digits"],
}


def chapters(app: Sphinx) -> dict[str, list[str]]:
    """Return the pages by chapter; those that no chapter names are guides."""
    named = {root_doc, *(page for pages in CHAPTERS.values() for page in pages)}
    return {**CHAPTERS, "Guides": [*CHAPTERS["Guides"], *sorted(app.env.found_docs - named)]}


def add_chapters(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the table of contents behind the README, where its readers elsewhere do not need it."""
    if name == root_doc:
        for title, pages in chapters(app).items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n"


STARS = re.compile(r"(?<![\w*])(\*{1,2})(?=\w)(?!\*?\w+\*\*)")
"""Stars before a name, as in [n, co, ci, *ck] and **kwargs, and not those of a **strong** word."""


def escape_marks(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """Keep the stars and bars of shapes and formulas in docstrings from being read as marks."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith(">>>"):
            lines[number] = STARS.sub(lambda found: found[0].replace("*", "\\*"), line).replace("|", "\\|")


def show_as_text(app: Sphinx, tree: nodes.document) -> None:
    """Take away links to folders, which are no pages here, and links in headings, which the contents cannot hold."""
    folder = Path(tree["source"]).parent
    to_folders = [
        link
        for link in tree.findall(addnodes.pending_xref)
        if link["reftype"] == "myst" and (folder / link["reftarget"]).is_dir()
    ]
    in_headings = [link for title in tree.findall(nodes.title) for link in title.findall(addnodes.download_reference)]
    for link in to_folders + in_headings:
        link.replace_self(link.children)


def write_the_ways_in(app: Sphinx, failure: Exception | None) -> None:
    """Write `llms.txt`, the list of the pages' sources for language models, and `index.html`, which leads on."""
    if failure is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    lines = [f"# {project}", "", f"> {metadata.metadata('kw-lightning')['Summary']}", ""]
    for title, pages in {"Start": [root_doc], **chapters(app)}.items():
        lines += [f"## {title}", ""]
        for page in pages:
            file = Path("_sources") / Path(app.env.doc2path(page, base=False)).with_suffix(".md.txt")
            assert (out / file).is_file(), file
            lines.append(f"- [{app.env.titles[page].astext()}]({file}): {first_sentence(app, page)}")
        lines.append("")
    (out / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    link = f"{root_doc}.html"
    (out / "index.html").write_text(
        f'<!doctype html><meta charset="utf-8"><title>{project}</title>'
        f'<meta http-equiv="refresh" content="0; url={link}"><a href="{link}">{project}</a>\n',
        encoding="utf-8",
    )


def first_sentence(app: Sphinx, page: str) -> str:
    """Return the first sentence of a page."""
    paragraph = next(iter(app.env.get_doctree(page).findall(nodes.paragraph)), None)
    text = "" if paragraph is None else " ".join(paragraph.astext().split())
    return text.partition(". ")[0].rstrip(".:") + "."


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", add_chapters)
    app.connect("autodoc-process-docstring", escape_marks)
    app.connect("doctree-read", show_as_text, priority=100)  # before the contents are collected
    app.connect("build-finished", write_the_ways_in)
