"""What a scan of images keeps for the next start."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from training_cases import DataError, images, scans, write_faces


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_faces(tmp_path / "faces", {"p1": 3, "p2": 3})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The contents that were decoded."""
    seen, plain = [], scans.decode

    def decode(content: bytes, size: int) -> object:
        seen.append(content)
        return plain(content, size)

    monkeypatch.setattr(scans, "decode", decode)
    return seen


def scan(folder: Path, cache: Path) -> list[str]:
    """The names of the images that cannot be read."""
    faces = images.load_faces(folder, 16)
    kept, names = images.readable(faces.images, 16, cache, threads=1)
    assert len(kept) + len(names) == len(faces)
    return [Path(name).name for name in names]


def test_only_what_changed_is_decoded_again(folder: Path, opened: list[bytes]) -> None:
    cache, bad = folder.parent / "scan.json", folder / "p1" / "p1_0001.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    assert scan(folder, cache) == [bad.name] and len(opened) == 6
    # What cannot be read is tried at every start: the disk may have been at fault.
    opened.clear()
    assert scan(folder, cache) == [bad.name] and opened == [b"no image"]
    opened.clear()
    bad.write_bytes(whole)
    assert scan(folder, cache) == [] and opened == [whole]
    opened.clear()
    assert scan(folder, cache) == [] and opened == []
    other = folder / "p2" / "p2_0003.png"
    times = other.stat()
    other.write_bytes(b"\0" * times.st_size)  # another time, the same size
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert scan(folder, cache) == [other.name] and len(opened) == 1
    other.write_bytes(whole)
    assert scan(folder, cache) == []
    opened.clear()
    times = other.stat()
    other.write_bytes(whole + b"\0")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))  # another size, the same time
    (folder / "p2" / "new.png").write_bytes(whole)
    assert scan(folder, cache) == [] and len(opened) == 2


def test_a_folder_that_is_moved_keeps_its_scan(folder: Path, opened: list[bytes]) -> None:
    cache = folder.parent / "scan.json"
    scan(folder, cache)
    opened.clear()
    folder.rename(folder.parent / "moved")
    assert scan(folder.parent / "moved", cache) == [] and opened == []


def test_the_other_processes_take_over_what_the_first_one_found(
    folder: Path,
    opened: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    cache, bad = folder.parent / "scan.json", folder / "p1" / "p1_0001.png"
    bad.write_bytes(b"no image")
    monkeypatch.setenv("RANK", "0")
    assert scan(folder, cache) == [bad.name]
    assert "cannot read" in capsys.readouterr().out
    content = cache.read_bytes()
    opened.clear()
    monkeypatch.setenv("RANK", "1")
    assert scan(folder, cache) == [bad.name] and opened == []
    assert cache.read_bytes() == content and "cannot read" not in capsys.readouterr().out


DAMAGED = {
    "nothing": b"",
    "zeros": bytes(100),
    "cut": None,
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "a number": b"5",
    "null": b"null",
    "nested": b"[" * 100_000,
    "of before": b'{"images": "0", "unreadable": [0], "names": ["x"]}',
    "of later": b'{"format": 99, "readable": [], "unreadable": {}}',
    "other kinds": b'{"format": 2, "readable": [1], "unreadable": {}}',
    "other kinds of values": b'{"format": 2, "readable": [], "unreadable": {"a": 1}}',
    "no map": b'{"format": 2, "readable": [], "unreadable": ["a"]}',
    "a giant number": b'{"format": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_scan_is_made_anew(
    content: bytes | None, folder: Path, opened: list[bytes], capsys: pytest.CaptureFixture
) -> None:
    cache = folder.parent / "scans" / "scan.json"
    scan(folder, cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2] if content is None else content)
    opened.clear()
    assert scan(folder, cache) == [] and len(opened) == 6
    assert "scan.json is damaged or of another version" in capsys.readouterr().out
    assert json.loads(cache.read_bytes()) == json.loads(whole)


def test_a_scan_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "file").write_text("in the way")
    with pytest.raises(DataError, match="file: File exists"):
        scan(folder, folder.parent / "file" / "scan.json")
    (folder.parent / "scan.json").mkdir()
    with pytest.raises(DataError, match="scan.json: Is a directory"):
        scan(folder, folder.parent / "scan.json")
    (folder.parent / "scan.json").rmdir()
    assert not list(folder.parent.glob("*.new"))


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_loses_nothing(
    step: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = folder.parent / "scan.json"
    scan(folder, cache)
    before = cache.read_bytes()
    (folder / "p1" / "p1_0001.png").write_bytes(b"no image")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        plain(path, content[: len(content) // 2])
        full()

    with monkeypatch.context() as patched:
        if step == "write":
            patched.setattr(Path, "write_bytes", half)
        else:
            patched.setattr(os, "replace", full)
        with pytest.raises(DataError, match="scan.json: No space left"):
            scan(folder, cache)
    assert cache.read_bytes() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["faces", "scan.json"]
    assert scan(folder, cache) == ["p1_0001.png"]
