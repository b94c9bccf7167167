"""Inter-class compactness and the domain frequency indicator (Domain Balancing, eqs. 1 and 2)."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from conftest import CPU, EMULATED
from hypothesis import given
from hypothesis import strategies as st
from strategies import HALF, LAYOUTS, assert_close, strided
from torch import Tensor

import facelt_ext
from facelt_ext import _C, _native, functional, reference
from facelt_ext.functional import _products, compactness


def literal_compactness(weight: Tensor, index: list[int], k: int, scale: float) -> list[float]:
    rows = weight.numpy().astype(np.float64)
    result = []
    for c in index:
        cosines = []
        for n in range(len(rows)):
            if n == c:
                continue
            norms = np.linalg.norm(rows[c]) * np.linalg.norm(rows[n])
            cosines.append(rows[c] @ rows[n] / norms if norms > 0 else 0.0)
        nearest = sorted(cosines, reverse=True)[:k]
        shift = max(nearest, default=0.0) * scale
        total = sum(math.exp(scale * cosine - shift) for cosine in nearest)
        result.append(shift + math.log(total) if nearest else -math.inf)
    return result


@st.composite
def weights(draw: st.DrawFn, max_classes: int = 40) -> Tensor:
    """Rows of any length, some of them equal or zero."""
    classes, dimensions = draw(st.integers(1, max_classes)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn(classes, dimensions, generator=generator, dtype=torch.float64)
    weight *= 10 ** (4 * torch.rand(classes, 1, generator=generator, dtype=torch.float64) - 2)
    if draw(st.booleans()):
        weight[classes // 2] = weight[0]
        weight[-1] = 0
    return weight


@given(weights(), st.integers(1, 45), st.sampled_from([1.0, 7.0, 64.0]))
def test_the_reference_is_the_papers_formula(weight, k, scale):
    index = list(range(len(weight)))
    expected = torch.tensor(literal_compactness(weight, index, k, scale))
    assert_close(
        reference.inter_class_compactness(weight, k=k, scale=scale), expected, torch.float64, scale
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_agree_with_the_reference(place, dtype):
    @given(weights(), st.data(), st.sampled_from([1.0, 64.0]))
    def run(weight, data, scale):
        weight = weight.to(place.device, dtype)
        numbers = st.integers(0, len(weight) - 1)
        index = data.draw(st.none() | st.lists(numbers, max_size=9), label="index")
        index = None if index is None else torch.tensor(index, dtype=torch.int64)
        k = data.draw(st.integers(1, 45), label="k")
        layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
        expected = reference.inter_class_compactness(weight.cpu().double(), index, k=k, scale=scale)
        index = None if index is None else index.to(place.device)
        with place.run():
            actual = functional.inter_class_compactness(
                strided(weight, layout), index, k=k, scale=scale
            )
        assert actual.dtype == dtype
        assert_close(actual, expected, dtype, scale)

    run()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 classes, and 64 classes looked at side by side."""
    for name in ("CHUNK_BYTES", "ROW_BYTES"):
        monkeypatch.setattr(_products, name, dict.fromkeys(("cpu", "cuda"), 1))
    monkeypatch.setattr(compactness, "KEPT_NUMBERS", 1)


def random_weight(classes: int, dimensions: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, dimensions, generator=generator).to(device)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
@pytest.mark.parametrize("k", [1, 3, 90, 500])
def test_many_chunks_and_selections(place, small_chunks, k, order):
    """Rising products are all candidates: the kept ones are sorted out again and again."""
    classes = 700 if place == EMULATED else 5000
    weight = random_weight(classes, 6, place.device)
    if order == "equal":
        weight[1::2] = weight[1]
    elif order != "random":
        cosines = torch.nn.functional.cosine_similarity(weight, weight[:1])
        weight = weight[cosines.argsort(descending=order == "falling")]
    index = torch.tensor([0, classes - 1, 63, 64, 3], device=place.device)
    expected = reference.inter_class_compactness(weight.double(), index, k=k, scale=20.0)
    with place.run():
        actual = functional.inter_class_compactness(weight, index, k=k, scale=20.0)
    assert_close(actual, expected, torch.float32, 20.0)


def test_all_classes_in_blocks(place, small_chunks):
    weight = random_weight(150, 5, place.device)
    expected = reference.inter_class_compactness(weight.double(), k=4)
    with place.run():
        assert_close(functional.inter_class_compactness(weight, k=4), expected, torch.float32, 64.0)


