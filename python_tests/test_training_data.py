"""What examples/train_faces.py reads: RecordIO sets, lists of pairs, .bin files; its networks."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import (
    DataError,
    backbones,
    evaluation_sets,
    images,
    recordio,
    sampling,
    train_faces,
    write_faces,
)

MAGIC = struct.pack("<I", 0xCED7230A)


def chunk(kind: int, content: bytes) -> bytes:
    """Part of a record as the format's description has it, padded to four bytes."""
    return MAGIC + struct.pack("<I", kind << 29 | len(content)) + content + bytes(-len(content) % 4)


def header(label: float | list[float], number: int) -> bytes:
    labels = label if isinstance(label, list) else []
    head = struct.pack("<IfQQ", len(labels), 0.0 if labels else label, number, 0)
    return head + struct.pack(f"<{len(labels)}f", *labels)


def write_records(folder: Path, records: dict[int, bytes]) -> Path:
    position, lines = 0, []
    with (folder / "train.rec").open("wb") as file:
        for number, record in records.items():
            lines.append(f"{number}\t{position}\n")
            position += file.write(record)
    (folder / "train.idx").write_text("".join(lines))
    return folder / "train.rec"


def png(colour: tuple[int, int, int], size: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "png")
    return file.getvalue()


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_an_insightface_set(tmp_path: Path) -> None:
    # Images 1 to 4 of identities 7 and 9; record 5 and 6 say which images an identity has.
    records = {0: chunk(0, header([5.0, 7.0], 0))}
    for number, (label, colour) in enumerate([(7, RED), (7, GREEN), (9, BLUE), (9, RED)], 1):
        records[number] = chunk(
            0, header([label, 0.0] if number == 2 else label, number) + png(colour)
        )
    records |= {5: chunk(0, header([1.0, 3.0], 5)), 6: chunk(0, header([3.0, 5.0], 6))}
    write_records(tmp_path, records)
    for path in (tmp_path, tmp_path / "train.rec"):
        faces = images.load_faces(path, size=16)
        assert faces.names == ["7", "9"] and faces.labels.tolist() == [0, 0, 1, 1]
    colours = [tuple(faces[item][0][:, 3, 5].tolist()) for item in range(4)]
    assert colours == [RED, GREEN, BLUE, RED]
    again = pickle.loads(pickle.dumps(faces))
    assert torch.equal(again[2][0], faces[2][0])


def test_a_set_without_a_header_is_all_images(tmp_path: Path) -> None:
    records = {number: chunk(0, header(number % 2, number) + png(RED)) for number in range(3)}
    path = write_records(tmp_path, records)
    assert images.load_faces(path, size=16).labels.tolist() == [0, 1, 0]


def test_a_record_cut_where_it_held_the_magic_number(tmp_path: Path) -> None:
    whole = header(3, 0) + b"before.." + MAGIC + b"between." + MAGIC + b"after"
    first, second, third = whole.split(MAGIC)
    path = write_records(tmp_path, {0: chunk(1, first) + chunk(2, second) + chunk(3, third)})
    record = recordio.RecordFile(path).read(0)
    assert record.labels.tolist() == [3]
    assert record.content == b"before.." + MAGIC + b"between." + MAGIC + b"after"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"something else altogether", "no record 0 at byte 0"),
        (chunk(0, header(1, 0))[:-4], "no record 0 at byte 0"),
        (chunk(2, header(1, 0)), "no record 0 at byte 0"),
        (chunk(1, header(1, 0)), "no record 0 at byte 32"),
        (chunk(0, b"short"), "record 0 is cut short"),
        (chunk(0, struct.pack("<IfQQ", 1000, 0, 0, 0)), "record 0 is cut short"),
    ],
)
def test_damaged_records(tmp_path: Path, content: bytes, message: str) -> None:
    file = recordio.RecordFile(write_records(tmp_path, {0: content}))
    with pytest.raises(DataError, match=message):
        file.read(0)


def test_missing_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.rec is missing or empty"):
        recordio.RecordFile(tmp_path / "train.rec")
    path = write_records(tmp_path, {0: chunk(0, header(1, 0))})
    with pytest.raises(DataError, match="no record 4 in the index"):
        recordio.RecordFile(path).read(4)
    (tmp_path / "train.idx").write_text("one two\n")
    with pytest.raises(DataError, match="train.idx: expected lines"):
        recordio.RecordFile(path)


