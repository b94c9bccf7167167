"""What all batch samplers share: epochs, state, ranks, surroundings, places in a loader."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from ignite.distributed.auto import DistributedProxySampler
from sampler_cases import LABELS, NUM_BATCHES, SAMPLERS, Make, Numbers, clusters, epoch_of
from test_surroundings import default_dtype
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from facelt_ext.clusters import ClusterIndex
from facelt_ext.samplers import ClusterBatchSampler, PKSampler


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest) -> Make:
    return SAMPLERS[request.param]


def test_each_iteration_draws_the_next_epoch(make):
    sampler = make()
    epochs = [list(sampler) for _ in range(4)]
    assert epochs == [epoch_of(make, epoch) for epoch in range(4)]
    assert len(set(map(str, epochs))) == 4
    assert all(len(epoch) == len(sampler) == NUM_BATCHES for epoch in epochs)


@pytest.mark.parametrize("drawn", [1, 3, NUM_BATCHES])
def test_a_left_epoch_is_followed_by_the_next(make, drawn):
    sampler = make()
    left = iter(sampler)
    assert list(islice(left, drawn)) == epoch_of(make, 0)[:drawn]
    assert list(sampler) == epoch_of(make, 1)
    assert list(left) == epoch_of(make, 0)[drawn:]
    assert sampler.state_dict() == {"epoch": 2, "drawn": 0}
    assert list(sampler) == epoch_of(make, 2)


def test_an_iterator_that_drew_nothing_begins_no_epoch(make):
    sampler = make()
    first, second = iter(sampler), iter(sampler)
    pairs = [*zip(first, second, strict=True)]
    assert pairs == [*zip(epoch_of(make, 0), epoch_of(make, 0), strict=True)]
    iter(sampler), iter(sampler)
    assert list(sampler) == epoch_of(make, 1)


@pytest.mark.parametrize("drawn", [0, 2, NUM_BATCHES])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_set_epoch_chooses_the_epoch_of_a_fresh_and_of_a_worn_sampler(make, epoch, drawn):
    sampler = make()
    for _ in range(2):
        list(islice(sampler, drawn))
        sampler.set_epoch(epoch)
        assert sampler.epoch == epoch and sampler.state_dict() == {"epoch": epoch, "drawn": 0}
        assert list(sampler) == epoch_of(make, epoch)
    assert list(sampler) == epoch_of(make, epoch + 1)


def test_an_epoch_told_while_another_is_drawn_is_that_of_the_next_iteration(make):
    sampler = make()
    batches = iter(sampler)
    begun = [next(batches)]
    sampler.set_epoch(4)
    assert begun + list(batches) == epoch_of(make, 0)
    assert list(sampler) == epoch_of(make, 4)


def test_an_iterator_that_has_not_begun_follows_set_epoch(make):
    sampler = make()
    batches = iter(sampler)
    sampler.set_epoch(3)
    assert list(batches) == epoch_of(make, 3)


def test_the_epoch_being_drawn_may_be_told_again(make):
    """As Lightning does when workers have begun to draw."""
    sampler = make()
    batches = iter(sampler)
    next(batches)
    sampler.set_epoch(0)
    next(batches)
    assert sampler.state_dict() == {"epoch": 0, "drawn": 2}


def test_trainers_reach_set_epoch_where_they_look_for_it(make):
    loader = DataLoader(Numbers(), batch_sampler=make())
    loader.batch_sampler.sampler.set_epoch(3)
    assert [batch["index"].tolist() for batch in loader] == epoch_of(make, 3)


def epochs_of(sampler: PKSampler | ClusterBatchSampler) -> Iterator[list[int]]:
    for _ in range(4):
        yield from sampler


@pytest.mark.parametrize("stop", range(2 * NUM_BATCHES + 1))
@pytest.mark.parametrize("move", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_state_goes_on_where_it_was_taken(make, stop, move):
    sampler, resumed = make(), make()
    begun = list(islice(epochs_of(sampler), stop))
    resumed.load_state_dict(move(sampler.state_dict()))
    rest = list(islice(epochs_of(resumed), 2 * NUM_BATCHES - stop))
    assert begun + rest == epoch_of(make, 0) + epoch_of(make, 1)
    assert move(sampler).state_dict() == sampler.state_dict()


@pytest.mark.parametrize("stops", [[2, 3, 4], [4, 4], [0, 5]])
def test_an_epoch_stopped_again_and_again(make, stops):
    found, state = [], make().state_dict()
    for stop in [*stops, 5]:
        sampler = make()
        sampler.load_state_dict(state)
        sampler.set_epoch(0)  # of the same epoch, it changes nothing
        found += islice(sampler, max(0, stop - state["drawn"]))
        state = {"epoch": 0, "drawn": stop}
    assert found == epoch_of(make, 0)


def test_a_restored_epoch_may_be_left_for_another(make):
    sampler = make()
    sampler.load_state_dict({"epoch": 2, "drawn": 3})
    assert list(sampler) == epoch_of(make, 2)[3:]
    assert list(sampler) == epoch_of(make, 3)
    sampler.load_state_dict({"epoch": 2, "drawn": 3})
    sampler.set_epoch(1)
    assert list(sampler) == epoch_of(make, 1)


def test_a_finished_epoch_has_nothing_left(make):
    sampler = make()
    sampler.load_state_dict({"epoch": 1, "drawn": NUM_BATCHES})
    assert list(sampler) == []
    assert list(sampler) == epoch_of(make, 2)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([0, 0], TypeError, "state: expected a dict, got list"),
        ({"epoch": 0}, ValueError, r"state: expected the keys epoch and drawn, got \['epoch'\]"),
        ({"epoch": -1, "drawn": 0}, ValueError, "state epoch: expected at least 0, got -1"),
        ({"epoch": 0, "drawn": -1}, ValueError, "state drawn: expected at least 0, got -1"),
        ({"epoch": 0, "drawn": 0.0}, TypeError, "state drawn: expected an int, got float"),
        ({"epoch": 0, "drawn": 6}, ValueError, "state drawn: expected at most 5, .* got 6"),
        ({"epoch": 0, "drawn": 2**62}, ValueError, "state drawn: expected at most 5"),
        ({"epoch": 2**70, "drawn": 0}, ValueError, "state epoch: expected"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(make, state, error, message):
    sampler = make()
    with pytest.raises(error, match=message):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"epoch": 0, "drawn": 0}


@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (-1, ValueError, "epoch: expected at least 0, got -1"),
        (0.5, TypeError, "epoch: expected an int, got float"),
        (2**70, ValueError, "epoch: expected an integer of 64 bits"),
    ],
)
def test_a_wrong_epoch_is_named(make, epoch, error, message):
    with pytest.raises(error, match=message):
        make().set_epoch(epoch)


def test_states_of_what_draws_ahead_are_documented(make):
    words = type(make()).state_dict.__doc__
    assert "workers" in words and "StatefulDataLoader" in words


def test_how_it_goes_with_frameworks_is_documented(make):
    words = " ".join(type(make()).__doc__.split())
    for word in ("use_distributed_sampler=False", "``accelerate``", "Hugging Face Trainer"):
        assert word in words


def test_an_error_while_drawing_leaves_the_epoch_to_be_drawn():
    index = ClusterIndex(LABELS, cluster_size=2)
    sampler = ClusterBatchSampler(
        index, clusters_per_batch=8, samples_per_cluster=2, num_batches=NUM_BATCHES, seed=1
    )
    with pytest.raises(RuntimeError, match="refreshed"):
        next(iter(sampler))
    index.load_state_dict(clusters().state_dict())
    assert list(sampler) == epoch_of(SAMPLERS["ClusterBatchSampler"], 0)


def world_of(monkeypatch: pytest.MonkeyPatch, size: int, rank: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


def test_ranks_are_those_of_the_time_of_iteration(make, monkeypatch):
    sampler, shared = make(), make(num_batches=None)
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    alone = len(shared)
    assert list(sampler) == epoch_of(make, 0)
    world_of(monkeypatch, 2, 1)
    assert (sampler.num_replicas, sampler.rank) == (2, 1)
    assert list(sampler) == epoch_of(make, 1, 2, 1)
    assert len(list(shared)) == len(shared) == math.ceil(alone / 2)


def test_given_ranks_win(make, monkeypatch):
    world_of(monkeypatch, 3, 2)
    sampler = make(num_replicas=2, rank=1)
    assert (sampler.num_replicas, sampler.rank) == (2, 1)
    assert list(sampler) == epoch_of(make, 0, 2, 1)
    assert make(num_replicas=1, rank=0).num_replicas == 1


def test_a_rank_outside_the_world_is_named_as_soon_as_the_world_is_known(make, monkeypatch):
    message = r"rank: expected a number in \[0, 2\), below num_replicas, got 2"
    with pytest.raises(ValueError, match=message):
        make(num_replicas=2, rank=2)
    sampler = make(rank=2)
    world_of(monkeypatch, 2, 0)
    for call in (iter, len, lambda _: make(rank=2)):
        with pytest.raises(ValueError, match=message):
            call(sampler)


def test_too_few_classes_for_the_world_are_named_as_soon_as_it_is_known(monkeypatch):
    message = "classes_per_batch: expected at most 12 / 5, the number of classes / num_replicas"
    with pytest.raises(ValueError, match=message):
        PKSampler(LABELS, 3, 2, num_replicas=5, rank=0)
    sampler = PKSampler(LABELS, 3, 2)
    world_of(monkeypatch, 5, 0)
    for call in (iter, len, lambda _: PKSampler(LABELS, 3, 2)):
        with pytest.raises(ValueError, match=message):
            call(sampler)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_surroundings_change_no_batch(make, surroundings):
    options = {"num_batches": 200}
    clusters()
    expected = list(make(**options))
    with SURROUNDINGS[surroundings]():
        assert list(make(**options)) == expected


NUMBERS = sorted(
    (sampler, name)
    for sampler, make in SAMPLERS.items()
    for name, parameter in inspect.signature(type(make()).__init__).parameters.items()
    if "int" in str(parameter.annotation) and name != "labels"
)


@pytest.mark.parametrize(("sampler", "name"), NUMBERS)
def test_numbers_of_numpy_are_numbers(sampler, name):
    value = {"num_replicas": 2, "rank": 1, "ignore_index": 3}.get(name, 2)
    more = {"rank": {"num_replicas": 2}, "num_replicas": {"rank": 0}}.get(name, {})
    make = SAMPLERS[sampler]
    assert list(make(**{name: np.int64(value)}, **more)) == list(make(**{name: value}, **more))


@pytest.mark.parametrize("value", [2.0, True, "2", [2], torch.tensor(2), object()])
@pytest.mark.parametrize(("sampler", "name"), NUMBERS)
def test_what_is_no_number_is_named(sampler, name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected an int, got"):
        SAMPLERS[sampler](**{name: value})


@pytest.mark.parametrize("value", [2**62, 2**70, -(2**62), -(2**70), -1])
@pytest.mark.parametrize(("sampler", "name"), NUMBERS)
def test_numbers_out_of_any_range_are_named_at_once(sampler, name, value):
    if name == "seed" and value == 2**62 or name == "ignore_index" and abs(value) < 2**63:
        assert list(SAMPLERS[sampler](**{name: value}))
        return
    with pytest.raises(ValueError, match=f"^{name}: expected|num_replicas"):
        iter(SAMPLERS[sampler](**{name: value}))


@pytest.mark.parametrize("value", [1, None, "no", torch.tensor(True)])
def test_what_is_no_flag_is_named(value):
    with pytest.raises(TypeError, match="^uniform_query: expected a bool, got"):
        SAMPLERS["ClusterBatchSampler"](uniform_query=value)


def loader(**options: object) -> Callable[[object], DataLoader]:
    return lambda sampler: DataLoader(Numbers(), sampler=sampler, **options)


WRONG_PLACES: dict[str, Callable[[object], object]] = {
    "loader": loader(batch_size=4),
    "loader that drops the last": loader(batch_size=4, drop_last=True),
    "loader with workers": loader(batch_size=4, num_workers=1),
    "loader of tensors": lambda sampler: DataLoader(TensorDataset(LABELS), 4, sampler=sampler),
    "stateful loader": lambda sampler: StatefulDataLoader(Numbers(), 4, sampler=sampler),
    "batch sampler": lambda sampler: BatchSampler(sampler, 4, drop_last=False),
    "ignite": lambda sampler: DistributedProxySampler(sampler, num_replicas=2, rank=0),
}


@pytest.mark.parametrize("place", WRONG_PLACES)
def test_a_sampler_of_batches_in_the_place_of_one_of_samples_is_named(make, place):
    with pytest.raises(TypeError, match=r"DataLoader\(dataset, batch_sampler="):
        next(iter(WRONG_PLACES[place](make())))


class Owner:
    """A trainer of one's own that keeps its sampler under a name of torch's."""

    def __init__(self, sampler: PKSampler | ClusterBatchSampler) -> None:
        self.sampler = self.batch_sampler = sampler

    def batches(self) -> list[list[int]]:
        return list(self.sampler)


def in_a_thread(sampler: PKSampler | ClusterBatchSampler) -> list[list[int]]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(list, sampler).result()


RIGHT_PLACES: dict[str, Callable[[object], list[list[int]]]] = {
    "whole batches as samples": lambda sampler: [
        batch["index"]
        for batch in DataLoader(Numbers(), sampler=sampler, batch_size=None, collate_fn=None)
    ],
    "own trainer": lambda sampler: Owner(sampler).batches(),
    "thread": in_a_thread,
}


@pytest.mark.parametrize("place", RIGHT_PLACES)
def test_other_places_are_right(make, place):
    assert RIGHT_PLACES[place](make()) == epoch_of(make, 0)
