"""Names of images and identities as file systems allow them, and what lies beside them."""

from __future__ import annotations

import html
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from training_cases import SMALL, DataError, demo_data, folders, images, train_faces, write_faces

NAMES = [
    "1", "01", "001", "1a", "01a", "2", "10", "a", "A", "a1", "a01", "b", "\u00e9", "e\u0301",
    "٣", "3", "①", "²", "x2²", "½", "10²", "", " ", "a b", "-1", "1.5", "1.05",
    os.fsdecode(b"Jos\xe9"), os.fsdecode(b"\xff1"), "line\nend",
    "９", "9", "一", "ß", "SS", "ss", "_", "__x__", "a" * 200,
]  # fmt: skip
# What a file system may hold and messages, pages and lists may not.
ODD = [
    os.fsdecode(b"Jos\xe9"), os.fsdecode(b"\xff\xfe"), "①", "x2²", "line\nend", "tab\there", "½",
    "\u202eturned", "a|b", "<b>", "\x1b[31m", "٣",
]  # fmt: skip


def test_the_order_of_names_is_total() -> None:
    paths = [Path("folder") / name for name in NAMES if name]
    keys = [folders.natural_order(path) for path in paths]
    assert all(keys.count(key) == 1 for key in keys)
    wanted = sorted(paths, key=folders.natural_order)
    for seed in range(20):
        random.Random(seed).shuffle(paths)
        assert sorted(paths, key=folders.natural_order) == wanted


def test_numbers_count() -> None:
    names = ["s10", "s2", "s1", "t1", "s02", "10", "9"]
    ordered = sorted(map(Path, names), key=folders.natural_order)
    assert [path.name for path in ordered] == ["9", "10", "s1", "s02", "s2", "s10", "t1"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_is_text(name: str) -> None:
    shown = folders.printable(name)
    assert shown.encode("utf-8").decode("utf-8") == shown and shown.isprintable()
    if name.isprintable():
        assert shown == name


@pytest.mark.parametrize("listed", [1, -1])
def test_both_examples_number_identities_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: int
) -> None:
    """In whatever order a disk lists them."""
    names = [name for name in NAMES if name not in ("", " ")]
    write_faces(tmp_path, dict.fromkeys(names, 1))
    plain = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(plain(path), reverse=listed < 0)))
    wanted = [
        folders.printable(path.name) for path in sorted(map(Path, names), key=folders.natural_order)
    ]
    assert images.load_faces(tmp_path, 16).names == wanted
    assert demo_data.read_folder(tmp_path).names == wanted


def test_a_training_on_odd_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_faces(
        tmp_path / os.fsdecode(b"fac\xe9s"), {f"{name} {i}": 3 for i, name in enumerate(ODD)}
    )
    for number, name in enumerate(ODD):
        (folder / f"{name} {number}" / f"{name}.png").write_bytes(b"no image")
    output = tmp_path / "run"
    chosen = ["--recipe", "softmax", "--set", "batch_size=8", "--epochs", "1", *SMALL]
    chosen += ["--data", str(folder), "--output", str(output)]
    train_faces.main(chosen)
    printed = capsys.readouterr().out
    assert f"{len(ODD)} unreadable image(s) left out" in printed
    page = html.unescape((output / "report.md").read_text(encoding="utf-8"))
    for name in ODD:
        assert f"{folders.printable(name)}.png" in printed
        assert f"{folders.printable(name)}.png" in page
    json.loads((output / "scans" / "training.json").read_text(encoding="utf-8"))
    train_faces.main([*chosen, "--resume"])


def test_an_output_that_tensorboard_cannot_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_faces.main(["--output", str(tmp_path / os.fsdecode(b"\xe9")), *SMALL])
    assert "--output must be a path in UTF-8" in capsys.readouterr().err


def test_odd_names_of_evaluation_sets(tmp_path: Path) -> None:
    folder = write_faces(tmp_path / os.fsdecode(b"t\xe9st"), {f"p{i}": 3 for i in range(6)})
    (found,) = train_faces.read_sets([str(folder)], 16, tmp_path / "scans", 1)
    assert found.name == "t\\udce9st" and len(found.faces) == 18


def test_an_output_of_few_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "output").open("w", encoding="ascii") as file:
        monkeypatch.setattr("sys.stdout", file)
        folders.any_output()
        folders.say("cannot read é①")
    assert (tmp_path / "output").read_bytes() == b"cannot read \\xe9\\u2460\n"


