"""One self-contained HTML page: pictures are inside it, nothing is loaded from anywhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from skd_jax.files import whole

COLUMNS = 8  # of a table, at most, that stand side by side on a narrow page
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
tbody th, thead th:first-child { text-align: left; font-weight: 500; }
thead th { border-bottom: 2px solid #888; font-size: .85rem; white-space: normal; }
td small { display: block; color: #666; font-size: .75rem; }
.facts th { vertical-align: top; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.missing { color: #999; font-style: italic; }
.source { color: #666; font-size: .8rem; }
img { max-width: min(100%, 56rem); height: auto; background: #fff; border-radius: 4px; }
nav ul { columns: 20rem; column-gap: 2.5rem; padding-left: 1.2rem; }
nav + * { margin-top: 3rem; }
code { background: #eee; padding: .1rem .3rem; border-radius: 3px; }
@media (max-width: 50rem) {
  body { margin: 1rem auto; }
  table { width: 100%; font-size: .8rem; }
  th, td { padding: .3rem; white-space: normal; }
  thead th, td small { font-size: .72rem; }
  thead th, tbody th { hyphens: auto; }
  .many, .many tbody, .many tr, .many th, .many td { display: block; text-align: left; }
  .many thead, .many td:empty { display: none; }
  .many tbody th { font-size: 1rem; padding-top: 1rem; }
  .many td::before { content: attr(data-column) ": "; color: #666; }
  .many td small { display: inline; margin-left: .5rem; }
}
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #16181c; }
  h2 { border-color: #444; }
  th, td { border-color: #333; }
  td small, .source { color: #9a9a9a; }
  .missing { color: #777; }
  code { background: #2a2d33; }
}
"""


def section(title: str, content: str) -> str:
    """A section with a heading; ``content`` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def image(png: bytes, title: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def picture(path: Path, title: str, source: str) -> str:
    """A section that shows a PNG."""
    below = f"<p class=source>{html.escape(source)}</p>"
    return section(title, image(path.read_bytes(), title) + below)


def missing(title: str, command: str) -> str:
    """A section for what has not been run."""
    return section(title, f"<p class=missing>not run: <code>{html.escape(command)}</code></p>")


def contents(titles: Mapping[str, str]) -> str:
    """Links to the parts of the page that :func:`part` names.

    Args:
      titles: by the part's name.
    """
    links = "".join(f"<li><a href='#{n}'>{html.escape(t)}</a></li>" for n, t in titles.items())
    return f"<nav><h2>Contents</h2><ul>{links}</ul></nav>"


def part(name: str) -> str:
    """Where :func:`contents` leads to."""
    return f"<a id='{html.escape(name)}'></a>"


def write(path: Path, title: str, sections: Sequence[str]) -> None:
    """Writes the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )
    how = {"encoding": "utf-8", "errors": "replace"}  # names that are no UTF-8
    with whole(path, mode="w", **how) as file:
        file.write(text)
