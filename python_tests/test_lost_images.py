"""Images that are lost while a network is trained, and runs that go on without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_cases import (
    SMALL,
    DataError,
    evaluation_sets,
    images,
    listing,
    train_faces,
    trainer,
    write_faces,
)

LOSSES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "overwritten": lambda path: path.write_bytes(b"no image"),
    "emptied": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.fixture
def faces(tmp_path: Path) -> images.Faces:
    """Three images of p1, one of p2, six of p3."""
    return images.load_faces(write_faces(tmp_path / "faces", {"p1": 3, "p2": 1, "p3": 6}), 8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_lost_image_is_an_error_that_names_it(
    lose: Callable[[Path], object], workers: int, faces: images.Faces
) -> None:
    lose(faces.images.paths[1])
    batches = iter(torch.utils.data.DataLoader(faces, num_workers=workers))
    with pytest.raises(DataError) as caught:
        list(batches)
    if workers:
        # The iterator would live on in the traceback, and its workers with it.
        batches._shutdown_workers()
    message = str(caught.value)
    assert message.startswith(f"{faces.images.paths[1]} cannot be read any more: ")
    assert message.endswith("put it back, or go on without it with --resume --skip-unreadable")
    assert "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_another_image_of_the_identity_takes_its_place(
    lose: Callable[[Path], object], faces: images.Faces, capsys: pytest.CaptureFixture
) -> None:
    wanted = [faces[item] for item in range(len(faces))]
    faces.skip_unreadable(replace=True)
    part = faces.keep(torch.arange(len(faces)))
    lose(faces.images.paths[1])
    for _ in range(2):
        image, label, item = part[1]
        assert torch.equal(image, wanted[2][0]) and (label, item) == (0, 1)
    assert capsys.readouterr().out.count("p1_0002.png cannot be read any more") == 1
    assert part.lost() == faces.lost() == [str(faces.images.paths[1])]
    lose(faces.images.paths[2])
    assert torch.equal(part[1][0], wanted[0][0]) and torch.equal(part[2][0], wanted[0][0])
    labels, items = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3])
    assert torch.equal(part.known(labels, items), labels) and not part.missing().any()


def test_an_identity_of_lost_images_is_left_out_by_losses(faces: images.Faces) -> None:
    path = faces.images.paths[3]
    content = path.read_bytes()
    wanted = faces[3][0]
    faces.skip_unreadable(replace=True)
    path.unlink()
    image, label, item = faces[3]
    assert image.shape == wanted.shape and image.unique().tolist() == [127]
    assert (label, item) == (1, 3)
    labels, items = torch.tensor([1, 0, 2]), torch.tensor([3, 0, 4])
    assert faces.known(labels, items).tolist() == [-100, 0, 2]
    assert faces.missing().nonzero().tolist() == [[3]]
    # It is back, and still among those that were lost.
    path.write_bytes(content)
    assert torch.equal(faces[3][0], wanted)
    assert faces.known(labels, items).tolist() == [1, 0, 2]
    assert faces.lost() == [str(path)]


def test_workers_tell_what_they_lost(faces: images.Faces) -> None:
    faces.skip_unreadable(replace=True)
    faces.images.paths[3].unlink()
    faces.images.paths[5].unlink()
    loader = torch.utils.data.DataLoader(faces, batch_size=4, num_workers=2)
    known = torch.cat([faces.known(labels, items) for _, labels, items in loader])
    assert known.tolist() == [0, 0, 0, -100, 2, 2, 2, 2, 2, 2]
    assert len(faces.lost()) == 2


def test_a_disk_that_is_gone_ends_the_run(faces: images.Faces) -> None:
    faces.skip_unreadable(replace=True)
    for path in faces.images.paths:
        path.unlink()
    with pytest.raises(DataError, match=r"6 of 10 images cannot be read any more.* is the disk"):
        for item in range(len(faces)):
            faces[item]


def model(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().mean(dim=(2, 3)) - 60


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_an_evaluation_goes_on_without_lost_images(kind: str, tmp_path: Path) -> None:
    """As if they had never been there."""
    folder = write_faces(tmp_path / "faces", {f"p{i}": 4 for i in range(6)})
    lines = [
        f"p{a}/p{a}_000{i}.png p{b}/p{b}_0001.png {int(a == b)}"
        for a in range(6)
        for b in (a, (a + 1) % 6)
        for i in (2, 3)
    ]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    argument = str(folder) if kind == "folder" else f"{tmp_path / 'pairs.txt'}={folder}"
    found = evaluation_sets.read_set(argument, 8, tmp_path, 1)
    found.faces.skip_unreadable(replace=False)
    (folder / "p2" / "p2_0003.png").unlink()
    lost = evaluation_sets.judge(model, found, 8, 0).figures
    without = evaluation_sets.read_set(argument, 8, tmp_path, 1)
    wanted = evaluation_sets.judge(model, without, 8, 0).figures
    # Of a folder, other pairs are drawn, but TAR is over all.
    compared = [name for name in wanted if kind == "list" or name.startswith("TAR")]
    assert compared and {name: lost[name] for name in compared} == {
        name: wanted[name] for name in compared
    }


RUN = ["--recipe", "softmax", "--set", "batch_size=8", "--epochs", "3", "--hold-out", "0", *SMALL]


def losing(monkeypatch: pytest.MonkeyPatch, path: Path, lose: Callable[[Path], object]) -> None:
    """Loses a file before the second epoch."""
    plain = trainer.Trainer._train_epoch

    def epoch(self: trainer.Trainer, run: object, number: int, writer: object) -> None:
        if number == 1 and path.is_file():
            lose(path)
        return plain(self, run, number, writer)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", epoch)


@pytest.mark.parametrize("lose", [LOSSES["removed"], LOSSES["overwritten"]])
def test_a_run_ends_by_name_and_goes_on_without_the_image(
    lose: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    # Some identities have one image, and one of these is lost.
    folder = write_faces(tmp_path / "faces", {f"p{i}": 1 + 3 * (i % 2) for i in range(8)})
    gone = folder / "p2" / "p2_0001.png"
    chosen = [*RUN, "--data", str(folder), "--output", str(tmp_path / "run")]
    losing(monkeypatch, gone, lose)
    with pytest.raises(SystemExit, match=r"error: .*p2_0001.png cannot be read any more"):
        train_faces.main(chosen)
    with pytest.raises(SystemExit, match=r"p2/p2_0001.png; put them back, or give --skip-unread"):
        train_faces.main([*chosen, "--resume"])
    capsys.readouterr()
    train_faces.main([*chosen, "--resume", "--skip-unreadable"])
    assert "p2_0001.png cannot be read any more" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert page.count("p2_0001.png") == 1


def test_a_run_that_skips_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_faces(tmp_path / "faces", {f"p{i}": 1 + 3 * (i % 2) for i in range(8)})
    chosen = [*RUN, "--data", str(folder), "--output", str(tmp_path / "run"), "--skip-unreadable"]
    losing(monkeypatch, folder / "p2" / "p2_0001.png", LOSSES["removed"])
    seen, plain = [], trainer.Trainer._step

    def step(self: trainer.Trainer, run: object, pixels: object, labels: torch.Tensor) -> object:
        seen.extend(labels.tolist())
        return plain(self, run, pixels, labels)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    train_faces.main(chosen)
    assert capsys.readouterr().out.count("p2_0001.png cannot be read any more") == 1
    # The one image of identity 2 is in two batches of eight of each epoch, or left over.
    assert -100 in seen and 2 not in seen[16:] and seen.count(-100) <= 2


CHANGES: dict[str, Callable[[Path], object]] = {
    "moved": lambda path: path.rename(path.parent.parent / "p3" / path.name),
    "added": lambda path: path.with_name("new.png").write_bytes(path.read_bytes()),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_lost_but_changed_is_no_loss(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = write_faces(tmp_path / "faces", {"p2": 3, "p3": 3})
    listing.write_listing(images.load_faces(folder, 8), tmp_path / "listing.json")
    change(folder / "p2" / "p2_0001.png")
    changed = images.load_faces(folder, 8)
    assert listing.restored(changed, tmp_path / "listing.json", True) is changed


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"names": ["a"]}', b"\xff"])
def test_a_damaged_listing(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faces = images.load_faces(write_faces(tmp_path / "faces", {"p2": 3}), 8)
    (tmp_path / "listing.json").write_bytes(content)
    assert listing.restored(faces, tmp_path / "listing.json", True) is faces
    assert "listing.json does not tell what images" in capsys.readouterr().out


def test_a_listing_restores_the_faces(tmp_path: Path) -> None:
    folder = write_faces(tmp_path / "faces", {"p1": 1, "p2": 3, "p3": 2})
    before = images.load_faces(folder, 8)
    listing.write_listing(before, tmp_path / "listing.json")
    assert listing.restored(before, tmp_path / "listing.json", False) is before
    (folder / "p1" / "p1_0001.png").unlink()
    (folder / "p1").rmdir()
    (folder / "p3" / "p3_0002.png").unlink()
    now = images.load_faces(folder, 8)
    with pytest.raises(DataError, match=r"2 image\(s\) that the run began with .*p1/p1_0001.png"):
        listing.restored(now, tmp_path / "listing.json", False)
    found = listing.restored(now, tmp_path / "listing.json", True)
    assert found.fingerprint() == before.fingerprint()
    assert found.names == before.names and torch.equal(found.labels, before.labels)
    assert torch.equal(found[2][0], before[2][0])
