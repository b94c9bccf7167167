"""The index of super classes, and their mean rows (Aggregate-and-Disperse, eq. 7)."""

from __future__ import annotations

import copy

import literal_dispersion
import pytest
import torch
from conftest import CPU, CUDA, EMULATED
from dispersion_cases import assignment
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF, LAYOUTS, TOLERANCE, assert_close, strided
from torch import Tensor

import facelt_ext
from facelt_ext import _C, functional, reference
from facelt_ext.functional import SuperClassIndex, super_class_mean

OPS = torch.ops.facelt_ext


def rows_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def assignments(draw: st.DrawFn, most: int = 60) -> Tensor:
    rows = draw(st.integers(0, most))
    count = draw(st.sampled_from(sorted({min(rows, 1), -(-rows // 3), rows})))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return assignment(rows, count, generator)


def mean_and_grad(function, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    x = weight.detach().clone().requires_grad_()
    means = function(x)
    return [means.detach(), *torch.autograd.grad(means, x, upstream.to(means))]


def run(place, weight: Tensor, super_class: Tensor, upstream: Tensor) -> list[Tensor]:
    index = super_class.to(place.device)
    with place.run():
        results = mean_and_grad(
            lambda x: super_class_mean(x, SuperClassIndex(index)), weight.to(place.device), upstream
        )
    return [result.cpu() for result in results]


def truth(weight: Tensor, super_class: Tensor, upstream: Tensor) -> list[Tensor]:
    return mean_and_grad(
        lambda x: reference.super_class_mean(x, super_class), weight.double(), upstream
    )


@given(assignments(20), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_reference_agrees_with_literal_loops(super_class, dimensions, seed):
    weight = rows_of(seed, len(super_class), dimensions)
    upstream = rows_of(seed + 1, len(super_class.unique()), dimensions)
    expected = literal_dispersion.super_class_mean(
        weight.numpy(), super_class.numpy(), len(upstream), upstream.numpy()
    )
    for a, e in zip(truth(weight, super_class, upstream), expected, strict=True):
        assert_close(a, torch.from_numpy(e), torch.float64)


@given(assignments(), st.data())
def test_kernels_agree_with_the_reference(place, super_class, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    dimensions = data.draw(st.integers(1, 40))
    prepared, told = data.draw(st.booleans()), data.draw(st.booleans())
    count, seed = len(super_class.unique()), data.draw(st.integers(0, 2**32 - 1))
    weight = rows_of(seed, len(super_class), dimensions).to(dtype)
    upstream = rows_of(seed + 1, count, dimensions).to(dtype)
    expected = truth(weight, super_class, upstream)
    index = super_class.to(place.device)
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    x = strided(weight.to(place.device), layouts[0]).requires_grad_()
    with place.run():
        given_index = SuperClassIndex(index) if prepared else index
        means = super_class_mean(x, given_index, count if told else None)
    (grad,) = torch.autograd.grad(means, x, strided(upstream.to(place.device), layouts[1]))
    assert means.dtype == grad.dtype == dtype and means.shape == (count, dimensions)
    assert_close(means, expected[0], dtype)
    assert_close(grad, expected[1], dtype)


@pytest.mark.parametrize("sizes", [[1], [5], [1, 1, 1], [3, 1, 4]])
def test_gradcheck(any_place, sizes):
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).flip(0)
    weight = rows_of(0, len(index), 3).to(any_place.device).requires_grad_()
    prepared = SuperClassIndex(index.to(any_place.device))
    with any_place.run():
        assert torch.autograd.gradcheck(lambda x: super_class_mean(x, prepared), weight)
        assert torch.autograd.gradgradcheck(lambda x: super_class_mean(x, prepared), weight)


@pytest.mark.parametrize("dimensions", [1, 3, 4, 8, 31, 32, 64, 127, 128, 129, 260])
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
def test_rows_of_any_width(place, dimensions, dtype):
    """Loads of several numbers, where a row has so many; to the bit on a grid of integers, with as
    many members as can be divided by."""
    index = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 2, 4, 8, 32]))
    generator = torch.Generator().manual_seed(dimensions)
    index = index[torch.randperm(len(index), generator=generator)]
    weight = torch.randint(-3, 4, (len(index), dimensions), generator=generator).to(dtype)
    upstream = torch.randint(-3, 4, (5, dimensions), generator=generator).to(dtype)
    for actual, expected in zip(
        run(place, weight, index, upstream), truth(weight, index, upstream), strict=True
    ):
        assert actual.dtype == dtype and torch.equal(actual.double(), expected)


def test_a_mean_is_of_its_own_members_in_one_order(any_place):
    index = torch.tensor([1, 0, 1, 1], device=any_place.device)
    weight = torch.tensor([[1.0], [5.0], [3.0], [8.0]], device=any_place.device)
    with any_place.run():
        assert super_class_mean(weight, index).tolist() == [[5.0], [4.0]]


@pytest.mark.parametrize("dimensions", [128, 129])
def test_a_table_larger_than_the_caches(dimensions):
    """Its gradient is written past them, where rows are aligned."""
    generator = torch.Generator().manual_seed(0)
    index = assignment(70_000, 9_000, generator)
    weight = torch.randn(len(index), dimensions, generator=generator)
    upstream = torch.randn(9_000, dimensions, generator=generator)
    assert weight.nbytes > 32 << 20
    for a, e in zip(run(CPU, weight, index, upstream), truth(weight, index, upstream), strict=True):
        assert_close(a, e, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, dtype):
    ours, textbook = [], []
    for seed in range(32):
        index = assignment(60, 7, torch.Generator().manual_seed(seed))
        weight, upstream = rows_of(seed, 60, 9).to(dtype), rows_of(seed + 1, 7, 9).to(dtype)
        expected = truth(weight, index, upstream)

        def plain(x, index=index):
            sums = torch.zeros(7, 9).index_add(0, index, x.float())
            return (sums / index.bincount()[:, None]).to(dtype)

        for results, errors in [
            (run(place, weight, index, upstream), ours),
            (mean_and_grad(plain, weight, upstream), textbook),
        ]:
            assert [r.dtype for r in results] == [dtype] * 2
            errors.append([r.double() - e for r, e in zip(results, expected, strict=True)])
    for mine, theirs in zip(zip(*ours, strict=True), zip(*textbook, strict=True), strict=True):
        rms = [torch.stack(errors).square().mean().sqrt() for errors in (mine, theirs)]
        assert 0 < rms[0] <= 1.1 * rms[1]


@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
def test_runs_and_threads_give_the_same_bits(place, dtype, monkeypatch):
    index = assignment(500, 70, torch.Generator().manual_seed(0))
    weight, upstream = rows_of(0, 500, 11).to(dtype), rows_of(1, 70, 11).to(dtype)
    expected = run(place, weight, index, upstream)
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, run(place, weight, index, upstream), expected))


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
@pytest.mark.parametrize("dimensions", [7, 64])
def test_emulated_threads_in_any_order_give_the_same_bits(dtype, dimensions):
    index = assignment(90, 4, torch.Generator().manual_seed(0))
    weight = rows_of(0, 90, dimensions).to(dtype)
    upstream = rows_of(1, 4, dimensions).to(dtype)
    try:
        expected = run(EMULATED, weight, index, upstream)
        for schedule, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            assert all(map(torch.equal, run(EMULATED, weight, index, upstream), expected))
    finally:
        _C.emulated.set_schedule("forward", 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
def test_a_row_that_is_not_finite(any_place, bad, dtype):
    index = torch.tensor([0, 1, 0, 2, 1])
    weight, upstream = rows_of(0, 5, 4).to(dtype), rows_of(1, 3, 4).to(dtype)
    expected = run(any_place, weight, index, upstream)
    weight[4, 2] = bad
    means, grad = run(any_place, weight, index, upstream)
    torch.testing.assert_close(means[1, 2], torch.tensor(bad, dtype=dtype), equal_nan=True)
    means[1, 2] = expected[0][1, 2]
    assert torch.equal(means, expected[0]) and torch.equal(grad, expected[1])


# Numbers out of range on either side, and super classes 1 and 4 without a member.
RAW = [2, 5, 0, -1, 2, 3, 2**62, 2, -(2**63), 0]


def assert_only_the_valid_count(means: Tensor, grad: Tensor, weight: Tensor, upstream: Tensor):
    assert means[[1, 4]].isnan().all()
    for s, members in {0: [2, 9], 2: [0, 4, 7], 3: [5]}.items():
        assert_close(means[s], weight[members].mean(0), torch.float64)
        assert_close(
            grad[members], upstream[s].expand(len(members), -1) / len(members), torch.float64
        )
    assert grad[[1, 3, 6, 8]].isnan().all()


def test_an_unchecked_index_is_not_followed(place):
    """As on CUDA, where a check would have to wait."""
    index = torch.tensor(RAW, device=place.device)
    weight, upstream = rows_of(0, 10, 6).to(place.device), rows_of(1, 5, 6).to(place.device)
    order, offsets = OPS.super_class_members(index, 5, False)
    assert sorted(order.tolist()) == list(range(10)) and offsets.tolist() == [2, 4, 4, 7, 8, 8]
    means = OPS.super_class_mean_forward(weight, order, offsets, torch.float64, place.backend)
    grad = OPS.super_class_mean_backward(upstream, index, order, offsets, place.backend)
    assert_only_the_valid_count(means, grad, weight, upstream)


def test_the_second_derivative_does_not_follow_it_either(place):
    index = torch.tensor(RAW, device=place.device)
    weight = rows_of(0, 10, 6).to(place.device).requires_grad_()
    upstream = rows_of(1, 5, 6).to(place.device).requires_grad_()
    order, offsets = OPS.super_class_members(index, 5, False)
    means = functional.super_classes.SuperClassMeanFunction.apply(
        weight, index, order, offsets, place.backend
    )
    (grad,) = torch.autograd.grad(means, weight, upstream, create_graph=True)
    assert_only_the_valid_count(means.detach(), grad.detach(), weight.detach(), upstream.detach())
    (again,) = torch.autograd.grad(grad[[0, 2, 5]].sum(), upstream)
    wanted = torch.tensor([1 / 2, 1 / 3, 1], dtype=torch.float64)
    assert_close(again[[0, 2, 3]], wanted[:, None].expand(3, 6), torch.float64)


@pytest.mark.gpu
def test_a_raw_index_on_cuda():
    index = torch.tensor(RAW, device="cuda")
    weight, upstream = rows_of(0, 10, 6).cuda().requires_grad_(), rows_of(1, 5, 6).cuda()
    means = super_class_mean(weight, index, 5)
    (grad,) = torch.autograd.grad(means, weight, upstream)
    assert_only_the_valid_count(means.detach(), grad, weight.detach(), upstream)
    facelt_ext.debug_checks(True)
    try:
        with pytest.raises(
            ValueError, match=r"super_class: expected numbers in \[0, 5\), got 5 at"
        ):
            super_class_mean(weight, index, 5)
    finally:
        facelt_ext.debug_checks(False)


def test_nothing(any_place):
    weight = torch.zeros(0, 4, device=any_place.device, requires_grad=True)
    index = torch.zeros(0, dtype=torch.int64, device=any_place.device)
    with any_place.run():
        for count in (None, 0):
            means = super_class_mean(weight, index, count)
            assert means.shape == (0, 4)
            assert torch.autograd.grad(means.sum(), weight)[0].shape == (0, 4)
        prepared = SuperClassIndex(index)
        assert prepared.num_super_classes == 0 and super_class_mean(weight, prepared).shape == (
            0,
            4,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(place, dtype):
    index = SuperClassIndex(torch.tensor([1, 0, 2, 1, 1, 0])).to(place.device)
    weight = rows_of(0, 6, 5).to(place.device, dtype)

    def total(x):
        return (super_class_mean(x, index) * 3).sum(0).square().sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True)):
        x = weight.clone().requires_grad_()
        with place.run():
            loss = function(x)
        results.append([loss.detach(), *torch.autograd.grad(2.5 * loss, x)])
    assert results[0][1].any()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@given(assignments())
def test_order_and_offsets(super_class):
    index = SuperClassIndex(super_class)
    members = [
        literal_dispersion.members_of(super_class.numpy(), s)
        for s in range(index.num_super_classes)
    ]
    assert index.order.tolist() == sum(members, [])
    assert index.counts().tolist() == [len(m) for m in members]
    assert index.offsets.tolist() == [sum(map(len, members[:s])) for s in range(len(members) + 1)]
    assert torch.equal(index.index, super_class)


def test_the_index_is_its_own_copy():
    super_class = torch.tensor([0, 1, 0])
    index = SuperClassIndex(super_class)
    super_class[0] = 1
    assert index.index.tolist() == [0, 1, 0]
    assert repr(index) == "SuperClassIndex(3 classes in 2 super classes)"


@pytest.mark.parametrize(
    ("super_class", "count", "error", "message"),
    [
        ([0, 1], None, TypeError, "super_class: expected a tensor, got list"),
        (torch.zeros(3), None, TypeError, "super_class: expected an integer dtype, .*float32"),
        (torch.zeros(3).bool(), None, TypeError, "super_class: expected an integer .*torch.bool"),
        (torch.zeros(2, 3).long(), None, ValueError, r"super_class: .*\[classes\].* got \[2, 3\]"),
        (torch.tensor(0), None, ValueError, r"super_class: expected shape .* got \[\]"),
        (torch.tensor([0, -1]), None, ValueError, r"super_class: .*\[0, 1\), got -1 at position 1"),
        (torch.tensor([-5]), None, ValueError, r"super_class: .*\[0, 1\), got -5 at position 0"),
        (torch.tensor([0, 2, 1]), 2, ValueError, r"\[0, 2\), got 2 at position 1"),
        (torch.tensor([0, 3, 0, 3]), None, ValueError, "each of the 4 .* 2 of them, .* is 1$"),
        (torch.tensor([0, 1]), 3, ValueError, "each of the 3 .* 1 of them, .* is 2$"),
        (torch.tensor([0, 1]), 0, ValueError, "num_super_classes: expected at least 1, got 0"),
        (torch.tensor([0, 1]), -1, ValueError, "num_super_classes: expected at least 1, got -1"),
        (torch.tensor([0, 1]), 2.0, TypeError, "num_super_classes: expected an int, got float"),
        (torch.tensor([0, 1]), True, TypeError, "num_super_classes: expected an int, got bool"),
        (torch.tensor([]).long(), -1, ValueError, "num_super_classes: expected at least 0, got -1"),
        (torch.tensor([]).long(), 2, ValueError, "class in each of the 2 .* 2 of them, .* is 0$"),
    ],
)
def test_wrong_assignments(super_class, count, error, message):
    with pytest.raises(error, match=message):
        SuperClassIndex(super_class, count)
    rows = len(super_class) if isinstance(super_class, Tensor) and super_class.ndim else 2
    with pytest.raises(error, match=message):
        super_class_mean(torch.zeros(rows, 2), super_class, count)


WEIGHT = torch.zeros(3, 2)
INDEX = torch.tensor([0, 1, 0])


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": WEIGHT.tolist()}, TypeError, "weight: expected a tensor, got list"),
        ({"weight": WEIGHT.long()}, TypeError, "weight: expected dtype float64.*got torch.int64"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight: expected shape .* got \[2\]"),
        ({"weight": WEIGHT[:, :0]}, ValueError, r"weight: expected shape .* got \[3, 0\]"),
        ({"weight": WEIGHT[:2]}, ValueError, r"super_class: expected shape \[2\] .* got \[3\] on"),
        ({"weight": WEIGHT.to("meta")}, ValueError, r"super_class: .* on meta, .* \[3\] on cpu"),
    ],
)
def test_wrong_arguments(any_place, prepare, changes, error, message):
    index = SuperClassIndex(INDEX) if prepare else INDEX
    with any_place.run(), pytest.raises(error, match=message):
        super_class_mean(**{"weight": WEIGHT, "super_class": index, **changes})


@pytest.mark.parametrize("count", [1, 3])
def test_a_number_that_contradicts_the_index(any_place, count):
    message = f"num_super_classes: expected 2, as super_class has, got {count}"
    with any_place.run(), pytest.raises(ValueError, match=message):
        super_class_mean(WEIGHT, SuperClassIndex(INDEX), count)


def test_state_dict_round_trip(tmp_path):
    saved = SuperClassIndex(torch.tensor([2, 0, 1, 1, 0, 2, 2]))
    assert list(saved.state_dict()) == ["index"]
    torch.save(saved.state_dict(), tmp_path / "index.pt")
    other = SuperClassIndex(torch.tensor([0, 1, 2, 2, 2, 2, 2]))
    other.load_state_dict(torch.load(tmp_path / "index.pt"))
    for index in (other, copy.deepcopy(saved)):
        for name in ("index", "order", "offsets"):
            assert torch.equal(getattr(index, name), getattr(saved, name))


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ([0, 1, 0, 2], ValueError, r"super_class: .*\[0, 2\), got 2 at position 3"),
        ([0, -1, 0, 1], ValueError, r"super_class: .*\[0, 2\), got -1 at position 1"),
        ([1, 1, 1, 1], ValueError, "each of the 2 super classes, got none in 1 of them"),
        ([0, 1, 0], ValueError, r"super_class: expected shape \[4\] in the state_dict, got \[3\]"),
        ([[0, 1, 0, 0]], ValueError, r"super_class: expected shape \[4\] .*, got \[1, 4\]"),
        ([0.0, 1.0, 0.0, 1.0], TypeError, "super_class: expected dtype torch.int64 .*float32"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_broken_state_is_refused(broken, error, message, assign):
    """And leaves the index as it was: nothing reads out of bounds by it afterwards."""
    index = SuperClassIndex(torch.tensor([0, 1, 0, 0]))
    with pytest.raises(error, match=message):
        index.load_state_dict({"index": torch.tensor(broken)}, assign=assign)
    assert index.index.tolist() == [0, 1, 0, 0]
    assert index.order.tolist() == [0, 2, 3, 1] and index.offsets.tolist() == [0, 3, 4]


def test_moved_and_converted():
    """Meta has no memory for it: it stays what it is."""
    index = SuperClassIndex(torch.tensor([0, 1, 0]))
    for moved in (index.half(), index.to("meta"), index.to_empty(device="cpu")):
        assert moved.index.tolist() == [0, 1, 0] and moved.index.dtype == torch.int64
        assert moved.order.tolist() == [0, 2, 1] and moved.offsets.tolist() == [0, 2, 3]


def test_a_large_number_asks_for_no_memory():
    index = torch.tensor([0, 2**62])
    with pytest.raises(ValueError, match=r"super_class: expected numbers in \[0, 2\), .* got 4611"):
        SuperClassIndex(index)
    with pytest.raises(ValueError, match="num_super_classes: expected sizes of a tensor that fits"):
        SuperClassIndex(torch.tensor([0, 1]), 2**62)


def test_values_are_needed():
    with pytest.raises(ValueError, match="super_class: expected values, got a tensor on meta"):
        SuperClassIndex(torch.tensor([0, 1], device="meta"))


@pytest.mark.gpu
def test_moved_to_a_gpu():
    index = SuperClassIndex(torch.tensor([1, 1, 0])).cuda()
    weight = rows_of(0, 3, 2)
    means = super_class_mean(weight.cuda(), index)
    assert_close(means, super_class_mean(weight, index.cpu()), torch.float64)
    assert CUDA.device == index.order.device.type == index.offsets.device.type
