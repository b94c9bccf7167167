"""What only a GPU can show: capture into a graph, streams, launches, large offsets."""

from __future__ import annotations

import pytest
import torch

from facelt_ext import functional, reference

pytestmark = pytest.mark.gpu

OPTIONS = {"k": 2, "margin": 400.0, "alpha": 0.3, "beta": 0.07}


def batch(size: int, dimensions: int = 64, classes: int = 16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, dimensions, generator=generator).cuda()
    return x.requires_grad_(), torch.randint(classes, (size,), generator=generator).cuda()


def loss_and_grad(x, labels):
    loss = functional.range_loss(x, labels, **OPTIONS)
    return loss, torch.autograd.grad(1.7 * loss, x)[0]


def test_forward_and_backward_are_captured_into_a_graph():
    """A capture that succeeds is the proof that nothing synchronises with the host."""
    x, labels = batch(256)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        loss_and_grad(x, labels)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = loss_and_grad(x, labels)
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected, expected_grad = loss_and_grad(x, labels)
        assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)


def test_kernels_run_on_the_current_stream():
    x, labels = batch(512)
    expected = loss_and_grad(x, labels)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x.detach().clone().requires_grad_()
        loss = loss_and_grad(y, labels)[0]
    # Had a kernel gone to another stream, it would have read y before it was written.
    stream.synchronize()
    assert torch.equal(loss, expected)


def test_at_most_six_launches():
    x, labels = batch(256, 512)
    loss = functional.range_loss(x, labels, **OPTIONS)
    upstream = torch.full_like(loss, 1.7)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        loss = functional.range_loss(x, labels, **OPTIONS)
        torch.autograd.grad(loss, x, upstream)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 6, [e.name for e in kernels]


def test_offsets_beyond_32_bits():
    """The last rows of a matrix of more than 2^31 elements."""
    rows, dimensions = 2**16 + 3, 2**15 + 1
    x = torch.zeros(rows, dimensions, dtype=torch.bfloat16, device="cuda")
    x[-1, -1], x[-2, -1] = 5, 2
    labels = torch.arange(rows, device="cuda")
    labels[-1] = labels[-2]
    result = functional.class_ranges(x, labels, 1, max_classes=rows)
    assert result.ranges[rows - 2].item() == 9
    assert result.pairs[rows - 2, 0].tolist() == [rows - 2, rows - 1]


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, labels = batch(128)
    there = x.detach().to("cuda:1").requires_grad_()
    loss, grad = loss_and_grad(there, labels.to("cuda:1"))
    expected = reference.range_loss(x.detach().double().cpu(), labels.cpu(), **OPTIONS)
    assert grad.device == there.device
    torch.testing.assert_close(loss.double().cpu(), expected, atol=1e-4, rtol=1e-5)
