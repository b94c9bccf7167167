"""Clusters of equal size within classes: what they hold, their losses, and going on from a file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from facelt_ext import CLMLELoss
from facelt_ext.clusters import ClusterIndex

SIZES = {7: 23, -3: 4, 2: 1, 9: 12}


def labelled(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [40, 6] and labels [40] in no order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in SIZES.items()])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), 6, generator=generator), labels


@pytest.fixture
def index() -> ClusterIndex:
    features, labels = labelled()
    index = ClusterIndex(labels, cluster_size=5, seed=3)
    index.refresh(features)
    return index


def assert_whole(index: ClusterIndex) -> None:
    """Each class has L_c // 5 clusters or one, of sizes that differ by at most one."""
    assert index.classes.tolist() == [-3, 2, 7, 9]
    assert index.cluster_class.tolist() == [-3, 2, 7, 7, 7, 7, 9, 9]
    for label, samples in SIZES.items():
        clusters = index.clusters_of(label)
        members = [index.members(m) for m in clusters]
        assert len(clusters) == max(1, samples // 5)
        sizes = [len(m) for m in members]
        assert max(sizes) - min(sizes) <= 1
        both = torch.cat(members).sort().values
        assert torch.equal(both, (index.labels == label).nonzero()[:, 0])
        for m, own in zip(clusters, members, strict=True):
            assert (index.assignments[own] == m).all()


def test_clusters_before_and_after_a_refresh(index):
    fresh = ClusterIndex(index.labels, cluster_size=5)
    assert fresh.centroids is None and fresh.refreshes == 0
    assert_whole(fresh)
    assert_whole(index)
    assert index.refreshes == 1


def test_centroids_are_directions_of_the_means(index):
    features, _ = labelled()
    units = features.double() / features.double().norm(dim=1, keepdim=True)
    for m in range(index.num_clusters):
        mean = units[index.members(m)].mean(0)
        torch.testing.assert_close(
            index.centroids[m].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6
        )


def test_clusters_are_where_the_directions_are():
    angles = torch.tensor([0.0, 2.0, 4.0]).repeat(8)
    noise = 0.05 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    lengths = 1 + torch.arange(24)
    features = lengths[:, None] * torch.stack([(angles + noise).cos(), (angles + noise).sin()], 1)
    index = ClusterIndex(torch.zeros(24, dtype=torch.int64), cluster_size=8)
    index.refresh(features)
    for m in range(3):
        assert angles[index.members(m)].unique().numel() == 1


def test_a_refresh_follows_seed_and_round_alone(index):
    features, labels = labelled()
    other = ClusterIndex(labels, cluster_size=5, seed=3)
    other.refresh(features)
    assert torch.equal(other.assignments, index.assignments)
    assert torch.equal(other.centroids, index.centroids)


def test_losses_are_kept_and_averaged_over_those_seen(index):
    assert all(math.isinf(index.cluster_loss(m)) for m in range(index.num_clusters))
    members = index.members(3)
    samples = torch.stack([members[0], members[2], members[0]])
    index.update_losses(samples, torch.tensor([9.0, 0.5, 2.0]))
    assert index.cluster_loss(3) == 1.25
    before = index.sample_losses.clone()
    index.refresh(labelled(1)[0])
    assert torch.equal(index.sample_losses, before) and index.refreshes == 2
    assert_whole(index)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_losses_that_are_not_finite_are_left_out(index, dtype):
    """As those of a step that overflowed: what was known of their samples stays."""
    index.update_losses(torch.arange(6), torch.tensor([1.0, 2, 3, 4, 5, 6]))
    samples = torch.tensor([0, 1, 2, 3, 30, 5, 5])
    losses = torch.tensor([9, torch.nan, torch.inf, -torch.inf, torch.nan, 7, torch.inf])
    index.update_losses(samples, losses.to(dtype).requires_grad_())
    assert index.sample_losses.dtype == torch.float32
    assert index.sample_losses[:6].tolist() == [9, 2, 3, 4, 5, 7]
    assert index.sample_losses[6:].eq(torch.inf).all()


def test_a_loss_that_float32_does_not_hold_is_left_out(index):
    index.update_losses(torch.tensor([0, 1]), torch.tensor([1e300, 2.0], dtype=torch.float64))
    assert index.sample_losses[:2].tolist() == [math.inf, 2]


def test_an_overflow_step_of_a_grad_scaler(index):
    features, labels = labelled()
    model, loss = torch.nn.Linear(6, 4), CLMLELoss(0.3, 0.1, samples_per_cluster=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = torch.full((len(labels),), torch.inf)
    for step in range(4):
        samples = index.members(step)[:2].repeat(2)
        inputs = features[samples].clone()
        if step == 2:
            inputs[1] = torch.inf
        scaler.scale(loss(model(inputs), labels[samples])).backward()
        scaler.step(optimizer)
        scaler.update()
        index.update_losses(samples, loss.sample_losses)
        for sample, value in zip(samples.tolist(), loss.sample_losses.tolist(), strict=True):
            if math.isfinite(value):
                expected[sample] = value
    assert torch.equal(index.sample_losses, expected)


def unlabelled() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and labels with ignored ones between them, and where the others are."""
    features, labels = labelled()
    place = torch.arange(len(labels)) * 2 + 1
    more = torch.full((2 * len(labels) + 3,), -100)
    more[place] = labels
    anything = torch.tensor([torch.nan, torch.inf, 3e38]).repeat(len(more))[: len(more), None]
    wide = anything.repeat(1, features.shape[1])
    wide[place] = features
    return wide, more, place


def test_ignored_samples_are_in_no_cluster(index):
    """The others are clustered as if they were alone."""
    features, labels, place = unlabelled()
    found = ClusterIndex(labels, cluster_size=5, seed=3)
    before = ClusterIndex(index.labels, cluster_size=5, seed=3)
    for each, alone in ((found, before), (found, index)):
        assert torch.equal(each.classes, alone.classes) and each.num_classes == 4
        assert torch.equal(each.cluster_class, alone.cluster_class)
        assert torch.equal(each.assignments[place], alone.assignments)
        assert (each.assignments[labels == -100] == -1).all()
        for m in range(each.num_clusters):
            assert torch.equal(each.members(m), place[alone.members(m)])
        each.refresh(features)
    assert torch.equal(found.labels, labels) and found.refreshes == 2
    with pytest.raises(ValueError, match="label: expected one of the 4 classes, got -100"):
        found.clusters_of(-100)


def test_centroids_without_ignored_samples(index):
    features, labels, _ = unlabelled()
    found = ClusterIndex(labels, cluster_size=5, seed=3)
    found.refresh(features)
    assert torch.equal(found.centroids, index.centroids)


def test_losses_of_ignored_samples_count_for_nothing():
    _, labels, place = unlabelled()
    index = ClusterIndex(labels, cluster_size=5)
    index.update_losses(torch.arange(len(labels)), torch.arange(len(labels)).float())
    assert index.sample_losses[place].tolist() == place.tolist()
    assert index.sample_losses[labels == -100].eq(torch.inf).all()


def test_another_ignored_label_or_none():
    _, labels = labelled()
    index = ClusterIndex(labels, cluster_size=5, ignore_index=7)
    assert index.classes.tolist() == [-3, 2, 9]
    assert torch.equal(index.assignments == -1, labels == 7)
    every = ClusterIndex(torch.tensor([-100, 4, -100]), ignore_index=None)
    assert every.classes.tolist() == [-100, 4] and every.assignments.tolist() == [0, 1, 0]


def test_a_model_may_give_anything_for_ignored_samples(index):
    features, labels, _ = unlabelled()
    found = ClusterIndex(labels, cluster_size=5, seed=3)
    loader = DataLoader(TensorDataset(features, labels), batch_size=7)
    found.refresh_from(lambda x: x, loader, progress=False)
    assert torch.equal(found.centroids, index.centroids)
    features[1] = torch.nan
    with pytest.raises(ValueError, match="features of batch 0: expected finite .* in row 1"):
        found.refresh_from(lambda x: x, loader, progress=False)


def test_numpy_numbers_and_labels_of_a_tensor(index):
    assert index.clusters_of(np.int64(7)) == index.clusters_of(torch.tensor(7)) == range(2, 6)
    assert torch.equal(index.members(np.int32(3)), index.members(3))
    assert index.cluster_loss(np.uint8(3)) == index.cluster_loss(3)
    other = ClusterIndex(index.labels, cluster_size=np.int64(5), seed=np.int64(3))
    other.load_state_dict(index.state_dict())


def test_refresh_from_a_model_in_eval_mode():
    features, labels = labelled()
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout())
    loader = DataLoader(TensorDataset(features, labels), batch_size=7)
    index, expected = (ClusterIndex(labels, cluster_size=5) for _ in range(2))
    index.refresh_from(model, loader, progress=False)
    assert model.training and all(m.training for m in model)
    expected.refresh(model.eval()(features).detach())
    assert torch.equal(index.assignments, expected.assignments)
    model.train()
    wrong = DataLoader(TensorDataset(features.flip(0), labels.flip(0)), batch_size=7)
    with pytest.raises(ValueError, match="labels of batch 0: .* is the loader shuffled"):
        index.refresh_from(model, wrong, progress=False)
    assert model.training
    short = DataLoader(TensorDataset(features[:14], labels[:14]), batch_size=7)
    with pytest.raises(ValueError, match="loader: expected 40 samples, got 14"):
        index.refresh_from(model, short, progress=False)


def test_going_on_from_a_file(index, tmp_path):
    index.update_losses(torch.arange(9), torch.arange(9.0))
    index.save(tmp_path / "clusters.pt")
    loaded = ClusterIndex.load(tmp_path / "clusters.pt")
    for one in (index, loaded):
        one.refresh(labelled(5)[0])
    for name, value in index.state_dict().items():
        other = loaded.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_files_that_are_none(index, tmp_path):
    path = tmp_path / "clusters.pt"
    torch.save({"format": "else"}, path)
    with pytest.raises(ValueError, match="expected a file of clusters"):
        ClusterIndex.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a file of clusters"):
        ClusterIndex.load(path)
    state = {"format": "facelt_ext.ClusterIndex", "version": 2, **index.state_dict()}
    torch.save({**state, "version": 3}, path)
    with pytest.raises(ValueError, match="expected version 2, got 3"):
        ClusterIndex.load(path)
    with pytest.raises(ValueError, match="expected seed 0, got 3"):
        ClusterIndex(index.labels, cluster_size=5).load_state_dict(index.state_dict())
    with pytest.raises(ValueError, match="expected the same labels"):
        ClusterIndex(index.labels + 1, cluster_size=5, seed=3).load_state_dict(index.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: ClusterIndex([1, 2]), TypeError, "labels: expected a tensor"),
        (lambda i: ClusterIndex(torch.ones(2)), TypeError, "labels: expected an integer"),
        (lambda i: ClusterIndex(i.labels[:0]), ValueError, "labels: expected shape"),
        (lambda i: ClusterIndex(i.labels, cluster_size=0), ValueError, "cluster_size"),
        (lambda i: ClusterIndex(i.labels, seed=-1), ValueError, "seed: expected at least 0"),
        (lambda i: i.refresh(torch.ones(39, 2)), ValueError, "expected 40 rows, .* got 39"),
        (lambda i: i.refresh(torch.ones(40, 2) / 0), ValueError, "features: expected finite"),
        (lambda i: i.members(8), ValueError, r"cluster: expected a number in \[0, 8\), got 8"),
        (lambda i: i.clusters_of(4), ValueError, "label: expected one of the 4 classes, got 4"),
        (
            lambda i: i.update_losses(torch.tensor([40]), torch.ones(1)),
            ValueError,
            r"samples: expected numbers in \[0, 40\), got 40",
        ),
        (
            lambda i: i.update_losses(torch.tensor([4]), torch.ones(2)),
            ValueError,
            r"losses: expected shape \[1\]",
        ),
        (
            lambda i: i.update_losses(torch.tensor([4]), torch.tensor([1])),
            TypeError,
            "losses: expected a floating dtype, got torch.int64",
        ),
        (
            lambda i: i.update_losses(torch.tensor([4]), None),
            TypeError,
            "losses: expected a tensor, got None.*DataParallel",
        ),
        (lambda i: ClusterIndex(i.labels, ignore_index="a"), TypeError, "ignore_index: expected"),
        (lambda i: ClusterIndex(i.labels * 0 - 100), ValueError, "labels: .* ignored -100"),
    ],
)
def test_wrong_arguments(index, call, error, message):
    with pytest.raises(error, match=message):
        call(index)
