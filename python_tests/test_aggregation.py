"""Class means against NumPy in float64, the split of the paper's Table 1, and planted clusters."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from facelt_ext import aggregation
from facelt_ext.aggregation import SuperClasses, aggregate, class_means, split_classes

# Table 1 of the paper: classes, images, and the range of images per class of its groups A to D.
TABLE_1 = [
    (17_032, 695_800, 21, 217),
    (15_000, 207_000, 10, 20),
    (27_000, 163_500, 4, 9),
    (26_132, 49_900, 1, 3),
]


def group_counts(classes: int, images: int, least: int, most: int) -> Tensor:
    """Images per class: one class at each end of the range, the rest spread evenly."""
    rest, others = images - least - most, classes - 2
    even = torch.full((others,), rest // others)
    even[: rest % others] += 1
    return torch.cat([torch.tensor([least, most]), even])


def paper_counts() -> Tensor:
    counts = torch.cat([group_counts(*group) for group in TABLE_1])
    return counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))]


def loader(inputs: Tensor, labels: Tensor, batch_size: int = 7) -> DataLoader:
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


class HalfFeatures(nn.Module):
    """Features in float16, off zero so that a float32 sum of many loses digits."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.half() + 1000


def test_means_are_those_of_a_float64_loop():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(200_000, 3, generator=generator)
    labels = torch.randint(0, 4, (200_000,), generator=generator)
    labels[labels == 2] = 0
    means, counts = class_means(HalfFeatures(), loader(inputs, labels, 512), 5, progress=False)
    assert (means.dtype, counts.dtype) == (torch.float32, torch.int64)
    features = HalfFeatures()(inputs).double().numpy()
    for label in range(5):
        rows = features[labels.numpy() == label]
        assert counts[label] == len(rows)
        wanted = rows.mean(0, dtype=np.float64) if len(rows) else np.zeros(3)
        # To the bit: a sum of so many in float32 would be off.
        np.testing.assert_array_equal(means[label].numpy(), wanted.astype(np.float32))
    assert counts[2] == counts[4] == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_any_loader_of_inputs_and_labels_will_do(dtype):
    inputs, labels = torch.rand(5, 2), torch.tensor([1, 0, 1, 1, 0], dtype=dtype)
    batches = [[inputs[:3], labels[:3], "more"], (inputs[3:], labels[3:])]
    wanted = class_means(lambda x: x, [(inputs, labels)], 2, progress=False)
    got = class_means(lambda x: x, iter(batches), 2, progress=False)
    torch.testing.assert_close(got.means, wanted.means, rtol=1e-6, atol=0)
    assert got.counts.tolist() == [2, 3]
    torch.testing.assert_close(got.means[1], inputs[[0, 2, 3]].mean(0))


class Modes(nn.Module):
    """Two submodules, one frozen in eval, and a note of the modes in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.BatchNorm1d(2).eval()
        self.seen = []
        self.cached = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append([module.training for module in self.modules()])
        if self.cached is None:
            self.cached = torch.ones(2)
        return self.frozen(self.norm(inputs)) * self.cached

    def modes(self) -> list[bool]:
        return [module.training for module in self.modules()]


def test_the_model_is_evaluated_and_then_as_it_was():
    model = Modes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = class_means(model, [(torch.rand(4, 2) + 5, torch.zeros(4).long())], 1, progress=False)
    assert model.seen == [[False] * 3]
    assert model.modes() == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not result.means.requires_grad
    # What the model kept from its forward may be trained with.
    model(torch.rand(4, 2, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("fails", ["the loader", "the model", "the labels"])
def test_the_modes_come_back_after_an_error(fails):
    model = Modes()

    def batches():
        yield torch.rand(3, 2), torch.zeros(3).long()
        if fails == "the loader":
            raise RuntimeError("the disk is gone")
        yield torch.rand(3, 5 if fails == "the model" else 2), torch.full((3,), 9)

    with pytest.raises((RuntimeError, ValueError)):
        class_means(model, batches(), 1, progress=False)
    assert model.seen
    assert model.modes() == [True, True, False]
    assert torch.is_grad_enabled()


class Device(nn.Module):
    """Says where its inputs came to."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.device = inputs.device
        return torch.zeros(len(inputs), 1)


