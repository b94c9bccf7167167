"""States of clusters and super classes: what they survive, what is refused, and their sizes."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from public_calls import content, made
from torch import Tensor

from facelt_ext import evaluation
from facelt_ext.aggregation import SuperClasses
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.clusters import ClusterIndex

LABELS = torch.tensor([7] * 9 + [-100] * 2 + [3] * 4 + [12] * 6)


def clusters(refreshes: int = 2) -> ClusterIndex:
    return copy.deepcopy(_clusters(refreshes))


@functools.cache
def _clusters(refreshes: int) -> ClusterIndex:
    index = ClusterIndex(LABELS, cluster_size=3, seed=5)
    torch.manual_seed(0)
    for _ in range(refreshes):
        index.refresh(torch.randn(len(LABELS), 4))
    index.update_losses(torch.arange(8), torch.rand(8))
    return index


STATE = clusters().state_dict()


def changed(position: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


OF_TENSORS = {
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "another float": lambda x: x.float() if x.dtype != torch.float32 else x.double(),
    "int32": lambda x: x.int(),
    "shorter": lambda x: x[1:],
    "longer": lambda x: torch.cat([x, x[:1]]),
    "more dimensions": lambda x: x[None],
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "list": lambda x: x.tolist(),
    "none": lambda x: None,
}
OF_NUMBERS = {
    "float": float,
    "tensor": torch.tensor,
    "text": str,
    "true": lambda _: True,
    "negative": lambda _: -1,
    "another": lambda x: x + 2**40,
    "none": lambda _: None,
}
DAMAGES = [
    *((entry, kind, damage) for kind, damage in OF_TENSORS.items() for entry in
      ("labels", "assignments", "centroids", "sample_losses")),
    *((entry, kind, damage) for kind, damage in OF_NUMBERS.items() for entry in
      ("cluster_size", "seed", "ignore_index", "refreshes")
      if (entry, kind) != ("refreshes", "another")),
    ("labels", "another label", changed(0, 3)),
    ("assignments", "out of range", changed(0, 9)),
    ("assignments", "no cluster", changed(0, -1)),
    ("assignments", "a cluster of what is ignored", changed(9, 0)),
    ("assignments", "another class", changed(0, 5)),
    ("assignments", "an empty cluster", lambda x: torch.where(x == 1, 2, x)),
    ("centroids", "nan", changed(1, torch.nan)),
    ("centroids", "inf", changed(1, torch.inf)),
    ("centroids", "averaged", lambda x: 0.9 * x),
    ("centroids", "no dimensions", lambda x: x[:, :0]),
    ("sample_losses", "nan", changed(1, torch.nan)),
    ("sample_losses", "-inf", changed(1, -torch.inf)),
    ("refreshes", "0 though there are centroids", lambda _: 0),
]  # fmt: skip


DAMAGED = pytest.mark.parametrize(
    ("entry", "damage"),
    [pytest.param(entry, damage, id=f"{entry}: {kind}") for entry, kind, damage in DAMAGES],
)


@DAMAGED
def test_a_damaged_entry_is_named_and_nothing_is_taken(entry, damage):
    state = {**STATE, entry: damage(STATE[entry])}
    index = clusters(1)
    before = content(index)
    name = entry if entry != "refreshes" else "refreshes|centroids"
    with pytest.raises((TypeError, ValueError), match=f"^state.*({name})"):
        index.load_state_dict(state)
    assert content(index) == before


@DAMAGED
def test_a_damaged_file_is_named(entry, damage, tmp_path):
    state = {**STATE, entry: damage(STATE[entry])}
    if entry == "seed" and state[entry] == STATE[entry] + 2**40:
        return  # Any seed is as good.
    path = tmp_path / "clusters.pt"
    torch.save({"format": "facelt_ext.ClusterIndex", "version": 2, **state}, path)
    # With other labels, or other settings, it is the assignments that are wrong.
    with pytest.raises(ValueError, match=f"path: .*{path.name} is damaged: .*({entry}|assignment)"):
        ClusterIndex.load(path)


@pytest.mark.parametrize("entry", STATE)
def test_a_missing_entry_is_named(entry, tmp_path):
    state = {name: value for name, value in STATE.items() if name != entry}
    with pytest.raises(ValueError, match=f"^state: .* got no {entry}$"):
        clusters().load_state_dict(state)
    path = tmp_path / "clusters.pt"
    torch.save({"format": "facelt_ext.ClusterIndex", "version": 2, **state}, path)
    with pytest.raises(ValueError, match=f"damaged: .*no {entry}$"):
        ClusterIndex.load(path)


def saved_and_loaded(value: object, weights_only: bool = False) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def from_state(index: ClusterIndex) -> ClusterIndex:
    other = ClusterIndex(LABELS, cluster_size=3, seed=5)
    other.load_state_dict(saved_and_loaded(index.state_dict(), weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("refreshes", [0, 2])
@pytest.mark.parametrize("copied", [*COPIES.values(), from_state])
def test_copies_of_clusters_go_on_as_they_do(copied, refreshes):
    index = clusters(refreshes)
    other = copied(index)
    assert content(other) == content(index)
    features = torch.randn(len(LABELS), 4)
    for each in (index, other):
        each.refresh(features)
        each.update_losses(torch.tensor([20, 3]), torch.tensor([0.5, 2.0]))
    assert content(other) == content(index)
    for label in (3, 7, 12):
        assert other.clusters_of(label) == index.clusters_of(label)
    for cluster in range(index.num_clusters):
        assert torch.equal(other.members(cluster), index.members(cluster))
        assert other.cluster_loss(cluster) == index.cluster_loss(cluster)


def test_a_state_is_not_the_clusters_own():
    index = clusters()
    state = index.state_dict()
    other = from_state(index)
    index.update_losses(torch.arange(9), torch.zeros(9))
    index.refresh(torch.randn(len(LABELS), 4))
    assert content(other.state_dict()) == content(state) == content(clusters().state_dict())


def test_files_from_before_ignored_labels(tmp_path):
    """Then every label was a class."""
    index = ClusterIndex(LABELS, cluster_size=3, ignore_index=None)
    state = {k: v for k, v in index.state_dict().items() if k != "ignore_index"}
    path = tmp_path / "clusters.pt"
    torch.save({"format": "facelt_ext.ClusterIndex", "version": 1, **state}, path)
    loaded = ClusterIndex.load(path)
    assert loaded.ignore_index is None and loaded.classes.tolist() == [-100, 3, 7, 12]
    assert content(loaded) == content(index)


CLASSES, EACH = 400, 10


def many_clusters() -> ClusterIndex:
    index = ClusterIndex(torch.arange(CLASSES * EACH) % CLASSES, cluster_size=EACH)
    index.refresh(torch.randn(CLASSES * EACH, 2))
    return index


def many_super_classes() -> SuperClasses:
    order, counts = torch.randperm(4000), torch.ones(4000, dtype=torch.int64)
    return SuperClasses(order[:1000], order[1000:], torch.arange(3000) % 500, counts)


LARGE = {
    "clusters": many_clusters,
    "their state": lambda: many_clusters().state_dict(),
    "members": lambda: many_clusters().members(3),
    "classifier": lambda: NearestClusterClassifier().fit(many_clusters()),
    "super classes": many_super_classes,
    "their members": lambda: many_super_classes().members(3),
    "trials": lambda: evaluation.random_trials(torch.arange(4000) // 4, num_trials=2),
    "pairs": lambda: evaluation.draw_pairs(torch.arange(400) // 4),
    "features": lambda: made("embed")[0](**made("embed")[1]),
}


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


@pytest.mark.parametrize("name", LARGE)
def test_what_is_saved_takes_the_memory_of_its_numbers(name):
    value = LARGE[name]()
    found = list(tensors(value))
    assert found
    for each in found:
        assert each.untyped_storage().nbytes() == each.nbytes
    numbers = sum(each.nbytes for each in found)
    for dump in (pickle.dumps, lambda each: saved(each)):
        assert len(dump(value)) < 1.1 * numbers + 1000 * len(found) + 40_000


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("entry", ["head", "tail", "super_class", "counts", "groups"])
@pytest.mark.parametrize(
    "damage",
    [None, Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.int, lambda x: x[1:], Tensor.tolist],
)
def test_a_damaged_file_of_super_classes_is_named(entry, damage, tmp_path):
    path = tmp_path / "super_classes.pt"
    super_classes = SuperClasses(**made("SuperClasses")[1])
    super_classes.save(path)
    state = torch.load(path)
    if damage is None:
        del state[entry]
    else:
        state[entry] = damage(state[entry])
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"path: .* damaged: .*({entry}|one for each|hold)"):
        SuperClasses.load(path)


@pytest.mark.parametrize("copied", COPIES.values())
def test_copies_of_super_classes(copied):
    super_classes = SuperClasses(**made("SuperClasses")[1])
    assert copied(super_classes) == super_classes
