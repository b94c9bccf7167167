"""The modules of the margin softmax, and the residual balancing module."""

from __future__ import annotations

import io

import pytest
import torch
from pytorch_metric_learning import losses as pml
from softmax_cases import random_case
from strategies import assert_close

import facelt_ext
from facelt_ext import ArcFaceLoss, CosFaceLoss, SphereFaceLoss, functional

HEADS = [CosFaceLoss, ArcFaceLoss, SphereFaceLoss]


def options_of(head: torch.nn.Module) -> dict[str, object]:
    """What the paper's loss is as options of the function."""
    if isinstance(head, CosFaceLoss):
        return {"cosine_margin": head.margin}
    if isinstance(head, ArcFaceLoss):
        return {"angular_margin": head.margin}
    return {"angular_multiplier": head.margin, "normalize_features": False}


@pytest.mark.parametrize("kind", HEADS)
def test_module_is_the_function(any_place, kind):
    case = random_case(0, 9, 7, 5).to(torch.float32, any_place.device)
    head = kind(7, 5, device=any_place.device)
    with any_place.run():
        for changes in [
            {}, {"scale": 5.0}, {"margin": 2}, {"reduction": "none"}, {"ignore_index": 3},
            {"workspace": "low"},
        ]:  # fmt: skip
            for name, value in changes.items():
                setattr(head, name, value)
            expected = functional.margin_softmax_loss(
                case.features, head.weight, case.labels, scale=head.scale, reduction=head.reduction,
                ignore_index=head.ignore_index, **options_of(head),
            )  # fmt: skip
            assert torch.equal(head(case.features, case.labels), expected)
    assert (expected == 0).tolist() == (case.labels == 3).tolist()


def test_every_hyper_parameter_reaches_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        functional, "margin_softmax_loss", lambda *args, **options: seen.update(options)
    )
    head = CosFaceLoss(4, 3, reduction="sum", ignore_index=-7, workspace="high", scale=3.0)
    head(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    assert seen == {
        "scale": 3.0, "reduction": "sum", "ignore_index": -7, "workspace": "high",
        "cosine_margin": 0.35,
    }  # fmt: skip


def test_paper_defaults():
    shape = "num_classes=4, embedding_size=3"
    assert repr(CosFaceLoss(4, 3)) == f"CosFaceLoss({shape}, margin=0.35, scale=64.0)"
    assert repr(ArcFaceLoss(4, 3)) == f"ArcFaceLoss({shape}, margin=0.5, scale=64.0)"
    assert repr(SphereFaceLoss(4, 3)) == f"SphereFaceLoss({shape}, margin=4, scale=1.0)"
    per_class = CosFaceLoss(4, 3, margin=torch.zeros(4))
    assert repr(per_class) == f"CosFaceLoss({shape}, margin=per class, scale=64.0)"


@pytest.mark.parametrize("kind", HEADS)
def test_the_weight(kind):
    head = kind(3000, 11, dtype=torch.float64)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert head.weight.shape == (3000, 11) and head.weight.dtype == torch.float64
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, before)
    assert kind(4, 3, device="meta").weight.is_meta


@pytest.mark.parametrize("kind", HEADS)
def test_state_dict_round_trip(kind):
    head, other = kind(7, 5), kind(7, 5)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    case = random_case(1, 6, 7, 5).to(torch.float32)
    assert torch.equal(head(case.features, case.labels), other(case.features, case.labels))
    assert list(head.state_dict()) == ["weight"]


