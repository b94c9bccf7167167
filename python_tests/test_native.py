"""The native module refuses what it cannot take; no mistake in Python reads out of bounds."""

from __future__ import annotations

import pytest
import torch

from facelt_ext import _C, _native


def grouping(labels: torch.Tensor, **changed: torch.Tensor) -> None:
    batch = labels.shape[0]
    outputs = {
        "order": torch.empty(batch, dtype=torch.int64),
        "segment": torch.empty(batch, dtype=torch.int64),
        "offsets": torch.empty(batch + 1, dtype=torch.int64),
        "num_classes": torch.empty(1, dtype=torch.int64),
        **changed,
    }
    _C.cpu.group_labels(labels, -100, *outputs.values(), torch.empty(0, dtype=torch.uint8), 1)


LABELS = torch.tensor([3, 1, 3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": torch.empty(2, dtype=torch.int64)}, r"order: expected 3 .* got int64 \[2\]"),
        ({"segment": torch.empty(3)}, r"segment: expected 3 .* int64 .* got float32 \[3\]"),
        (
            {"offsets": torch.empty(8, dtype=torch.int64)[::2]},
            r"offsets: expected 4 .* got int64 \[4\] on cpu, not contiguous",
        ),
    ],
)
def test_a_tensor_of_the_wrong_size_dtype_or_layout(changed, message):
    grouping(LABELS)
    with pytest.raises(ValueError, match=message):
        grouping(LABELS, **changed)


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="expected a torch.Tensor, got list"):
        _C.no_operation([1.0])
    with pytest.raises(TypeError, match=r"no kernel takes tensors of dtype torch.complex64"):
        _C.no_operation(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="no kernel takes tensors of 5 dimensions"):
        _C.no_operation(torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="on cpu and cuda devices only"):
        _C.no_operation(torch.zeros(2, device="meta"))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_fake_tensor_has_no_memory():
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(2)
    with pytest.raises(TypeError, match="memory of its own, got FakeTensor"):
        _C.no_operation(fake)


def test_a_workspace_of_no_bytes_lies_where_its_tensors_do(monkeypatch):
    kernels = type("Kernels", (), {"function_workspace": staticmethod(lambda: 0)})
    monkeypatch.setattr(_native, "_kernels", lambda *_: kernels)
    for device in ("cpu", "meta"):
        like = torch.empty(0, device=device)
        assert _native.workspace("native", like, "function").device == like.device


def test_a_class_beyond_the_rows_has_a_gradient_of_nan():
    grad, counts = torch.ones(1, 2), torch.tensor([3])
    segment = torch.tensor([0, 1, 0])
    result = torch.ops.facelt_ext.class_centroids_backward(
        grad, segment, counts, torch.float32, "native"
    )
    assert result[1].isnan().all() and torch.equal(result[::2], torch.full((2, 2), 1 / 3))


def test_the_thread_count_is_torchs(monkeypatch):
    seen = []
    kernels = type("Kernels", (), {"function": staticmethod(lambda *args: seen.append(args))})
    monkeypatch.setattr(_native, "_kernels", lambda *_: kernels)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    _native.run("native", torch.zeros(1), "function")
    assert seen == [(5,)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_must_be_floating(dtype):
    x = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="features: expected a floating dtype, got int64"):
        _C.cpu.class_centroids_forward(
            x, LABELS, torch.zeros(4, dtype=torch.int64), LABELS[:1], x.to(dtype), LABELS, 1
        )
