"""The margin softmax's guarantees: half precision, determinism, what is not finite, memory."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, EMULATED
from softmax_cases import FLAVOURS, Case, chunks_of, products_made, random_case, rms, run, truth
from strategies import HALF, TOLERANCE
from torch.nn.functional import cross_entropy, normalize

import facelt_ext
from facelt_ext import _C, _native, functional
from facelt_ext.functional import _products

AT_64 = {
    "cosface": {"scale": 64.0, "cosine_margin": 0.35},
    "arcface": {"scale": 64.0, "angular_margin": 0.5},
}
MARGINS = {
    "cosface": lambda cosine: cosine - 0.35,
    "arcface": lambda cosine: (cosine.clamp(-1, 1).acos() + 0.5).cos(),
}


def faces(seed: int, batch: int = 24, classes: int = 40, dimensions: int = 20, **options) -> Case:
    """Features around their classes' rows, and a weight of the size that heads start with."""
    case = random_case(seed, batch, classes, dimensions, **options)
    case.features += case.weight[case.labels]
    case.weight *= 0.01
    case.upstream[:] = 1.7
    return case


def textbook(case: Case, dtype: torch.dtype, margin) -> list[torch.Tensor]:
    """Only the product is in the half type; autograd does the rest."""
    x, w = (t.clone().requires_grad_() for t in (case.features, case.weight))
    product = normalize(x.float()).to(dtype) @ normalize(w.float()).to(dtype).t()
    cosine, target = product.float(), case.labels[:, None]
    logits = 64 * cosine.scatter(1, target, margin(cosine.gather(1, target)))
    losses = cross_entropy(logits, case.labels, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, (x, w), case.upstream.float())]


@pytest.mark.parametrize("flavour", AT_64)
@pytest.mark.parametrize("kind", ["half", "float32 weight", "autocast of float32"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_the_textbook_form(place, flavour, kind, dtype):
    """Both read the same inputs. One ulp more would be granted, which none needs."""
    ours, theirs = [], []
    for seed in range(32):
        case = faces(seed, **AT_64[flavour])
        case.features = case.features.to(torch.float32 if kind.startswith("autocast") else dtype)
        case.weight = case.weight.to(dtype if kind == "half" else torch.float32)
        expected = truth(case)
        with torch.autocast(place.device, dtype, enabled=kind.startswith("autocast")):
            actual = run(place, case)
        assert [a.dtype for a in actual] == [torch.float32, case.features.dtype, case.weight.dtype]
        plain = textbook(case, dtype, MARGINS[flavour])
        ours.append([a.double() - e for a, e in zip(actual, expected, strict=True)])
        theirs.append([a.double() - e for a, e in zip(plain, expected, strict=True)])
    for mine, textbooks in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        # Not float32 in disguise either.
        assert 0.1 * rms(textbooks) <= rms(mine) <= 1.1 * rms(textbooks)


@pytest.mark.parametrize("features", HALF)
@pytest.mark.parametrize("autocast", HALF)
def test_autocast_decides_the_products_dtype(place, features, autocast, monkeypatch):
    case = faces(0, batch=6, classes=9, dimensions=5, **AT_64["cosface"])
    case.features, case.weight = case.features.to(features), case.weight.float()
    seen, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.add(a[0].dtype), mm(*a, **k))[1])
    with torch.autocast(place.device, autocast):
        actual = run(place, case)
    assert seen == {autocast}
    assert [a.dtype for a in actual] == [torch.float32, features, torch.float32]
    expected = truth(case)
    for a, e in zip(actual, expected, strict=True):
        assert rms([a.double() - e]) <= 0.1 * rms([e])


