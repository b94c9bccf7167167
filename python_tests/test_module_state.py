"""State of the losses that others average, cast, empty, copy and load."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from loss_cases import (
    ARGUMENTS,
    HEADS,
    LOSSES,
    MARGINS,
    OTHER_SETS,
    STATE,
    batch,
    make,
    train,
    value,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from facelt_ext import losses

WHOLE_NUMBERS = [
    (name, key)
    for name, keys in STATE.items()
    for key in keys
    if key in ("label_map", "super_class.index", "cursor")
]
MAPS = [(name, key) for name, key in WHOLE_NUMBERS if key != "cursor"]


def kept(loss: nn.Module) -> dict[str, Tensor]:
    """What nothing may compute with, the orders of super classes too."""
    tensors = {key: t for key, t in loss.state_dict().items() if key not in ("weight",)}
    tensors.pop("compactness", None)
    if hasattr(loss, "super_class"):
        tensors.update(order=loss.super_class.order, offsets=loss.super_class.offsets)
    return tensors


def assert_kept(actual: nn.Module, expected: dict[str, Tensor]) -> None:
    now = kept(actual)
    assert list(now) == list(expected)
    for key, tensor in expected.items():
        assert now[key].dtype == tensor.dtype and torch.equal(now[key], tensor), key


def test_every_head_tells_its_state():
    assert sorted(STATE) == HEADS
    for name in LOSSES:
        assert list(make(name).state_dict()) == STATE.get(name, [])


def averaged_by(**options: object) -> Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]]:
    def begin(loss):
        average = AveragedModel(loss, **options)
        return average.module, lambda: average.update_parameters(loss)

    return begin


def by_entries(update: Callable[[Tensor, Tensor], None]):
    """As timm and YOLO do, on the tensors that state_dict() returns."""

    def begin(loss):
        average = copy.deepcopy(loss)

        def step():
            entries = zip(average.state_dict().values(), loss.state_dict().values(), strict=True)
            with torch.no_grad():
                for mean, own in entries:
                    update(mean, own)

        return average, step

    return begin


def floats(mean: Tensor, own: Tensor) -> None:
    if mean.is_floating_point():
        mean.mul_(0.9).add_(own, alpha=0.1)


AVERAGES = {
    "default": averaged_by(use_buffers=True),
    "average of steps": averaged_by(multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True),
    "exponential": averaged_by(multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "without buffers": averaged_by(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "all entries": by_entries(lambda mean, own: mean.copy_(0.9 * mean + 0.1 * own)),
    "floats": by_entries(floats),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("name", HEADS)
def test_the_average_of_a_head_that_rests_is_the_head(name, average):
    """With a running mean too, which lacks classes at the first updates."""
    loss = make(name)
    mean, update = average(loss)
    for _ in range(4):
        train(loss, 1)
        update()
    torch.testing.assert_close(value(mean), value(loss))
    assert_kept(mean, {**kept(loss), **{k: t for k, t in kept(mean).items() if k == "cursor"}})


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("name", [name for name in HEADS if name != "DomainBalancingLoss"])
def test_the_average_has_the_loss_of_the_averaged_weight(name, average):
    loss = make(name)
    mean, update = average(loss)
    for _ in range(4):
        train(loss, 1, moving=True)
        update()
    alone = make(name)
    with torch.no_grad():
        alone.weight.copy_(mean.weight)
    assert not torch.equal(mean.weight, loss.weight)
    assert torch.equal(value(mean), value(alone))
    assert_kept(mean, kept(alone))


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float16), lambda m: m.to(torch.float64).to(torch.float32),
    ],
    ids=["half", "bfloat16", "double", "to", "type", "there and back"],
)  # fmt: skip
@pytest.mark.parametrize("name", HEADS)
def test_casts_are_of_the_weight(name, cast):
    loss = make(name)
    train(loss, 3)
    before, expected = kept(loss), value(loss)
    mean = getattr(loss, "compactness", None)
    cast(loss)
    assert_kept(loss, before)
    dtype = loss.weight.dtype
    actual = value(loss, lambda x: x.to(dtype))
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0.03, atol=0)
    if mean is not None:
        assert loss.compactness.dtype == actual.dtype
        assert torch.equal(loss.compactness.to(mean.dtype), mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_that_are_cast_one_by_one(dtype):
    """As FSDP's buffer_dtype does, at each step."""
    loss, plain = make("DomainBalancingLoss"), make("DomainBalancingLoss")
    for seed in range(4):
        for buffer in loss.buffers():
            buffer.data = buffer.to(dtype)
        torch.testing.assert_close(loss(*batch(seed)), plain(*batch(seed)), rtol=0.01, atol=0)
    assert_kept(loss, kept(plain))