def test_unreadable_records_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    contents = [png(RED), b"no image", png(BLUE)]
    records = {i: chunk(0, header(i, i) + each) for i, each in enumerate(contents)}
    faces = images.load_faces(write_records(tmp_path, records), size=16)
    kept, names = images.readable(faces.images, 16, tmp_path / "scan.json", threads=2)
    assert kept.tolist() == [0, 2] and names == [f"{tmp_path / 'train.rec'}, record 1"]
    assert faces.keep(kept).names == ["0", "2"] and faces.keep(kept).counts().tolist() == [1, 1]


def test_what_was_found_unreadable_is_of_those_images_alone(tmp_path: Path) -> None:
    good, bad = png(RED), b"no image"
    for name, contents in {"first": [good, bad], "second": [bad, good]}.items():
        held = images.MemoryImages(name, contents)
        kept, names = images.readable(held, 16, tmp_path / "scan.json", threads=1)
        assert kept.tolist() == [contents.index(good)]
        assert names == [f"{name}, image {contents.index(bad)}"]


def test_images_are_turned_cut_and_coloured() -> None:
    file = io.BytesIO()
    grey = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    grey.save(file, "png")
    decoded = images.decode(file.getvalue(), 4)
    assert decoded.shape == (3, 4, 4) and decoded.dtype == torch.uint8
    # The middle four columns of six.
    assert torch.equal(decoded[0], torch.arange(0, 240, 10).view(4, 6)[:, 1:5].to(torch.uint8))
    assert torch.equal(decoded[0], decoded[2])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = io.BytesIO()
    Image.fromarray(np.arange(0, 240, 15, dtype=np.uint8).reshape(4, 4)).save(
        turned, "png", exif=exif
    )
    assert images.decode(turned.getvalue(), 4)[1].flatten().tolist() == list(range(225, -1, -15))


@pytest.fixture
def brightness() -> torch.nn.Module:
    """A model whose feature tells colours apart."""

    class Model(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float().mean(dim=(2, 3)) - 60

    return Model()


def test_a_list_of_pairs(tmp_path: Path, brightness: torch.nn.Module) -> None:
    folder = write_faces(tmp_path / "images", {"ann": 3, "bob": 3, "cyd": 3}, size=16)
    (folder / "bob" / "bob_0003.png").write_bytes(b"no image")
    pairs = [("ann", 1, "ann", 2), ("ann", 2, "ann", 3), ("bob", 1, "bob", 2), ("cyd", 1, "cyd", 3)]
    pairs += [
        ("ann", 1, "bob", 2),
        ("bob", 1, "cyd", 1),
        ("cyd", 2, "ann", 3),
        ("ann", 2, "cyd", 2),
    ]
    pairs += [("bob", 1, "bob", 3), ("bob", 3, "ann", 1)]
    lines = [f"{a}/{a}_000{i}.png {b}/{b}_000{j}.png {int(a == b)}" for a, i, b, j in pairs]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    found = evaluation_sets.read_set(f"{tmp_path / 'pairs.txt'}={folder}", 16, tmp_path, 2)
    assert (len(found.pairs.same), int(found.pairs.same.sum()), found.skipped) == (8, 4, 1)
    for number, (a, i, b, j) in enumerate(pairs[:8]):
        ends = int(found.pairs.first[number]), int(found.pairs.second[number])
        names = [found.faces.images.name(int(found.faces.rows[end])) for end in ends]
        assert names == [f"{folder}/{a}/{a}_000{i}.png", f"{folder}/{b}/{b}_000{j}.png"]
    judged = evaluation_sets.judge(brightness, found, 4, 0)
    # Colours are far apart, and images of one identity are nearly of one colour.
    assert judged.figures["accuracy"] == judged.figures["AUC"] == 1
    assert "rank-1" not in judged.figures


def test_a_bin_file(tmp_path: Path, brightness: torch.nn.Module) -> None:
    contents = [
        png(RED),
        png(RED),
        png(RED),
        png(GREEN),
        png(BLUE),
        png(BLUE),
        png(GREEN),
        png(BLUE),
    ]
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps((contents, [True, False, True, False]), protocol=2))
    found = evaluation_sets.read_set(str(path), 16, tmp_path, 1)
    assert found.name == "lfw" and found.pairs.same.tolist() == [True, False, True, False]
    assert found.pairs.first.tolist() == [0, 2, 4, 6]
    judged = evaluation_sets.judge(brightness, found, 4, 0)
    assert judged.figures["accuracy"] == 1 and judged.figures["TAR at FAR 0.1"] == 1


class Dangerous:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a file ran')",)


