"""The cluster margin loss's operators and arguments: torch.compile, tracing, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from cluster_cases import MARGINS, loss_of, random_case, run, truth
from conftest import CPU

import facelt_ext
from facelt_ext import _C, _native, functional
from facelt_ext.functional.cluster_margin import ClusterMarginFunction

OPS = torch.ops.facelt_ext


@pytest.mark.parametrize("clusters", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(place, dtype, clusters):
    case = random_case(0, 14, clusters, 5, normalize_centroids=True, between_margin=0.9)
    case.sample_weight = 0.5 + torch.rand(14)
    case = case.to(dtype, place.device)

    def loss(x):
        return loss_of(case, reduction="mean")(x)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = case.features.clone().requires_grad_()
        with place.run():
            value = function(x)
            results.append([value.detach(), *torch.autograd.grad(2.5 * value, x)])
    assert results[0][1].any()
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compile_follows_changed_margins_and_shapes(place):
    case = random_case(1, 16, 6, 5).to(torch.float32, place.device)

    def loss(x, index, between, within):
        return functional.cluster_margin_loss(
            x, index, case.cluster_class, between_margin=between, within_margin=within
        )

    compiled, seen = torch.compile(loss, fullgraph=True), set()
    with place.run():
        for between, within, size in [(0.4, 0.1, 16), (0.9, 0.3, 16), (1.4, 0.7, 11), (1.4, 0, 7)]:
            args = case.features[:size], case.cluster_index[:size], between, within
            expected = loss(*args)
            torch.testing.assert_close(compiled(*args), expected)
            seen.add(round(expected.item(), 4))
    assert len(seen) == 4


def test_backward_runs_where_forward_ran(place, monkeypatch):
    ran, native_run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda b, *args: (ran.append(b), native_run(b, *args)))
    case = random_case(2, 9, 4, 5).to(torch.float32, place.device)
    x = case.features.requires_grad_()
    with place.run():
        losses = loss_of(case)(x)
    forward = len(ran)
    with facelt_ext.use_backend("reference"):
        losses.sum().backward()
    assert len(ran) == forward + 1 and set(ran) == {place.backend}


def test_a_second_backward_gives_the_same(place):
    case = random_case(3, 12, 40, 5).to(torch.float32, place.device)
    x = case.features.requires_grad_()
    with place.run():
        loss = loss_of(case, reduction="sum")(x)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)


@pytest.mark.parametrize("clusters", [4, 40])
def test_the_operators_take_strided_tensors(place, clusters):
    case = random_case(4, 12, clusters, 5).to(torch.float32, place.device)
    x = case.features.t().contiguous().t()
    index, classes = (t.repeat_interleave(2)[::2] for t in (case.cluster_index, case.cluster_class))
    upstream = torch.rand(24, device=place.device)[::2]
    options = (0.9, 0.5, True, "none", -100, place.backend)
    args = (x, index, classes, upstream, *options)
    torch.library.opcheck(OPS.cluster_margin_forward.default, args)
    _, _, *state = OPS.cluster_margin_forward(*args)
    args = (upstream, x, index, *state, *options)
    torch.library.opcheck(OPS.cluster_margin_backward.default, args)


def test_tracing_sees_the_operators(place):
    """What follows tensors through the dispatcher, as FakeTensorMode does, is not passed by."""
    with torch._subclasses.FakeTensorMode(), place.run():
        x = torch.zeros(8, 3, device=place.device, requires_grad=True)
        index = torch.zeros(8, dtype=torch.int64, device=place.device)
        loss = functional.cluster_margin_loss(x, index, index[:5], **MARGINS)
        (grad,) = torch.autograd.grad(loss, x)
    assert isinstance(grad, torch._subclasses.FakeTensor) and grad.shape == x.shape


def test_no_gradient_wanted(place):
    case = random_case(5, 9, 4, 5).to(torch.float32, place.device)
    with place.run():
        assert not loss_of(case)(case.features).requires_grad
        with torch.no_grad():
            assert not loss_of(case)(case.features.requires_grad_()).requires_grad


@pytest.mark.parametrize("clusters", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(any_place, dtype, clusters):
    """All is reckoned in float32 all the same."""
    case = random_case(6, 20, clusters, 9, normalize_centroids=True).to(
        torch.float32, any_place.device
    )
    case.features = case.features.to(dtype)
    expected = run(any_place, case)
    with torch.autocast(any_place.device, torch.bfloat16):
        actual = run(any_place, case)
    assert expected[1].any() and actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    if any_place.backend == "reference":
        # Its backward is torch's own, which follows the autocast that is on when it runs.
        assert torch.equal(actual[0], expected[0])
    else:
        assert all(map(torch.equal, actual, expected))


def test_grad_scaling(place):
    case = random_case(7, 20, 5, 9).to(torch.float32, place.device)
    layer = torch.nn.Linear(9, 6, device=place.device)
    with place.run(), torch.autocast(place.device, torch.bfloat16):
        features = layer(case.features)
        loss = loss_of(case, reduction="mean")(features)
    assert features.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (loss * 65536).backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("clusters", [4, 40])
def test_second_derivatives_of_float32_features(place, clusters, autocast):
    """Through the reference, with autocast off there too."""
    case = random_case(8, 12, clusters, 6, normalize_centroids=True, between_margin=0.9)
    case = case.to(torch.float32, place.device)
    x = case.features.requires_grad_()
    with place.run(), torch.autocast(place.device, torch.bfloat16, enabled=autocast):
        losses = loss_of(case)(x)
        (grad,) = torch.autograd.grad(losses, x, case.upstream, create_graph=True)
    (again,) = torch.autograd.grad(grad.square().sum(), x)
    wide = case.to(torch.float64, "cpu")
    y = wide.features.detach().requires_grad_()
    with facelt_ext.use_backend("reference"):
        (true,) = torch.autograd.grad(loss_of(wide)(y), y, wide.upstream, create_graph=True)
    (twice,) = torch.autograd.grad(true.square().sum(), y)
    assert twice.any()
    for actual, expected in [(grad, true), (again, twice)]:
        off = (actual.detach().double().cpu() - expected.detach()).norm()
        assert off <= 1e-5 * expected.norm()


@pytest.mark.parametrize("clusters", [4, 40])
@pytest.mark.parametrize("bad", [-1, None, 2**40, -(2**63)])
def test_an_index_out_of_range(any_place, clusters, bad):
    bad = clusters if bad is None else bad
    case = random_case(9, 8, clusters, 5, normalize_centroids=True).to(torch.float32)
    case.cluster_index[:] = torch.arange(8) % 4
    case.cluster_index[3] = bad
    message = rf"cluster_index: .* in \[0, {clusters}\) or -100, got {bad} at position 3"
    if any_place.backend == "reference" or any_place == CPU:
        with pytest.raises(ValueError, match=message):
            run(any_place, case)
        return
    losses, grad = run(any_place, case)
    others = torch.arange(8) != 3
    assert losses[3].isnan() and grad[3].isnan().all()
    # To the others it is as if it had not come.
    case.features, case.cluster_index = case.features[others], case.cluster_index[others]
    case.upstream = case.upstream[others]
    expected = truth(case)
    torch.testing.assert_close(losses[others].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[others].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_samples_where_there_are_no_clusters(any_place):
    case = random_case(10, 3, 4, 5).to(torch.float32)
    case.cluster_class = case.cluster_class[:0]
    message = "cluster_class: expected at least one cluster for 3 samples, got none"
    with pytest.raises(ValueError, match=message):
        run(any_place, case)


def test_debug_checks_find_an_index_out_of_range(place):
    case = random_case(11, 8, 4, 5)
    case.cluster_index[5] = 4
    facelt_ext.debug_checks(True)
    try:
        with pytest.raises(ValueError, match=r"cluster_index: .* 4\) or -100, got 4 at position 5"):
            run(place, case)
    finally:
        facelt_ext.debug_checks(False)


def test_second_derivatives_follow_no_index_out_of_range(place):
    """The CPU refuses it; elsewhere nobody looks, and the reference must not follow it."""
    if place == CPU:
        pytest.skip("a ValueError, as tested above")
    case = random_case(12, 8, 4, 5).to(torch.float32, place.device)
    case.cluster_index[:] = torch.arange(8) % 4
    case.cluster_index[5] = 99
    x = case.features.requires_grad_()
    with place.run():
        losses = loss_of(case)(x)
        (grad,) = torch.autograd.grad(losses, x, case.upstream, create_graph=True)
        first = torch.autograd.grad(losses, x, case.upstream)[0]
    torch.testing.assert_close(grad.detach(), first, equal_nan=True)
    assert grad[5].isnan().all()
    (again,) = torch.autograd.grad(grad[:5].square().sum(), x)
    assert again[:5].isfinite().all() and again[:5].any()


def test_the_operators_refuse_an_index_out_of_range_on_the_cpu():
    case = random_case(13, 8, 4, 5)
    case.cluster_index[2] = -1
    options = (1.0, 1.0, False, "none", -100, "native")
    args = (case.features, case.cluster_index, case.cluster_class, None, *options)
    with pytest.raises(ValueError, match="cluster_index: .* got -1 at position 2"):
        OPS.cluster_margin_forward(*args)
    case.cluster_index[2] = 0
    _, _, *state = OPS.cluster_margin_forward(*args)
    case.cluster_index[2] = 4
    args = (case.upstream, case.features, case.cluster_index, *state, *options)
    with pytest.raises(ValueError, match="cluster_index: .* got 4 at position 2"):
        OPS.cluster_margin_backward(*args)


X, INDEX, CLASSES = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([7, 8])
NUMBERS = [
    (torch.nan, ValueError, "expected a number that is finite in torch.float32, got nan"),
    (-torch.inf, ValueError, "expected a number that is finite in torch.float32, got -inf"),
    (1e39, ValueError, "expected a number that is finite in torch.float32, got 1e.39"),
    ("1", TypeError, "expected a number, got str"),
    (torch.ones(()), TypeError, "expected a number, got Tensor"),
    (True, TypeError, "expected a number, got bool"),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": X.tolist()}, TypeError, "features: expected a tensor, got list"),
        ({"features": X.long()}, TypeError, "features: expected dtype float64, .* torch.int64"),
        ({"features": X[0]}, ValueError, r"features: expected shape .* got \[3\]"),
        ({"features": X[:, :0]}, ValueError, r"features: expected shape .* got \[4, 0\]"),
        ({"cluster_index": [0]}, TypeError, "cluster_index: expected a tensor, got list"),
        ({"cluster_index": X[:, 0]}, TypeError, "cluster_index: expected an integer dtype"),
        (
            {"cluster_index": INDEX[:3]},
            ValueError,
            r"cluster_index: expected shape \[4\], one for each row of features, got \[3\]",
        ),
        ({"cluster_index": INDEX[None]}, ValueError, r"cluster_index: .* got \[1, 4\]"),
        ({"cluster_index": INDEX.to("meta")}, ValueError, "cluster_index: .* got meta"),
        ({"cluster_class": [7, 8]}, TypeError, "cluster_class: expected a tensor, got list"),
        ({"cluster_class": X[0]}, TypeError, "cluster_class: expected an integer dtype"),
        ({"cluster_class": CLASSES > 7}, TypeError, "cluster_class: .* got torch.bool"),
        ({"cluster_class": CLASSES[None]}, ValueError, r"cluster_class: .* got \[1, 2\]"),
        ({"cluster_class": CLASSES[0]}, ValueError, r"cluster_class: .* got \[\]"),
        (
            {"cluster_class": CLASSES.to("meta")},
            ValueError,
            "cluster_class: expected device cpu, where features is, got meta",
        ),
        *(({"between_margin": v}, e, f"between_margin: {m}") for v, e, m in NUMBERS),
        *(({"within_margin": v}, e, f"within_margin: {m}") for v, e, m in NUMBERS),
        ({"sample_weight": 2.0}, TypeError, "sample_weight: expected a tensor, got float"),
        ({"sample_weight": INDEX}, TypeError, "sample_weight: .* floating dtype, got torch.int64"),
        ({"sample_weight": X[:3, 0]}, ValueError, r"sample_weight: .*\[4\].* got \[3\] on cpu"),
        ({"sample_weight": X[:, :1]}, ValueError, r"sample_weight: .* got \[4, 1\] on cpu"),
        ({"sample_weight": X[:, 0].to("meta")}, ValueError, r"sample_weight: .* on meta"),
        (
            {"sample_weight": torch.ones(4, requires_grad=True)},
            ValueError,
            r"sample_weight: no gradient goes to weights; expected sample_weight.detach\(\)",
        ),
        ({"reduction": "max"}, ValueError, "reduction: expected one of none, sum, mean, got 'max'"),
    ],
)
def test_wrong_arguments(any_place, changed, error, message):
    arguments = {"features": X, "cluster_index": INDEX, "cluster_class": CLASSES, **MARGINS}
    with any_place.run(), pytest.raises(error, match=message):
        functional.cluster_margin_loss(**{**arguments, **changed})


def test_margins_have_no_default():
    with pytest.raises(TypeError, match="between_margin.*within_margin"):
        functional.cluster_margin_loss(X, INDEX, CLASSES)


def test_the_inputs_are_never_written(place):
    case = random_case(14, 12, 5, 4).to(torch.float32, place.device)
    before = [t.clone() for t in (case.features, case.cluster_index, case.cluster_class)]
    with place.run():
        x = case.features.requires_grad_()
        losses, _ = ClusterMarginFunction.apply(
            x, case.cluster_index, case.cluster_class, None,
            (0.4, 0.1, True, "none", None, place.backend),
        )  # fmt: skip
    losses.backward(case.upstream)
    after = (x.detach(), case.cluster_index, case.cluster_class)
    assert all(map(torch.equal, after, before))


@pytest.mark.emulation
@pytest.mark.parametrize("clusters", [5, 40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_at_most_four_launches(clusters, reduction):
    case = random_case(14, 20, clusters, 9).to(torch.float32)
    x = case.features.requires_grad_()
    with facelt_ext.use_backend("emulated"):
        before = _C.emulated.launches()
        loss = loss_of(case, reduction=reduction)(x)
        forward = _C.emulated.launches()
        loss.sum().backward()
    assert (forward - before, _C.emulated.launches() - forward) == (2, 2)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_the_native_function_refuses_a_part_that_there_is_not(place, wrong):
    case = random_case(15, 6, 3, 4).to(torch.float32, place.device)
    outputs = [torch.zeros(n, device=place.device) for n in (1, 6, (6 + 4 + 2) * 3 + 2)]
    with pytest.raises(ValueError, match=f"part: expected 0, 1 or 2, got {wrong}"):
        _native.run(
            place.backend, case.features, "cluster_margin_forward", case.features,
            case.cluster_index, case.cluster_class, None, (0.3, 0.1, False, 2, None), wrong,
            *outputs,
        )  # fmt: skip
