"""What only a GPU can show: capture into a graph, streams, launches, large offsets."""

from __future__ import annotations

import pytest
import torch

import facelt_ext
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


MARGINS = {"cosine_margin": 0.2, "angular_margin": 0.3}


def head(size: int, classes: int = 300, dimensions: int = 64):
    """A batch, and a weight whose chunks of classes are several."""
    x, labels = batch(size, dimensions, classes)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, dimensions, generator=generator).cuda().requires_grad_()
    return x, weight, labels


def margin_loss_and_grads(x, weight, labels):
    loss = functional.margin_softmax_loss(x, weight, labels, **MARGINS)
    return loss, *torch.autograd.grad(1.7 * loss, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margin_softmax_is_captured_into_a_graph(dtype, monkeypatch):
    monkeypatch.setattr(functional._products, "CHUNK_BYTES", {"cuda": 1})
    x, weight, labels = head(256)
    x = x.detach().to(dtype).requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        margin_loss_and_grads(x, weight, labels)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = margin_loss_and_grads(x, weight, labels)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=generator))
            labels.copy_(torch.randint(300, labels.shape, generator=generator))
        graph.replay()
        expected = margin_loss_and_grads(x, weight, labels)
        for actual, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("epsilon", [5.5, "auto"])
def test_domain_balancing_is_captured_into_a_graph(epsilon, monkeypatch):
    monkeypatch.setattr(functional._products, "CHUNK_BYTES", {"cuda": 1})
    loss = facelt_ext.DomainBalancingLoss(300, 64, k=20, epsilon=epsilon, device="cuda")
    x, labels = batch(256, 64, 300)
    gate = torch.rand(256, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(10):  # after which all classes were seen, and evaluation computes none
            loss(x, labels, gate)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(x, labels, gate)
    graph.replay()
    loss.eval()  # the mean of epsilon="auto" stays as the replay has left it
    torch.testing.assert_close(captured, loss(x, labels, gate))


def test_a_margin_per_class_is_moved_once():
    loss = facelt_ext.CosFaceLoss(300, 64, margin=torch.rand(300)).cuda()
    x, labels = batch(256, 64, 300)
    loss(x, labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(x, labels)
    graph.replay()
    torch.testing.assert_close(captured, loss(x, labels))


def test_margin_softmax_runs_on_the_current_stream():
    x, weight, labels = head(256)
    expected = margin_loss_and_grads(x, weight, labels)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x.detach().clone().requires_grad_()
        actual = margin_loss_and_grads(y, weight, labels)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("workspace", ["low", "high"])
def test_margin_softmax_beyond_32_bits(workspace):
    """Products and a weight of more than 2^31 numbers; the last class is looked at."""
    batch_size, classes, dimensions = 64, 2**25 + 5, 65
    x = torch.zeros(batch_size, dimensions, dtype=torch.bfloat16, device="cuda")
    x[:, 0] = 1
    weight = torch.zeros(classes, dimensions, dtype=torch.bfloat16, device="cuda")
    weight[-1, 0], weight[-1, 1] = 3, 4
    weight.requires_grad_()
    labels = torch.full((batch_size,), classes - 1, device="cuda")
    loss = functional.margin_softmax_loss(x, weight, labels, scale=20.0, workspace=workspace)
    # All other cosines are 0, that of the target is 0.6.
    expected = torch.tensor([12.0, torch.tensor(float(classes - 1)).log()]).logsumexp(0) - 12
    torch.testing.assert_close(loss.detach().cpu(), expected, rtol=1e-3, atol=1e-3)
    (grad,) = torch.autograd.grad(loss, weight)
    assert not grad[:-1].any()
    # (p - 1) * 20 * (u - cos v) / |w|
    slope = 20 / 5 * torch.expm1(-expected)
    wanted = slope * torch.tensor([1 - 0.36, -0.48])
    torch.testing.assert_close(grad[-1, :2].float().cpu(), wanted, rtol=2e-2, atol=1e-2)


def test_margin_softmax_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight, labels = head(128)
    there = [t.detach().to("cuda:1").requires_grad_() for t in (x, weight)]
    actual = margin_loss_and_grads(*there, labels.to("cuda:1"))
    expected = margin_loss_and_grads(x, weight, labels)
    assert all(a.device == there[0].device for a in actual)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e.cpu())


def case_on_the_gpu(dtype: torch.dtype = torch.float32):
    """Features, heads and tails, the tails' super classes, labels."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 64, generator=generator).to("cuda", dtype) for n in (96, 50, 300)]
    index = functional.SuperClassIndex(torch.arange(300) % 40).cuda()
    labels = torch.randint(350, (96,), generator=generator).cuda()
    return *(r.requires_grad_() for r in rows), index, labels


def dispersion(features, head, tail, index, labels):
    loss = functional.dispersion_softmax_loss(features, head, tail, index, labels)
    return loss, *torch.autograd.grad(1.7 * loss, (features, head, tail))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dispersion_softmax_is_captured_into_a_graph(dtype):
    features, head, tail, index, labels = case_on_the_gpu(dtype)
    generator = torch.Generator().manual_seed(1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        dispersion(features, head, tail, index, labels)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = dispersion(features, head, tail, index, labels)
    for _ in range(2):
        with torch.no_grad():
            features.copy_(torch.randn(features.shape, generator=generator))
            labels.copy_(torch.randint(350, (96,), generator=generator))
        graph.replay()
        expected = dispersion(features, head, tail, index, labels)
        assert all(map(torch.equal, results, expected))


def test_the_dispersion_softmax_runs_on_the_current_stream():
    features, *others = case_on_the_gpu()
    expected = dispersion(features, *others)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        copied = features.detach().clone().requires_grad_()
        actual = dispersion(copied, *others)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("prepared", [False, True])
def test_the_mean_of_super_classes_is_captured_into_a_graph(prepared):
    """Also of an index that is no more than a tensor, if the number of super classes is given."""
    _, _, tail, index, _ = case_on_the_gpu()
    raw = index.index.clone()

    def means_and_grad():
        means = functional.super_class_mean(tail, index if prepared else raw, 40)
        return means, *torch.autograd.grad(means, tail, means.detach())

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        means_and_grad()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = means_and_grad()
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            tail.copy_(torch.randn(tail.shape, generator=generator))
            raw.copy_(torch.randint(-1, 41, raw.shape, generator=generator))
        graph.replay()
        for a, e in zip(captured, means_and_grad(), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dimensions", [64, 65])
def test_the_mean_of_super_classes_beyond_32_bits(dimensions):
    """The last rows of a table of more than 2^31 numbers, with wide loads and without."""
    rows, count = 2**25 + 2**20, 2**20
    weight = torch.zeros(rows, dimensions, dtype=torch.bfloat16, device="cuda")
    weight[-1, -1], weight[-1 - count, -1] = 22, 44
    weight.requires_grad_()
    index = functional.SuperClassIndex(torch.arange(rows, device="cuda") % count)
    means = functional.super_class_mean(weight, index)
    assert means[-1, -1].item() == 2 and not means[:-1].any()
    upstream = torch.zeros_like(means)
    upstream[-1, -1] = 33
    (grad,) = torch.autograd.grad(means, weight, upstream)
    assert (grad[count - 1 :: count, -1] == 1).all()
    assert grad.count_nonzero().item() == rows // count


def test_the_dispersion_softmax_beyond_32_bits():
    """Tails of more than 2^31 numbers; the samples are of the last one."""
    batch_size, tails, count, dimensions = 32, 2**25 + 2**15, 2**15, 65
    members = tails // count
    features = torch.zeros(batch_size, dimensions, dtype=torch.bfloat16, device="cuda")
    features[:, 0] = 1
    head = torch.zeros(1, dimensions, dtype=torch.bfloat16, device="cuda")
    tail = torch.zeros(tails, dimensions, dtype=torch.bfloat16, device="cuda")
    tail[-1, 0] = 8
    tail.requires_grad_()
    index = functional.SuperClassIndex(torch.arange(tails, device="cuda") % count)
    labels = torch.full((batch_size,), tails, device="cuda")
    loss = functional.dispersion_softmax_loss(features, head, tail, index, labels)
    (grad,) = torch.autograd.grad(loss, tail)
    # Every logit but the target's, which is 8, is 0: a head, the other members, the other means.
    zeros = float(1 + members - 1 + count - 1)
    lse = torch.tensor([8.0, torch.tensor(zeros).log()]).logsumexp(0)
    torch.testing.assert_close(loss.detach().cpu(), lse - 8, rtol=1e-3, atol=1e-3)
    term = torch.exp(-lse).item()
    assert not grad[:, 1:].any()
    for row, wanted in [
        (tails - 1, torch.expm1(8 - lse).item()),
        (count - 1, term),
        (tails - 2, term / members),
        (0, term / members),
    ]:
        assert grad[row, 0].item() == pytest.approx(wanted, rel=0.02)


def test_the_dispersion_softmax_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    *rows, index, labels = case_on_the_gpu()
    expected = dispersion(*rows, index, labels)
    there = [t.detach().to("cuda:1").requires_grad_() for t in rows]
    actual = dispersion(*there, index.to("cuda:1"), labels.to("cuda:1"))
    assert all(a.device == there[0].device for a in actual)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e.cpu())