@pytest.mark.parametrize("kind", [CosFaceLoss, ArcFaceLoss])
def test_a_margin_per_class(any_place, kind):
    case = random_case(2, 9, 7, 5).to(torch.float32, any_place.device)
    margin = torch.linspace(0, 0.6, 7)
    # It follows the weight.
    head = kind(7, 5, margin=margin).to(any_place.device)
    with any_place.run():
        actual = head(case.features, case.labels)
        head.margin = margin.to(any_place.device)[case.labels][:, None]
        assert torch.equal(head(case.features, case.labels), actual)
        assert list(head.state_dict()) == ["weight"], "margins of samples belong to a batch"
        head.margin = 0.3
        assert not torch.equal(head(case.features, case.labels), actual)
    assert list(head.state_dict()) == ["weight"]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_have_no_margin(kind, dtype):
    head = kind(7, 5, dtype=torch.float64)
    head.margin, head.scale = 1 if kind is SphereFaceLoss else 0.0, 6.0
    case = random_case(3, 8, 7, 5)
    logits = head.logits(case.features.to(dtype))
    assert logits.shape == (8, 7) and logits.dtype == dtype
    loss = torch.nn.functional.cross_entropy(logits.double(), case.labels)
    expected = head(case.features, case.labels)
    torch.testing.assert_close(loss, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_learns(kind):
    torch.manual_seed(0)
    head = kind(5, 4)
    x = torch.eye(4).repeat(4, 1) + 0.1 * torch.randn(16, 4)
    labels = torch.arange(16) % 4
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        optimizer.step()
    assert torch.equal(head.logits(x).argmax(1), labels)


@pytest.mark.parametrize(
    ("name", "their_margin", "margin", "scale"),
    [
        ("CosFaceLoss", 0.3, 0.3, 16.0),
        ("ArcFaceLoss", 20.0, torch.pi / 9, 16.0),
        ("SphereFaceLoss", 4, 4, 2.0),
        ("SphereFaceLoss", 3, 3, 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_pytorch_metric_learning_agrees(any_place, name, their_margin, margin, scale):
    """With its weight; ArcFace where theta + m is at most pi, beyond which it takes another way."""
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, "device": any_place.device}
    theirs = getattr(pml, name)(7, 5, margin=their_margin, scale=scale).to(**kind)
    ours = getattr(facelt_ext, name)(7, 5, margin, scale, **kind)
    ours.load_state_dict(facelt_ext.convert_state_dict(theirs.state_dict()))
    case = random_case(4, 12, 7, 5).to(torch.float64, any_place.device)
    rows = ours.weight.detach()[case.labels]
    case.features += 0.5 * rows / rows.norm(dim=1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(case.features, rows)
    assert (cosine.acos() + torch.pi / 9).max() < torch.pi
    results = []
    for head in (theirs, ours):
        x = case.features.clone().requires_grad_()
        with any_place.run():
            loss = head(x, case.labels)
            (parameter,) = head.parameters()
            grad_x, grad_w = torch.autograd.grad(loss, (x, parameter))
        results.append([loss.detach(), grad_x, grad_w if head is ours else grad_w.t()])
    for their, our in zip(*results, strict=True):
        assert_close(our, their, torch.float64, 100)


def test_residual_balancing():
    torch.manual_seed(0)
    module = facelt_ext.ResidualBalancingModule(5, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    first, norm, _, last = module.residual
    hidden = x @ first.weight.t() + first.bias
    variance, mean = torch.var_mean(hidden, 0, correction=0)
    hidden = (hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    residual = hidden.clamp(min=0) @ last.weight.t() + last.bias
    gate = x @ module.gate.weight[0] + module.gate.bias
    balanced, own_gate = module(x)
    assert balanced.shape == (6, 5) and own_gate.shape == (6,)
    torch.testing.assert_close(own_gate, gate)
    torch.testing.assert_close(balanced, x + gate[:, None] * residual)
    (balanced.sum() + own_gate.sum()).backward()
    assert x.grad.any() and all(p.grad is not None for p in module.parameters())


def test_residual_balancing_of_one_sample():
    module = facelt_ext.ResidualBalancingModule(5)
    x = torch.randn(4, 5)
    with pytest.raises(
        ValueError, match="features: expected at least 2 rows in training, .* got 1"
    ):
        module(x[:1])
    module(x)
    module.eval()
    for single, batched in zip(module(x[:1]), module(x), strict=True):
        torch.testing.assert_close(single, batched[:1])
    assert module(x[:0])[0].shape == (0, 5)


def test_residual_balancing_state_and_errors():
    module, other = (facelt_ext.ResidualBalancingModule(5) for _ in range(2))
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(module.eval()(x)[0], other.eval()(x)[0])
    with pytest.raises(ValueError, match="embedding_size: expected at least 1, got 0"):
        facelt_ext.ResidualBalancingModule(0)
    assert facelt_ext.ResidualBalancingModule(2, device="meta").gate.weight.is_meta