def test_inputs_move_to_the_device_of_the_model():
    batches = [(torch.rand(3, 2), torch.zeros(3).long())]
    with_parameter, with_buffer = Device(), Device()
    with_parameter.weight = nn.Parameter(torch.empty(1, device="meta"))
    with_buffer.register_buffer("mean", torch.empty(1, device="meta"))
    for model, device, wanted in [
        (with_parameter, None, "meta"),
        (with_buffer, None, "meta"),
        (Device(), None, "cpu"),
        (with_parameter, "cpu", "cpu"),
        (Device(), "meta", "meta"),
    ]:
        class_means(model, batches, 1, device=device, progress=False)
        assert model.device.type == wanted


@pytest.mark.gpu
def test_a_model_on_cuda_gives_the_same_bits_twice():
    model = nn.Linear(8, 4).cuda()
    data = loader(torch.rand(500, 8), torch.randint(0, 9, (500,)), 64)
    first, second = (class_means(model, data, 9, progress=False) for _ in range(2))
    assert torch.equal(first.means, second.means)
    on_cpu = class_means(model.cpu(), data, 9, progress=False)
    torch.testing.assert_close(first.means, on_cpu.means, rtol=1e-5, atol=1e-6)


def test_the_bar_counts_batches(capsys):
    data = loader(torch.rand(20, 2), torch.zeros(20).long(), 10)
    class_means(lambda x: x, data, 1)
    assert "2/2" in capsys.readouterr().err
    class_means(lambda x: x, data, 1, progress=False)
    assert capsys.readouterr().err == ""


class Endless(IterableDataset):
    """A data set that does not know its length."""

    def __iter__(self):
        yield from [(torch.ones(2), 0)] * 5


def test_the_bar_needs_no_length(capsys):
    assert class_means(lambda x: x, DataLoader(Endless(), batch_size=2), 1).counts == 5
    assert "3batch" in capsys.readouterr().err


def test_without_tqdm_there_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    batches = [(torch.ones(2, 2), torch.zeros(2).long())]
    with pytest.raises(ImportError, match=r"tqdm.*facelt_ext\[aggregation\].*progress=False"):
        class_means(lambda x: x, batches, 1)
    assert class_means(lambda x: x, batches, 1, progress=False).counts == 2


GOOD = (torch.ones(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "batch 1: expected a tuple or list .*, got Tensor"),
        ((torch.ones(2, 3),), TypeError, "batch 1: expected a tuple .*, got tuple of length 1"),
        (([1.0], GOOD[1]), TypeError, "inputs of batch 1: expected a tensor, got list"),
        ((GOOD[0], [0, 1]), TypeError, "labels of batch 1: expected a tensor, got list"),
        ((GOOD[0], torch.rand(2)), TypeError, "labels of batch 1: expected an integer dtype"),
        ((GOOD[0], torch.tensor([0])), ValueError, r"labels of batch 1: .*\[2\].*got \[1\]"),
        (
            (GOOD[0], torch.tensor([0, 2])),
            ValueError,
            r"labels of batch 1: .*\[0, 2\), got 2 at position 1",
        ),
        ((GOOD[0], torch.tensor([-1, 0])), ValueError, "labels of batch 1: .* got -1 at position"),
        ((torch.ones(2, 3, 1), GOOD[1]), ValueError, "features of batch 1: expected shape"),
        ((torch.ones(2, 3).int(), GOOD[1]), TypeError, "features of batch 1: expected dtype"),
        ((torch.ones(2, 4), GOOD[1]), ValueError, "features of batch 1: expected 3 dim.* got 4"),
        (
            (torch.tensor([[1.0, 2, 3], [4, torch.inf, 6]]), GOOD[1]),
            ValueError,
            "features of batch 1: expected finite numbers, got others in row 1",
        ),
        ((torch.full((2, 3), torch.nan), GOOD[1]), ValueError, "features of batch 1: .*in row 0"),
    ],
)
def test_a_wrong_batch_is_named(batch, error, message):
    with pytest.raises(error, match=message):
        class_means(lambda x: x, [GOOD, batch], 2, progress=False)


def test_other_errors_of_class_means():
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        class_means(lambda x: x, [], 2, progress=False)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        class_means(lambda x: x, [GOOD], 0, progress=False)
    with pytest.raises(TypeError, match="features of batch 0: expected a tensor, got tuple"):
        class_means(lambda x: (x, x), [GOOD], 2, progress=False)


def test_the_paper_s_split():
    counts = paper_counts()
    assert int(counts.sum()) == 1_116_200
    head, tails = split_classes(counts)
    assert len(head) == 32_032
    assert [len(tail) for tail in tails] == [27_000, 26_132]
    for labels, (least, most) in zip([head, *tails], [(10, 217), (4, 9), (1, 3)], strict=True):
        assert counts[labels].aminmax() == (least, most)
        assert torch.equal(labels, labels.sort().values)
    assert torch.equal(torch.cat([head, *tails]).sort().values, torch.arange(85_164))


