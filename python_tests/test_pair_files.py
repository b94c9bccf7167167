"""Evaluation sets of train_faces.py: their paths and names, .bin files, and the images of lists."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_cases import (
    DataError,
    evaluation_sets,
    images,
    pair_files,
    sources,
    train_faces,
    write_faces,
)

PAIRS = 8
SAME = [number % 2 == 0 for number in range(PAIRS)]


def picture(number: int, kind: str = "jpeg") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (5 * number, 100, 200)).save(file, kind)
    return file.getvalue()


CONTENTS = [picture(number) for number in range(2 * PAIRS)]


def python2(protocol: int) -> bytes:
    """As Python 2 pickles a tuple of a list of str and a list of bool."""
    if protocol == 2:
        strings = b"".join(b"T" + struct.pack("<i", len(each)) + each for each in CONTENTS)
        flags = b"".join(b"\x88" if each else b"\x89" for each in SAME)
        return b"\x80\x02](" + strings + b"e](" + flags + b"e\x86."
    strings = b"".join(
        b"S'" + b"".join(b"\\x%02x" % byte for byte in each) + b"'\na" for each in CONTENTS
    )
    flags = b"".join(b"I01\na" if each else b"I00\na" for each in SAME)
    return b"((lp0\n" + strings + b"(lp1\n" + flags + b"t."


def older_numpy(content: bytes) -> bytes:
    """NumPy 1 named its modules otherwise, in protocols 0 to 3 on lines of their own."""
    return content.replace(b"cnumpy._core.", b"cnumpy.core.")


ARRAYS = [np.frombuffer(each, np.uint8) for each in CONTENTS]
OBJECTS = np.empty(len(CONTENTS), object)
OBJECTS[:] = CONTENTS
FORMS: dict[str, tuple[object, object]] = {
    "as insightface writes it": (CONTENTS, SAME),
    "bytearray": ([bytearray(each) for each in CONTENTS], SAME),
    "np.uint8": (ARRAYS, SAME),
    "np.int8": ([each.view(np.int8) for each in ARRAYS], SAME),
    "an array of bytes": (OBJECTS, SAME),
    "tuples": (tuple(CONTENTS), tuple(SAME)),
    "np.bool_": (CONTENTS, list(np.array(SAME))),
    "an array of bool": (CONTENTS, np.array(SAME)),
    "int": (CONTENTS, [int(each) for each in SAME]),
    "np.int64": (CONTENTS, list(np.array(SAME, np.int64))),
    "an array of big-endian int32": (CONTENTS, np.array(SAME, ">i4")),
    "float": (CONTENTS, np.array(SAME, np.float32)),
}
READ = {
    f"{name}, protocol {protocol}": pickle.dumps(form, protocol)
    for name, form in FORMS.items()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
}
READ |= {
    f"{name}, NumPy 1": older_numpy(pickle.dumps(form, 2))
    for name, form in FORMS.items()
    if b"cnumpy._core." in pickle.dumps(form, 2)
}
READ |= {
    "Python 2, protocol 2": python2(2),
    "Python 2, protocol 0": python2(0),
    "list, not tuple": pickle.dumps([CONTENTS, SAME]),
}


@pytest.mark.parametrize("name", READ)
def test_pickles_that_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(READ[name])
    contents, same = pair_files.read_bin(tmp_path / "set.bin")
    assert contents == CONTENTS and same.tolist() == SAME


class Calling:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple:
        return self.parts


def harmful(function: Callable, *arguments: object) -> bytes:
    return pickle.dumps(([Calling(function, *arguments)], [True]))


REFUSED = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "html": b"<!doctype html><html>",
    "zip": b"PK\x03\x04" + bytes(50),
    "nothing": b"",
    "cut": python2(2)[:-300],
    "a number": pickle.dumps(5),
    "a dict": pickle.dumps({"a": 1}),
    "text": pickle.dumps("ab"),
    "None": pickle.dumps(None),
    "one part": pickle.dumps((CONTENTS,)),
    "three parts": pickle.dumps((CONTENTS, SAME, 1)),
    "no labels": pickle.dumps((CONTENTS, None)),
    "labels in words": pickle.dumps((CONTENTS, ["False"] * PAIRS)),
    "labels of 2": pickle.dumps((CONTENTS, [2] * PAIRS)),
    "labels of nan": pickle.dumps((CONTENTS, [float("nan")] * PAIRS)),
    "too few images": pickle.dumps((CONTENTS[1:], SAME)),
    "complex numbers": pickle.dumps((CONTENTS, np.zeros(PAIRS, complex))),
    "records": pickle.dumps((CONTENTS, np.zeros(PAIRS, [("a", "u1")]))),
    "code": harmful(exec, "raise SystemExit('code from a file ran')"),
    "code of ours": harmful(write_faces, "x", {}),
    "a call of numpy's": harmful(np.load, "/etc/passwd"),
    **{
        f"opcodes {each!r}": each
        for each in (b"eeee", b"(", b"aaa.", b"0.", b"jaaaa.", b"\x80\xff")
    },
    "too long a string": b"\x8e" + b"\xff" * 8,
}


@pytest.mark.parametrize("name", REFUSED)
def test_pickles_that_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(REFUSED[name])
    with pytest.raises(DataError, match="set.bin"):
        evaluation_sets.read_set(str(tmp_path / "set.bin"), 8, tmp_path / "scans", 1)


@pytest.mark.parametrize("name", ["cut anywhere", "changed anywhere"])
def test_damaged_pickles_raise_nothing_else(name: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    whole = pickle.dumps((ARRAYS, np.array(SAME)), 2)
    for _ in range(300):
        damaged = bytearray(whole)
        if name == "cut anywhere":
            del damaged[draw.integers(len(whole)) :]
        else:
            for place in draw.integers(0, len(whole), 3):
                damaged[place] = draw.integers(256)
        (tmp_path / "set.bin").write_bytes(damaged)
        try:
            contents, same = pair_files.read_bin(tmp_path / "set.bin")
        except DataError as error:
            assert "set.bin" in str(error)
        else:
            assert len(contents) == 2 * len(same)


@pytest.mark.parametrize("odd", [None, "text", 5, [1], b"no image", b"", np.zeros((2, 2))])
def test_an_odd_image_leaves_out_its_pair(odd: object, tmp_path: Path) -> None:
    contents = [*CONTENTS[:4], odd, *CONTENTS[5:]]
    (tmp_path / "set.bin").write_bytes(pickle.dumps((contents, SAME)))
    found = evaluation_sets.read_set(str(tmp_path / "set.bin"), 8, tmp_path / "scans", 1)
    assert found.skipped == 1 and len(found.pairs.same) == PAIRS - 1
    assert found.pairs.same.tolist() == SAME[:2] + SAME[3:]


def write_list(path: Path, extension: str = ".jpg") -> Path:
    """A list of pairs of the images that `write_crops` writes, by names with an extension."""
    lines = [
        f"p{a}/p{a}_0001{extension} p{b}/p{b}_0002{extension} {int(a == b)}"
        for a in range(4)
        for b in (a, (a + 1) % 4)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def write_crops(folder: Path, extension: str) -> Path:
    write_faces(folder, {f"p{i}": 2 for i in range(4)})
    for path in folder.glob("*/*.png"):
        with Image.open(path) as image:
            kind = Image.registered_extensions()[extension.lower()]
            image.save(path.with_name(path.stem + extension), kind)
        if extension != ".png":
            path.unlink()
    return folder


@pytest.mark.parametrize(
    "found", [".jpg", ".png", ".jpeg", ".JPG", ".bmp", ".webp", ".tif", ".PNG"]
)
@pytest.mark.parametrize("listed", [".jpg", ".png", ""])
def test_crops_of_every_extension(listed: str, found: str, tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", found)
    pairs = write_list(tmp_path / "pairs.txt", listed)
    read = evaluation_sets.read_set(f"{pairs}={folder}", 8, tmp_path / "scans", 1)
    assert len(read.faces) == 8 and read.skipped == 0
    names = {Path(read.faces.images.name(row)).name for row in range(8)}
    assert names == {f"p{i}_000{j}{found}" for i in range(4) for j in (1, 2)}


def test_the_extension_of_the_list_comes_first(tmp_path: Path) -> None:
    folder = write_crops(tmp_path, ".jpg")
    write_crops(tmp_path / "png", ".png")
    for path in (tmp_path / "png").glob("*/*.png"):
        path.rename(folder / path.parent.name / path.name)
    (folder / "p1" / "p1_0001.txt").write_text("about")
    names = ["p1/p1_0001.jpg", "p1/p1_0001.png", "p1/p1_0001.bmp", "p1/p1_0001", "p9/p9.jpg"]
    found = pair_files.find_images(folder, names)
    assert [path.name for path in found] == [
        "p1_0001.jpg",
        "p1_0001.png",
        "p1_0001.jpg",
        "p1_0001.jpg",
        "p9.jpg",
    ]


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", ".png")
    pairs = write_list(tmp_path / "pairs.txt", ".png")
    odd = ["long" * 2000, "p0/" + "long" * 2000 + ".jpg", "long" * 2000 + "/p0.jpg", "\x01\x7f"]
    lines = "".join(f"\np0/p0_0001.png {name} 0" for name in odd)
    pairs.write_text(pairs.read_text() + lines)
    read = evaluation_sets.read_set(f"{pairs}={folder}", 8, tmp_path / "scans", 1)
    assert len(read.faces) == 8 and read.skipped == len(odd)


def test_names_with_dots(tmp_path: Path) -> None:
    write_faces(tmp_path, {"a.b": 1, "a": 1})
    (tmp_path / "a.b" / "a.b_0001.png").rename(tmp_path / "a.b" / "x.1.png")
    found = pair_files.find_images(tmp_path, ["a.b/x.1.jpg", "a.b/x.1", "a.b/x.jpg"])
    assert [path.name for path in found] == ["x.1.png", "x.1.png", "x.jpg"]


def test_a_folder_without_the_images(tmp_path: Path) -> None:
    pairs = write_list(tmp_path / "pairs.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has none of the 8 images .* extension"):
        evaluation_sets.read_set(f"{pairs}={tmp_path / 'empty'}", 8, tmp_path, 1)
    with pytest.raises(DataError, match="none of the 8 images .* LIST=FOLDER"):
        evaluation_sets.read_set(str(pairs), 8, tmp_path, 1)


# What `--eval` is given in the folder "run=3", and the set and the folder that it means.
PATHS = {
    "a=b/test": ("a=b/test", None),
    "a=b/test/": ("a=b/test", None),
    "a=b/list.txt": ("a=b/list.txt", "a=b"),
    "a=b/list.txt=crops": ("a=b/list.txt", "crops"),
    "a=b/list.txt=c=d/crops": ("a=b/list.txt", "c=d/crops"),
    "list=1.txt=crops": ("list=1.txt", "crops"),
    "list=1.txt": ("list=1.txt", "."),
    "list=1.txt=c=d/crops": ("list=1.txt", "c=d/crops"),
    "list.txt=": ("list.txt", "."),
    # Both the whole and a list before the sign are there.
    "list.txt=both": ("list.txt=both", None),
    "=/test": ("=/test", None),
}


@pytest.mark.parametrize("argument", PATHS)
def test_an_equals_sign_in_a_path(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run=3").mkdir()
    monkeypatch.chdir(tmp_path / "run=3")
    for name in ("a=b/list.txt", "list=1.txt", "list.txt"):
        write_list(Path(name))
    for name in ("a=b/test", "crops", "c=d/crops", "list.txt=both", "=/test"):
        Path(name).mkdir(parents=True)
    source, folder = evaluation_sets._paths(argument)
    wanted, where = PATHS[argument]
    assert source == Path(wanted) and (where is None or folder == Path(where))
    if argument in ("list.txt=", "list=1.txt"):
        write_crops(Path("."), ".png")
        read = evaluation_sets.read_set(str(Path.cwd() / argument), 8, tmp_path, 1)
        assert len(read.faces) == 8


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nothing", "--eval nothing is neither a folder nor a .rec file, a .bin file or a"),
        ("nothing=crops", "nor is what is before an equals sign"),
        ("long" * 2000, "is neither a folder nor"),
        (f"list.txt={'long' * 2000}", "is not a folder"),
        ("nothing.bin", "neither a folder nor"),
        ("nothing.rec", "neither a folder nor"),
        ("list.txt=nowhere", "nowhere is not a folder"),
        ("crops=crops", "nor is what is before an equals sign"),
        ("empty", "empty has no sub-folders"),
    ],
)
def test_sets_that_are_not_there(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_list(Path("list.txt"))
    Path("crops").mkdir()
    Path("empty").mkdir()
    with pytest.raises(DataError, match=message):
        evaluation_sets.read_set(argument, 8, tmp_path, 1)


def test_names_of_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_crops(tmp_path / "crops", ".png")
    for name in ("lfw", "calfw"):
        write_list(tmp_path / name / "pairs.txt", ".png")
        write_faces(tmp_path / name / "test", {f"p{i}": 2 for i in range(4)})
    write_faces(tmp_path / "held.out", {f"p{i}": 2 for i in range(4)})
    monkeypatch.chdir(tmp_path / "lfw" / "test")
    arguments = [
        f"{tmp_path}/lfw/pairs.txt={tmp_path}/crops",
        f"{tmp_path}/calfw/pairs.txt={tmp_path}/crops",
        ".",
        "../../calfw/test/",
        "../../held.out",
    ]
    scans = tmp_path / "scans"
    sets = train_faces.read_sets(arguments, 8, scans, 1)
    assert [each.name for each in sets] == [
        "lfw/pairs",
        "calfw/pairs",
        "lfw/test",
        "calfw/test",
        "held.out",
    ]
    assert len(list(scans.iterdir())) == 5
    assert train_faces.read_sets(arguments[:1], 8, scans, 1)[0].name == "pairs"
    twice = train_faces.read_sets([arguments[2], f"{tmp_path}/lfw/test"], 8, scans, 1)
    assert [each.name for each in twice] == ["test", "test"]


def faces_of(counts: list[int]) -> images.Faces:
    labels = np.repeat(np.arange(len(counts)), counts)
    held = sources.MemoryImages("counts", [b""] * len(labels))
    names = [f"p{i}" for i in range(len(counts))]
    return images.Faces(held, train_faces.torch.from_numpy(labels), names, 8)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("several", [2, 3, 6, 20])
def test_what_is_held_out_can_be_verified(several: int, share: float) -> None:
    """Most identities have one image."""
    faces = faces_of([4] * several + [1] * 60)
    drawn = set()
    for seed in range(20):
        kept, out = train_faces.hold_out(faces, share, seed)
        assert len(out.names) == max(4, round(share * len(faces.names)))
        assert set(kept.names).isdisjoint(out.names) and len(kept) + len(out) == len(faces)
        evaluation_sets.identity_set("held out", out)
        drawn.add(tuple(out.names))
    assert len(drawn) > 10


def test_every_identity_may_be_held_out() -> None:
    faces = faces_of([2] * 5 + [1] * 10)
    outs = [train_faces.hold_out(faces, 0.3, seed)[1].names for seed in range(60)]
    assert set(sum(outs, [])) == set(faces.names)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1] * 60, "two images or more, found 0; give an evaluation set with --eval"),
        ([5] + [1] * 60, "two images or more, found 1; give an evaluation set with --eval"),
        ([5] * 5, "5 identities are too few to hold 4 out"),
    ],
)
def test_what_cannot_be_held_out(counts: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_faces.hold_out(faces_of(counts), 0.2, 0)
