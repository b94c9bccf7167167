"""Lists of pairs: in every form, between all separators, with every kind of name."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from facelt_ext import evaluation

NAMES = {
    "words": ["Ann_Lee", "Bo", "Cy_de_la_Cruz", "O'Neil"],
    "numbers": ["17", "4", "230", "1"],
    "numbers with zeros": ["0000045", "0000099", "01", "001"],
    "many digits": ["9" * 30, "8" * 30, "7" * 30, "6" * 30],
    "other alphabets": ["Łukasz", "美智子", "é", "١٢"],
    "blanks": ["John Smith", "Mary Ann", "X 1", "2 Y"],
    "commas": ["Davis,_Jr", "Lee,_Ann", "a,b", ",c"],
    "some commas": ["Davis,_Jr", "Bo", "a,b", "Cy"],
    "dots": ["a.b", "c.jpg", "St._John", "..."],
    "quotes": ['"Bo"', 'An"n', "'Cy'", "Di"],
}
SEPARATORS = {"tabs": "\t", "commas": ",", "commas, blanks": ", ", "blanks": " ", "more": "   "}
LINE_ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r"}


class Written(NamedTuple):
    """Rows of fields, and what they say: first, second, same; the fold of each, or None."""

    rows: list[list[str]]
    pairs: list[tuple[str, str, bool]]
    folds: list[int] | None = None
    titles: tuple[str, ...] = ()
    header: str = ""


def image(name: str, number: int) -> str:
    return f"{name}/{name}_{number:04d}.jpg"


def lfw(names: list[str], header: str = "") -> Written:
    rows, pairs = [], []
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        rows += [[one, "1", "12"], [one, "3", other, "1234"]]
        pairs += [(image(one, 1), image(one, 12), True), (image(one, 3), image(other, 1234), False)]
    titles = ("name", "imagenum1", "imagenum2", "") if not header else ()
    return Written(rows, pairs, titles=titles, header=header)


def lfw_in_folds(names: list[str]) -> Written:
    return lfw(names, "2\t2")._replace(folds=[0, 0, 0, 0, 1, 1, 1, 1])


def plain(names: list[str]) -> Written:
    pairs = [(a, b, a < b) for a, b in itertools.permutations(names, 2)]
    rows = [[a, b, str(int(same))] for a, b, same in pairs]
    return Written(rows, pairs, titles=("first", "second", "same"))


def ytf(names: list[str]) -> Written:
    pairs = plain(names).pairs
    folds = [3 * (number // 4) for number in range(len(pairs))]
    rows = [
        [str(fold), a, b, str(int(same))] for fold, (a, b, same) in zip(folds, pairs, strict=True)
    ]
    titles = ("split number", "first name", "second name", "is same")
    return Written(rows, pairs, [fold // 3 for fold in folds], titles)


def two_lines(names: list[str]) -> Written:
    pairs = sorted(plain(names).pairs, key=lambda pair: not pair[2])
    numbers = [1 + place if same else 0 for place, (_, _, same) in enumerate(pairs)]
    rows = [
        [each, str(number)]
        for number, pair in zip(numbers, pairs, strict=True)
        for each in pair[:2]
    ]
    return Written(rows, pairs, titles=("image", "number"))


FORMS: dict[str, Callable[[list[str]], Written]] = {
    "LFW": lfw,
    "LFW in folds": lfw_in_folds,
    "LFW, first view": lambda names: lfw(names, "4"),
    "plain": plain,
    "YTF": ytf,
    "CALFW": two_lines,
}


def _joined(fields: tuple[str, ...] | list[str], separator: str) -> str:
    if not separator.startswith(","):
        return separator.join(fields)
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(fields)
    # Names with blanks are written as they are, those with commas or quotes between quotes.
    return out.getvalue() if separator == "," else ", ".join(next(csv.reader([out.getvalue()])))


def _fits(names: list[str], separator: str) -> bool:
    """Whether a list of these names can be told between these separators."""
    if separator == ", ":
        return not any(set(',"') & set(name) for name in names)
    return separator in (",", "\t") or not any(" " in name for name in names)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_it_reads_what_was_written(form: str, names: str, tmp_path: Path) -> None:
    written = FORMS[form](NAMES[names])
    path = tmp_path / "pairs.txt"
    read = 0
    for separator, end, mark, titles, untidy in itertools.product(
        SEPARATORS.values(), LINE_ENDS.values(), ("", "\ufeff"), (False, True), (False, True)
    ):
        if not _fits(NAMES[names], separator):
            continue
        lines = [_joined(row, separator) for row in written.rows]
        if titles and written.titles and not (separator.isspace() and separator != "\t"):
            lines.insert(0, _joined(written.titles, separator))
        if written.header:
            lines.insert(0, written.header)
        if untidy:
            # Blanks and an empty last column at the ends, and empty lines.
            tail = separator if separator in (",", "\t") else "  "
            lines = [each for line in lines for each in (line + tail + " ", "", " \t")]
        path.write_bytes((mark + end.join(lines) + end).encode())
        found = evaluation.read_pairs(path)
        assert list(zip(found.first, found.second, found.same.tolist(), strict=True)) == (
            written.pairs
        ), (separator, end, mark, titles, untidy)
        assert (None if found.folds is None else found.folds.tolist()) == written.folds
        read += 1
    assert read >= 24


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("separator", ["tabs", "commas", "blanks"])
def test_each_wrong_line_is_named(form: str, separator: str, tmp_path: Path) -> None:
    written = FORMS[form](NAMES["words"])
    path = tmp_path / "some pairs.txt"
    between = SEPARATORS[separator]
    lines = [_joined(row, between) for row in written.rows]
    before = [written.header] if written.header else []
    for place in range(1, len(lines)):
        for wrong in ("one", _joined(["one", "two", "x"], between), lines[place] + between + "y"):
            if form == "YTF" and wrong.endswith("y"):
                continue  # Further columns are allowed.
            text = "\n".join([*before, *lines[:place], wrong, *lines[place + 1 :]])
            path.write_text(text)
            with pytest.raises(ValueError) as error:
                evaluation.read_pairs(path)
            message = str(error.value)
            assert f"some pairs.txt, line {len(before) + place + 1}: expected" in message
            assert repr(wrong) in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected at least one pair"),
        (b"\xef\xbb\xbf\n \n", "expected at least one pair"),
        (b"10\t300\n", "expected at least one pair"),
        (b"2 1\nAnn 1 2\nAnn 1 Bo 1\n", "2 folds of 2 x 1 pairs, as its first line says, got 2"),
        (b"Ann 1 2\nAnn 1 Bo one\n", "line 2: expected 'name i j' or 'name i other j', got"),
        (b"a.jpg b.jpg 2\n", "line 1: expected 'image image"),
        (b"1,a,b,1\na b 0\n", "line 2: .* .a fold in each line or in none."),
        (b"a.jpg 1\nb.jpg 1\nc.jpg 0\n", "line 3: expected 'image number' in two lines"),
        (b"a.jpg 1\nb.jpg 0\n", "line 2: expected 'image number' in two lines"),
        (b"a b c d e f\n", "line 1: expected 'image image 0.1' or 'fold"),
        (b"Ann 1 2\nJos\xe9 1 2\n", "UTF-8, got .*pairs.txt, line 2: "),
        ("Ann\t1\t2\n".encode("utf-16"), "UTF-8, got .*pairs.txt, line 1: "),
        ("Ann\t1\t2\n".encode("utf-16-le"), "NUL character in .*pairs.txt, line 1"),
        (b"Ann 1 " + b"9" * 5000 + b"\n", "line 1: expected"),
        (b"Ann 1 2\n" + b"x" * 200_000 + b"\n", r"line 2: expected 'name i j'.*x\.\.\.'$"),
        ("Ann 1 ²\n".encode(), "line 1: expected"),
        (b"9" * 5000 + b"\n", "line 1: expected"),
    ],
)
def test_wrong_lists(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluation.read_pairs(path)


def test_the_form_is_that_of_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    # By its first line, each might be another form.
    path.write_text("5 1 1\n5 1 7 2\n")
    assert evaluation.read_pairs(path).first == ["5/5_0001.jpg"] * 2
    path.write_text("5 1 1\n5 7 0\n")
    assert evaluation.read_pairs(path).second == ["1", "7"]
    path.write_text("1 2 3 1\n1 5 6 0\n")
    assert evaluation.read_pairs(path).folds.tolist() == [0, 0]
    path.write_text("1 2 3 1\n1 5 6 4\n")
    assert evaluation.read_pairs(path).first == ["1/1_0002.jpg", "1/1_0005.jpg"]
    path.write_text("17 1\n18 1\n17 0\n19 0\n")
    assert evaluation.read_pairs(path).second == ["18", "19"]


@pytest.mark.parametrize("extension", [".png", ".JPG", ".tar.gz", "", ".j pg"])
def test_other_extensions(extension: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("1\nAnn 1 2\nAnn 1 Bo 1\n")
    pairs = evaluation.read_pairs(path, extension=extension)
    assert pairs.first == [f"Ann/Ann_0001{extension}"] * 2 and pairs.folds is None


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("Ann 1 2\n")
    with pytest.raises(ValueError, match="extension: expected it to begin with a dot, got 'png'"):
        evaluation.read_pairs(path, "png")
    with pytest.raises(TypeError, match="extension: expected a str, got NoneType"):
        evaluation.read_pairs(path, None)
    with pytest.raises(OSError, match="no such file"):
        evaluation.read_pairs(tmp_path / "no such file")
