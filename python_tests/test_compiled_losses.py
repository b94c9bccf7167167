"""Every loss under torch.compile and torch.export: what may change from step to step."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim, export

import facelt_ext
from facelt_ext import functional
from facelt_ext.aggregation import SuperClasses

N, D = 6, 4
SETS = SuperClasses(torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5]), torch.tensor([0, 0, 1, 1]))
# Clusters of one sample: batches of any size.
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "CosFaceLoss": lambda: facelt_ext.CosFaceLoss(N, D),
    "ArcFaceLoss": lambda: facelt_ext.ArcFaceLoss(N, D),
    "SphereFaceLoss": lambda: facelt_ext.SphereFaceLoss(N, D),
    "DomainBalancingLoss": lambda: facelt_ext.DomainBalancingLoss(N, D, k=2, indicator_scale=2.0),
    "AggregatedSoftmaxLoss": lambda: facelt_ext.AggregatedSoftmaxLoss(N, D, SETS),
    "DispersionLoss": lambda: facelt_ext.DispersionLoss(N, D, SETS),
    "RangeLoss": lambda: facelt_ext.RangeLoss(alpha=1.0, beta=1.0, margin=9.0),
    "CLMLELoss": lambda: facelt_ext.CLMLELoss(0.3, 0.1, samples_per_cluster=1),
    "LMLELoss": lambda: facelt_ext.LMLELoss((0.1, 0.2, 0.3), samples_per_cluster=1),
}


def numbers_of(loss: nn.Module) -> dict[str, object]:
    """Attributes that are numbers, or tuples of them, and may change between steps."""
    names = {*vars(loss), *(n for n, v in vars(type(loss)).items() if isinstance(v, property))}
    values = {name: getattr(loss, name) for name in sorted(names) if not name.startswith("_")}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, float) or (isinstance(value, tuple) and isinstance(value[0], float))
    }


SCHEDULES = [
    (name, attribute)
    for name, make in LOSSES.items()
    for attribute in numbers_of(make())
    if attribute != "init_std"
]


def test_every_loss_is_here():
    made = [getattr(facelt_ext, name) for name in facelt_ext.__all__]
    losses = {each.__name__ for each in made if isinstance(each, type) and "Loss" in each.__name__}
    assert losses == set(LOSSES)
    assert {name for name, _ in SCHEDULES} == losses - {"AggregatedSoftmaxLoss", "DispersionLoss"}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, D), torch.arange(size) // 2 % N


def gradients(loss: Callable[..., Tensor], features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    features = features.clone().requires_grad_()
    value = loss(features, labels)
    return value.detach(), torch.autograd.grad(value, features)[0]


def compiled(loss: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(loss, fullgraph=True, backend="aot_eager")


def check_like(loss: nn.Module, program: Callable[..., Tensor], size: int) -> None:
    given = batch(size)
    for found, expected in zip(gradients(program, *given), gradients(loss, *given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "attribute"), SCHEDULES)
def test_a_number_that_changes_each_step(name, attribute):
    loss = LOSSES[name]()
    program = compiled(loss)
    first = getattr(loss, attribute)
    for step in range(4):
        factor = 1 + 0.1 * step
        value = first * factor if isinstance(first, float) else tuple(g * factor for g in first)
        setattr(loss, attribute, value)
        check_like(loss, program, 8)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", LOSSES)
def test_batches_of_many_sizes(name):
    loss = LOSSES[name]().eval()
    program = compiled(loss)
    for size in (12, 10, 7, 14):
        check_like(loss, program, size)
    assert counters["stats"]["unique_graphs"] <= 2


class Network(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.base, self.loss = nn.Linear(D, D), loss

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.base(features), labels)


# Their steps depend on the labels, which plain operations of a program cannot.
BY_OPERATORS = {"RangeLoss": "range_loss_forward", "LMLELoss": "quintuplet_forward"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_export_with_an_open_batch_size(name, strict):
    network, size = Network(LOSSES[name]()), Dim("size", min=2)
    program = export(network, batch(4), dynamic_shapes=({0: size}, {0: size}), strict=strict)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored)
    operators = {str(node.target) for node in loaded.graph.nodes if "facelt" in str(node.target)}
    wanted = {f"facelt_ext.{BY_OPERATORS[name]}.default"} if name in BY_OPERATORS else set()
    assert operators == wanted
    again, given = loaded.module(), batch(9)
    for model in (network, again):
        model(*given).backward()
    torch.testing.assert_close(again(*given), network(*given), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        again.base.weight.grad, network.base.weight.grad, rtol=1e-4, atol=1e-5
    )


INDEX = torch.tensor([0, 0, 1, 1, 2, 2])


def dispersion(index: Tensor, count: int | None) -> Tensor:
    features, labels = batch(6)
    rows = torch.linspace(-1, 1, 6 * D).view(6, D)
    return functional.dispersion_softmax_loss(
        features, rows[:2], rows, index, labels, num_super_classes=count
    )


def mean(index: Tensor, count: int | None) -> Tensor:
    return functional.super_class_mean(torch.linspace(-1, 1, 6 * D).view(6, D), index, count)


@pytest.mark.parametrize("function", [dispersion, mean])
def test_an_index_that_is_a_tensor_needs_its_number(function):
    program = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = function(INDEX, None)
    torch.manual_seed(1)
    torch.testing.assert_close(program(INDEX, 3), expected)
    with pytest.raises(Exception, match="num_super_classes: expected a number under torch.compile"):
        program(INDEX, None)
