"""Arguments of the losses' constructors and calls, and their attributes."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from loss_cases import ARGUMENTS, CLASSES, HEADS, LOSSES, MARGINS, SIZE, batch, make, value
from torch import nn

from facelt_ext import ArcFaceLoss, CosFaceLoss, DomainBalancingLoss, SphereFaceLoss, losses

HUGE = 2**62
WRONG = {
    bool: [1, None, "yes", np.ones(2), torch.ones(2)],
    int: [1.5, True, "3", [], 2**70, math.nan, torch.tensor(3), np.ones(2)],
    float: ["abc", True, [], math.nan, math.inf, 1j, np.ones(2), {}],
    str: ["abc", 3, None, np.ones(2)],
    tuple: [3, (1.0, 2.0), (1.0, 2.0, math.nan), "abc", None],
}
WRONG_KINDS = {
    "device": ["nowhere", 1.5], "dtype": [torch.int64, "float32", torch.complex64],
    "num_classes": [0, -1, HUGE, 2**70], "embedding_size": [0, -1, HUGE, 2**70],
    "super_classes": [None, torch.arange(CLASSES)], "init_std": [0.0, -1.0], "scale": [0.0, -1.0],
    "indicator_scale": [0.0, "auto"], "max_indicator": [0.0, -1.0], "epsilon": [0.0, "Auto", None],
    "samples_per_cluster": [0, -1],
}  # fmt: skip
# What a weight is made of; all others may be changed later.
MADE_WITH = ("num_classes", "embedding_size", "super_classes", "device", "dtype", "init_std")


def right_arguments(name: str) -> dict[str, object]:
    """All that the constructor takes, with the options that it hands on; numbers where it can."""
    found: dict[str, object] = {}
    for kind in getattr(losses, name).__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(kind.__init__).parameters.values()
        for each in parameters:
            if each.name != "self" and each.kind is not each.VAR_KEYWORD:
                found.setdefault(each.name, each.default)
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            break
    return {**found, **ARGUMENTS[name][-1]}


def wrong_values(argument: str, right: object) -> list[object]:
    wrong = [object(), *WRONG_KINDS.get(argument, [])]
    if argument not in MADE_WITH or isinstance(right, (int, float)):
        wrong += WRONG.get(type(right), [])
    return wrong


EVERY = [(name, argument) for name in LOSSES for argument in right_arguments(name)]


def test_every_loss_has_a_case():
    assert sorted(ARGUMENTS) == LOSSES
    for name in LOSSES:
        assert value(make(name)).isfinite()


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_wrong_arguments_of_constructors_are_named(name, argument):
    right = right_arguments(name)
    getattr(losses, name)(**right)
    for wrong in wrong_values(argument, right[argument]):
        with pytest.raises((TypeError, ValueError), match=argument):
            getattr(losses, name)(**{**right, argument: wrong})


@pytest.mark.parametrize(("name", "attribute"), [e for e in EVERY if e[1] not in MADE_WITH])
def test_wrong_attributes_are_named_when_they_are_used(name, attribute):
    right = right_arguments(name)
    for wrong in wrong_values(attribute, right[attribute]):
        loss = getattr(losses, name)(**right)
        with pytest.raises((TypeError, ValueError), match=attribute):
            setattr(loss, attribute, wrong)
            loss(*batch())


def numpy_kind(right: object) -> object:
    if isinstance(right, bool):
        return np.bool_(right)
    if isinstance(right, int):
        return np.int64(right)
    if isinstance(right, float):
        return np.float64(right)
    return tuple(map(numpy_kind, right)) if isinstance(right, tuple) else right


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_of_numpy(name):
    right = right_arguments(name)
    kinds = {argument: numpy_kind(number) for argument, number in right.items()}
    assert any(
        isinstance(kind, np.generic) or argument == "margins" for argument, kind in kinds.items()
    )
    torch.manual_seed(0)
    plain = getattr(losses, name)(**right)
    torch.manual_seed(0)
    given = getattr(losses, name)(**kinds)
    assert torch.equal(value(given), value(plain))
    for argument in set(kinds) - set(MADE_WITH):
        assert type(getattr(given, argument)) is type(getattr(plain, argument))
        setattr(plain, argument, kinds[argument])
    assert torch.equal(value(given), value(plain))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "DomainBalancingLoss"])
def test_the_third_argument_of_pytorch_metric_learning(name):
    loss = make(name).eval()
    features, labels = batch()
    expected = loss(features, labels)
    assert torch.equal(loss(features, labels, None), expected)
    assert torch.equal(loss(features, labels, indices_tuple=None), expected)
    for mined in [(labels,) * 3, labels, 3]:
        with pytest.raises(
            ValueError, match=f"indices_tuple: expected None, .* {type(mined).__name__}"
        ):
            loss(features, labels, mined)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_containers_of_pytorch_metric_learning(name):
    from pytorch_metric_learning.losses import MultipleLosses

    loss = make(name).eval()
    both = MultipleLosses([loss, loss], weights=[1.0, 0.5])
    torch.testing.assert_close(both(*batch()), 1.5 * loss(*batch()))


@pytest.mark.parametrize(
    ("gate", "error"),
    [
        ((torch.arange(3),) * 4, TypeError), (0.5, TypeError), ([0.1] * 16, TypeError),
        (torch.arange(16), TypeError), (torch.rand(16).to_sparse(), TypeError),
        (torch.rand(16, 1), ValueError), (torch.rand(16, device="meta"), ValueError),
    ],
    ids=["mined", "number", "list", "integers", "sparse", "shape", "meta"],
)  # fmt: skip
def test_what_is_no_gate(gate, error):
    with pytest.raises(error, match="gate: expected"):
        make("DomainBalancingLoss")(*batch(), gate)


@pytest.mark.parametrize("name", HEADS)
def test_features_of_logits_are_checked(name):
    loss = make(name)
    features = batch()[0]
    for wrong, error, message in [
        (features.tolist(), TypeError, "features: expected a tensor"),
        (features[0], ValueError, "features: expected shape"),
        (features[:, 1:], ValueError, rf"weight: expected shape .* {SIZE - 1}\]"),
        (features.long(), TypeError, "features: expected dtype"),
        (features.to("meta"), ValueError, "weight: expected device meta"),
    ]:
        with pytest.raises(error, match=message):
            loss.logits(wrong)


WITH_MARGINS = [ArcFaceLoss, CosFaceLoss, DomainBalancingLoss]


@pytest.mark.parametrize("kind", WITH_MARGINS)
@pytest.mark.parametrize(
    ("margin", "error", "message"),
    [
        (
            torch.zeros(3),
            ValueError,
            r"expected a number, or shape \[60\], one per class, got \[3\]",
        ),
        (torch.zeros(60, 1), ValueError, r"expected a number, .* \[60\], .* got \[60, 1\]"),
        (torch.zeros(60).long(), TypeError, "expected a floating dtype, got torch.int64"),
        (torch.full((60,), math.nan), ValueError, "expected finite numbers"),
        (nn.Parameter(torch.zeros(60)), ValueError, "no gradient goes to margins"),
        (torch.zeros(60).to_sparse(), TypeError, "expected a dense tensor"),
        ([0.1] * 60, TypeError, "expected a number, got list"),
    ],
)
def test_wrong_margins_of_classes(kind, margin, error, message):
    with pytest.raises(error, match=f"margin: {message}"):
        kind(CLASSES, SIZE, margin=margin)


def test_angles_are_in_radians():
    for margin in (28.6, np.float32(28.6), 3.15, torch.full((CLASSES,), 28.6)):
        with pytest.raises(
            ValueError, match=r"margin: expected an angle in radians, .* math.radians"
        ):
            ArcFaceLoss(CLASSES, SIZE, margin=margin)
    for margin in (-0.1, torch.linspace(-0.1, 1, CLASSES)):
        with pytest.raises(ValueError, match="margin: expected at least 0.0, got -0.1"):
            ArcFaceLoss(CLASSES, SIZE, margin=margin)
    head = ArcFaceLoss(CLASSES, SIZE, margin=math.radians(28.6))
    assert head.margin == pytest.approx(0.4992, abs=1e-4)
    assert ArcFaceLoss(CLASSES, SIZE, margin=math.pi)(*batch()).isfinite()
    head.margin = 28.6
    with pytest.raises(ValueError, match="angular_margin: .*radians"):
        head(*batch())


def test_the_multiplier_of_an_angle():
    for margin in (0, 1001, HUGE, 2.0, torch.full((CLASSES,), 2)):
        with pytest.raises((TypeError, ValueError), match="margin: expected"):
            SphereFaceLoss(CLASSES, SIZE, margin=margin)


@pytest.mark.parametrize("kind", [*WITH_MARGINS, SphereFaceLoss])
def test_rows_are_drawn_as_asked(kind):
    for std in (0.01, 1.0):
        options = {} if std == 0.01 else {"init_std": std}
        head = kind(3000, 11, **options)
        for _ in range(2):
            assert head.weight.std().item() == pytest.approx(std, rel=0.05)
            head.reset_parameters()


def test_a_step_turns_rows_as_the_docs_say():
    """By an angle that goes with 1 / init_std^2."""
    features, labels = batch()
    turned = []
    for std in (1.0, 0.1):
        head = CosFaceLoss(CLASSES, SIZE, init_std=std, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(std * make("CosFaceLoss").weight / 0.01)
        before = head.weight.detach().clone()
        head(features.double(), labels).backward()
        torch.optim.SGD(head.parameters(), lr=1e-7).step()
        across = before / before.norm(dim=1, keepdim=True) - nn.functional.normalize(head.weight)
        turned.append(across.norm().item())
    assert turned[1] == pytest.approx(100 * turned[0], rel=1e-3)


@pytest.mark.parametrize("kind", WITH_MARGINS)
def test_margins_of_classes_in_checkpoints(kind):
    head, number = kind(CLASSES, SIZE, margin=MARGINS), kind(CLASSES, SIZE, margin=0.25)
    assert "margin" in head.state_dict() and "margin" not in number.state_dict()
    kept = number.state_dict()
    number.load_state_dict(head.state_dict())
    assert torch.equal(number.margin, MARGINS)
    other = kind(CLASSES, SIZE, margin=2 * MARGINS)
    other.load_state_dict(kept)
    assert torch.equal(other.margin, 2 * MARGINS), "what is not in a state_dict stays"
    head.margin = 0.125
    assert "margin" not in head.state_dict() and value(head).isfinite()
    head.margin = MARGINS.double()
    assert head.state_dict()["margin"].dtype == torch.float64
    head.load_state_dict({**head.state_dict(), "margin": MARGINS.half()})
    assert torch.equal(head.margin, MARGINS.half().double())


@pytest.mark.parametrize("kind", WITH_MARGINS)
@pytest.mark.parametrize("own", [0.25, MARGINS])
def test_wrong_margins_in_checkpoints(kind, own):
    head = kind(CLASSES, SIZE, margin=own)
    weight = head.weight.detach().clone()
    state = {**head.state_dict(), "weight": torch.ones(CLASSES, SIZE)}
    wrong = [MARGINS[1:], MARGINS[:, None], MARGINS.long(), MARGINS * math.nan, MARGINS.to("meta")]
    if kind is ArcFaceLoss:
        wrong += [MARGINS + math.pi, -MARGINS]
    for margin in wrong:
        with pytest.raises((TypeError, ValueError), match="margin: expected"):
            head.load_state_dict({**state, "margin": margin})
        assert torch.equal(head.weight, weight) and head.margin is not margin
    assert value(head).isfinite()


def test_margins_of_classes_for_domain_balancing():
    """Each sample has its class's, also in a batch of as many samples as there are classes."""
    head = DomainBalancingLoss(16, SIZE, margin=MARGINS[:16], k=3, epsilon=5.0, scale=8.0)
    features, labels = batch()[0], torch.arange(16).flip(0) // 2
    with torch.no_grad():
        head.weight.normal_()
    expected = []
    for f, label in zip(features, labels, strict=True):
        number = DomainBalancingLoss(
            16, SIZE, margin=MARGINS[label].item(), k=3, epsilon=5.0, scale=8.0
        )
        number.load_state_dict({"weight": head.weight.detach()})
        expected.append(number(f[None], label[None]))
    torch.testing.assert_close(head(features, labels), torch.stack(expected).mean())
    torch.testing.assert_close(head(features[:5], labels[:5]), torch.stack(expected[:5]).mean())


def test_margins_without_values_wait_for_a_checkpoint():
    with torch.device("meta"):
        head = CosFaceLoss(CLASSES, SIZE, margin=torch.ones(CLASSES))
    head.to_empty(device="cpu").reset_parameters()
    with pytest.raises(ValueError, match=r"margin: was made on meta .* load_state_dict\(\)"):
        head(*batch())
    head.load_state_dict(make("CosFaceLoss").state_dict())
    assert torch.equal(value(head), value(make("CosFaceLoss")))