def test_a_bin_file_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(([Dangerous()], [True])))
    with pytest.raises(
        DataError,
        match=r"not one of insightface's .bin files: UnpicklingError: it holds a builtins.exec",
    ):
        evaluation_sets.read_set(str(tmp_path / "bad.bin"), 16, tmp_path, 1)
    (tmp_path / "odd.bin").write_bytes(pickle.dumps(([png(RED)], [True])))
    with pytest.raises(DataError, match="two images a pair, got 1 for 1"):
        evaluation_sets.read_set(str(tmp_path / "odd.bin"), 16, tmp_path, 1)


def test_a_folder_is_verified_and_searched(tmp_path: Path, brightness: torch.nn.Module) -> None:
    folder = write_faces(tmp_path / "faces", {f"p{i}": 4 for i in range(8)}, size=16)
    found = evaluation_sets.read_set(str(folder), 16, tmp_path, 1)
    judged = evaluation_sets.judge(brightness, found, 8, 0)
    # 32 * 31 / 2 pairs, 8 * 6 of them genuine: 448 impostors, so that FAR 0.001 means nothing.
    assert [name for name in judged.figures if "TAR" in name] == [
        "TAR at FAR 0.1",
        "TAR at FAR 0.01",
    ]
    assert judged.figures["rank-1"] > 0.5 and 0 <= judged.figures["DIR at FAR 0.01"] <= 1


def test_held_out_identities_are_not_trained_on(tmp_path: Path) -> None:
    folder = write_faces(tmp_path / "faces", {f"p{i}": 1 + i % 3 for i in range(30)}, size=16)
    faces = images.load_faces(folder, 16)
    kept, out = train_faces.hold_out(faces, 0.2, seed=1)
    assert len(out.names) == 6 and set(kept.names) | set(out.names) == set(faces.names)
    assert len(kept) + len(out) == len(faces) and not set(kept.names) & set(out.names)
    for part in (kept, out):
        for item in range(len(part)):
            name = Path(part.images.name(int(part.rows[item]))).parent.name
            assert part.names[int(part.labels[item])] == name


def test_networks() -> None:
    # The numbers of parameters that insightface's networks of these names have.
    sizes = {"iresnet18": 24_025_600, "iresnet50": 43_590_848, "iresnet100": 65_156_160}
    for name, size in sizes.items():
        with torch.device("meta"):
            network = backbones.make_backbone(name, 512, 112)
        assert sum(each.numel() for each in network.parameters()) == size
    network = backbones.make_backbone("iresnet18", 32, 32).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 32)
    with pytest.raises(DataError, match="multiple of 16, got 100"):
        backbones.make_backbone("iresnet18", 512, 100)
    with pytest.raises(DataError, match="expected iresnet18, .*, got 'resnet'"):
        backbones.make_backbone("resnet", 512, 112)


def test_networks_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for as their documentation says; the libraries themselves stay out."""
    calls = []

    def module(name: str, function: str) -> types.ModuleType:
        def make(*names: str, **options: object) -> torch.nn.Module:
            calls.append((names, options))
            pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
            return pooled.append(torch.nn.Linear(3, options["num_classes"]))

        made = types.ModuleType(name)
        setattr(made, function, make)
        return made

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(
        sys.modules, "torchvision.models", module("torchvision.models", "get_model")
    )
    monkeypatch.setitem(sys.modules, "timm", module("timm", "create_model"))
    backbones.make_backbone("torchvision/resnet50", 512, 112)
    backbones.make_backbone("timm/resnet26d", 256, 112)
    assert calls == [
        (("resnet50",), {"weights": None, "num_classes": 512}),
        (("resnet26d",), {"pretrained": False, "num_classes": 256}),
    ]


def test_pixels_lie_around_zero() -> None:
    embedder = backbones.Embedder(torch.nn.Flatten(), None)
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert embedder(pixels)[0].tolist() == [-127.5 / 128, -0.5 / 128, 127.5 / 128]


def test_random_batches() -> None:
    epochs = []
    for epoch in range(2):
        ranks = [sampling.RandomBatches(23, 4, 2, rank, seed=3) for rank in range(2)]
        for each in ranks:
            each.set_epoch(epoch)
        batches = [list(each) for each in ranks]
        assert [len(own) for own in batches] == [2, 2] == [len(each) for each in ranks]
        drawn = sum(sum(batches, []), [])
        assert len(set(drawn)) == 16 and set(drawn) <= set(range(23))
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    small = sampling.RandomBatches(3, 256, 1, 0, seed=0)
    assert sorted(sum(small, [])) == [0, 1, 2]


def test_clusters_are_found_anew_after_as_many_batches_as_asked_for() -> None:
    assert [sampling.refresh_epochs({"refresh": 3000}, each) for each in (10, 1200, 9000)] == [
        300,
        2,
        1,
    ]
