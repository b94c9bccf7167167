"""Pages of reports as HTML, which the examples' own tests check for all of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_cases import Image, page
from page_cases import check_page

NAMES = [
    "plain",
    "p1_0001.png",
    "_under_ _scores_",
    "*stars* **two**",
    "`code`",
    "a|b",
    "<b>bold</b> <script>",
    "&amp; &#42; A&B",
    "[link](elsewhere)",
    "![picture](none.png)",
    "# heading",
    "back\\slash\\*",
    "a - b + c. 1) d",
    "Umlaute äöü, 名前",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_itself_wherever_it_is(name: str, tmp_path: Path) -> None:
    text = page.literal(name)
    (tmp_path / "report.md").write_text(
        f"# Faces of {text}\n\nImages: {text}, {text}.\n\n- x {text}\n\n"
        f"| {text} | value |\n|---|---|\n| a | {text} |\n",
        encoding="utf-8",
    )
    found = check_page(page.write_html(tmp_path / "report.md"), name)
    assert found.texts["title"] == found.texts["h1"] == [f"Faces of {name}"]
    assert found.texts["p"] == [f"Images: {name}, {name}."]
    assert found.texts["li"] == [f"x {name}"]
    assert found.tables == [[[name, "value"], ["a", name]]]
    assert not found.pictures and "script" not in found.texts


def test_fenced_blocks_keep_their_lines(tmp_path: Path) -> None:
    lines = "group | images\n----- | ------\nhead  |     10 <&> **\n"
    (tmp_path / "report.md").write_text(f"# A\n\nText\n\n```\n{lines}```\n\nMore\n", "utf-8")
    found = check_page(page.write_html(tmp_path / "report.md"))
    assert found.texts["pre"] == [lines] and found.texts["p"] == ["Text", "More"]


@pytest.mark.parametrize(
    "broken",
    [
        "# A\n\nText\n```\nno | block\n```\n\n~~~\n```\n~~~\n",
        "# A\n\nText right before\n| a | b |\n|---|---|\n| c | d |\n",
        "# A\n\n![picture](missing.png)\n",
        "# A\n\n| a | b |\n|---|---|\n\n| c | d |\n",
        "# A\n\nleft **open\n",
    ],
)
def test_the_check_sees_what_is_wrong(broken: str, tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "there.png")
    good = "# A\n\nText\n\n| a | b |\n|---|---|\n| c | d |\n\n![picture](there.png)\n"
    (tmp_path / "report.md").write_text(good, "utf-8")
    check_page(page.write_html(tmp_path / "report.md"))
    (tmp_path / "report.md").write_text(broken, "utf-8")
    with pytest.raises(AssertionError):
        check_page(page.write_html(tmp_path / "report.md"))