@pytest.mark.parametrize(
    ("minimums", "head", "tails"),
    [
        ((10, 4, 1), [1, 3], [[2, 5], [0, 4]]),
        ([10, 1], [1, 3], [[0, 2, 4, 5]]),
        ((1,), [0, 1, 2, 3, 4, 5], []),
        ((100, 1), [], [[0, 1, 2, 3, 4, 5]]),
        ((10, 9, 8, 1), [1, 3], [[5], [], [0, 2, 4]]),
    ],
)
def test_other_splits(minimums, head, tails):
    groups = split_classes(torch.tensor([3, 10, 4, 11, 1, 9], dtype=torch.int16), minimums)
    assert groups.head.tolist() == head
    assert [tail.tolist() for tail in groups.tails] == tails
    assert all(labels.dtype == torch.int64 for labels in [groups.head, *groups.tails])


@pytest.mark.parametrize(
    ("counts", "minimums", "error", "message"),
    [
        ([10, 3], (10, 1), TypeError, "counts: expected a tensor, got list"),
        (torch.rand(3), (10, 1), TypeError, "counts: expected an integer dtype, got torch.float32"),
        (torch.ones(3, 1).int(), (10, 1), ValueError, r"counts: expected shape .*got \[3, 1\]"),
        (
            torch.tensor([10, 0, 3, 1]),
            (10, 2),
            ValueError,
            "counts: expected at least 2 .* fewer for 2 classes, .* class 1 with 0",
        ),
        (torch.tensor([10]), 10, TypeError, "minimums: expected a tuple or list of ints, got int"),
        (torch.tensor([10]), (), TypeError, "minimums: expected a tuple or list of ints"),
        (torch.tensor([10]), (10, 1.5), TypeError, r"minimums\[1\]: expected an int, got float"),
        (torch.tensor([10]), (10, 0), ValueError, r"minimums\[1\]: expected at least 1, got 0"),
        (torch.tensor([10]), (4, 4), ValueError, r"minimums: expected descending .*\(4, 4\)"),
        (torch.tensor([10]), (1, 4), ValueError, r"minimums: expected descending .*\(1, 4\)"),
    ],
)
def test_what_the_split_refuses(counts, minimums, error, message):
    with pytest.raises(error, match=message):
        split_classes(counts, minimums)


def planted() -> tuple[Tensor, Tensor, list[int]]:
    """40 classes; head, tail groups in turns; tail means near one of 3 and one of 4 places.

    Returns the means, the counts, and the place of each class (-1 for the head).
    """
    generator = torch.Generator().manual_seed(1)
    centers = 10 * torch.randn(7, 16, generator=generator)
    counts, places = [], []
    for label in range(40):
        group = label % 5
        counts.append([20, 5, 2, 7, 1][group])
        places.append([-1, label % 3, 3 + label % 4, label % 3, 3 + label % 4][group])
    means = centers[torch.tensor(places)] + torch.randn(40, 16, generator=generator) / 10
    return means, torch.tensor(counts), places


@pytest.mark.parametrize("spherical", [False, True])
def test_planted_clusters_are_found(spherical):
    means, counts, places = planted()
    if spherical:
        means *= torch.logspace(-2, 2, 40)[
            torch.randperm(40, generator=torch.Generator().manual_seed(0)), None
        ]
    found = aggregate(means, counts, num_super_classes=(3, 4), spherical=spherical)
    assert found.head.tolist() == [label for label in range(40) if label % 5 == 0]
    assert found.tail.tolist() == [label for label in range(40) if label % 5]
    assert torch.equal(found.counts, counts)
    assert found.groups.tolist() == [0, 0, 0, 1, 1, 1, 1]
    members = {frozenset(found.members(s).tolist()) for s in range(7)}
    assert members == {
        frozenset(label for label, at in enumerate(places) if at == place) for place in range(7)
    }
    for group, least, most in [(0, 4, 9), (1, 1, 3)]:
        for super_class in (found.groups == group).nonzero().flatten().tolist():
            in_group = counts[found.members(super_class)]
            assert ((in_group >= least) & (in_group <= most)).all()


