"""Files of BLUFR's trials that are damaged or hold something else: named, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from facelt_ext import evaluation


def cells(*values: object) -> np.ndarray:
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = [np.array(each, np.uint16) if isinstance(each, list) else each for each in values]
    return array


def content() -> dict[str, np.ndarray]:
    return {
        "imageList": cells("a.jpg", "b.jpg", "c.jpg"),
        "labels": np.array([[1.0], [1.0], [2.0]]),
        "testIndex": cells([[1], [2], [3]], [[2], [3]]),
        "galIndex": cells([[1]], [[2]]),
        "probIndex": cells([[2], [3]], [[3]]),
    }


@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_end_early(compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / "config.mat"
    savemat(path, content(), do_compression=compressed)
    whole = path.read_bytes()
    assert len(evaluation.read_blufr(path)[0]) == 3
    for size in range(0, len(whole), len(whole) // 200):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            evaluation.read_blufr(path)


@pytest.mark.parametrize(
    "other", [b"", b"not a file of MATLAB's at all", b"\x89HDF\r\n\x1a\n" * 40]
)
def test_other_files(other: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.mat"
    path.write_bytes(other)
    with pytest.raises(ValueError, match="expected MATLAB's file of the trials, got .*config.mat"):
        evaluation.read_blufr(path)
    with pytest.raises(OSError, match="none.mat"):
        evaluation.read_blufr(tmp_path / "none.mat")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("imageList", np.array([["a.jpg"], ["b.jpg"], ["c.jpg"]]), None),
        ("imageList", cells("a.jpg", [1], "c.jpg"), "imageList: expected a name in each cell"),
        ("imageList", np.eye(3), "imageList: expected a name in each cell"),
        ("imageList", cells("a.jpg", "b.jpg"), "labels: expected 2, one for each of imageList"),
        ("labels", np.array([1.0, 1.5, 2.0]), "labels: expected whole numbers, got 1.5"),
        ("labels", np.array([1.0, np.nan, 2.0]), "labels: expected whole numbers, got nan"),
        ("labels", np.array([1.0, 1e300, 2.0]), "labels: expected whole numbers, got 1e"),
        ("labels", cells("a", "b", "c"), "labels: expected numbers"),
        ("testIndex", cells([[1], [4]], [[1]]), r"testIndex\[0\]: .* \[1, 3\], .* got 4"),
        ("galIndex", cells([[1]], [[0]]), r"galIndex\[1\]: .* \[1, 3\], .* got 0"),
        ("galIndex", cells([[1]], "2"), r"galIndex\[1\]: expected numbers"),
        ("probIndex", cells([[1]]), "expected as many trials in .*, got 2, 2, 1"),
        ("probIndex", np.array([[1, 2]]), r"probIndex\[0\]: expected numbers"),
    ],
)
def test_wrong_variables(name: str, value: np.ndarray, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.mat"
    savemat(path, {**content(), name: value})
    if message is None:
        assert evaluation.read_blufr(path)[0] == ["a.jpg", "b.jpg", "c.jpg"]
        return
    with pytest.raises(ValueError, match=f"config.mat: {message}"):
        evaluation.read_blufr(path)
