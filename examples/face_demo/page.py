"""A Markdown page as HTML."""

from __future__ import annotations

import re
from pathlib import Path

import markdown

from .files import write_text

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 66rem; margin: 2.5rem auto;
       padding: 0 1.25rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.75rem; border-bottom: 1px solid #8884; padding-bottom: .3rem; }
img { max-width: min(100%, 54rem); display: block; margin: 1.25rem auto; background: white;
      border-radius: .35rem; }
.table { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid #8884; }
td { white-space: nowrap; }
th { text-align: left; border-bottom-width: 2px; vertical-align: bottom; }
tbody tr:hover { background: #8881; }
code { font-size: .9em; }
pre { overflow-x: auto; line-height: 1.35; }
"""
# What means something in Markdown or HTML; an underscore does not between letters.
_SPECIAL = re.compile(r"[\\`*\[\]#|<>]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")


def literal(text: str) -> str:
    """A name or other text that stands for itself in Markdown."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)


def write_html(page: Path) -> Path:
    """Writes the page as HTML beside itself, pictures by the same links; returns its path."""
    text = page.read_text(encoding="utf-8")
    body = markdown.markdown(text, extensions=["tables", "sane_lists", "fenced_code"])
    body = body.replace("<table>", '<div class="table"><table>').replace(
        "</table>", "</table></div>"
    )
    title = text.splitlines()[0].lstrip("# ")
    path = page.with_suffix(".html")
    write_text(
        path,
        f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
""",
    )
    return path
