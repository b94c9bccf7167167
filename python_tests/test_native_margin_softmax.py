"""The margin softmax's native functions refuse tensors that do not fit; memory that is kept."""

from __future__ import annotations

import gc

import pytest
import torch
from native_calls import MODULES, assert_refused_if_wrong, call, empty

from facelt_ext import _C, _native

OPTIONS = (8.0, 1, True, True, 0, 6, -100)
# Tensors by name, in the order of the arguments, with numbers between them: B = 4, N = 6, D = 3.
CALLS = {
    "normalize_rows": {"x": empty(6, 3), "inverse_norms": empty(6), "normalized": empty(6, 3)},
    "project_rows": {
        "raw": empty(6, 3), "x": empty(6, 3), "inverse_norms": empty(6), "gain": empty(6),
        "": False, "grad_x": empty(6, 3),
    },
    "margin_softmax_targets": {
        "features": empty(4, 3), "inverse_feature_norms": empty(4), "weight": empty(6, 3),
        "labels": empty(4, dtype=torch.int64), "cosine_margin": empty(4),
        "angular_margin": empty(4), "": OPTIONS, "targets": empty(3, 4),
    },
    "margin_softmax_normalizer": {
        "products": empty(4, 6), "column_scales": empty(6),
        "labels": empty(4, dtype=torch.int64), "targets": empty(3, 4), "": 0, " ": 8.0,
        "  ": True, "normalizer": empty(2, 4),
    },
    "margin_softmax_coefficients": {
        "grad_losses": empty(4), "labels": empty(4, dtype=torch.int64), "targets": empty(3, 4),
        "inverse_feature_norms": empty(4), "": OPTIONS,
        "coefficients": empty(4), "weight_gain": empty(1), "feature_gain": empty(4),
    },
    "margin_softmax_gradient": {
        "products": empty(4, 6), "column_scales": empty(6),
        "labels": empty(4, dtype=torch.int64), "targets": empty(3, 4), "lse": empty(4),
        "coefficients": empty(4), "": 0, " ": 8.0, "gradient": empty(4, 6),
    },
}  # fmt: skip
# What decides the others' sizes, and what may be empty or of one element.
FREE = {
    "project_rows": ("x",),
    "normalize_rows": ("x",),
    "margin_softmax_targets": ("features", "weight"),
    "margin_softmax_normalizer": ("products",),
    "margin_softmax_coefficients": ("grad_losses",),
    "margin_softmax_gradient": ("products",),
}


def tensors_of(function: str) -> list[str]:
    return [name for name, value in CALLS[function].items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function in CALLS for name in tensors_of(function)]
)
def test_a_tensor_of_the_wrong_size_dtype_or_layout(module, function, name):
    assert_refused_if_wrong(
        module, function, CALLS[function], name, name in FREE[function], name == "column_scales"
    )


