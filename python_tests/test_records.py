"""RecordIO sets of which a record, or a line of the index, is damaged."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_cases import DataError, images, recordio

MAGIC = 0xCED7230A
NUMBER, COUNT = 5, 9
Index = dict[int, int]


def record(number: int, labels: float | list[float], content: bytes) -> bytes:
    given = labels if isinstance(labels, list) else []
    head = struct.pack("<IfQQ", len(given), 0.0 if given else labels, number, 0)
    body = head + struct.pack(f"<{len(given)}f", *given) + content
    return struct.pack("<II", MAGIC, len(body)) + body + bytes(-len(body) % 4)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(file, "bmp")
    return file.getvalue()


def write(folder: Path, header: bool) -> tuple[Path, Index]:
    """Images 1 to 9 of identities 0 to 2; with a header and the identities' records behind them."""
    records = {n: record(n, (n - 1) // 3, picture(n)) for n in range(1, COUNT + 1)}
    if header:
        behind = {10 + k: record(10 + k, [3 * k + 1.0, 3 * k + 4.0], b"") for k in range(3)}
        records = {0: record(0, [COUNT + 1.0, 13.0], b"")} | records | behind
    index, position = {}, 0
    for number, each in records.items():
        index[number] = position
        position += len(each)
    (folder / "train.rec").write_bytes(b"".join(records.values()))
    write_index(folder, [f"{number}\t{at}" for number, at in index.items()])
    return folder / "train.rec", index


def write_index(folder: Path, lines: list[str]) -> None:
    (folder / "train.idx").write_text("\n".join(lines) + "\n")


def read(path: Path) -> tuple[list[int], list[int], list[str]]:
    """The numbers of the readable images as their pixels tell them, labels, names of the others."""
    faces = images.load_faces(path, 8)
    kept, names = images.readable(faces.images, 8, path.parent / "scan.json", threads=1)
    skipped = faces.left_out + names
    faces = faces.keep(kept)
    numbers = [int(faces[item][0][0, 0, 0]) // 20 for item in range(len(faces))]
    labels = [int(faces.names[label]) for label in faces.labels.tolist()]
    return numbers, labels, skipped


ALL = list(range(1, COUNT + 1))
OTHERS = [number for number in ALL if number != NUMBER]

Damage = Callable[[bytearray, int], bytearray]


def at(place: int, content: bytes) -> Damage:
    """Writes into the damaged record."""

    def damage(data: bytearray, start: int) -> bytearray:
        data[start + place : start + place + len(content)] = content
        return data

    return damage


DAMAGE: dict[str, Damage] = {
    "the magic number": at(0, bytes(4)),
    "a length beyond the file": at(4, struct.pack("<I", (1 << 29) - 1)),
    "a length of nothing": at(4, bytes(4)),
    "a part that begins in the middle": at(4, struct.pack("<I", 2 << 29 | 40)),
    "a part without an end": at(4, struct.pack("<I", 1 << 29 | 40)),
    "more labels than bytes": at(8, struct.pack("<I", 2**31)),
    "a label that is no number": at(12, struct.pack("<f", float("nan"))),
    "an infinite label": at(12, struct.pack("<f", float("inf"))),
    "pixels": at(8 + 24, bytes(60)),
}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_leaves_out_itself_alone(
    name: str, header: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, index = write(tmp_path, header)
    assert read(path)[0] == ALL
    path.write_bytes(DAMAGE[name](bytearray(path.read_bytes()), index[NUMBER]))
    numbers, labels, skipped = read(path)
    assert numbers == OTHERS and labels == [(number - 1) // 3 for number in OTHERS]
    assert skipped == [f"{path}, record {NUMBER}"]
    assert capsys.readouterr().out.count(f"cannot read {path}, record {NUMBER}: ") == 1


@pytest.mark.parametrize("header", [True, False])
def test_a_file_that_is_cut(header: bool, tmp_path: Path) -> None:
    path, index = write(tmp_path, header)
    for end in (index[COUNT] + 100, index[COUNT] + 30, index[COUNT] + 4, index[COUNT]):
        path.write_bytes(path.read_bytes()[:end])
        numbers, _, skipped = read(path)
        assert numbers == ALL[:-1] and skipped == [f"{path}, record {COUNT}"]


OFFSETS = ["18446744073709551615", "-1", "-8", str(10**15), "9" * 5000, "abc", "", "1.5", "1 2"]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("offset", OFFSETS, ids=lambda offset: offset[:20] or "nothing")
def test_a_wrong_offset_leaves_out_its_record_alone(
    offset: str, header: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, index = write(tmp_path, header)
    write_index(tmp_path, [f"{n}\t{offset if n == NUMBER else i}" for n, i in index.items()])
    numbers, labels, skipped = read(path)
    assert numbers == OTHERS and labels == [(number - 1) // 3 for number in OTHERS]
    assert skipped == [f"{path}, record {NUMBER}"]
    printed = capsys.readouterr().out
    assert f"cannot read {path}, record {NUMBER}: " in printed and "has no offset" in printed


@pytest.mark.parametrize("number", ["abc", "\ufeff5", "5.0", "½"])
def test_a_line_without_a_number_is_named(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, index = write(tmp_path, True)
    lines = [f"{number if n == NUMBER else n}\t{offset}" for n, offset in index.items()]
    write_index(tmp_path, lines)
    assert read(path)[0] == OTHERS
    printed = capsys.readouterr().out
    assert "1 line(s) have no number" in printed
    assert "record 0 tells of 9 images, the index has 8" in printed


@pytest.mark.parametrize("content", [b"", b"\n\n", b"one two\n", b"\xff\xfe\x00", b"1\t-1\n2\n"])
def test_an_index_of_nothing(content: bytes, tmp_path: Path) -> None:
    path, _ = write(tmp_path, False)
    (tmp_path / "train.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"train.idx(: expected lines| is missing or empty)"):
        recordio.RecordFile(path)


@pytest.mark.parametrize("lines", ["\n", "\r\n", "\n\n", " \n"])
def test_lines_of_an_index(lines: str, tmp_path: Path) -> None:
    path, index = write(tmp_path, True)
    text = lines.join(f"{number}\t{offset}" for number, offset in reversed(index.items()))
    (tmp_path / "train.idx").write_text(text, newline="")
    assert read(path)[0] == ALL


HEADERS: dict[str, Damage] = {
    "the magic number": at(0, bytes(4)),
    "too few labels": at(8, struct.pack("<I", 9)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_leaves_the_images_in(name: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path, True)
    path.write_bytes(HEADERS[name](bytearray(path.read_bytes()), 0))
    numbers, _, skipped = read(path)
    assert numbers == ALL and skipped == [f"{path}, record 0"]


@pytest.mark.parametrize("last", [1e30, float("inf"), 20.0, float("nan"), 0.0, -5.0, 9.5])
def test_a_header_of_another_number_of_images(
    last: float, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, _ = write(tmp_path, True)
    path.write_bytes(at(8 + 24, struct.pack("<f", last))(bytearray(path.read_bytes()), 0))
    assert read(path)[::2] == (ALL, [])
    assert "record 0 tells of" in capsys.readouterr().out


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write(tmp_path, True)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recordio.np, "memmap", refused)
    with pytest.raises(DataError, match="train.rec cannot be read: Permission denied"):
        images.load_faces(path, 8)


def test_the_fingerprint_of_records(tmp_path: Path) -> None:
    path, index = write(tmp_path, False)
    before = images.load_faces(path, 8).fingerprint()
    other = bytearray(path.read_bytes())
    path.write_bytes(at(12, struct.pack("<f", 2.0))(other, index[1]))
    assert images.load_faces(path, 8).fingerprint() != before
    path.write_bytes(at(12, struct.pack("<f", 0.0))(other, index[1]))
    assert images.load_faces(path, 8).fingerprint() == before
    assert torch.equal(images.load_faces(path, 8).labels, torch.arange(9) // 3)
