"""Tensors that are not plain memory: an error that names the argument, wherever they come from."""

from __future__ import annotations

import pytest
import torch
from odd_values import Plain, Wrapper
from public_calls import CALLS, made
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from facelt_ext import functional
from facelt_ext.functional import SuperClassIndex


def fake(value: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(value)


def distributed(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, MESH[0], [Replicate()], run_check=False)


MESH: list[object] = []


@pytest.fixture(scope="module", autouse=True)
def mesh(tmp_path_factory):
    meet = tmp_path_factory.mktemp("group") / "meet"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    MESH.append(torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    yield
    torch.distributed.destroy_process_group()
    MESH.clear()


UNREADABLE = {
    "wrapper": Wrapper,
    "fake": fake,
    "DTensor": distributed,
    "sparse": Tensor.to_sparse,
    "nested": lambda value: torch.nested.nested_tensor([value.float()]),
}
# Made of torch's own modules, which take what they take.
OF_TORCH = "ResidualBalancingModule.forward"
ARGUMENTS = [
    (name, argument)
    for name in CALLS
    if name != OF_TORCH
    for argument, value in made(name)[1].items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_tensor_without_readable_memory_is_named(name, argument, kind):
    function, arguments = made(name)
    arguments[argument] = UNREADABLE[kind](arguments[argument].detach())
    with pytest.raises((TypeError, ValueError), match=argument) as caught:
        function(**arguments)
    if kind == "DTensor":
        assert "full_tensor()" in str(caught.value)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_plain_subclass_is_a_tensor(name, argument):
    function, arguments = made(name)
    arguments[argument] = arguments[argument].detach().as_subclass(Plain)
    function(**arguments)


W, X, Y = torch.randn(4, 3), torch.randn(8, 3), torch.arange(8) // 2
INDEX = SuperClassIndex(torch.arange(4) // 2)
LOSSES = {
    "range_loss": lambda x: functional.range_loss(x, Y),
    "class_ranges": lambda x: functional.class_ranges(x, Y).ranges,
    "class_centroids": lambda x: functional.class_centroids(x, Y).centroids,
    "min_centroid_distance": lambda x: functional.min_centroid_distance(x).distance,
    "cluster_margin_loss": lambda x: functional.cluster_margin_loss(
        x, Y, torch.arange(4) // 2, between_margin=0.3, within_margin=0.1, reduction="none"
    ),
    "quintuplet_loss": lambda x: functional.quintuplet_loss(
        x, Y // 2, Y, margins=(0.1, 0.2, 0.3), reduction="none"
    ),
    "super_class_mean": lambda x: functional.super_class_mean(x, Y),
    "margin_softmax_loss": lambda x: functional.margin_softmax_loss(x, W, Y, reduction="none"),
    "dispersion_softmax_loss": lambda x: functional.dispersion_softmax_loss(
        x, W[:0], W, INDEX, Y, reduction="none"
    ),
}


def test_every_differentiable_function_is_here():
    without_gradient = {"inter_class_compactness", "domain_frequency_indicator", "SuperClassIndex"}
    assert set(LOSSES) == set(functional.__all__) - without_gradient


@pytest.mark.parametrize("kind", [Wrapper, fake, distributed], ids=["wrapper", "fake", "DTensor"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_without_memory_is_named(name, kind):
    x = X.clone().requires_grad_()
    out = LOSSES[name](x)
    came = torch.rand(9, *out.shape)[1]
    (expected,) = torch.autograd.grad(out, x, came, retain_graph=True)
    try:
        (found,) = torch.autograd.grad(out, x, kind(came))
    except TypeError as error:
        assert str(error).startswith("grad")
    else:
        # What torch's own operators made of it first.
        assert torch.equal(found.inner if isinstance(found, Wrapper) else found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_hook_makes_of_saved_tensors_is_named(name):
    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, Wrapper):
        out = LOSSES[name](x)
    with pytest.raises(TypeError, match=r"^\w+: expected a tensor with memory .* got Wrapper"):
        out.sum().backward()


def test_a_negated_view_is_read_as_what_it_means():
    negated = torch._neg_view(X)
    assert torch.equal(functional.range_loss(negated, Y), functional.range_loss(-X, Y))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functional.min_centroid_distance, "centroids"),
        (functional.inter_class_compactness, "weight"),
        (functional.domain_frequency_indicator, "weight"),
    ],
)
def test_the_only_tensor_of_a_call_has_values(function, name):
    with pytest.raises(ValueError, match=f"^{name}: expected values, got a tensor on meta"):
        function(torch.randn(4, 3, device="meta"))
