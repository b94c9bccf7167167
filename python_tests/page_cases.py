"""Whether a report's page shows what it should: its HTML, parsed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Texts by element, tables row by row, and the pictures of a page whose elements nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.pictures: list[str] = []
        self.loose = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if not {"pre", "code", "style", "table"} & set(self.open):
            self.loose += data


def check_page(path: Path, name: str = "") -> Page:
    """No Markdown is left, tables are tables, and every picture is there.

    Args:
        path: the HTML; the Markdown that it is made from lies beside it.
        name: a text in it that may look like Markdown.
    """
    page, source = Page(path), path.with_suffix(".md").read_text(encoding="utf-8")
    fences = re.findall(r"^```\n(.*?)^```$", source, re.M | re.S)
    assert page.texts.get("pre", []) == fences
    plain = re.sub(r"^```\n.*?^```$", "", source, flags=re.M | re.S)
    assert len(page.tables) == len(re.findall(r"^\|[ :]*-+[-:| ]*$", plain, re.M))
    rows = len(re.findall(r"^\|", plain, re.M)) - len(page.tables)
    assert sum(map(len, page.tables)) == rows
    for table in page.tables:
        assert len(table) > 1 and len({len(row) for row in table}) == 1
    cells = "".join(cell for table in page.tables for row in table for cell in row)
    words = page.loose + cells
    words = words.replace(name, "") if name else words
    for raw in ("```", "**", "![", "](", "|", "&#", "&amp;", "##"):
        assert raw not in words, raw
    assert page.pictures == re.findall(r"!\[.*?\]\((.*?)\)", plain)
    assert all((path.parent / name).is_file() for name in page.pictures)
    headings = re.findall(r"^(#+) ", plain, re.M)
    for level in (1, 2):
        assert len(page.texts.get(f"h{level}", [])) == headings.count("#" * level)
    return page
