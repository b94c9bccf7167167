"""Around the functions: torch.func, forward-mode AD, autocast, FLOPs, the gradients asked for."""

from __future__ import annotations

import pytest
import torch
from test_tensor_kinds import INDEX, LOSSES, W, Y
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from facelt_ext import functional, use_backend

X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BY_VALUES = ("range_loss", "class_ranges", "class_centroids", "min_centroid_distance")


def total(name: str, x: Tensor) -> Tensor:
    """With a weight in the features' dtype."""
    if name == "margin_softmax_loss":
        out = functional.margin_softmax_loss(x, W.to(x.dtype), Y, scale=4.0)
    elif name == "dispersion_softmax_loss":
        w = W.to(x.dtype)
        out = functional.dispersion_softmax_loss(x, w[:0], w, INDEX, Y)
    else:
        out = LOSSES[name](x)
    return out.square().sum()


def gradient(name: str, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(total(name, x), x)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_func_transforms_of_the_reference(name):
    def loss(x: Tensor) -> Tensor:
        return total(name, x)

    expected = gradient(name, X)
    direction = torch.linspace(-1, 1, X.numel(), dtype=X.dtype).view_as(X)
    with use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(X), expected)
        value, slope = torch.func.jvp(loss, (X,), (direction,))
    torch.testing.assert_close(value, total(name, X))
    torch.testing.assert_close(slope, (expected * direction).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_of_the_reference(name):
    batch = torch.stack([X, 2 * X, X.flip(0)])
    with use_backend("reference"):
        if name in (*BY_VALUES, "quintuplet_loss"):
            with pytest.raises(RuntimeError, match=f"^{name} .*vmap, .* once for each batch"):
                torch.func.vmap(lambda x: total(name, x))(batch)
            return
        if name == "super_class_mean":
            found = torch.func.vmap(lambda x: functional.super_class_mean(x, Y, 4))(batch)
            expected = [functional.super_class_mean(x, Y) for x in batch]
        else:
            found = torch.func.vmap(lambda x: total(name, x))(batch)
            expected = [total(name, x) for x in batch]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", LOSSES)
def test_kernels_under_a_transform_say_what_to_call(name):
    match = f"^{name} has no kernels .*use_backend"
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=match):
            transform(lambda x: total(name, x))(X[None] if transform is torch.func.vmap else X)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(RuntimeError, match=match):
            total(name, dual)
        total(name, X)


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_under_autocast_is_that_of_outside(name):
    """Products of the heads follow autocast, in both backends."""
    x = X.float()

    def under_autocast(backend: str) -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = total(name, z)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    native, reference = under_autocast("native"), under_autocast("reference")
    heads = name in ("margin_softmax_loss", "dispersion_softmax_loss")
    tolerance = {"rtol": 0.05, "atol": 0.1} if heads else {}
    for found, expected in zip(reference, native, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, **tolerance)
    if not heads:
        torch.testing.assert_close(native[0], total(name, x))


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_the_same_in_each_run(name):
    x = torch.randn(240, 512, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(240) // 20
    w = torch.randn(12, 512, generator=torch.Generator().manual_seed(1))
    index = functional.SuperClassIndex(torch.arange(12) // 3)
    calls = {
        "range_loss": lambda x: functional.range_loss(x, labels),
        "class_ranges": lambda x: functional.class_ranges(x, labels).ranges,
        "class_centroids": lambda x: functional.class_centroids(x, labels).centroids.square(),
        "min_centroid_distance": lambda x: functional.min_centroid_distance(x).distance,
        "cluster_margin_loss": lambda x: functional.cluster_margin_loss(
            x, labels, torch.arange(12) // 2, between_margin=0.3, within_margin=0.1
        ),
        "quintuplet_loss": lambda x: functional.quintuplet_loss(
            x, labels // 2, labels, margins=(0.1, 0.2, 0.3)
        ),
        "super_class_mean": lambda x: functional.super_class_mean(x, labels).square(),
        "margin_softmax_loss": lambda x: functional.margin_softmax_loss(x, w, labels, scale=8.0),
        "dispersion_softmax_loss": lambda x: functional.dispersion_softmax_loss(
            x, w[:0], w, index, labels
        ),
    }
    assert set(calls) == set(LOSSES)

    def second() -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(calls[name](z).sum(), z, create_graph=True)
        return grad.detach(), torch.autograd.grad((grad * x.flip(0)).sum(), z)[0]

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        expected = second()
        for _ in range(5):
            assert all(map(torch.equal, second(), expected))
    finally:
        torch.set_num_threads(before)


B, N, D = 6, 10, 4
PRODUCT = 2 * B * N * D


@pytest.mark.parametrize(("workspace", "products"), [("high", 3), ("low", 4)])
def test_flops_of_the_margin_softmax_are_those_of_its_products(workspace, products):
    x, w = torch.randn(B, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        functional.margin_softmax_loss(x, w, torch.arange(B), workspace=workspace).backward()
    assert counter.get_total_flops() == products * PRODUCT


@pytest.mark.parametrize(("workspace", "products"), [("high", 3), ("low", 4)])
def test_flops_of_the_dispersion_softmax_are_those_of_heads_and_super_classes(workspace, products):
    x, heads = torch.randn(B, D, requires_grad=True), torch.randn(7, D, requires_grad=True)
    tails = torch.randn(8, D, requires_grad=True)
    index = functional.SuperClassIndex(torch.arange(8) % 3)
    with FlopCounterMode(display=False) as counter:
        functional.dispersion_softmax_loss(
            x, heads, tails, index, torch.arange(B), workspace=workspace
        ).backward()
    assert counter.get_total_flops() == products * PRODUCT


def test_flops_of_compactness_are_those_of_its_product():
    with FlopCounterMode(display=False) as counter:
        functional.inter_class_compactness(torch.randn(N, D), torch.arange(B), k=3)
    assert counter.get_total_flops() == PRODUCT


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """The sizes of what the operators of the package return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "facelt_ext" and "backward" in str(func):
            self.sizes += [tensor.numel() for tensor in out]
        return out


def margin_softmax(x: Tensor, w: Tensor) -> Tensor:
    return functional.margin_softmax_loss(x, w, torch.arange(B))


def dispersion(x: Tensor, w: Tensor) -> Tensor:
    index = functional.SuperClassIndex(torch.arange(4) % 2)
    return functional.dispersion_softmax_loss(x, w[:6].clone(), w[6:].clone(), index, Y[:B])


@pytest.mark.parametrize("loss", [margin_softmax, dispersion])
@pytest.mark.parametrize("how", ["grad", "inputs", "all"])
def test_a_gradient_that_nobody_asked_for_is_not_made(loss, how):
    x, w = torch.randn(B, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    expected, expected_w = torch.autograd.grad(loss(x, w), [x, w])
    out = loss(x, w)
    with Counted() as counted:
        if how == "grad":
            (found,) = torch.autograd.grad(out, x)
        else:
            out.backward(inputs=[x] if how == "inputs" else None)
            found = x.grad
    assert torch.equal(found, expected)
    assert sum(counted.sizes) == B * D + (N * D if how == "all" else 0)
    if how == "all":
        assert torch.equal(w.grad, expected_w)
    (alone,) = torch.autograd.grad(loss(x, w), w)
    assert torch.equal(alone, expected_w)
