"""PKSampler: the properties its docstring promises, over skewed label sets."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from facelt_ext.samplers import PKSampler


@st.composite
def skewed_labels(draw: st.DrawFn, min_classes: int = 1) -> np.ndarray:
    """Shuffled labels of a few rich and many poor classes, with gaps and negative values."""
    names = draw(st.lists(st.integers(-99, 99), min_size=min_classes, max_size=9, unique=True))
    sizes = [draw(st.sampled_from([1, 1, 2, 3, 4, 5, 12])) for _ in names]
    labels = np.repeat(np.array(names), sizes)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)


@st.composite
def drawn_sampler_arguments(draw: st.DrawFn) -> tuple[np.ndarray, int, dict]:
    """Labels, a number of replicas, and the other arguments of a PKSampler that fit them."""
    replicas = draw(st.integers(1, 3))
    labels = draw(skewed_labels(min_classes=replicas))
    most = len(np.unique(labels)) // replicas
    arguments = {
        "classes_per_batch": draw(st.integers(1, most)),
        "samples_per_class": draw(st.integers(1, 7)),
        "num_batches": draw(st.none() | st.integers(1, 12)),
        "seed": draw(st.integers(0, 9)),
    }
    return labels, replicas, arguments


def steps_of_all_ranks(labels: np.ndarray, replicas: int, arguments: dict) -> list[list[list[int]]]:
    """The batches of one epoch, as ``[step][rank]``."""
    ranks = [
        list(PKSampler(labels, num_replicas=replicas, rank=rank, **arguments))
        for rank in range(replicas)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


def spread(counts: Counter, members: np.ndarray) -> int:
    """How much more often the commonest of ``members`` was counted than the rarest."""
    numbers = [counts[member] for member in members.tolist()]
    return max(numbers) - min(numbers)


@settings(deadline=None)
@given(drawn_sampler_arguments())
def test_batch_has_k_samples_of_each_of_p_classes(drawn):
    labels, replicas, arguments = drawn
    for step in steps_of_all_ranks(labels, replicas, arguments):
        for batch in step:
            counts = Counter(labels[batch].tolist())
            assert len(counts) == arguments["classes_per_batch"]
            assert set(counts.values()) == {arguments["samples_per_class"]}


@settings(deadline=None)
@given(drawn_sampler_arguments())
def test_samples_of_a_class_occur_equally_often_in_a_batch_within_one(drawn):
    labels, replicas, arguments = drawn
    for step in steps_of_all_ranks(labels, replicas, arguments):
        for batch in step:
            counts = Counter(batch)
            for label in np.unique(labels[batch]):
                assert spread(counts, np.flatnonzero(labels == label)) <= 1


@settings(deadline=None)
@given(drawn_sampler_arguments())
def test_every_class_comes_up_before_any_comes_up_twice(drawn):
    labels, replicas, arguments = drawn
    counts = Counter()
    for step in steps_of_all_ranks(labels, replicas, arguments):
        for batch in step:
            counts.update(np.unique(labels[batch]).tolist())
        assert spread(counts, np.unique(labels)) <= 1


@settings(deadline=None)
@given(drawn_sampler_arguments())
def test_every_sample_of_a_class_comes_up_before_any_comes_up_twice_as_often(drawn):
    labels, replicas, arguments = drawn
    counts = Counter()
    for step in steps_of_all_ranks(labels, replicas, arguments):
        for batch in step:
            counts.update(batch)
        for label in np.unique(labels):
            assert spread(counts, np.flatnonzero(labels == label)) <= 1


@settings(deadline=None)
@given(drawn_sampler_arguments())
def test_ranks_take_the_parts_of_one_common_sequence_of_disjoint_classes(drawn):
    labels, replicas, arguments = drawn
    steps = steps_of_all_ranks(labels, replicas, arguments)
    alone = arguments | {"classes_per_batch": replicas * arguments["classes_per_batch"]}
    together = [list(chain.from_iterable(step)) for step in steps]
    assert together == list(PKSampler(labels, num_replicas=1, rank=0, **alone))
    for batch in together:
        assert len(np.unique(labels[batch])) == alone["classes_per_batch"]


@settings(deadline=None)
@given(drawn_sampler_arguments())
def test_length_is_what_an_epoch_yields_on_every_rank(drawn):
    labels, replicas, arguments = drawn
    per_step = replicas * arguments["classes_per_batch"] * arguments["samples_per_class"]
    wanted = arguments["num_batches"] or int(np.ceil(len(labels) / per_step))
    for rank in range(replicas):
        sampler = PKSampler(labels, num_replicas=replicas, rank=rank, **arguments)
        assert len(sampler) == len(list(sampler)) == wanted


@settings(deadline=None)
@given(drawn_sampler_arguments(), st.integers(0, 5))
def test_seed_and_epoch_alone_decide_the_batches(drawn, epoch):
    labels, _, arguments = drawn
    first, second = (PKSampler(labels, **arguments) for _ in range(2))
    first.set_epoch(epoch)
    np.random.seed(0)
    torch.manual_seed(0)
    batches = list(first)
    np.random.seed(1)
    torch.manual_seed(1)
    list(second)
    second.set_epoch(epoch)
    assert batches == list(first) == list(second)


def test_another_epoch_or_seed_draws_other_batches():
    labels = np.repeat(np.arange(20), 10)
    drawn = []
    for seed in range(5):
        sampler = PKSampler(labels, 4, 4, seed=seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            drawn.append(str(list(sampler)))
    assert len(set(drawn)) == 25


def test_global_random_state_is_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(PKSampler([0, 0, 1, 1, 2], 2, 3))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_classes_are_drawn_uniformly():
    labels = [0] * 50 + [1] * 5 + list(range(2, 10))
    sampler = PKSampler(labels, 3, 1, num_batches=1)
    counts = Counter()
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        counts.update(labels[index] for index in next(iter(sampler)))
    # 600 draws of each class are expected; the standard deviation is 20.5.
    assert all(500 < counts[label] < 700 for label in range(10))


@pytest.mark.parametrize(
    "labels",
    [
        (5, -3, 5, 900, -3, 5),
        np.array([5, -3, 5, 900, -3, 5], dtype=np.int16),
        torch.tensor([5, -3, 5, 900, -3, 5]),
        torch.tensor([5, -3, 5, 900, -3, 5], dtype=torch.int32),
    ],
)
def test_any_kind_of_integer_labels_gives_the_same_batches(labels):
    assert list(PKSampler(labels, 2, 2)) == list(PKSampler([5, -3, 5, 900, -3, 5], 2, 2))


def test_data_loader_delivers_the_batches():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    dataset = torch.utils.data.TensorDataset(torch.arange(6), labels)
    sampler = PKSampler(labels, 2, 4, num_batches=5)
    delivered = [indices.tolist() for indices, _ in DataLoader(dataset, batch_sampler=sampler)]
    assert delivered == list(sampler)


def test_replicas_and_rank_default_to_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    sampler = PKSampler(list(range(9)), 2, 1)
    assert (sampler.num_replicas, sampler.rank) == (3, 2)
    assert list(sampler) == list(PKSampler(list(range(9)), 2, 1, num_replicas=3, rank=2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": []}, ValueError, "labels must hold at least one"),
        ({"labels": torch.empty(0, dtype=torch.int64)}, ValueError, "labels must hold at least"),
        ({"labels": [0.0, 1.0]}, TypeError, "labels must be .*integers, got list of float64"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels must be integers.*float32"),
        ({"labels": torch.tensor([True, False])}, TypeError, "labels must be integers.*bool"),
        ({"labels": ["a", "b"]}, TypeError, "labels must be .*integers"),
        ({"labels": iter([0, 1])}, TypeError, "labels must be .*integers"),
        ({"labels": [[0, 1], [2, 3]]}, ValueError, r"labels must be one-dim.*\(2, 2\)"),
        ({"labels": [[0, 1], [2]]}, ValueError, "labels must be one-dimensional"),
        ({"classes_per_batch": 0}, ValueError, "classes_per_batch must be at least 1, got 0"),
        ({"classes_per_batch": 4}, ValueError, "classes_per_batch must be at most .* 3 / 1, got 4"),
        (
            {"classes_per_batch": 2, "num_replicas": 2, "rank": 0},
            ValueError,
            "classes_per_batch must be at most .* 3 / 2, got 2",
        ),
        ({"classes_per_batch": 2.0}, TypeError, "classes_per_batch must be an integer, got 2.0"),
        ({"samples_per_class": -1}, ValueError, "samples_per_class must be at least 1, got -1"),
        ({"samples_per_class": True}, TypeError, "samples_per_class must be an integer, got True"),
        ({"num_batches": 0}, ValueError, "num_batches must be at least 1, got 0"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be at least 1, got 0"),
        ({"rank": 1}, ValueError, r"rank must be in .*\[0, 1\), got 1"),
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_is_wanted(changes, error, message):
    arguments = {"labels": [0, 0, 1, 2], "classes_per_batch": 2, "samples_per_class": 2} | changes
    with pytest.raises(error, match=message):
        PKSampler(**arguments)


def test_a_wrong_epoch_is_named():
    sampler = PKSampler([0, 1], 2, 1)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(TypeError, match=r"epoch must be an integer, got 0\.5"):
        sampler.set_epoch(0.5)
