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
    first.set_epoch(epoch)
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
    assert delivered == list(PKSampler(labels, 2, 4, num_batches=5))


@settings(deadline=None)
@given(drawn_sampler_arguments(), st.integers(0, 9))
def test_ignored_samples_are_as_if_they_were_not_there(drawn, seed):
    labels, _, arguments = drawn
    places = np.random.default_rng(seed).integers(0, len(labels) + 1, size=5)
    whole = np.insert(labels.astype(np.int64), places, -100)
    kept = np.flatnonzero(whole != -100)
    expected = [kept[batch].tolist() for batch in PKSampler(labels, **arguments)]
    assert list(PKSampler(whole, **arguments)) == expected
    other = np.where(whole == -100, 555, whole)
    assert list(PKSampler(other, ignore_index=555, **arguments)) == expected


def test_without_ignore_index_every_label_is_a_class():
    labels = [0, -100, 0, -100]
    batches = list(PKSampler(labels, 2, 2, ignore_index=None))
    assert {index for batch in batches for index in batch} == {0, 1, 2, 3}


def test_samples_are_counted_without_those_ignored():
    assert len(PKSampler([0] * 8 + [-100] * 8, 1, 2)) == 4
    assert len(PKSampler([0] * 8 + [-100] * 8, 1, 2, ignore_index=None)) == 8


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": []}, ValueError, "labels: expected at least one label, got none"),
        ({"labels": torch.empty(0, dtype=torch.int64)}, ValueError, "labels: expected at least"),
        ({"labels": [0.0, 1.0]}, TypeError, "labels: expected integers, got list of float64"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels: .*, got torch.float32"),
        ({"labels": torch.tensor([True, False])}, TypeError, "labels: .* got torch.bool"),
        ({"labels": np.array([True, False])}, TypeError, "labels: expected integers, .* bool"),
        ({"labels": ["a", "b"]}, TypeError, "labels: expected integers"),
        ({"labels": [0, None]}, TypeError, "labels: expected integers, got list of object"),
        ({"labels": [0, 2**70]}, TypeError, "labels: expected integers, got list of object"),
        ({"labels": None}, TypeError, "labels: expected integers, got NoneType"),
        ({"labels": {0: 1}}, TypeError, "labels: expected integers, got dict"),
        ({"labels": iter([0, 1])}, TypeError, "labels: expected integers"),
        ({"labels": 3}, ValueError, r"labels: expected shape \[N\], got \[\]"),
        ({"labels": [[0, 1], [2, 3]]}, ValueError, r"labels: expected shape \[N\], got \[2, 2\]"),
        ({"labels": [[0, 1], [2]]}, ValueError, r"labels: expected shape \[N\], got list"),
        ({"labels": torch.zeros(2, 2).long()}, ValueError, r"labels: expected shape \[N\], got"),
        ({"labels": torch.zeros(4, dtype=torch.uint16)}, TypeError, "labels: .* torch.uint16"),
        ({"labels": torch.zeros(4).to_sparse()}, TypeError, "labels: expected a dense tensor"),
        ({"labels": torch.zeros(4, device="meta").long()}, TypeError, "labels: .* meta"),
        ({"labels": [torch.zeros((), device="meta")] * 4}, ValueError, "labels: .* meta"),
        (
            {"labels": torch.nested.nested_tensor([torch.zeros(2).long()])},
            TypeError,
            "labels: expected a dense tensor, got a nested one",
        ),
        (
            {"labels": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)},
            TypeError,
            "labels: expected an integer dtype, got torch.qint8",
        ),
        ({"labels": [-100] * 3}, ValueError, "labels: .* ignore_index, got 3 of -100"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"classes_per_batch": 0}, ValueError, "classes_per_batch: expected at least 1, got 0"),
        ({"classes_per_batch": 4}, ValueError, "classes_per_batch: expected at most 3 / 1.* got 4"),
        (
            {"classes_per_batch": 2, "num_replicas": 2, "rank": 0},
            ValueError,
            "classes_per_batch: expected at most 3 / 2, .* got 2",
        ),
        ({"classes_per_batch": 2.0}, TypeError, "classes_per_batch: expected an int, got float"),
        ({"samples_per_class": -1}, ValueError, "samples_per_class: expected at least 1, got -1"),
        ({"samples_per_class": True}, TypeError, "samples_per_class: expected an int, got bool"),
        (
            {"samples_per_class": 2**23 + 1},
            ValueError,
            "samples_per_class: expected a batch of at most 16777216 indices, got 2 x 8388609",
        ),
        ({"num_batches": 0}, ValueError, "num_batches: expected at least 1, got 0"),
        ({"num_replicas": 0}, ValueError, "num_replicas: expected at least 1, got 0"),
        (
            {"num_replicas": 1, "rank": 1},
            ValueError,
            r"rank: expected a number in \[0, 1\).* got 1",
        ),
        ({"rank": -1}, ValueError, "rank: expected at least 0, got -1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": "0"}, TypeError, "seed: expected an int, got str"),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_is_wanted(changes, error, message):
    arguments = {"labels": [0, 0, 1, 2], "classes_per_batch": 2, "samples_per_class": 2} | changes
    with pytest.raises(error, match=message):
        PKSampler(**arguments)
