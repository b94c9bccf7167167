"""Copies of an image score the same wherever they lie; of equal scores the right one is last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from facelt_ext import evaluation
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.evaluation import _scores, identification, operating_points

# How far apart scores are that count as equal, and a little more.
EQUAL = {torch.float32: 2e-6, torch.float64: 2e-12}

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "all positive": lambda x: x.relu() + 0.1,
    "nearly constant": lambda x: 1 + 0.01 * x,
    "huge": lambda x: 1e30 * x,
    "few dimensions": lambda x: x[:, :3],
    "signs": lambda x: x[:, :5].sign(),
    "collapsed": lambda x: torch.ones_like(x),
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "the same bits": lambda x: x,
    "scaled": lambda x: 3 * x,
    "of length 1": lambda x: torch.nn.functional.normalize(x.double()).to(x),
    "float64": lambda x: x.double(),
    "strided": lambda x: x.t().contiguous().t(),
    "NumPy, reversed": lambda x: x.flip(0).numpy()[::-1],
    "NumPy, big-endian": lambda x: x.numpy().astype(x.numpy().dtype.newbyteorder(">")),
}
# Numbers of rows and columns of a block.
BLOCKS = [(1 << 10, 1 << 14), (7, 61)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def set_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    for module in (_scores, operating_points):
        monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    for module in (_scores, operating_points, identification):
        monkeypatch.setattr(module, "BLOCK_COLUMNS", columns)


def faces(kind: str, seed: int, identities: int = 30, images: int = 3) -> tuple[Tensor, Tensor]:
    """float32 [90, up to 200] and labels, in random order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat_interleave(images)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(identities, 200, generator=generator)
    x = centers[labels] + torch.randn(len(labels), 200, generator=generator)
    return FEATURES[kind](x), labels


def plain(rows: Tensor | np.ndarray) -> Tensor:
    """float64, in the order in which it is indexed."""
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(rows.astype("f8", order="C"))
    return rows.double().contiguous()


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """The truth, but for rounding in float64."""
    rows, columns = (torch.nn.functional.normalize(x.double(), eps=1e-300) for x in (rows, columns))
    return rows @ columns.T


def check_ranks(ranks: Tensor, mate: Tensor, others: Tensor, dtype: torch.dtype) -> None:
    """Scores [R, n] of the others that are higher count, those that are equal do, no others do."""
    equal = EQUAL[dtype]
    least = 1 + (others > mate[:, None] + equal).sum(1)
    most = 1 + (others >= mate[:, None] - equal).sum(1)
    assert (least <= ranks).all() and (ranks <= most).all()
    # Nothing but ties is between the two.
    ties = 1 + (others >= mate[:, None] - equal / 100).sum(1)
    assert (ranks >= ties).all()


