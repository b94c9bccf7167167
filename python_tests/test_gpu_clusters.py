"""What only a GPU can show of CLMLE and LMLE: capture into a graph, streams, launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import facelt_ext

pytestmark = pytest.mark.gpu

SIZE = 8
LOSSES = {
    "CLMLE": lambda: facelt_ext.CLMLELoss(0.6, 0.3, samples_per_cluster=SIZE),
    "LMLE": lambda: facelt_ext.LMLELoss((0.5, 0.5, 2.0), samples_per_cluster=SIZE),
}


def batch(clusters: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(clusters * SIZE, 64, generator=generator).to("cuda", dtype)
    labels = (torch.arange(clusters) // 3).repeat_interleave(SIZE).cuda()
    return x.requires_grad_(), labels


def loss_and_grad(loss: Callable[..., Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    value = loss(x, labels)
    return [value, *torch.autograd.grad(1.7 * value, x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clusters", [12, 60])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward_are_captured_into_a_graph(name, clusters, dtype):
    """A capture that succeeds is the proof that nothing synchronises with the host."""
    loss, (x, labels) = LOSSES[name](), batch(clusters, dtype)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        loss_and_grad(loss, x, labels)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grad(loss, x, labels)
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected = loss_and_grad(loss, x, labels)
        assert captured[1].any()
        for actual, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_kernels_run_on_the_current_stream(name):
    loss, (x, labels) = LOSSES[name](), batch(60)
    expected = loss_and_grad(loss, x, labels)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        actual = loss_and_grad(loss, x.detach().clone().requires_grad_(), labels)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("name", "most"), [("CLMLE", 6), ("LMLE", 5)])
def test_launches(name, most):
    """Of ours; a module's own steps are torch's."""
    loss, (x, labels) = LOSSES[name](), batch(12)
    loss_and_grad(loss, x, labels)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        loss_and_grad(loss, x, labels)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [e.name for e in kernels if "facelt" in e.name]
    assert 0 < len(ours) <= most, ours


@pytest.mark.parametrize("name", LOSSES)
def test_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    loss, (x, labels) = LOSSES[name](), batch(12)
    expected = loss_and_grad(loss, x, labels)
    there = x.detach().to("cuda:1").requires_grad_()
    actual = loss_and_grad(loss, there, labels.to("cuda:1"))
    for a, e in zip(actual, expected, strict=True):
        assert a.device == there.device
        torch.testing.assert_close(a.cpu(), e.cpu())
