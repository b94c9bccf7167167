"""Batches of a hard cluster and its neighbours, against the rule in literal loops."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from facelt_ext import CLMLELoss
from facelt_ext.clusters import ClusterIndex
from facelt_ext.samplers import ClusterBatchSampler

SIZES = {7: 23, -3: 4, 2: 1, 9: 12, 0: 11}


def clusters_of(sizes: dict[int, int], size: int = 5, seed: int = 0) -> ClusterIndex:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in sizes.items()])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    index = ClusterIndex(labels, cluster_size=size)
    index.refresh(torch.randn(len(labels), 4, generator=generator))
    return index


def batch_clusters(index: ClusterIndex, batch: list[int], size: int) -> list[int]:
    """The clusters of a batch, after seeing that it is made of whole ones."""
    own = index.assignments[batch].view(-1, size)
    assert (own == own[:, :1]).all()
    return own[:, 0].tolist()


def literal_neighbours(index: ClusterIndex, query: int, count: int) -> list[int]:
    centroids = index.centroids.double().tolist()
    near = sorted(
        (m for m in range(len(centroids)) if m != query),
        key=lambda m: -sum(a * b for a, b in zip(centroids[m], centroids[query], strict=True)),
    )
    chosen = near[:count]
    label = index.cluster_class[query]
    for wanted in (True, False):
        suited = [m for m in near if (index.cluster_class[m] == label) == wanted]
        if suited and not any(m in suited for m in chosen):
            chosen[-1] = suited[0]
    return chosen


@pytest.mark.parametrize("clusters_per_batch", [2, 3, 4, 10])
def test_batches_follow_the_rule(clusters_per_batch):
    index = clusters_of(SIZES)
    generator = torch.Generator().manual_seed(1)
    seen = torch.randperm(51, generator=generator)[:40]
    index.update_losses(seen, torch.rand(40, generator=generator))
    sampler = ClusterBatchSampler(
        index, clusters_per_batch=clusters_per_batch, samples_per_cluster=3, num_batches=200
    )
    queries = set()
    for batch in sampler:
        query, *others = batch_clusters(index, batch, 3)
        queries.add(query)
        assert others == literal_neighbours(index, query, clusters_per_batch - 1)
    hardest = set()
    for label in SIZES:
        losses = {m: index.cluster_loss(m) for m in index.clusters_of(label)}
        hardest.add(next(m for m, loss in losses.items() if loss == max(losses.values())))
    assert queries == hardest


def test_classes_are_drawn_uniformly_and_a_uniform_query_is_any_cluster():
    index = clusters_of(SIZES)
    sampler = ClusterBatchSampler(
        index, clusters_per_batch=3, samples_per_cluster=1, num_batches=2000, uniform_query=True
    )
    queries = torch.tensor([batch_clusters(index, batch, 1)[0] for batch in sampler])
    counts = queries.bincount(minlength=index.num_clusters).double()
    expected = torch.tensor(
        [400 / len(index.clusters_of(int(label))) for label in index.cluster_class]
    ).double()
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_samples_are_distinct_where_there_are_enough():
    index = clusters_of(SIZES)
    for batch in ClusterBatchSampler(index, clusters_per_batch=10, samples_per_cluster=4):
        for samples in torch.tensor(batch).view(10, 4):
            own = index.members(int(index.assignments[samples[0]]))
            times = samples.bincount(minlength=51)[own]
            assert times.max() - times.min() <= 1 and times.sum() == 4


def test_all_samples_of_a_cluster_come_up():
    index = clusters_of({1: 9, 2: 9}, size=9)
    sampler = ClusterBatchSampler(
        index, clusters_per_batch=2, samples_per_cluster=2, num_batches=60
    )
    assert {sample for batch in sampler for sample in batch} == set(range(18))


@pytest.mark.parametrize("sizes", [{5: 20}, {5: 4, 6: 4}])
def test_one_class_and_no_other_cluster_of_the_class(sizes):
    index = clusters_of(sizes)
    sampler = ClusterBatchSampler(index, clusters_per_batch=2, samples_per_cluster=4)
    for batch in sampler:
        assert len(set(batch_clusters(index, batch, 4))) == 2


def test_ties_go_to_the_lower_cluster():
    labels = torch.arange(6)
    index = ClusterIndex(labels, cluster_size=1)
    index.refresh(torch.tensor([[1.0, 0.0]]).repeat(6, 1))
    for batch in ClusterBatchSampler(
        index, clusters_per_batch=4, samples_per_cluster=1, num_batches=30
    ):
        assert batch[1:] == [m for m in range(6) if m != batch[0]][:3]


def test_epochs_seeds_and_ranks_differ_and_repeat():
    index = clusters_of(SIZES)

    def batches(epoch: int = 0, **options: int) -> list[list[int]]:
        sampler = ClusterBatchSampler(
            index, clusters_per_batch=3, samples_per_cluster=2, num_batches=9, **options
        )
        sampler.set_epoch(epoch)
        assert len(sampler) == 9
        return list(sampler)

    assert batches() == batches() and len(batches()) == 9
    different = [batches(), batches(1), batches(seed=1), batches(num_replicas=2, rank=1)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
    default = ClusterBatchSampler(
        index, clusters_per_batch=3, samples_per_cluster=2, num_replicas=2, rank=0
    )
    assert len(default) == 5


def trained(path, stop: tuple[int, int] | None) -> tuple[list[list[int]], torch.Tensor]:
    """Two epochs of training, which stop after a batch and go on from files."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(torch.tensor([20, 10, 6, 3, 1]))
    images = torch.randn(40, 6, generator=generator)
    data = TensorDataset(images, labels, torch.arange(40))
    model = torch.nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    index = ClusterIndex(labels, cluster_size=4)
    index.refresh_from(model, DataLoader(data, batch_size=16), progress=False)
    options = {"clusters_per_batch": 3, "samples_per_cluster": 4, "num_batches": 8}
    sampler = ClusterBatchSampler(index, **options)
    loss = CLMLELoss(0.5, 0.3, samples_per_cluster=4)
    seen, epoch, stopped = [], 0, False
    while epoch < 2:
        sampler.set_epoch(epoch)
        for number, (x, y, samples) in enumerate(DataLoader(data, batch_sampler=sampler)):
            seen.append(samples.tolist())
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            index.update_losses(samples, loss.sample_losses)
            if len(seen) % 5 == 0:
                index.refresh_from(model, DataLoader(data, batch_size=16), progress=False)
            if (epoch, number) == stop and not stopped:
                stopped = True
                index.save(path)
                state = sampler.state_dict()
                index = ClusterIndex.load(path)
                sampler = ClusterBatchSampler(index, **options)
                sampler.load_state_dict(state)
                break
        else:
            epoch += 1
    return seen, model.weight.detach()


