"""The table and the picture of super classes."""

from __future__ import annotations

import sys

import matplotlib.figure
import pytest
import torch

from facelt_ext.aggregation import SuperClasses


def example(with_counts: bool = True) -> SuperClasses:
    """Super classes {1, 5} and {2} of tail group 1 and {3} of tail group 3; group 2 is empty."""
    return SuperClasses(
        torch.tensor([4, 0]),
        torch.tensor([1, 2, 3, 5]),
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([30, 5, 6, 2, 1200, 7]) if with_counts else None,
        torch.tensor([0, 0, 2]),
    )


def cells(summary: str) -> list[list[str]]:
    """Columns are two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in summary.splitlines()]


def test_the_table_says_what_was_put_together():
    titles = ["group", "classes", "%", "super classes", "images", "%", "images per class"]
    assert cells(example().summary()) == [
        [*titles, "images per super class"],
        ["head", "2", "33.3", "-", "1,230", "98.4", "615.0 [30, 1200]", "-"],
        ["tail 1", "3", "50.0", "2", "18", "1.4", "6.0 [5, 7]", "9.0 [6, 12]"],
        ["tail 3", "1", "16.7", "1", "2", "0.2", "2.0 [2, 2]", "2.0 [2, 2]"],
        ["total", "6", "100.0", "3", "1,250", "100.0", "208.3 [2, 1200]", "6.7 [2, 12]"],
    ]


def test_the_columns_of_the_table_are_aligned():
    assert len({len(line) for line in example().summary().splitlines()}) == 1


def test_without_counts_the_table_has_no_images():
    assert cells(example(with_counts=False).summary()) == [
        ["group", "classes", "%", "super classes"],
        ["head", "2", "33.3", "-"],
        ["tail 1", "3", "50.0", "2"],
        ["tail 3", "1", "16.7", "1"],
        ["total", "6", "100.0", "3"],
    ]


def test_a_table_without_tail_or_without_head():
    none, some = torch.empty(0, dtype=torch.int64), torch.tensor([0, 1])
    head_only = cells(SuperClasses(some, none, none, some + 1).summary())
    assert [line[0] for line in head_only] == ["group", "head", "total"]
    assert head_only[-1][3:] == ["0", "3", "100.0", "1.5 [1, 2]", "-"]
    tail_only = cells(SuperClasses(none, some, some, some + 1).summary())
    assert [line[0] for line in tail_only] == ["group", "tail 1", "total"]


def bars(axes) -> list[list[int]]:
    return [[round(bar.get_height()) for bar in container] for container in axes.containers]


def test_the_picture_has_a_bar_for_each_doubling_before_and_after():
    axes = example().plot_sizes()
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names[:4] == ["1", "2–3", "4–7", "8–15"]
    assert names[10] == "1024–2047"
    # Before: 2; 5, 6, 7; 30; 1200. After: 2; 6; 12; 30; 1200.
    assert bars(axes) == [[0, 1, 3, 0, 1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["before aggregation: 6 classes", "after: 5 classes"]


def test_the_picture_goes_into_given_axes_and_into_a_file(tmp_path):
    given = matplotlib.figure.Figure().subplots()
    assert example().plot_sizes(given) is given
    assert len(bars(given)) == 2
    example().plot_sizes().figure.savefig(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 1000


def test_a_picture_of_a_head_alone():
    none = torch.empty(0, dtype=torch.int64)
    axes = SuperClasses(torch.arange(2), none, none, torch.tensor([1, 4])).plot_sizes()
    assert bars(axes) == [[1, 0, 1], [1, 0, 1]]


def test_a_picture_needs_counts_and_matplotlib(monkeypatch):
    with pytest.raises(ValueError, match="counts: expected the images of each class .* got None"):
        example(with_counts=False).plot_sizes()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib; pip install matplotlib"):
        example().plot_sizes()
