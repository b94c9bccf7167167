"""The code of the documentation runs, page by page, and its examples hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from facelt_ext import (
    aggregation,
    classification,
    clustering,
    clusters,
    evaluation,
    functional,
    losses,
    samplers,
)

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if "```python" in page.read_text()]
)
def test_code_of_a_page(name: str, seed: int) -> None:
    blocks = BLOCK.findall(PAGES[name].read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, block in enumerate(blocks):
            exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_every_loss_has_its_sections() -> None:
    pages = [page for name, page in PAGES.items() if name.startswith("losses/")]
    assert len(pages) == 6
    sections = [
        "Idea",
        "When to use it",
        "Hyper-parameters",
        "Equivalent to",
        "What public code gets wrong",
    ]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall("^## (.*)$", text, re.MULTILINE) == sections, page
        assert text.count("torch.testing.assert_close") >= 1


def test_the_site_builds_without_warnings_and_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    shown = {
        anchor.rpartition(".")[2]
        for page in (tmp_path / "api").glob("*.html")
        for anchor in re.findall(r'id="(facelt_ext\.[\w.]+)"', page.read_text(encoding="utf-8"))
    }
    rooms = [functional, losses, aggregation, classification, clustering, clusters, evaluation]
    rooms.append(samplers)
    for room in rooms:
        assert set(room.__all__) <= shown, room
