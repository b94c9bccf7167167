"""Domain Balancing (Cao et al., CVPR 2020): the loss with its margins and its gate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CPU, REFERENCE
from torch import Tensor

import facelt_ext
from facelt_ext import CosFaceLoss, DomainBalancingLoss, ResidualBalancingModule
from facelt_ext.losses.domain_balancing import PROBES

CLASSES, DIMENSIONS, BATCH = 30, 6, 11


def case(device: str = "cpu", dtype: torch.dtype = torch.float64, **options: object):
    generator = torch.Generator().manual_seed(0)
    loss = DomainBalancingLoss(
        CLASSES, DIMENSIONS, **{"k": 5, "scale": 8.0, **options}, device=device, dtype=dtype
    )
    with torch.no_grad():
        loss.weight.copy_(torch.randn(CLASSES, DIMENSIONS, generator=generator))
        loss.weight[:10] += 2
    features = torch.randn(BATCH, DIMENSIONS, generator=generator).to(device, dtype)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
    gate = torch.rand(BATCH, generator=generator).to(device, dtype)
    return loss, features.requires_grad_(), labels, gate.requires_grad_()


def literal_indicators(weight: Tensor, k: int, scale: float, epsilon: float) -> np.ndarray:
    rows = weight.detach().double().cpu().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    result = []
    for c in range(len(rows)):
        cosines = sorted((rows[c] @ rows[n] for n in range(len(rows)) if n != c), reverse=True)
        compactness = math.log(sum(math.exp(scale * cosine) for cosine in cosines[:k]))
        result.append(2.0 if compactness <= epsilon / 2 else epsilon / compactness)
    return np.array(result)


def literal_loss(loss: DomainBalancingLoss, features, labels, gate, indicators) -> float:
    x = features.detach().double().cpu().numpy()
    w = loss.weight.detach().double().cpu().numpy()
    total = 0.0
    for i, y in enumerate(labels.tolist()):
        cosines = w @ x[i] / np.linalg.norm(w, axis=1) / np.linalg.norm(x[i])
        cosines[y] -= indicators[y] * loss.margin
        terms = np.exp(loss.scale * cosines)
        total += -math.log(terms[y] / terms.sum())
        total += loss.rbm_weight * (gate[i].item() - indicators[y]) ** 2
    return total / len(labels)


@pytest.mark.parametrize("indicator_scale", [None, 2.0])
def test_it_is_the_papers_formula(any_place, indicator_scale):
    loss, features, labels, gate = case(
        any_place.device, epsilon=6.0, rbm_weight=0.3, indicator_scale=indicator_scale
    )
    indicators = literal_indicators(loss.weight, 5, indicator_scale or 8.0, 6.0)
    assert len(set(indicators[labels.tolist()])) > 5
    expected = literal_loss(loss, features, labels, gate, indicators)
    with any_place.run():
        value = loss(features, labels, gate)
    (1.7 * value).backward()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    wanted = 1.7 * 2 * 0.3 / BATCH * (gate.detach().cpu() - torch.tensor(indicators)[labels.cpu()])
    torch.testing.assert_close(gate.grad.cpu(), wanted, atol=1e-12, rtol=1e-9)


def test_the_indicators_are_constants_of_the_gradient(any_place):
    """Those of the weight before the update: CosFace with these margins has the same gradient."""
    loss, features, labels, _ = case(any_place.device, epsilon=6.0)
    with any_place.run():
        margins = loss.margin * loss.indicators(labels)
        loss(features, labels).backward()
        plain = facelt_ext.functional.margin_softmax_loss(
            features, loss.weight, labels, scale=8.0, cosine_margin=margins[:, None]
        )
        grads = torch.autograd.grad(plain, (features, loss.weight))
    torch.testing.assert_close((features.grad, loss.weight.grad), grads, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_neighbours_make_it_cosface_exactly(any_place, dtype):
    loss, features, labels, _ = case(any_place.device, dtype, k=0)
    cosface = CosFaceLoss(
        CLASSES, DIMENSIONS, margin=0.35, scale=8.0, device=any_place.device, dtype=dtype
    )
    cosface.load_state_dict({"weight": loss.weight.detach()})
    results = []
    for module in (loss, cosface):
        with any_place.run():
            value = module(features, labels)
        results.append((value, *torch.autograd.grad(value, (features, module.weight))))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
    assert loss.dfi().indicators.tolist() == [1.0] * CLASSES and loss.dfi().clamped == 0


def test_a_lonely_class_has_the_larger_margin():
    loss = case(k=5, epsilon=6.0)[0]
    indicators = loss.dfi().indicators
    lonely, crowded = indicators.argmax(), indicators.argmin()
    assert indicators[lonely] > 1.2 * indicators[crowded]
    with torch.no_grad():
        loss.weight[crowded] = -loss.weight[:10].mean(0)
        moved = loss.indicators(torch.tensor([crowded]))
    assert moved > indicators[crowded]


def test_dfi_counts_what_was_clamped(any_place):
    loss, _, _, _ = case(any_place.device, epsilon=6.0, max_indicator=0.8)
    with any_place.run():
        domain = loss.dfi()
    assert domain.indicators.shape == domain.compactness.shape == (CLASSES,)
    assert 0 < domain.clamped < CLASSES
    assert domain.clamped == (domain.indicators == 0.8).sum()
    torch.testing.assert_close(
        domain.indicators, (6.0 / domain.compactness).clamp(max=0.8), atol=0, rtol=1e-12
    )


def test_reductions_and_ignored_samples(any_place):
    loss, features, labels, gate = case(any_place.device, epsilon=6.0, rbm_weight=0.3)
    labels[3] = -100
    results = {}
    for loss.reduction in ("none", "sum", "mean"):
        with any_place.run():
            results[loss.reduction] = loss(features, labels, gate)
    assert results["none"].shape == (BATCH,) and results["none"][3] == 0
    torch.testing.assert_close(results["sum"], results["none"].sum())
    torch.testing.assert_close(results["mean"], results["sum"] / (BATCH - 1))
    (grad,) = torch.autograd.grad(results["mean"], gate)
    assert grad[3] == 0 and (grad != 0).sum() == BATCH - 1


def test_the_mean_of_all_classes_is_known_after_a_round(any_place):
    classes = 3 * PROBES + 5
    loss = DomainBalancingLoss(classes, DIMENSIONS, k=4, epsilon="auto", device=any_place.device)
    features = torch.randn(2, DIMENSIONS, device=any_place.device)
    labels = torch.tensor([classes - 1, classes - 1], device=any_place.device)
    with any_place.run():
        for step in range(4):
            known = (~loss.compactness.isnan()).sum().item()
            assert known == (0 if step == 0 else PROBES * step + 1)
            loss(features, labels)
        assert not loss.compactness.isnan().any()
        domain = loss.dfi()
        torch.testing.assert_close(loss.compactness, domain.compactness)
        expected = domain.compactness.mean() / domain.compactness[-1]
        torch.testing.assert_close(loss.indicators(labels), expected.expand(2))
    assert domain.indicators.mean().item() == pytest.approx(1.0, abs=0.02)


def test_the_mean_follows_the_weight_and_rests_in_evaluation():
    loss, features, labels, _ = case(epsilon="auto", indicator_scale=8.0)
    loss(features, labels)
    before = loss.compactness.clone()
    with torch.no_grad():
        loss.weight[:, 0] += 5
    loss.eval()
    loss(features, labels)
    assert torch.equal(loss.compactness, before)
    loss.train()
    loss(features, labels)
    assert (loss.compactness > before).all()


def test_a_mean_that_is_not_positive_turns_no_margin_round():
    loss = DomainBalancingLoss(3, 2, k=1, epsilon="auto")
    with torch.no_grad():
        angles = torch.tensor([0.0, 2.1, 4.2])
        loss.weight.copy_(torch.stack([angles.cos(), angles.sin()], 1))
    assert (loss.dfi().compactness < 0).all()
    assert (loss.indicators(torch.arange(3)) == 2).all()


@pytest.mark.parametrize(("name", "value"), [("indicator_scale", 1.0), ("scale", 4.0), ("k", 2)])
def test_a_change_makes_the_mean_anew(name, value):
    """Of what is seen with it; one that changes nothing leaves the mean."""
    loss = DomainBalancingLoss(3 * PROBES, DIMENSIONS, k=4, scale=8.0, epsilon="auto")
    labels = torch.tensor([3 * PROBES - 1])
    for _ in range(3):
        loss.indicators(labels)
    loss.margin, loss.k, loss.scale = 0.1, 4, 8.0
    assert not loss.compactness.isnan().any()
    setattr(loss, name, value)
    loss.indicators(labels)
    seen = ~loss.compactness.isnan()
    assert seen.sum() == PROBES + 1
    torch.testing.assert_close(loss.compactness[seen], loss.dfi().compactness[seen])


def test_evaluation_comes_before_training():
    """The mean is that of all classes, which is computed once."""
    loss, features, labels, _ = case(epsilon="auto")
    loss.eval()
    assert loss(features, labels).isfinite()
    domain = loss.dfi()
    torch.testing.assert_close(loss.compactness, domain.compactness)
    torch.testing.assert_close(loss.indicators(labels), domain.indicators[labels])
    with torch.no_grad():
        loss.weight[:, 0] += 5
    loss(features, labels)
    torch.testing.assert_close(loss.compactness, domain.compactness)


def test_evaluation_computes_what_is_missing():
    loss, features, labels, _ = case(epsilon="auto")
    loss(features, labels)
    known = loss.compactness.clone()
    loss.compactness[[2, 7]] = torch.nan  # as an average with what was not yet seen
    loss.eval()
    with torch.inference_mode():
        loss(features, labels)
    torch.testing.assert_close(loss.compactness, known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_made_half(place, dtype):
    loss, features, labels, gate = case(place.device, torch.float32, epsilon="auto")
    with place.run():
        expected = loss(features, labels, gate).detach()
        loss.to(dtype)
        value = loss(features.to(dtype), labels, gate.to(dtype))
    assert loss.compactness.dtype == value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), expected, atol=0.1, rtol=0.02)


def test_narrow_labels_are_enough():
    features = case()[1]
    big = DomainBalancingLoss(300, DIMENSIONS, epsilon="auto", dtype=torch.float64).eval()
    narrow = torch.arange(BATCH, dtype=torch.int8)
    assert torch.equal(big(features, narrow), big(features, narrow.long()))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("epsilon", -1.0, ValueError, "epsilon: expected a positive number, got -1.0"),
        ("epsilon", "Auto", TypeError, "epsilon: expected a number, got str"),
        ("max_indicator", 0.0, ValueError, "max_indicator: expected a positive number, got 0.0"),
        ("k", -1, ValueError, "k: expected at least 0, got -1"),
        ("indicator_scale", 0.0, ValueError, "indicator_scale: expected a positive number"),
    ],
)
def test_wrong_hyper_parameters(name, value, error, message):
    loss, features, labels, _ = case()
    setattr(loss, name, value)
    for call in (lambda: loss(features, labels), loss.dfi):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("epsilon", [5.5, "auto"])
def test_wrong_labels_are_named(epsilon):
    loss, features, labels, _ = case(epsilon=epsilon)
    for wrong, error, message in [
        (labels.float(), TypeError, "labels: expected an integer dtype"),
        (labels[:, None], ValueError, r"labels: expected shape \[11\]"),
        (labels.to("meta"), ValueError, "labels: expected device cpu"),
    ]:
        with pytest.raises(error, match=message):
            loss(features, wrong)


def test_hyper_parameters_may_be_changed_between_steps():
    loss, features, labels, gate = case(epsilon=6.0)
    values = [loss(features, labels, gate).item()]
    changes = {
        "margin": 0.1, "scale": 4.0, "k": 3, "epsilon": 5.0, "rbm_weight": 1.0,
        "indicator_scale": 3.0, "max_indicator": 0.9,
    }  # fmt: skip
    for name, value in changes.items():
        setattr(loss, name, value)
        values.append(loss(features, labels, gate).item())
    loss.epsilon = "auto"
    values.append(loss(features, labels, gate).item())
    assert len(set(values)) == len(values)


def test_state_dict():
    loss, features, labels, _ = case(epsilon="auto")
    loss(features, labels)
    other = DomainBalancingLoss(CLASSES, DIMENSIONS, dtype=torch.float64)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.compactness, loss.compactness) and other.cursor == loss.cursor
    other.load_state_dict(facelt_ext.convert_state_dict({"W": loss.weight.detach().t()}))
    assert torch.equal(other.weight, loss.weight) and other.compactness.isnan().all()
    # A checkpoint of other parts of a model leaves the head as it is.
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": loss})
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone")}
    model.load_state_dict(backbone, strict=False)
    assert not loss.compactness.isnan().all() and loss.cursor > 0


def test_a_label_out_of_range(any_place):
    loss, features, labels, gate = case(any_place.device, epsilon=6.0)
    labels[2] = CLASSES
    with any_place.run():
        if any_place in (CPU, REFERENCE):
            with pytest.raises(ValueError, match=r"labels: expected .* got 30 at position 2"):
                loss(features, labels, gate)
        else:
            assert loss(features, labels, gate).isnan()


def test_a_gate_of_another_shape():
    loss, features, labels, gate = case()
    with pytest.raises(ValueError, match=r"gate: expected shape \[11\], .* got \[11, 1\]"):
        loss(features, labels, gate[:, None])


@pytest.mark.parametrize("epsilon", [6.0, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(place, epsilon, dtype):
    results = []
    for compiled in (False, True):
        loss, features, labels, gate = case(place.device, dtype, epsilon=epsilon)
        run = torch.compile(loss, fullgraph=True) if compiled else loss
        with place.run():
            for margin in (0.35, 0.2):
                loss.margin = margin
                value = run(features, labels, gate)
        value.backward()
        results.append((value.detach(), features.grad, loss.weight.grad, gate.grad))
        results[-1] += (loss.compactness, loss.cursor)
    torch.testing.assert_close(*results, equal_nan=True)


def test_training_with_the_balancing_module_learns(any_place):
    torch.manual_seed(0)
    balance = ResidualBalancingModule(DIMENSIONS).to(any_place.device)
    loss = DomainBalancingLoss(
        CLASSES, DIMENSIONS, k=5, scale=8.0, epsilon="auto", rbm_weight=5.0, device=any_place.device
    )
    centers = torch.randn(CLASSES, DIMENSIONS)
    labels = torch.arange(CLASSES).repeat(2)
    features = (centers[labels] + 0.1 * torch.randn(len(labels), DIMENSIONS)).to(any_place.device)
    labels = labels.to(any_place.device)
    parameters = [*balance.parameters(), *loss.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    values = []
    with any_place.run():
        for _ in range(60):
            value = loss(*_balanced(balance, features, labels))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        gate = balance(features)[1]
        distance = (gate - loss.indicators(labels)).abs().mean()
    assert values[-1] < 0.5 * values[0] and distance < 0.2


def _balanced(balance: ResidualBalancingModule, features: Tensor, labels: Tensor):
    balanced, gate = balance(features)
    return balanced, labels, gate