@pytest.mark.parametrize("module", MODULES)
def test_two_half_types_are_no_pair(module):
    half, other = empty(6, 3, dtype=torch.float16), empty(6, 3, dtype=torch.bfloat16)
    for x, y in [(half, other), (other, half), (half, empty(6, 3, dtype=torch.float64))]:
        with pytest.raises(ValueError, match="x.*normalized"):
            call(module, "normalize_rows", CALLS["normalize_rows"], x=x, normalized=y)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norms(module, dtype):
    """Inverses, also where nothing is written beside them."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, torch.nan, 1.0]], dtype=dtype)
    inverses, rows = torch.full((3,), 7.0, dtype=compute), torch.full((3, 3), 7.0, dtype=dtype)
    getattr(_C, module).normalize_rows(x, inverses, rows, 1)
    torch.testing.assert_close(inverses, inverses.new_tensor([0.2, 0.0, torch.nan]), equal_nan=True)
    wanted = rows.new_tensor([[0.6, 0.8, 0], [0, 0, 0], [torch.nan] * 3])
    torch.testing.assert_close(rows, wanted, equal_nan=True)
    alone = torch.full((3,), 7.0, dtype=compute)
    getattr(_C, module).normalize_rows(x, alone, rows.new_empty(0), 1)
    torch.testing.assert_close(alone, inverses, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_of_any_size(module, dtype):
    """Over the whole range of normal numbers; below it a row counts as zeros."""
    info = torch.finfo(dtype)
    sizes = torch.logspace(
        torch.tensor(info.tiny).double().log10() if dtype == torch.float32 else -307,
        38 if dtype == torch.float32 else 307, 200, dtype=torch.float64,
    ).to(dtype)  # fmt: skip
    x = sizes[:, None] * torch.tensor([0.0, 1.0, -0.5], dtype=dtype)
    inverses, rows = torch.zeros(200, dtype=dtype), torch.zeros(200, 3, dtype=dtype)
    getattr(_C, module).normalize_rows(x, inverses, rows, 1)
    wanted = (torch.tensor([[0.0, 1.0, -0.5]]).double() / 1.25**0.5).to(dtype).expand(200, 3)
    # The smallest sizes' own halves lose digits.
    torch.testing.assert_close(rows[1:], wanted[1:], rtol=1e-6, atol=0)
    tiny = torch.full((1, 3), info.tiny / 2, dtype=dtype)
    getattr(_C, module).normalize_rows(tiny, inverses[:1], rows[:1], 1)
    assert inverses[0] == 0 and not rows[0].any()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("largest", [1e-30, 1e-3, 0.5, 0.75, 1.0, 65536.0, 1e30])
def test_coefficients_are_brought_to_one_by_a_power_of_two(module, largest):
    grads = torch.tensor([largest, -largest / 3, 4 * largest, -8 * largest, 0.0])
    # Those of samples that take no part do not count.
    labels = torch.tensor([0, 5, -100, 6, 1])
    coefficients, gain, own_gain = empty(5), empty(1), empty(5)
    slopes = torch.tensor([[0.0], [-0.5], [0.0]]).expand(3, 5).contiguous()
    getattr(_C, module).margin_softmax_coefficients(
        grads, labels, slopes, torch.ones(5), OPTIONS, coefficients, gain, own_gain, 1
    )
    unit = gain.item() / 8
    assert unit == 2 ** torch.tensor(largest).log2().ceil().item()
    assert 0.5 < coefficients[0] <= 1
    assert torch.equal(coefficients * unit, grads * torch.tensor([1, 1, 0, 0, 1]))
    assert own_gain.isnan().tolist() == [False, False, False, True, False]
    assert own_gain[[0, 1, 2, 4]].tolist() == [gain.item(), gain.item(), 0, gain.item()]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("norm", "crowding"), [(100.0, 1), (2.0**15, 4)])
def test_coefficients_leave_room_for_slopes_and_features(module, norm, crowding):
    """Four samples of a class add up; so does what their features are, if not normalised."""
    grads, labels = torch.tensor([1.0, 1.0, 0.5, -1.0]), torch.tensor([0, 0, 0, -100])
    targets = torch.tensor([[0.0] * 4, [-0.5, 3.0, -8.0, 1e4], [0.0] * 4])
    coefficients, gain, own_gain = empty(4), empty(1), empty(4)
    for normalized in (True, False):
        options = (OPTIONS[0], OPTIONS[1], normalized, *OPTIONS[3:])
        getattr(_C, module).margin_softmax_coefficients(
            grads, labels, targets, torch.full((4,), 1 / norm), options, coefficients, gain,
            own_gain, 1,
        )  # fmt: skip
        assert gain.item() / options[0] == 4 * (1 if normalized else crowding)


BYTES = 8 << 20


def memory(size: int = BYTES) -> torch.Tensor:
    assert size >= _native.LARGE
    return _native.large_output(torch.empty(0), size // 4, torch.float32)


def test_memory_is_taken_again_for_the_same_size():
    first = memory()
    assert first.shape == (BYTES // 4,) and first.dtype == torch.float32
    place = first.data_ptr()
    assert place % (2 << 20) == 0
    second = memory()
    assert second.data_ptr() != place
    del first
    gc.collect()
    # The same huge pages hold what is a little smaller.
    third = memory(BYTES - 4096)
    assert third.data_ptr() == place and third.numel() == (BYTES - 4096) // 4


def test_tensors_stay_valid_while_others_come_and_go():
    first = memory()
    view = first.view(2, -1)[1]
    first.fill_(3.0)
    for size in (BYTES, 2 * BYTES, BYTES, 4 * BYTES):
        other = memory(size)
        other.fill_(7.0)
        del other
    del first
    gc.collect()
    memory().fill_(9.0)
    assert (view == 3).all()


def resident() -> int:
    """Kilobytes."""
    with open("/proc/self/statm") as file:
        return 4 * int(file.read().split()[1])


def test_another_size_gives_back_what_is_kept():
    held = [memory(64 << 20) for _ in range(3)]
    for tensor in held:
        tensor.fill_(1.0)
    before = resident()
    del tensor, held
    gc.collect()
    # Kept for a step of the same sizes.
    assert resident() > before - (32 << 10)
    other = memory(66 << 20)
    assert resident() < before - (128 << 10)
    assert other.numel() == (66 << 20) // 4


def test_small_outputs_are_torchs():
    small = _native.large_output(torch.empty(0), 5, torch.float16)
    assert small.shape == (5,) and small.dtype == torch.float16
    nothing = _native.large_output(torch.empty(0), 0, torch.float32)
    assert nothing.shape == (0,)
    assert _native.large_output(torch.empty(0, device="meta"), BYTES, torch.float32).is_meta