def spoiled(loss: nn.Module) -> nn.Module:
    for tensor in [*loss.parameters(), *loss.buffers()]:
        tensor.detach().fill_(7)
    return loss


def on_meta(name: str, how: str, **changes: object) -> nn.Module:
    if how == "device=":
        return make(name, device="meta", **changes)
    with torch.device("meta"):
        return make(name, **changes)


@pytest.mark.parametrize("how", ["device=", "torch.device"])
@pytest.mark.parametrize("name", HEADS)
def test_emptied_and_reset(name, how):
    emptied = spoiled(on_meta(name, how).to_empty(device="cpu"))
    at_once = make(name)
    for loss in (emptied, at_once):
        torch.manual_seed(1)
        loss.reset_parameters()
    assert torch.equal(value(emptied), value(at_once))
    assert_kept(emptied, kept(at_once))
    train(emptied, 2)
    train(at_once, 2)
    assert torch.equal(value(emptied), value(at_once))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_use_is_emptied_and_reset(name):
    loss, fresh = make(name), make(name)
    train(loss, 3, moving=True)
    spoiled(loss.to_empty(device="cpu"))
    for each in (loss, fresh):
        torch.manual_seed(1)
        each.reset_parameters()
    assert torch.equal(value(loss), value(fresh))
    assert_kept(loss, kept(fresh))


@pytest.mark.parametrize("name", HEADS)
def test_initialisation_is_skipped(name):
    first = ARGUMENTS[name][0]
    positional = [first[key] for key in ("num_classes", "embedding_size")]
    if "super_classes" in first:
        positional.append(first["super_classes"])
    options = {key: first[key] for key in ("margin", "k", "epsilon", "scale") if key in first}
    loss = nn.utils.skip_init(getattr(losses, name), *positional, **options)
    fresh = make(name)
    with torch.no_grad():
        loss.weight.copy_(fresh.weight)
    assert_kept(loss, kept(fresh))
    assert torch.equal(value(loss), value(fresh))


@pytest.mark.parametrize("sets", ["own", "others"])
@pytest.mark.parametrize("how", ["device=", "torch.device", "cpu", "assign"])
@pytest.mark.parametrize("name", HEADS)
def test_loaded_in_every_way(name, how, sets):
    loss = make(name)
    train(loss, 3, moving=True)
    changes = {"super_classes": OTHER_SETS} if "label_map" in STATE[name] else {}
    changes = changes if sets == "others" else {}
    meta = how not in ("cpu", "assign")
    loaded = on_meta(name, how, **changes) if meta else make(name, **changes)
    state = loss.state_dict()
    loaded.load_state_dict(state, assign=how != "cpu")
    assert torch.equal(value(loaded), value(loss))
    assert_kept(loaded, kept(loss))
    before = {key: tensor.clone() for key, tensor in state.items()}
    train(loaded, 2)
    for key, tensor in before.items():
        torch.testing.assert_close(state[key], tensor, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_loaded_in_inference_mode(name):
    loss, source = make(name), make(name)
    train(source, 2, moving=True)
    with torch.inference_mode():
        loss.load_state_dict(source.state_dict())
        value(loss)
    loss(*batch()).backward()
    source(*batch()).backward()
    assert torch.equal(loss.weight.grad, source.weight.grad)


@pytest.mark.parametrize("name", HEADS)
def test_copies(name):
    loss = make(name)
    train(loss, 3, moving=True)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    others = [
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(file, weights_only=False),
    ]
    for _ in range(2):
        for other in others:
            assert torch.equal(value(other), value(loss))
            assert_kept(other, kept(loss))
        for each in (loss, *others):
            train(each, 1)


def broken(tensor: Tensor) -> dict[str, Tensor]:
    """What a whole number's entry of a state_dict may have become."""
    cases = {
        "half": tensor.half(), "bfloat16": tensor.bfloat16(), "float32": tensor.float(),
        "int32": tensor.int(), "bool": tensor.bool(), "longer": torch.stack([tensor, tensor]),
        "on meta": tensor.to("meta"),
    }  # fmt: skip
    if tensor.ndim:
        rounded = tensor.clone()
        rounded[rounded == 5] = 6
        cases |= {
            "rounded": rounded, "shorter": tensor[1:], "negative": tensor - 1, "large": tensor + 1,
            "stray": torch.full_like(tensor, 2**62), "alike": torch.zeros_like(tensor),
        }  # fmt: skip
    return cases


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "key"), WHOLE_NUMBERS)
def test_broken_whole_numbers_are_refused(name, key, assign):
    """By name, and nothing of the checkpoint is taken: its rows go with them."""
    source, loss = make(name), make(name)
    train(source, 2, moving=True)
    before = {k: tensor.clone() for k, tensor in loss.state_dict().items()}
    good = source.state_dict()
    for what, tensor in broken(good[key]).items():
        with pytest.raises((TypeError, ValueError), match=key.split(".")[0] + ": expected"):
            loss.load_state_dict({**good, key: tensor}, assign=assign)
        after = loss.state_dict()
        for k, expected in before.items():
            torch.testing.assert_close(
                after[k], expected, equal_nan=True, msg=lambda m, w=what, k=k: f"{w}: {k} {m}"
            )