def lay_out(folder: Path) -> None:
    """Six identities with two images each, and all that may lie beside them."""
    write_faces(folder, {f"p{i}": 2 for i in range(6)})
    (folder / "p0" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "p6").symlink_to(folder / "nobody")
    (folder / "p7").symlink_to(folder / "p1")
    (folder / "p2" / "more").mkdir()
    shutil.copy(folder / "p2" / "p2_0001.png", folder / "p2" / "more" / "x.png")
    os.mkfifo(folder / "p3" / "pipe.png")
    (folder / "p4" / "loop.png").symlink_to(folder / "p4" / "loop.png")
    (folder / "p4" / "linked.png").symlink_to(folder / "p5" / "p5_0001.png")
    (folder / "readme.txt").write_text("about")
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        (folder / name / "._p0.png").write_bytes(b"no image")
    (folder / "p5" / ".DS_Store").write_bytes(b"no image")


NAMED = {
    "p6": "1 link(s) that lead nowhere: p6",
    "p7": "1 link(s) to the folder of another identity: p7",
    "more": "1 folder(s) in an identity's folder, whose images are not read: p2/more",
    "pipe": "1 thing(s) that are neither files nor folders: p3/pipe.png",
    "readme": "1 file(s) beside the identities' folders: readme.txt",
    "hidden": "4 hidden file(s) or folder(s) of the system: .ipynb_checkpoints, @eaDir, "
    "__MACOSX, p5/.DS_Store",
}


@pytest.mark.parametrize("example", ["training", "demo"])
def test_what_is_ignored_is_named_and_counted(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lay_out(tmp_path / "faces")
    names = [f"p{i}" for i in range(6)]
    if example == "training":
        faces = images.load_faces(tmp_path / "faces", 16)
        kept, skipped = images.readable(faces.images, 16, tmp_path / "scan.json", threads=1)
        assert faces.names == names and len(kept) == 13
        assert [Path(each).name for each in skipped] == ["gone.png", "loop.png"]
    else:
        found = demo_data.read_folder(tmp_path / "faces")
        assert found.names == names and len(found.images) == 13
        assert found.skipped == ["p0/gone.png", "p4/loop.png"]
    printed = capsys.readouterr().out
    for line in NAMED.values():
        assert f"ignored {line}\n" in printed
    assert printed.count("cannot read") == 2


def test_many_ignored_things_make_few_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_faces(tmp_path, {"p": 1})
    for number in range(50):
        (tmp_path / "p" / f".{number}").touch()
    images.load_faces(tmp_path, 16)
    printed = capsys.readouterr().out
    assert "ignored 50 hidden" in printed and "and 30 more\n" in printed


def test_folders_that_are_no_identities(tmp_path: Path) -> None:
    write_faces(tmp_path / "deep" / "p1", {"video": 2})
    with pytest.raises(DataError, match=r"no images, but 1 folder\(s\) as video; put the images"):
        images.load_faces(tmp_path / "deep", 16)
    (tmp_path / "empty" / "p1").mkdir(parents=True)
    with pytest.raises(DataError, match="p1 is empty"):
        images.load_faces(tmp_path / "empty", 16)
    (tmp_path / "file").write_text("about")
    for path in (tmp_path / "file", tmp_path / "nothing", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="neither a folder nor a .rec file"):
            images.load_faces(path, 16)


def test_folders_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The tests may run as root, whom no mode of a folder keeps out."""
    write_faces(tmp_path / "faces", {"p1": 1, "p2": 1, "p3": 1})
    plain = Path.iterdir

    def listed(path: Path) -> object:
        if path.name in closed:
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "iterdir", listed)
    closed = {"p2"}
    assert images.load_faces(tmp_path / "faces", 16).names == ["p1", "p3"]
    assert "cannot be listed (Permission denied): p2" in capsys.readouterr().out
    closed = {"faces"}
    with pytest.raises(DataError, match="faces cannot be read: Permission denied"):
        images.load_faces(tmp_path / "faces", 16)
    with pytest.raises(DataError, match="faces cannot be listed: Permission denied"):
        demo_data.read_folder(tmp_path / "faces")


def test_the_fingerprint_is_of_names_labels_and_sizes(tmp_path: Path) -> None:
    folder = write_faces(tmp_path / "a", {"p1": 3, "p2": 3, os.fsdecode(b"\xff"): 1})
    before = images.load_faces(folder, 16).fingerprint()
    assert images.load_faces(folder, 32).fingerprint() == before
    shutil.copytree(folder, tmp_path / "b")
    assert images.load_faces(tmp_path / "b", 16).fingerprint() == before
    image = folder / "p1" / "p1_0002.png"
    changes = {
        "moved": lambda: image.rename(folder / "p2" / image.name),
        "renamed": lambda: image.rename(image.with_name("other.png")),
        "removed": lambda: image.unlink(),
        "grown": lambda: image.write_bytes(image.read_bytes() + b"\0"),
        "added": lambda: shutil.copy(image, image.with_name("copy.png")),
    }
    found = {before}
    for change in changes.values():
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "b", folder)
        change()
        found.add(images.load_faces(folder, 16).fingerprint())
    assert len(found) == 1 + len(changes)
    some = images.load_faces(tmp_path / "b", 16)
    assert some.keep((some.labels != 1).nonzero()[:, 0]).fingerprint() not in found
