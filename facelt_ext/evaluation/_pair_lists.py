"""Which form a list of pairs has, and what its lines say."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# Of a number, so that it is one of 64 bits.
MOST_DIGITS = 18
# Of a line that an error shows.
MOST_SHOWN = 100


class Pair(NamedTuple):
    first: str
    second: str
    same: bool
    fold: int | None = None


class _Line(NamedTuple):
    """A line that is not empty, and its number, from 1 on."""

    number: int
    text: str


class _OtherFormError(Exception):
    """The row at this position has another form."""

    def __init__(self, position: int) -> None:
        self.position = position


class _Form(NamedTuple):
    """How messages tell a form, and what reads all its rows or raises `_OtherFormError`."""

    wanted: str
    read: Callable[[Sequence[list[str]], str], list[Pair]]


def read_list(path: Path, extension: str) -> tuple[list[int], list[Pair]]:
    """The numbers of the first line of LFW's lists, and the pairs in whichever form all lines have.

    Raises:
        OSError, ValueError: as of `read_pairs`.
    """
    lines = _lines(path)
    header = _header(lines[0].text) if lines else []
    if len(lines) == bool(header):
        raise ValueError(f"{path}: expected at least one pair, got none")
    # Of the forms that fail, the one that does so last is meant.
    reached, wanted = -1, ""
    for split in (_by_tabs, _by_commas, _by_blanks):
        rows = [split(line.text) for line in lines]
        for form in _FORMS:
            start = bool(header) and form is _LFW
            start += len(rows) > start + 1 and _is_titles(rows[start])
            try:
                return header if form is _LFW else [], form.read(rows[start:], extension)
            except _OtherFormError as error:
                if start + error.position > reached:
                    reached = start + error.position
                    meant = [form] if error.position or header else _FORMS
                    wanted = " or ".join(each.wanted for each in meant)
    number, text = lines[reached]
    shown = text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."
    raise ValueError(f"{path}, line {number}: expected {wanted}, got {shown!r}")


def _lines(path: Path) -> list[_Line]:
    content = path.read_bytes()
    try:
        # Editors of Windows begin files with a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"path: expected a text file in UTF-8, got {path}, line {number}: {error}"
        ) from error
    lines = [_Line(*each) for each in enumerate(re.split(r"\r\n|\r|\n", text), 1)]
    for line in lines:
        if "\0" in line.text:
            raise ValueError(
                f"path: expected a text file in UTF-8, got a NUL character in {path}, "
                f"line {line.number}"
            )
    return [line for line in lines if line.text.strip()]


def _by_tabs(line: str) -> list[str]:
    return _trimmed(line.split("\t"))


def _by_commas(line: str) -> list[str]:
    try:
        return _trimmed(next(csv.reader([line], skipinitialspace=True)))
    except csv.Error:
        return []


def _by_blanks(line: str) -> list[str]:
    return line.split()


def _trimmed(fields: list[str]) -> list[str]:
    """Without the blanks around them, and without empty last columns."""
    fields = [field.strip() for field in fields]
    while fields and not fields[-1]:
        fields.pop()
    return fields


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdecimal() and len(field) <= MOST_DIGITS


def _header(line: str) -> list[int]:
    """Its numbers, if they are at most two and all there is."""
    fields = re.split(r"[\s,]+", line.strip(" \t,"))
    return (
        [int(each) for each in fields] if len(fields) <= 2 and all(map(_is_number, fields)) else []
    )


def _is_titles(fields: list[str]) -> bool:
    """Names of columns: words that are neither numbers nor files."""
    return len(fields) > 1 and not any(
        _is_number(each) or set("./\\") & set(each) for each in fields
    )


def _read_lfw(rows: Sequence[list[str]], extension: str) -> list[Pair]:
    def image(name: str, number: str) -> str:
        return f"{name}/{name}_{int(number):04d}{extension}"

    def pair(fields: list[str]) -> Pair | None:
        if len(fields) not in (3, 4) or not all(fields):
            return None
        if not (_is_number(fields[1]) and _is_number(fields[-1])):
            return None
        name, number, *other = fields[:-1]
        return Pair(image(name, number), image(*(other or [name]), fields[-1]), not other)

    return _each(rows, pair)


def _read_plain(rows: Sequence[list[str]], extension: str) -> list[Pair]:
    def pair(fields: list[str]) -> Pair | None:
        if len(fields) != 3 or not all(fields) or fields[2] not in ("0", "1"):
            return None
        return Pair(fields[0], fields[1], fields[2] == "1")

    pairs = _each(rows, pair)
    _check_kinds(pairs)
    return pairs


def _read_ytf(rows: Sequence[list[str]], extension: str) -> list[Pair]:
    def pair(fields: list[str]) -> Pair | None:
        if len(fields) < 4 or not all(fields[:4]) or fields[3] not in ("0", "1"):
            return None
        if not _is_number(fields[0]):
            return None
        return Pair(fields[1], fields[2], fields[3] == "1", int(fields[0]))

    pairs = _each(rows, pair)
    _check_kinds(pairs)
    return pairs


def _check_kinds(pairs: Sequence[Pair]) -> None:
    """Where all names are numbers, only pairs of both kinds tell these lists from LFW's."""
    if all(_is_number(pair.second) for pair in pairs) and len({pair.same for pair in pairs}) == 1:
        raise _OtherFormError(0)


def _read_two_lines(rows: Sequence[list[str]], extension: str) -> list[Pair]:
    def checked(fields: list[str]) -> list[str] | None:
        return fields if len(fields) == 2 and all(fields) and _is_number(fields[1]) else None

    rows = _each(rows, checked)
    pairs = []
    for position in range(0, len(rows), 2):
        first, *others = rows[position : position + 2]
        if not others or int(first[1]) != int(others[0][1]):
            raise _OtherFormError(position + len(others))
        pairs.append(Pair(first[0], others[0][0], int(first[1]) > 0))
    return pairs


def _each(rows: Sequence[list[str]], read: Callable[[list[str]], T | None]) -> list[T]:
    """What each row is read as; None is for another form."""
    found = []
    for position, fields in enumerate(rows):
        found.append(read(fields))
        if found[-1] is None:
            raise _OtherFormError(position)
    return found


_LFW = _Form("'name i j' or 'name i other j'", _read_lfw)
_FORMS = (
    _Form("'image image 0|1'", _read_plain),
    _Form("'fold, video, video, 0|1' (a fold in each line or in none)", _read_ytf),
    _LFW,
    _Form("'image number' in two lines with the same number for each pair", _read_two_lines),
)