def test_the_same_seed_gives_the_same_super_classes():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(300, 8, generator=generator)
    counts = torch.randint(1, 30, (300,), generator=generator)
    made = [aggregate(means, counts, seed=seed) for seed in (3, 3, 4)]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_by_default_super_classes_hold_as_many_images_as_head_classes():
    means = torch.randn(190, 4, generator=torch.Generator().manual_seed(0))
    # 30 images per head class; 45 * 6 and 135 * 2 images of the tail groups.
    counts = torch.tensor([20] * 5 + [40] * 5 + [6] * 45 + [2] * 135)
    assert aggregate(means, counts).groups.bincount().tolist() == [9, 9]
    # 1 / 30 of a super class is one.
    assert aggregate(means[:10], torch.tensor([30] * 9 + [1])).num_super_classes == 1


def test_the_default_at_the_size_of_the_paper(monkeypatch):
    numbers = []

    def in_turns(x, k, **options):
        numbers.append(k)
        return type("Clustering", (), {"assignments": torch.arange(len(x)) % k})

    monkeypatch.setattr(aggregation, "kmeans", in_turns)
    made = aggregate(torch.zeros(85_164, 1), paper_counts())
    # 163,500 and 49,900 images over the 902,800 / 32,032 = 28.18 of a head class.
    assert numbers == [5_801, 1_770]
    assert made.num_tail == 53_132
    # Within a tenth of the paper's numbers, had it given the larger one to group C.
    assert numbers == pytest.approx([5_400, 1_800], rel=0.1)


def test_groups_without_classes_and_a_data_set_without_tail_or_head():
    means = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    no_c = aggregate(means, torch.tensor([12, 2, 1, 20]))
    assert no_c.groups.tolist() == [1]
    assert aggregate(means, torch.tensor([12, 2, 1, 20]), num_super_classes=[0, 1]) == no_c
    no_tail = aggregate(means, torch.tensor([12, 10, 10, 20]))
    assert (no_tail.num_head, no_tail.num_super_classes) == (4, 0)
    assert aggregate(means, torch.tensor([1, 2, 1, 1]), minimums=(1,)).num_head == 4
    no_head = aggregate(means, torch.tensor([5, 6, 5, 6]), num_super_classes=(4, 0))
    assert (no_head.num_head, no_head.num_super_classes) == (0, 4)
    with pytest.raises(ValueError, match="num_super_classes: .* no class is in it"):
        aggregate(means, torch.tensor([5, 6, 5, 6]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"means": torch.ones(4)}, ValueError, "means: expected shape"),
        ({"means": torch.ones(4, 2).int()}, TypeError, "means: expected dtype"),
        ({"counts": torch.tensor([12, 2, 1])}, ValueError, r"counts: .*\[4\].* means, got \[3\]"),
        ({"counts": torch.tensor([12, 2, 0, 5])}, ValueError, "counts: .* class 2 with 0"),
        ({"num_super_classes": 2}, TypeError, "num_super_classes: expected a tuple or .* got int"),
        ({"num_super_classes": [2]}, ValueError, "num_super_classes: expected 2 numbers.* got 1"),
        ({"num_super_classes": [1, 2.0]}, TypeError, r"num_super_classes\[1\]: expected an int"),
        ({"num_super_classes": [1, 3]}, ValueError, r"num_super_classes\[1\]: .* most 2, .*got 3"),
        ({"num_super_classes": [1, 0]}, ValueError, r"num_super_classes\[1\]: .* least 1, got 0"),
        ({"num_super_classes": [-1, 1]}, ValueError, r"num_super_classes\[0\]: .* got -1"),
    ],
)
def test_what_aggregate_refuses(changes, error, message):
    arguments = {"means": torch.rand(4, 2), "counts": torch.tensor([12, 2, 1, 5])} | changes
    with pytest.raises(error, match=message):
        aggregate(**arguments)


def test_from_a_model_to_super_classes_that_are_loaded_again(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(6).repeat_interleave(12), torch.arange(6, 30)])
    means = F.one_hot(torch.arange(30) % 6, 6) * 4.0
    inputs = means[labels] + torch.randn(len(labels), 6, generator=generator) / 20
    found = aggregate(
        *class_means(nn.Flatten(), loader(inputs, labels), 30, progress=False),
        num_super_classes=(0, 6),
    )
    found.save(tmp_path / "super_classes.pt")
    loaded = SuperClasses.load(tmp_path / "super_classes.pt")
    assert loaded == found
    coarse = loaded.coarse_labels(labels)
    assert torch.equal(coarse[:72], labels[:72])
    assert torch.equal(coarse[72:78], coarse[78:84])
    assert coarse[72:78].unique().numel() == 6
