"""Wrong arguments of the margin softmax and its modules are named."""

from __future__ import annotations

import pytest
import torch

from facelt_ext import ArcFaceLoss, CosFaceLoss, SphereFaceLoss, functional

X, W = torch.randn(4, 3), torch.randn(6, 3)
Y = torch.tensor([0, 5, 1, 1])
HALF = X.half()

WRONG = [
    ({"weight": W.tolist()}, TypeError, "weight: expected a tensor, got list"),
    ({"weight": W.long()}, TypeError, "weight: expected dtype float64, .* got torch.int64"),
    ({"weight": W[0]}, ValueError, r"weight: expected shape \[rows, .* got \[3\]"),
    ({"weight": W[:, :2]}, ValueError, r"weight: expected shape \[classes >= 1, 3\].*\[6, 2\]"),
    ({"weight": W[:0]}, ValueError, r"weight: expected shape \[classes >= 1, 3\].*\[0, 3\]"),
    ({"weight": W.to("meta")}, ValueError, "weight: expected device cpu, .* got meta"),
    ({"weight": W.double()}, TypeError, "weight: .*torch.float32, as the .*got torch.float64"),
    ({"weight": W.half()}, TypeError, "weight: .*torch.float32, as the .*got torch.float16"),
    (
        {"features": HALF, "weight": W.bfloat16()},
        TypeError,
        "weight: expected dtype torch.float16 or torch.float32, .* got torch.bfloat16",
    ),
    ({"features": HALF, "weight": W.double()}, TypeError, "weight: .* got torch.float64"),
    ({"features": X.double()}, TypeError, "weight: expected dtype torch.float64, .*torch.float32"),
    ({"scale": 0.0}, ValueError, "scale: expected a positive number, got 0"),
    ({"scale": -1.0}, ValueError, "scale: expected a positive number, got -1"),
    ({"scale": torch.nan}, ValueError, "scale: expected a number that is finite .* got nan"),
    ({"scale": 1e39}, ValueError, "scale: expected a number that is finite in torch.float32"),
    ({"scale": torch.tensor(1.0)}, TypeError, "scale: expected a number, got Tensor"),
    ({"angular_multiplier": 0}, ValueError, "angular_multiplier: expected at least 1, got 0"),
    ({"angular_multiplier": 1.5}, TypeError, "angular_multiplier: expected an int, got float"),
    ({"angular_multiplier": True}, TypeError, "angular_multiplier: expected an int, got bool"),
    (
        {"angular_margin": -0.1},
        ValueError,
        r"angular_margin: .* \[0, pi\], got -0.1",
    ),
    ({"reduction": "avg"}, ValueError, "reduction: expected one of none, sum, mean, got 'avg'"),
    ({"workspace": "big"}, ValueError, "workspace: expected one of low, high, auto, got 'big'"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
    ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
]
WRONG_MARGINS = [
    (torch.nan, ValueError, "expected a number that is finite in torch.float32, got nan"),
    (torch.inf, ValueError, "expected a number that is finite in torch.float32, got inf"),
    ("1", TypeError, "expected a number, got str"),
    (None, TypeError, "expected a number, got NoneType"),
    (torch.zeros(6).long(), TypeError, "expected a floating dtype, got torch.int64"),
    (torch.zeros(5), ValueError, r"expected a number, or shape \[6\], .* or \[4, 1\], .* \[5\]"),
    (torch.zeros(4), ValueError, r"or \[4, 1\], one per sample, got \[4\]"),
    (torch.zeros(1, 4), ValueError, r"or \[4, 1\], one per sample, got \[1, 4\]"),
    (torch.zeros(6, 1), ValueError, r"or \[4, 1\], one per sample, got \[6, 1\]"),
    (torch.tensor(0.5), ValueError, r"got \[\]"),
    (torch.zeros(6, device="meta"), ValueError, "expected device cpu, .* got meta"),
    (torch.zeros(6).requires_grad_(), ValueError, r"no gradient goes to margins; .*\.detach\(\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_arguments(any_place, changes, error, message):
    arguments = {"features": X, "weight": W, "labels": Y, **changes}
    with any_place.run(), pytest.raises(error, match=message):
        functional.margin_softmax_loss(**arguments)


@pytest.mark.parametrize("name", ["cosine_margin", "angular_margin"])
@pytest.mark.parametrize(("margin", "error", "message"), WRONG_MARGINS)
def test_margins(any_place, name, margin, error, message):
    with any_place.run(), pytest.raises(error, match=f"{name}: .*{message}"):
        functional.margin_softmax_loss(X, W, Y, **{name: margin})


def test_a_negative_cosine_margin_is_none_of_ours(any_place):
    with any_place.run():
        easier = functional.margin_softmax_loss(X, W, Y, cosine_margin=-0.2)
        assert easier < functional.margin_softmax_loss(X, W, Y)


@pytest.mark.parametrize(
    "margin",
    [
        {"cosine_margin": 0.1},
        {"angular_margin": 0.1},
        {"angular_multiplier": 2},
        {"cosine_margin": torch.zeros(6)},
        {"angular_margin": torch.zeros(4, 1)},
    ],
)
def test_margins_need_normalized_rows(any_place, margin):
    wanted = "normalize_weight: margins need it to be True, got False"
    with any_place.run(), pytest.raises(ValueError, match=wanted):
        functional.margin_softmax_loss(X, W, Y, normalize_weight=False, **margin)


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_out_of_range(label):
    message = rf"labels: expected numbers in \[0, 6\) or -100, got {label} at position 1"
    with pytest.raises(ValueError, match=message):
        functional.margin_softmax_loss(X, W, torch.tensor([0, label, 1, 99]))


@pytest.mark.parametrize("kind", [CosFaceLoss, ArcFaceLoss, SphereFaceLoss])
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 3), ValueError, "num_classes: expected at least 1, got 0"),
        ((6, 0), ValueError, "embedding_size: expected at least 1, got 0"),
        ((6.0, 3), TypeError, "num_classes: expected an int, got float"),
        ((6, "3"), TypeError, "embedding_size: expected an int, got str"),
    ],
)
def test_sizes_of_modules(kind, sizes, error, message):
    with pytest.raises(error, match=message):
        kind(*sizes)


def test_modules_name_margins():
    with pytest.raises(ValueError, match="^margin: expected a number, or shape"):
        CosFaceLoss(6, 3, margin=torch.zeros(5))
    with pytest.raises(ValueError, match="^margin: expected at least 0"):
        ArcFaceLoss(6, 3, margin=-0.5)
    with pytest.raises(ValueError, match="^margin: .* radians"):
        ArcFaceLoss(6, 3, margin=28.6)
    with pytest.raises(TypeError, match="^margin: expected an int, got float"):
        SphereFaceLoss(6, 3, margin=1.5)
    with pytest.raises(ValueError, match="weight: expected shape .* got .6, 4."):
        CosFaceLoss(6, 4)(X, Y)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        CosFaceLoss(6, 3, reduction="max")(X, Y)
