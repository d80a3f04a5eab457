"""One self-contained HTML page: pictures are inside it, nothing is loaded from anywhere."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
tbody th, thead th:first-child { text-align: left; font-weight: 500; }
thead th { border-bottom: 2px solid #888; font-size: .85rem; white-space: normal; }
td small { display: block; color: #666; font-size: .75rem; }
.missing { color: #999; font-style: italic; }
.source { color: #666; font-size: .8rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { background: #eee; padding: .1rem .3rem; border-radius: 3px; }
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


def write(path: Path, title: str, sections: Sequence[str]) -> None:
    """Writes the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )
