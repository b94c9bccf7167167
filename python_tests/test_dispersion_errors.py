"""What the dispersion softmax refuses, and what it makes of it where it does not look."""

from __future__ import annotations

import pytest
import torch

import facelt_ext
from facelt_ext.functional import SuperClassIndex, dispersion_softmax_loss
from facelt_ext.functional._dispersion_operators import backward, forward

INDEX = torch.tensor([0, 1, 0, 2])


def arguments(**changes: object) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    given = {
        "features": torch.randn(5, 3, generator=generator),
        "head_weight": torch.randn(2, 3, generator=generator),
        "tail_weight": torch.randn(4, 3, generator=generator),
        "super_class": INDEX,
        "labels": torch.tensor([0, 1, 2, 5, -100]),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [[1.0]]}, TypeError, "features: expected a tensor, got list"),
        ({"features": torch.zeros(5)}, ValueError, r"features: expected shape .*got \[5\]"),
        ({"features": torch.zeros(5, 3).long()}, TypeError, "features: expected dtype"),
        ({"head_weight": None}, TypeError, "head_weight: expected a tensor, got NoneType"),
        ({"head_weight": torch.zeros(2, 4)}, ValueError, r"head_weight: .*classes, 3.*\[2, 4\]"),
        ({"head_weight": torch.zeros(3)}, ValueError, "head_weight: expected shape"),
        ({"tail_weight": torch.zeros(4, 2)}, ValueError, r"tail_weight: .*classes, 3.*\[4, 2\]"),
        ({"tail_weight": torch.zeros(4, 3).int()}, TypeError, "tail_weight: expected dtype"),
        (
            {"tail_weight": torch.zeros(4, 3).double()},
            TypeError,
            "tail_weight: expected dtype torch.float32, as head_weight, got torch.float64",
        ),
        ({"features": torch.zeros(5, 3).double()}, TypeError, "head_weight: expected dtype .*64"),
        (
            {"features": torch.zeros(5, 3).half(), "head_weight": torch.zeros(2, 3).half()},
            TypeError,
            "tail_weight: expected dtype torch.float16, as head_weight, got torch.float32",
        ),
        (
            {"head_weight": torch.zeros(2, 3).half(), "tail_weight": torch.zeros(4, 3).half()},
            TypeError,
            "head_weight: expected dtype torch.float32, as the features, got torch.float16",
        ),
        (
            {"head_weight": torch.zeros(2, 3, device="meta")},
            ValueError,
            "head_weight: expected device cpu, where features is, got meta",
        ),
        (
            {"tail_weight": torch.zeros(4, 3, device="meta")},
            ValueError,
            "tail_weight: expected device cpu, where features is, got meta",
        ),
        (
            {"super_class": INDEX.to("meta")},
            ValueError,
            "super_class: expected values, got a tensor on meta",
        ),
        (
            {"labels": torch.zeros(5, device="meta").long()},
            ValueError,
            "labels: expected device cpu, where features is, got meta",
        ),
        ({"super_class": [0, 1, 0, 2]}, TypeError, "super_class: expected a tensor, got list"),
        ({"super_class": INDEX[:3]}, ValueError, r"super_class: .*\[4\] on cpu, .*got \[3\]"),
        (
            {"super_class": SuperClassIndex(torch.tensor([0, 1, 0, 2, 1]))},
            ValueError,
            r"super_class: expected shape \[4\] on cpu, .* of tail_weight, got \[5\]",
        ),
        ({"super_class": INDEX * 2}, ValueError, "super_class: .* each super class has a class"),
        ({"super_class": INDEX - 1}, ValueError, r"super_class: .*\[0, 2\), got -1 at position 0"),
        ({"super_class": INDEX.float()}, TypeError, "super_class: expected an integer dtype"),
        ({"super_class": INDEX[:, None]}, ValueError, "super_class: expected shape"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels: expected shape \[5\], one"),
        ({"labels": torch.zeros(5)}, TypeError, "labels: expected an integer dtype"),
        (
            {"labels": torch.tensor([0, 1, 2, 6, 0])},
            ValueError,
            r"labels: expected numbers in \[0, 6\) or -100, got 6 at position 3",
        ),
        ({"labels": torch.tensor([0, -1, 2, 3, 0])}, ValueError, "labels: .*got -1 at position 1"),
        ({"reduction": "median"}, ValueError, "reduction: expected one of none, sum, mean, got"),
        ({"workspace": "huge"}, ValueError, "workspace: expected one of low, high, auto, got"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
        ({"ignore_index": True}, TypeError, "ignore_index: expected an int, got bool"),
        (
            {
                "head_weight": torch.zeros(0, 3),
                "tail_weight": torch.zeros(0, 3),
                "super_class": INDEX[:0],
            },
            ValueError,
            "head_weight, tail_weight: expected a row in one of them, got none",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_wrong_arguments(changes, error, message, backend):
    with facelt_ext.use_backend(backend), pytest.raises(error, match=message):
        dispersion_softmax_loss(**arguments(**changes))


def test_right_arguments():
    assert dispersion_softmax_loss(**arguments()).isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("moved", ["features", "head_weight", "tail_weight", "super_class"])
def test_tensors_on_two_devices(moved):
    given = arguments()
    with pytest.raises(ValueError, match="expected .* on |expected device"):
        dispersion_softmax_loss(**given | {moved: given[moved].cuda()})


def checked_on_the_host(place) -> bool:
    return place.device == "cpu" and place.backend == "native"


def test_labels_out_of_range_are_not_followed(place):
    if checked_on_the_host(place):
        return  # an error, above
    given = {name: value.to(place.device) for name, value in arguments().items()}
    given["labels"][1:3] = torch.tensor([6, -1])
    names = ("features", "head_weight", "tail_weight")
    for name in names:
        given[name].requires_grad_()
    with place.run():
        losses = dispersion_softmax_loss(**given, reduction="none")
        grads = torch.autograd.grad(losses.sum(), [given[name] for name in names])
        assert losses.isnan().tolist() == [False, True, True, False, False]
        assert grads[0].isnan().all(1).tolist() == [False, True, True, False, False]
        rest = torch.tensor([0, 3, 4], device=place.device)
        valid = given | {"features": given["features"][rest], "labels": given["labels"][rest]}
        expected = torch.autograd.grad(
            dispersion_softmax_loss(**valid, reduction="sum"), [given[n] for n in names[1:]]
        )
    for grad, value in zip(grads[1:], expected, strict=True):
        torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_label_out_of_range_in_the_second_derivative(place, create_graph):
    if checked_on_the_host(place):
        return  # an error, above
    given = {name: value.to(place.device) for name, value in arguments().items()}
    given["labels"][1] = 2**40
    features = given["features"].requires_grad_()
    with place.run():
        losses = dispersion_softmax_loss(**given, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), features, create_graph=create_graph)
    assert grad.isnan().all(1).tolist() == [False, True, False, False, False]


def test_operators_refuse_tensors_of_other_sizes(place):
    given = {name: value.to(place.device) for name, value in arguments().items()}
    index = SuperClassIndex(given["super_class"]).to(place.device)
    rows = (given["features"], given["head_weight"], given["tail_weight"])
    members = (index.index, index.order, index.offsets)
    rest = (-100, False, torch.float32, place.backend)
    state = forward(*rows, given["labels"], *members, *rest)
    upstream = torch.ones(5, device=place.device)
    flags = (True, True, True, torch.float32, place.backend)
    backward(upstream, *rows, given["labels"], *members, *state, *flags)
    with pytest.raises(ValueError, match="labels: expected 5 contiguous elements of int64"):
        forward(*rows, given["labels"][:4], *members, *rest)
    with pytest.raises(ValueError, match="order: expected 4 contiguous elements"):
        forward(*rows, given["labels"], members[0], members[1][:3], members[2], *rest)
    with pytest.raises(ValueError, match="targets: expected 15"):
        wrong = (*state[:2], state[2][:2].contiguous(), *state[3:])
        backward(upstream, *rows, given["labels"], *members, *wrong, *flags)