@pytest.mark.parametrize("forward", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", HALF)
def test_backward_keeps_to_the_dtype_of_forward(place, forward, backward):
    """Also where somebody calls it under another autocast."""
    case = faces(0, batch=6, classes=9, dimensions=5, **AT_64["cosface"])
    case = case.to(torch.float32, place.device)
    inputs = (case.features.requires_grad_(), case.weight.requires_grad_())
    with place.run():
        with torch.autocast(place.device, forward, enabled=forward is not None):
            loss = functional.margin_softmax_loss(*inputs, case.labels, **case.options)
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        with torch.autocast(place.device, backward):
            actual = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize("flavour", AT_64)
@pytest.mark.parametrize("dtype", HALF)
def test_a_thousand_steps_without_nan(dtype, flavour, identical):
    case = faces(0, batch=8, classes=12, dimensions=6, **AT_64[flavour])
    x, w = case.features.to(dtype), case.weight.to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        x = torch.randn(x.shape, generator=generator).to(dtype)
        x = x[:1].expand_as(x).clone() if identical else x
        labels = torch.randint(12, (8,), generator=generator)
        x.requires_grad_()
        loss = functional.margin_softmax_loss(x, w, labels, **case.options)
        grads = torch.autograd.grad(loss, (x, w))
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
        with torch.no_grad():
            w -= 1e-3 * grads[1]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("normalize_features", [True, False])
def test_features_opposite_to_their_class_do_not_overflow(
    place, dtype, weight_dtype, normalize_features
):
    """There ArcFace's slope is 10,000, and one class has all samples of the batch."""
    generator = torch.Generator().manual_seed(0)
    w = (0.01 * torch.randn(12, 6, generator=generator)).to(dtype)
    x = (-500 * w[:1]).expand(20, 6).clone().to(place.device).requires_grad_()
    w = w.to(place.device, weight_dtype or dtype).requires_grad_()
    labels = torch.zeros(20, dtype=torch.int64, device=place.device)
    with place.run():
        loss = functional.margin_softmax_loss(
            x, w, labels, angular_margin=0.5, normalize_features=normalize_features, scale=8.0
        )
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_loss_has_scaled_gradients(place, dtype):
    """To the bit: a GradScaler's power of two goes past the half types."""
    case = faces(0, **AT_64["arcface"]).to(torch.float32)
    with torch.autocast(place.device, dtype, enabled=dtype != torch.float32):
        plain = run(place, case)
        case.upstream *= 65536
        scaled = run(place, case)
    assert scaled[1].isfinite().all() and scaled[2].isfinite().all()
    assert torch.equal(scaled[1], 65536 * plain[1]) and torch.equal(scaled[2], 65536 * plain[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_runs_workspaces_and_threads_give_the_same_bits(place, dtype, flavour, monkeypatch):
    """Only our kernels are told other numbers of threads: what torch.mm does is its own."""
    case = random_case(4, 19, 45, 13, **FLAVOURS[flavour]).to(dtype)
    with chunks_of(16):
        expected = run(place, case, workspace="low")
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            for workspace in ("low", "high"):
                for a, e in zip(run(place, case, workspace=workspace), expected, strict=True):
                    assert torch.equal(a, e)


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF])
def test_emulated_threads_in_any_order_give_the_same_bits(dtype):
    """What differs between orders is a missing barrier."""
    everything = [
        random_case(5, 9, 300, 37, **FLAVOURS[flavour]).to(dtype)
        for flavour in ("combined", "combined by norm", "plain")
    ]

    def results():
        with chunks_of(270):
            return [t for case in everything for t in run(EMULATED, case)]

    try:
        expected = results()
        for schedule, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            _C.emulated.set_schedule(schedule, seed)
            assert all(map(torch.equal, results(), expected))
    finally:
        _C.emulated.set_schedule("forward", 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("position", [(0, 0), (3, 6)])
def test_a_feature_that_is_not_finite(any_place, bad, flavour, position):
    case = random_case(6, 5, 9, 7, **FLAVOURS[flavour]).to(torch.float32)
    expected = truth(case)
    case.features[position] = bad
    with chunks_of(4):
        losses, grad_x, _ = run(any_place, case)
    others = torch.arange(5) != position[0]
    assert losses[~others].isnan().all() and grad_x[~others].isnan().all()
    torch.testing.assert_close(losses[others].double(), expected[0][others], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad_x[others].double(), expected[1][others], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("flavour", ["cosface", "arcface", "sphereface"])
@pytest.mark.parametrize("row", [0, 8])
def test_a_row_that_is_not_finite(any_place, bad, flavour, row):
    """In the first chunk and the last, whoever's class it is."""
    case = random_case(6, 5, 9, 7, **FLAVOURS[flavour]).to(torch.float32)
    case.weight[row, 3] = bad
    with chunks_of(4):
        assert run(any_place, case)[0].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_ignored_samples_may_hold_anything(any_place, flavour, bad, dtype):
    case = random_case(7, 6, 9, 5, ignore_index=2, **FLAVOURS[flavour]).to(dtype)
    case.labels[:] = torch.tensor([2, 0, 1, 2, 8, 2])
    expected = run(any_place, case)
    case.features[::3] = bad
    actual = run(any_place, case)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) and a.isfinite().all()
    ignored = case.labels == 2
    assert not actual[0][ignored].any() and not actual[1][ignored].any()
    # The reduced loss too.
    case.upstream[:] = 1
    with any_place.run():
        moved = case.to(dtype, any_place.device)
        loss = functional.margin_softmax_loss(
            moved.features, moved.weight, moved.labels, **moved.options
        )
    torch.testing.assert_close(loss.cpu(), actual[0].sum() / 3)


@pytest.mark.parametrize("label", [-1, 9, 2**62, -(2**63)])
@pytest.mark.parametrize("flavour", ["arcface", "sphereface", "plain"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_label_out_of_range(any_place, label, flavour, reduction):
    case = random_case(8, 5, 9, 4, **FLAVOURS[flavour]).to(torch.float32)
    case.upstream[:] = 1.0 if reduction == "none" else 1 / 5
    case.labels[2] = -100
    _, _, expected_w = run(any_place, case)
    case.labels[2] = label
    if any_place.backend == "reference" or any_place == CPU:
        wanted = rf"labels: expected numbers in \[0, 9\) or -100, got {label} at position 2"
        with pytest.raises(ValueError, match=wanted):
            run(any_place, case)
        return
    x, w = case.features.to(any_place.device), case.weight.to(any_place.device)
    x.requires_grad_(), w.requires_grad_()
    with any_place.run():
        loss = functional.margin_softmax_loss(
            x, w, case.labels.to(any_place.device), reduction=reduction, **case.options
        )
        upstream = torch.ones_like(loss)
        grad_x, grad_w = torch.autograd.grad(loss, (x, w), upstream, retain_graph=True)
        again_x, again_w = torch.autograd.grad(loss, (x, w), upstream, create_graph=True)
    others = torch.arange(5) != 2
    if reduction == "none":
        assert loss[2].isnan() and loss[others].isfinite().all()
    else:
        assert loss.isnan()
    assert grad_x[2].isnan().all() and grad_x[others].isfinite().all()
    assert torch.equal(grad_w.cpu(), expected_w)
    torch.testing.assert_close(again_x.detach(), grad_x, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(again_w.detach(), grad_w, atol=1e-5, rtol=1e-5)
    facelt_ext.debug_checks(True)
    try:
        with pytest.raises(ValueError, match=f"labels: .* got {label} at position 2"):
            run(any_place, case)
    finally:
        facelt_ext.debug_checks(False)


@pytest.mark.parametrize(("workspace", "kept"), [("low", 0), ("high", 6 * 10), ("auto", 6 * 10)])
def test_what_is_kept_and_what_is_multiplied_again(place, workspace, kept, monkeypatch):
    made = products_made(monkeypatch)
    case = random_case(9, 6, 10, 4, **FLAVOURS["cosface"]).to(torch.float32, place.device)
    x, w = case.features.requires_grad_(), case.weight.requires_grad_()
    logits = [(6, 4), (6, 4), (6, 2)]
    with place.run(), chunks_of(4):
        options = {"workspace": workspace, **case.options}
        loss = functional.margin_softmax_loss(x, w, case.labels, reduction="sum", **options)
        assert made == logits
        state = loss.grad_fn.next_functions[0][0].saved_tensors
        assert state[-1].numel() == kept
        made.clear()
        loss.backward()
        again = [shape for shape in made if shape in logits]
        assert again == ([] if kept else logits)
        assert len([shape for shape in made if shape in [(4, 4), (2, 4)]]) == 3


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_without_a_gradient_nothing_is_kept(place, how, monkeypatch):
    made, kept = products_made(monkeypatch), []
    forward = functional.margin_softmax.forward

    def watched(*args):
        results = forward(*args)
        kept.append(results[-1].numel())
        return results

    monkeypatch.setattr(functional.margin_softmax, "forward", watched)
    case = random_case(9, 6, 10, 5, **FLAVOURS["cosface"]).to(torch.float32, place.device)
    x = case.features.requires_grad_(how == "no_grad")
    with place.run(), torch.set_grad_enabled(how != "no_grad"):
        loss = functional.margin_softmax_loss(
            x, case.weight, case.labels, workspace="high", **case.options
        )
    assert not loss.requires_grad and made == [(6, 10)] and kept == [0]


def test_auto_keeps_what_the_budget_allows(place, monkeypatch):
    case = random_case(9, 6, 10, 5, **FLAVOURS["cosface"]).to(torch.float32, place.device)
    x = case.features.requires_grad_()
    for budget, kept in [(6 * 10 * 4, 60), (6 * 10 * 4 - 1, 0)]:
        monkeypatch.setitem(_products.KEPT_BYTES, place.device, budget)
        with place.run():
            loss = functional.margin_softmax_loss(
                x, case.weight, case.labels, reduction="sum", **case.options
            )
        assert loss.grad_fn.next_functions[0][0].saved_tensors[-1].numel() == kept


def test_a_chunk_is_a_fixed_number_of_classes(monkeypatch):
    """Kept products are found by it: it may depend on nothing that changes before the backward."""
    from facelt_ext.functional._products import chunk_size

    assert chunk_size(512, 512, torch.float32, "cpu") == 1024
    assert chunk_size(512, 512, torch.bfloat16, "cpu") == 2048
    assert chunk_size(1, 512, torch.float32, "cpu") == 2048
    assert chunk_size(0, 1, torch.float64, "cpu") == 2**18
    # At least as many as there are dimensions.
    assert chunk_size(2**20, 512, torch.float32, "cpu") == 512
    assert chunk_size(2**20, 65, torch.float32, "cpu") == 128
    before = chunk_size(77, 33, torch.float32, "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert chunk_size(77, 33, torch.float32, "cpu") == before


def test_kernels_of_a_step(place, monkeypatch):
    """One pass over the weight's rows for its norms; none in a backward that takes them over."""
    ran, native_run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda *a: (ran.append(a[2]), native_run(*a))[1])
    case = random_case(9, 6, 10, 5, **FLAVOURS["cosface"]).to(torch.float32)
    with chunks_of(5):
        run(place, case)
    assert ran.count("normalize_rows") == 1 + 2 + 1
    assert ran.count("margin_softmax_normalizer") == ran.count("margin_softmax_gradient") == 2
    assert ran.count("project_rows") == 2 + 1