@pytest.mark.parametrize("stop", [(0, 2), (0, 4), (1, 3), (1, 7)])
def test_going_on_in_the_middle_gives_the_same_batches(tmp_path, stop):
    batches, weight = trained(tmp_path / "clusters.pt", None)
    again, same = trained(tmp_path / "clusters.pt", stop)
    assert again == batches and len(batches) == 16
    assert torch.equal(same, weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"clusters_per_batch": 12},
            ValueError,
            "clusters_per_batch: expected at most 10, .* got 12",
        ),
        ({"clusters_per_batch": 1}, ValueError, "clusters_per_batch: expected at least 2, got 1"),
        ({"samples_per_cluster": 0}, ValueError, "samples_per_cluster: expected at least 1, got 0"),
        ({"num_batches": 0}, ValueError, "num_batches: expected at least 1"),
        (
            {"num_replicas": 2, "rank": 2},
            ValueError,
            r"rank: expected a number in \[0, 2\), .* got 2",
        ),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        ClusterBatchSampler(clusters_of(SIZES), **{"clusters_per_batch": 3, **options})


def test_clusters_have_to_be_refreshed_first():
    with pytest.raises(TypeError, match="clusters: expected a ClusterIndex, got list"):
        ClusterBatchSampler([1])
    sampler = ClusterBatchSampler(
        ClusterIndex(torch.arange(9), cluster_size=1), clusters_per_batch=3
    )
    with pytest.raises(RuntimeError, match="refresh"):
        next(iter(sampler))
