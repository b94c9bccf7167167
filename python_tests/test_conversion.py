"""Weights of other libraries' heads."""

from __future__ import annotations

import io

import pytest
import torch

from facelt_ext import CosFaceLoss, DomainBalancingLoss, convert_state_dict

W = torch.arange(12.0).reshape(4, 3)
LAYER = torch.ones(3, 20)


def saved(state: object) -> object:
    """As it comes out of a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ALONE = {
    "pytorch-metric-learning": {"W": W.t()},
    "in a loss": {"loss_func.W": W.t()},
    "partial FC": {"weight": W},
    "in DataParallel": {"module.head.weight": W},
    "older insightface": {"kernel": W.t()},
    "beside numbers": {
        "head.kernel": W.t(), "head.steps": torch.tensor(3), "head.t": torch.zeros(1),
        "head.weight_index": torch.ones(2, 3, dtype=torch.int64),
    },
    "beside a norm": {"head.weight": W, "norm.weight": torch.ones(3)},
    "a parameter": {"weight": torch.nn.Parameter(W)},
}  # fmt: skip
WHOLE = {
    "AdaFace": {"fc.weight": LAYER, "conv.weight": torch.ones(2, 2, 3, 3), "head.kernel": W.t()},
    "Lightning": {"epoch": 3, "state_dict": {"model.fc.weight": LAYER, "head.kernel": W.t()}},
    "a loss beside a network": {"trunk": {"fc.weight": LAYER}, "loss": {"W": W.t()}},
    "insightface": {
        "epoch": 3, "state_dict_backbone": {"fc.weight": LAYER, "features.weight": torch.ones(3)},
        "state_dict_softmax_fc": {"weight": W}, "state_optimizer": {"state": {0: {"m": LAYER}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("state", [*ALONE.values(), *WHOLE.values()], ids=[*ALONE, *WHOLE])
def test_weights_of_other_libraries(state):
    converted = convert_state_dict(saved(state))
    assert list(converted) == ["weight"] and torch.equal(converted["weight"], W)
    assert converted["weight"].is_contiguous() and not converted["weight"].requires_grad
    for head in (CosFaceLoss(4, 3), DomainBalancingLoss(4, 3)):
        head.load_state_dict(converted)
        assert torch.equal(head.weight, W)


@pytest.mark.parametrize(
    "ranks",
    [
        [{"weight": W[:3]}, {"weight": W[3:]}],
        (W[:1], W[1:3], W[3:]),
        [{"module.kernel": W[:2].t()}, {"module.kernel": W[2:].t()}],
        [{**WHOLE["insightface"], "state_dict_softmax_fc": {"weight": p}} for p in W.split(2)],
        [W],
    ],
    ids=["partial FC", "rank:0_softmax_weight.pt", "transposed", "checkpoints", "one rank"],
)
def test_a_file_for_each_rank(ranks):
    assert torch.equal(convert_state_dict(ranks)["weight"], W)


def test_a_bare_weight():
    assert torch.equal(convert_state_dict(W)["weight"], W)


TWO = {"state_dict": {"a.weight": W, "b.weight": 2 * W}, "state_dict_ema": {"a.weight": 3 * W}}


@pytest.mark.parametrize(
    ("prefix", "factor"), [("b", 2), ("b.weight", 2), ("state_dict_ema", 3), ("state_dict.a", 1)]
)
def test_a_prefix_chooses(prefix, factor):
    assert torch.equal(convert_state_dict(TWO, prefix=prefix)["weight"], factor * W)
    assert torch.equal(convert_state_dict([TWO, TWO], prefix=prefix)["weight"][:4], factor * W)


@pytest.mark.parametrize(
    ("state", "prefix", "error", "message"),
    [
        ({}, None, ValueError, "state_dict: expected one matrix .* kernel, got the entries none"),
        ({"bias": W, "layer.width": W}, None, ValueError, "got the entries bias, layer.width"),
        ({"conv.weight": W[None, None]}, None, ValueError, "got the entries conv.weight"),
        ({"weight": W.long()}, None, ValueError, "got the entries weight"),
        ({"a.weight": W, "b.weight": W}, None, ValueError, "a.weight, b.weight; prefix= chooses"),
        ({"a.W": W.t(), "b.kernel": W.t()}, None, ValueError, "a.W, b.kernel; prefix= chooses"),
        (TWO, "a", ValueError, "under the prefix 'a', .* state_dict.a.weight, state_dict_ema.a.w"),
        (TWO, "c", ValueError, "under the prefix 'c', got the entries state_dict.a.weight"),
        (TWO, "a.weigh", ValueError, "under the prefix 'a.weigh'"),
        (TWO, 3, TypeError, "prefix: expected a str or None, got int"),
        ({f"{i}.weight": W for i in range(11)}, None, ValueError, "7.weight and 3 more; prefix="),
        ("head.pt", None, TypeError, "state_dict: expected a state_dict, a tensor or .* got str"),
        (None, None, TypeError, "state_dict: expected a state_dict, .* got NoneType"),
        (torch.nn.Linear(3, 4), None, TypeError, "state_dict: .* got Linear"),
        (W[0], None, ValueError, "state_dict: expected shape"),
        (W.long(), None, TypeError, "state_dict: expected dtype float64"),
        ([], None, ValueError, "state_dict: expected the state of at least one rank"),
        ([W, "head.pt"], None, TypeError, r"state_dict\[1\]: .* got str"),
        ([W, [W]], None, TypeError, r"state_dict\[1\]: .* got list"),
        ([{"weight": W}, {}], None, ValueError, r"state_dict\[1\]: expected one matrix"),
        ([W, W[:, :2]], None, ValueError, r"state_dict\[1\]: expected rows of 3 .* got 2 of"),
        ([W, W.half()], None, ValueError, r"\[1\]: .* of torch.float32, as .* torch.float16"),
    ],
)
def test_the_rest_is_refused_by_name(state, prefix, error, message):
    with pytest.raises(error, match=message):
        convert_state_dict(state, prefix=prefix)