def test_of_one_class_and_of_no_class(any_place):
    weight = random_weight(9, 4, any_place.device)
    nothing = torch.empty(0, dtype=torch.int64, device=any_place.device)
    with any_place.run():
        alone = functional.inter_class_compactness(weight[:1])
        assert alone.tolist() == [-torch.inf]
        assert functional.domain_frequency_indicator(weight[:1], max_indicator=3.0).tolist() == [
            3.0
        ]
        assert functional.inter_class_compactness(weight, nothing).shape == (0,)
        assert functional.domain_frequency_indicator(weight, nothing, k=0).shape == (0,)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, dtype):
    ours, textbook = [], []
    for seed in range(32):
        weight = random_weight(50, 24, place.device, seed).to(dtype)
        truth = reference.inter_class_compactness(weight.double(), k=7)
        with place.run():
            ours.append(functional.inter_class_compactness(weight, k=7).double() - truth)
        rows = torch.nn.functional.normalize(weight.float()).to(dtype)
        cosines = (rows @ rows.t()).float().fill_diagonal_(-torch.inf)
        plain = (64 * cosines.topk(7).values).logsumexp(1)
        textbook.append(plain.double() - truth)
    rms = [torch.cat(errors).square().mean().sqrt() for errors in (ours, textbook)]
    assert 0 < rms[0] <= 1.1 * rms[1] + torch.finfo(dtype).eps * 64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_seen_by_all(any_place, small_chunks, bad):
    """It may be anyone's nearest."""
    weight = random_weight(150, 4, any_place.device)
    weight[140, 2] = bad
    with any_place.run():
        for k in (2, 149):
            assert functional.inter_class_compactness(weight, k=k).isnan().all()


def test_an_index_out_of_range(any_place):
    weight = random_weight(9, 4, any_place.device)
    index = torch.tensor([2, 9, 4], device=any_place.device)
    with any_place.run():
        if any_place.backend == "reference" or any_place == CPU:
            message = r"index: expected numbers in \[0, 9\), got 9 at position 1"
            with pytest.raises(ValueError, match=message):
                functional.inter_class_compactness(weight, index, k=2)
        else:
            result = functional.inter_class_compactness(weight, index, k=2)
            assert result.isnan().tolist() == [False, True, False]
            facelt_ext.debug_checks(True)
            try:
                with pytest.raises(ValueError, match="index: expected numbers"):
                    functional.inter_class_compactness(weight, index, k=2)
            finally:
                facelt_ext.debug_checks(False)


def test_no_tensor_of_all_products(monkeypatch):
    """256 x 4,000 products would be 4 MB; a chunk of them is a sixteenth."""
    monkeypatch.setattr(_products, "CHUNK_BYTES", {"cpu": 1 << 18})
    largest, mm = [0], torch.mm

    def watched(*args, out):
        largest[0] = max(largest[0], out.nbytes)
        return mm(*args, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    functional.inter_class_compactness(random_weight(4000, 8, "cpu"), torch.arange(256))
    assert 0 < largest[0] <= 1 << 18


def test_equal_bits_for_any_number_of_threads_and_again():
    weight = random_weight(3000, 16, "cpu")
    index, before = torch.arange(100), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(functional.inter_class_compactness(weight, index, k=50))
    finally:
        torch.set_num_threads(before)
    # The products are torch's, and at this size the same for any number of its threads.
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_was_just_kept_is_sorted_out_too(place):
    """For 64 threads, of which each looks at four columns at a time, and k = 5.

    Of the second 256 columns three are positive. Of the third, 175 are kept, so that after 64
    of the fourth it is sorted out: where these have just been written, the three had lain.
    """
    k, products = 5, torch.full((1, 1024), -0.9)
    products[0, [436, 441, 451]] = 0.5
    products[0, 512 : 512 + 175] = -0.8
    products[0, 512 + 175 : 768] = -1.0
    products[0, 768:] = -0.7
    native = _native._kernels(place.backend, place.device)
    kept = torch.empty(1, native.compactness_capacity(k), device=place.device)
    counts = torch.zeros(1, dtype=torch.int64, device=place.device)
    thresholds, sums = kept[:, 0].clone(), kept[:, 0].clone()
    run = functools.partial(_native.run, place.backend, kept)
    for schedule in ("forward", "reverse"):
        if place == EMULATED:
            _C.emulated.set_schedule(schedule)
        try:
            run(
                "compactness_select", products.to(place.device), kept.new_empty(0), counts - 1, 0,
                k, True, kept, counts, thresholds,
            )  # fmt: skip
            run("compactness_reduce", kept, counts, k, 5.0, sums)
        finally:
            if place == EMULATED:
                _C.emulated.set_schedule("forward")
        expected = (5 * products.double().topk(k).values).logsumexp(1)
        assert_close(sums, expected, torch.float32)
        counts.zero_()


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_emulated_threads_in_any_order_give_the_same_bits(small_chunks, dtype):
    weight = random_weight(500, 5, "cpu").to(dtype)
    index = torch.tensor([0, 499, 70])
    results = []
    try:
        for schedule, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            with EMULATED.run():
                results.append(
                    [functional.inter_class_compactness(weight, index, k=k) for k in (5, 100, 499)]
                )
    finally:
        _C.emulated.set_schedule("forward", 0)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_indicators(any_place):
    """epsilon / IC, cut off at the largest; a class with IC <= 0 is of a tail domain."""
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 2.0, 4.0], dtype=torch.float64)
    weight = torch.stack([angles.cos(), angles.sin()], 1).to(any_place.device)
    with any_place.run():
        compactness = functional.inter_class_compactness(weight, k=2, scale=5.0)
        options = {"k": 2, "scale": 5.0, "epsilon": 4.0, "max_indicator": 1.5}
        indicators = functional.domain_frequency_indicator(weight, **options)
        options["epsilon"] = torch.tensor(4.0, device=any_place.device)
        again = functional.domain_frequency_indicator(weight, **options)
    assert (compactness[4:] < 0).all() and (compactness[:4] > 4 / 1.5).all()
    expected = [min(4.0 / c, 1.5) if c > 0 else 1.5 for c in compactness.tolist()]
    assert_close(indicators, torch.tensor(expected, dtype=torch.float64), torch.float64)
    assert torch.equal(again, indicators)


