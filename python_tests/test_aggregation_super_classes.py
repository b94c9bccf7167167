"""SuperClasses: label maps as literal loops, files, and what it refuses."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from facelt_ext.aggregation import SuperClasses


def tensor(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@st.composite
def super_classes(draw: st.DrawFn) -> SuperClasses:
    """Any split of up to 12 classes, in any order; sometimes without head or without tail."""
    classes = draw(st.permutations(range(draw(st.integers(1, 12)))))
    num_head = draw(st.integers(0, len(classes)))
    num_tail = len(classes) - num_head
    num_super_classes = draw(st.integers(1, num_tail)) if num_tail else 0
    others = st.lists(
        st.integers(0, max(num_super_classes - 1, 0)),
        min_size=num_tail - num_super_classes,
        max_size=num_tail - num_super_classes,
    )
    super_class = draw(st.permutations([*range(num_super_classes), *draw(others)]))
    counts = draw(st.none() | st.permutations(range(1, len(classes) + 1)))
    return SuperClasses(
        tensor(*classes[:num_head]),
        tensor(*classes[num_head:]),
        tensor(*super_class),
        counts if counts is None else tensor(*counts),
    )


def example(**changes: Tensor | None) -> SuperClasses:
    """Head 4, 0; super classes {5, 1}, {2}, {3}, the last one of another tail group."""
    arguments = {
        "head": tensor(4, 0),
        "tail": tensor(1, 2, 3, 5),
        "super_class": tensor(0, 1, 2, 0),
        "counts": tensor(30, 5, 6, 2, 40, 4),
        "groups": tensor(0, 0, 1),
    }
    return SuperClasses(**arguments | changes)


@given(super_classes())
def test_label_maps_are_those_of_literal_loops(drawn):
    labels = torch.arange(drawn.num_classes)
    coarse, dispersed = drawn.coarse_labels(labels), drawn.dispersed_labels(labels)
    for position, label in enumerate(drawn.head.tolist()):
        assert coarse[label] == dispersed[label] == position
    for position, label in enumerate(drawn.tail.tolist()):
        assert coarse[label] == len(drawn.head) + drawn.super_class[position]
        assert dispersed[label] == len(drawn.head) + position


@given(super_classes())
def test_members_and_numbers_agree_with_the_coarse_labels(drawn):
    coarse = drawn.coarse_labels(torch.arange(drawn.num_classes)).tolist()
    assert drawn.num_head == len(drawn.head)
    assert drawn.num_tail == len(drawn.tail)
    assert drawn.num_classes == drawn.num_head + drawn.num_tail
    assert drawn.num_coarse == drawn.num_head + drawn.num_super_classes == len(set(coarse))
    for super_class in range(drawn.num_super_classes):
        members = drawn.members(super_class).tolist()
        wanted = {label for label, c in enumerate(coarse) if c == drawn.num_head + super_class}
        assert set(members) == wanted
        assert len(members) == len(wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_labels_keep_their_shape_and_ignored_ones_their_value(dtype):
    labels = torch.tensor([[5, -100, 0], [3, 4, 1]], dtype=dtype)
    assert torch.equal(example().coarse_labels(labels), torch.tensor([[2, -100, 1], [4, 0, 2]]))
    assert torch.equal(example().dispersed_labels(labels), torch.tensor([[5, -100, 1], [4, 0, 2]]))


def test_labels_of_one_byte_go_with_more_classes_than_a_byte_holds():
    many = SuperClasses(torch.arange(300), tensor(300), tensor(0))
    labels = torch.tensor([0, 156, 255], dtype=torch.uint8)
    assert many.coarse_labels(labels).tolist() == [0, 156, 255]
    assert many.coarse_labels(torch.tensor(7)).shape == ()
    assert many.coarse_labels(torch.empty(0, 3, dtype=torch.int32)).shape == (0, 3)


def test_another_ignore_index_or_none():
    assert example().coarse_labels(tensor(-1, 4), ignore_index=-1).tolist() == [-1, 0]
    with pytest.raises(
        ValueError, match=r"labels: expected .* in \[0, 6\), got -100 at position 1"
    ):
        example().coarse_labels(tensor(4, -100), ignore_index=None)
    with pytest.raises(ValueError, match=r"ignore_index: expected .* outside \[0, 6\).* got 3"):
        example().coarse_labels(tensor(4), ignore_index=3)


@pytest.mark.gpu
def test_labels_stay_on_their_device():
    mapped = example().coarse_labels(tensor(5, -100, 0).cuda())
    assert mapped.is_cuda
    assert mapped.tolist() == [2, -100, 1]


def test_it_owns_what_it_was_made_of():
    head = tensor(4, 0)
    made = example(head=head)
    head[0] = 1
    assert made == example()


@given(super_classes(), super_classes())
def test_equal_are_those_of_equal_contents(one, other):
    assert one == pickle.loads(pickle.dumps(one))
    names = ("head", "tail", "super_class", "counts", "groups")
    contents = [[str(getattr(s, name)) for name in names] for s in (one, other)]
    assert (one == other) == (contents[0] == contents[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"head": tensor(0, 4)},
        {"tail": tensor(1, 2, 5, 3)},
        {"super_class": tensor(0, 2, 1, 0)},
        {"counts": None},
        {"counts": tensor(30, 5, 6, 2, 40, 5)},
        {"groups": None},
    ],
)
def test_any_other_content_is_unequal(changes):
    assert example() != example(**changes)
    assert example(**changes) != example()
    assert example(**changes) == example(**changes)


@given(drawn=super_classes())
def test_a_saved_one_is_loaded_again(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("saved") / "super_classes.pt"
    drawn.save(path)
    assert SuperClasses.load(path) == drawn


def test_a_new_process_loads_what_was_saved(tmp_path):
    example().save(tmp_path / "super_classes.pt")
    program = (
        "import sys; from facelt_ext.aggregation import SuperClasses; "
        "loaded = SuperClasses.load(sys.argv[1]); "
        "print([getattr(loaded, name).tolist() for name in sys.argv[2:]])"
    )
    names = ["head", "tail", "super_class", "counts", "groups"]
    command = [sys.executable, "-c", program, tmp_path / "super_classes.pt", *names]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = [[4, 0], [1, 2, 3, 5], [0, 1, 2, 0], [30, 5, 6, 2, 40, 4], [0, 0, 1]]
    assert printed.strip() == str(wanted)


def saved(path, **changes: object) -> None:
    example().save(path)
    torch.save(torch.load(path, weights_only=True) | changes, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("head, tail\n"), "expected a file of super classes, got /"),
        (lambda path: path.write_bytes(b""), "expected a file of super classes, got /"),
        (lambda path: torch.save(torch.nn.ReLU(), path), "expected a file of super classes, got /"),
        (lambda path: torch.save(tensor(1), path), "got something else in"),
        (lambda path: torch.save({"weight": tensor(1)}, path), "got something else in"),
        (lambda path: saved(path, version=2), "expected version 1, got 2 in"),
        (lambda path: saved(path, tail=tensor(1)), "is damaged: head and tail: "),
        (lambda path: saved(path, extra=tensor(1)), "is damaged: .*extra"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, write, message):
    path = tmp_path / "wrong.pt"
    write(path)
    with pytest.raises(ValueError, match=f"path: .*{message}") as raised:
        SuperClasses.load(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        SuperClasses.load(tmp_path / "none.pt")


def test_repr_is_short():
    assert repr(example()) == "SuperClasses(num_head=2, num_tail=4, num_super_classes=3)"


ONCE = r"expected each of 0 \.\. 5 once, as they hold 6 classes, got "


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head": [4, 0]}, TypeError, "head: expected a tensor, got list"),
        ({"tail": torch.rand(4)}, TypeError, "tail: expected an integer dtype, got torch.float32"),
        ({"super_class": torch.ones(4) > 0}, TypeError, "super_class: expected .* got torch.bool"),
        ({"counts": torch.rand(6)}, TypeError, "counts: expected an integer dtype"),
        ({"groups": torch.rand(3)}, TypeError, "groups: expected an integer dtype"),
        ({"head": tensor(4, 0)[None]}, ValueError, r"head: expected one dimension, .*\[1, 2\]"),
        ({"head": tensor(4, 1)}, ValueError, f"{ONCE}class 1 in both and class 0 in neither"),
        ({"head": tensor(4, 4)}, ValueError, f"{ONCE}class 4 more than once and class 0 in nei"),
        ({"head": tensor(4, 6)}, ValueError, f"{ONCE}class 6 and class 0 in neither"),
        ({"tail": tensor(1, 2, 3, -1)}, ValueError, f"{ONCE}class -1 and class 5 in neither"),
        (
            {"super_class": tensor(0, 1, 2)},
            ValueError,
            r"super_class: expected shape \[4\], one for each tail class, got \[3\]",
        ),
        ({"super_class": tensor(0, 1, 3, 0)}, ValueError, r"super_class: .* got none in 2"),
        ({"super_class": tensor(1, 1, 2, 2)}, ValueError, r"super_class: .* got none in 0"),
        ({"super_class": tensor(0, 1, 4, 0)}, ValueError, r"super_class: .*\[0, 4\).* got 4"),
        ({"super_class": tensor(0, -1, 1, 0)}, ValueError, "super_class: .* got -1 at position 1"),
        (
            {"counts": tensor(1, 2, 3, 4, 5)},
            ValueError,
            r"counts: expected shape \[6\], one for each class, got \[5\]",
        ),
        ({"counts": tensor(1, 2, 3, 4, 5, 0)}, ValueError, "counts: .* 1, got 0 at position 5"),
        (
            {"groups": tensor(0, 1)},
            ValueError,
            r"groups: expected shape \[3\], one for each super class, got \[2\]",
        ),
        ({"groups": tensor(0, -1, 1)}, ValueError, "groups: .* got -1 at position 1"),
        (
            {"head": tensor(), "tail": tensor(), "super_class": tensor()},
            ValueError,
            "head and tail: expected at least one class, got none",
        ),
    ],
)
def test_what_it_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        example(**changes)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, "labels: expected a tensor, got list"),
        (torch.rand(3), TypeError, "labels: expected an integer dtype, got torch.float32"),
        (tensor(0, 6), ValueError, r"labels: expected .*\[0, 6\) or -100, got 6 at position 1"),
        (tensor(-1), ValueError, r"labels: expected .*\[0, 6\) or -100, got -1 at position 0"),
    ],
)
def test_labels_it_refuses(labels, error, message):
    for mapping in (example().coarse_labels, example().dispersed_labels):
        with pytest.raises(error, match=message):
            mapping(labels)


def test_members_of_no_super_class_are_refused():
    assert example().members(0).tolist() == [1, 5]
    with pytest.raises(ValueError, match=r"super_class: expected .*\[0, 3\), got 3"):
        example().members(3)
    with pytest.raises(ValueError, match=r"super_class: expected .*\[0, 3\), got -1"):
        example().members(-1)