@pytest.mark.parametrize(("name", "key"), MAPS)
def test_a_map_has_to_be_there(name, key):
    state = make(name).state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        make(name).load_state_dict(state)
    assert make(name).load_state_dict(state, strict=False).missing_keys == [key]


@pytest.mark.parametrize("name", HEADS)
def test_another_size_is_refused_whole(name):
    changes = {"label_map": {"super_classes": OTHER_SETS}, "margin": {"margin": 2 * MARGINS}}
    loss = make(name)
    for key in STATE[name]:
        state = make(name, **changes.get(key, {})).state_dict()
        state["weight"] = torch.zeros(3, 2)
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            loss.load_state_dict(state)
        if key in changes:
            assert torch.equal(loss.state_dict()[key], make(name).state_dict()[key])


@pytest.mark.parametrize("name", HEADS)
def test_loaded_as_transformers_does(name):
    """It sets each entry as a parameter, on a model from the meta device."""
    loss = make(name)
    train(loss, 2, moving=True)
    changes = {"super_classes": OTHER_SETS} if "label_map" in STATE[name] else {}
    loaded = on_meta(name, "torch.device", **changes)
    for key, tensor in loss.state_dict().items():
        path, _, attribute = key.rpartition(".")
        module = loaded.get_submodule(path)
        entry = tensor.clone()
        if attribute not in module._buffers:
            entry = nn.Parameter(entry, requires_grad=entry.is_floating_point())
        entry._is_hf_initialized = True
        setattr(module, attribute, entry)
    assert [key for key, _ in loaded.named_parameters()] == ["weight"]
    assert torch.equal(value(loaded), value(loss))
    assert_kept(loaded, kept(loss))


@pytest.mark.parametrize("name", HEADS)
def test_checkpoints_of_a_compiled_model(name):
    """torch.distributed.checkpoint's own state_dict, whose names differ from the model's."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    loss, other = make(name), make(name)
    train(loss, 2, moving=True)
    models = [torch.compile(nn.Sequential(each), backend="eager") for each in (loss, other)]
    state = get_model_state_dict(models[0])
    assert sorted(state) == sorted("0." + key for key in STATE[name])
    set_model_state_dict(models[1], state)
    assert torch.equal(value(other), value(loss))
    assert_kept(other, kept(loss))


@pytest.mark.parametrize("name", HEADS)
def test_who_walks_over_buffers_meets_no_whole_number(name):
    loss = make(name)
    assert all(tensor.is_floating_point() for tensor in loss.buffers())
    assert all(tensor.is_floating_point() for tensor in loss.parameters())
    for tensor in loss.state_dict().values():
        if not tensor.is_floating_point():
            tensor.fill_(-1)
    for module in loss.modules():
        for tensor in module.buffers(recurse=False):
            if not tensor.is_floating_point():
                tensor.fill_(-1)
    assert_kept(loss, kept(make(name)))


@pytest.mark.parametrize("name", LOSSES)
def test_replicas_of_data_parallel(name):
    """The first one's buffers are the module's own."""
    loss, plain = make(name), make(name)
    for seed in range(3):
        replica = loss._replicate_for_data_parallel()
        for key, parameter in loss.named_parameters(recurse=False):
            setattr(replica, key, parameter)
        assert torch.equal(replica(*batch(seed)), plain(*batch(seed)))
    if name in HEADS:
        assert torch.equal(value(loss), value(plain))
        assert_kept(loss, kept(plain))