@pytest.mark.parametrize("dtype", EQUAL)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("kind", FEATURES)
def test_distractors_that_copy_the_mate(
    kind: str, copy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    features, labels = faces(kind, 0)
    others = FEATURES[kind](torch.randn(400, 200, generator=generator))
    # In float64, with all of its bits.
    features, others = (torch.pi * each.to(dtype) for each in (features, others))
    order = torch.randperm(len(others) + len(features), generator=generator)
    distractors = COPIES[copy](torch.cat([others, features])[order])
    pairs = labels[:, None] == labels
    probe, mate = pairs.fill_diagonal_(False).nonzero(as_tuple=True)
    scores = cosines(features, features)[probe, mate]
    all_scores = cosines(features, plain(distractors))
    for blocks in BLOCKS:
        set_blocks(monkeypatch, *blocks)
        ranks = evaluation.distractor_ranks(features, labels, distractors)
        check_ranks(ranks, scores, all_scores[probe], dtype)
        # A copy of the mate, and one of the probe itself.
        assert ranks.min() >= 3


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("kind", FEATURES)
def test_others_in_the_gallery_that_copy_the_mate(
    kind: str, copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = faces(kind, 2)
    half = torch.arange(len(labels)) % 2 == 0
    half |= ~torch.isin(labels, labels[half])
    gallery, names, probes, wanted = features[half], labels[half], features[~half], labels[~half]
    copies = COPIES[copy](gallery)
    as_tensor = plain(copies)
    scores = cosines(probes, gallery)
    mate = scores.masked_fill(wanted[:, None] != names, -torch.inf).amax(1)
    strangers = torch.cat([gallery, as_tensor.float()])
    both = torch.cat([names, 1000 + names])
    others = torch.cat([scores, cosines(probes, as_tensor)], dim=1)
    others = others.masked_fill(wanted[:, None] == both, -torch.inf)
    for blocks in BLOCKS:
        set_blocks(monkeypatch, *blocks)
        found = evaluation.identification_ranks(strangers, both, probes, wanted)
        check_ranks(found, mate, others, torch.float32)
        # As distractors, they count the same.
        again = evaluation.identification_ranks(gallery, names, probes, wanted, copies)
        alone = evaluation.identification_ranks(gallery, names, probes, wanted)
        assert (again > alone).all() and found.min() >= 2
        own = (wanted[:, None] == names) & (scores >= mate[:, None] - 1e-12)
        assert (again - alone >= own.sum(1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_ranks_depend_on_no_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = faces("all positive", 3)
    features = features.to(dtype)
    generator = torch.Generator().manual_seed(4)
    distractors = features[torch.randint(len(features), (600,), generator=generator)]
    expected = None
    for number, blocks in enumerate([*BLOCKS, (64, 1)]):
        set_blocks(monkeypatch, *blocks)
        order = torch.randperm(len(features), generator=generator)
        ranks = evaluation.distractor_ranks(
            features[order], labels[order], distractors.roll(number * 37, 0)
        )
        table = torch.zeros(len(labels), len(labels), dtype=torch.int64)
        pairs = (labels[order][:, None] == labels[order]).fill_diagonal_(False)
        probe, mate = pairs.nonzero(as_tuple=True)
        table[order[probe], order[mate]] = ranks
        assert expected is None or torch.equal(table, expected)
        expected = table


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unknown_probes_that_copy_known_ones(copy: str, dtype: torch.dtype, threads: None) -> None:
    gallery, names = faces("normal", 5, identities=60, images=1)
    generator = torch.Generator().manual_seed(6)
    probes = (gallery + torch.randn(60, 200, generator=generator)).to(dtype)
    unknown = plain(COPIES[copy](probes)).to(dtype)
    order = torch.randperm(120, generator=generator)
    everyone = torch.cat([probes, unknown])[order]
    labels = torch.cat([names, 1000 + names])[order]
    ranks = evaluation.identification_ranks(gallery, names, probes, names)
    assert (ranks == 1).all()
    # Each known probe scores as the unknown one that copies it, so that as many are accepted.
    fars = [number / 60 for number in range(60)]
    points = evaluation.open_set_identification(gallery, names, everyone, labels, fars)
    assert points.far.tolist() == pytest.approx(fars)
    assert points.dir.tolist() == pytest.approx(fars)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", FEATURES)
def test_pairs_of_copies_score_the_same(
    kind: str, dtype: torch.dtype, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = faces(kind, 7, identities=40, images=1)[0]
    if dtype == torch.float16:
        originals = originals / originals.abs().amax()
    generator = torch.Generator().manual_seed(8)
    which = torch.arange(40).repeat(3)[torch.randperm(120, generator=generator)]
    features = originals.to(dtype)[which]
    one, other = torch.combinations(torch.arange(120)).unbind(1)
    by_pairs = evaluation.pair_scores(features, one, other)
    names = torch.minimum(which[one], which[other]) * 40 + torch.maximum(which[one], which[other])
    scores: dict[int, float] = {}
    for name, score in zip(names.tolist(), by_pairs.tolist(), strict=True):
        assert scores.setdefault(name, score) == score
    for blocks in BLOCKS:
        set_blocks(monkeypatch, *blocks)
        found, _ = evaluation.all_pairs(features, torch.arange(120))
        assert torch.equal(found.sort().values, by_pairs.sort().values)
        assert found.abs().max() <= 1 and not found.double().arccos().isnan().any()
        swapped = evaluation.pair_scores(features, other, one)
        assert torch.equal(swapped, by_pairs)


def test_genuine_pairs_that_score_as_impostors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each identity is there twice, under two labels: where a pair is accepted, its copies are."""
    features, labels = faces("normal", 9, identities=20)
    generator = torch.Generator().manual_seed(10)
    order = torch.randperm(2 * len(labels), generator=generator)
    features, labels = torch.cat([features] * 2)[order], torch.cat([labels, 100 + labels])[order]
    one, other = torch.combinations(torch.arange(len(labels))).unbind(1)
    same = cosines(features, features)[one, other]
    for blocks in BLOCKS:
        set_blocks(monkeypatch, *blocks)
        far = torch.linspace(0, 0.05, 200).tolist()
        found = evaluation.all_pairs_tar_at_far(features, labels, far)
        again = evaluation.tar_at_far(*evaluation.all_pairs(features, labels), far)
        for threshold, rate, ours, theirs in zip(
            found.threshold.tolist(), found.tar.tolist(), found.far.tolist(), far, strict=True
        ):
            assert ours <= theirs and torch.isclose(same, torch.tensor(threshold).double()).any()
            # Pairs within identities and their copies: an even number.
            assert round(rate * 120) % 2 == 0
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("neighbors", [1, 4, 7, 40])
@pytest.mark.parametrize("kind", ["normal", "all positive", "few dimensions", "signs", "collapsed"])
def test_clusters_that_are_copies(kind: str, neighbors: int) -> None:
    """Of equally near clusters the first counts, of classes with equal scores the lowest."""
    features, _ = faces(kind, 11)
    centroids = torch.nn.functional.normalize(faces(kind, 12, identities=20, images=1)[0])
    generator = torch.Generator().manual_seed(13)
    which = torch.arange(20).repeat(2)[torch.randperm(40, generator=generator)]
    classes = torch.randperm(40, generator=generator)
    model = NearestClusterClassifier(neighbors)._take(centroids[which], classes)
    units = torch.nn.functional.normalize(features.double())
    # Copies have one score, bit for bit.
    scores = (units @ centroids.double().T).div(1e-9).round().mul(1e-9)[:, which]
    expected = []
    for row in scores:
        nearest = row.sort(descending=True, stable=True).indices[:neighbors]
        best = row[nearest].max()
        # Each class has one cluster: the nearest scores best.
        expected.append(int(classes[nearest[row[nearest] >= best - 1e-6]].min()))
    assert model.predict(features).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reduced_products_are_not_trusted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 and bfloat16 round entries before they are multiplied."""
    features, labels = faces("normal", 14)
    features = features.to(dtype)
    expected = evaluation.distractor_ranks(features, labels, features.flip(0))
    exact = Tensor.__matmul__

    def coarse(self: Tensor, other: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            self, other = self.bfloat16().float(), other.bfloat16().float()
        return exact(self, other)

    monkeypatch.setattr(Tensor, "__matmul__", coarse)
    found = evaluation.distractor_ranks(features, labels, features.flip(0))
    assert torch.equal(found, expected)