def test_uniform_weights_have_equal_indicators(any_place):
    """The corners of a simplex: every class sees the others alike."""
    weight = torch.eye(12, dtype=torch.float64, device=any_place.device) - 1 / 12
    with any_place.run():
        for k in (1, 5, 100):
            indicators = functional.domain_frequency_indicator(weight, k=k, scale=1.0, epsilon=0.7)
            assert_close(indicators, indicators[:1].expand(12), torch.float64)


def test_a_class_moved_away_from_the_crowd_gets_a_larger_indicator(any_place):
    crowd = random_weight(50, 16, any_place.device) * 0.3
    crowd[:, 0] += 1
    away = crowd.clone()
    away[7, 0] = -1
    with any_place.run():
        before = functional.domain_frequency_indicator(crowd, k=10, epsilon=20.0)
        after = functional.domain_frequency_indicator(away, k=10, epsilon=20.0)
    assert after[7] > before[7] and after[7] == after.max()


def test_no_neighbours_make_it_one(any_place):
    with any_place.run():
        weight = random_weight(6, 3, any_place.device)
        assert functional.domain_frequency_indicator(weight, k=0).tolist() == [1.0] * 6


def test_no_gradient(any_place):
    weight = random_weight(6, 3, any_place.device).requires_grad_()
    with any_place.run():
        assert not functional.inter_class_compactness(weight, k=2).requires_grad
        assert not functional.domain_frequency_indicator(weight, k=2).requires_grad


WEIGHT = torch.randn(4, 3)
BOTH = (functional.inter_class_compactness, functional.domain_frequency_indicator)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": WEIGHT.long()}, TypeError, "weight: expected dtype float64"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight: expected shape .* got \[3\]"),
        ({"weight": WEIGHT[:0]}, ValueError, r"weight: expected at least one row, got \[0, 3\]"),
        ({"index": [1]}, TypeError, "index: expected a tensor, got list"),
        ({"index": torch.tensor(1)}, ValueError, r"index: expected shape .* got \[\]"),
        ({"index": torch.ones(2)}, TypeError, "index: expected an integer dtype"),
        ({"index": torch.ones(2).long().to("meta")}, ValueError, "index: expected device cpu"),
        ({"k": -1}, ValueError, "k: expected at least"),
        ({"k": 2.0}, TypeError, "k: expected an int, got float"),
        ({"scale": 0.0}, ValueError, "scale: expected a positive number, got 0.0"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
    ],
)
def test_wrong_arguments(any_place, function, arguments, error, message):
    with any_place.run(), pytest.raises(error, match=message):
        function(**{"weight": WEIGHT, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon: expected a positive number, got 0.0"),
        ({"epsilon": "auto"}, TypeError, "epsilon: expected a number, got str"),
        (
            {"epsilon": torch.ones(2)},
            ValueError,
            r"epsilon: .* shape \[\] on cpu, got \[2\] on cpu",
        ),
        ({"max_indicator": -1.0}, ValueError, "max_indicator: expected a positive number"),
    ],
)
def test_wrong_arguments_of_the_indicator(any_place, arguments, error, message):
    with any_place.run(), pytest.raises(error, match=message):
        functional.domain_frequency_indicator(WEIGHT, **arguments)


def test_no_neighbour_is_refused_for_compactness():
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        functional.inter_class_compactness(WEIGHT, k=0)
    index = torch.arange(4)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        torch.ops.facelt_ext.inter_class_compactness(WEIGHT, index, 0, 1.0, torch.float32, "native")
