"""Losses in what runs them twice, shards them, or gives them other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from loss_cases import BATCH, CLASSES, HEADS, LOSSES, SIZE, STATE, batch, make, train, value
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import facelt_ext


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.head = nn.Linear(SIZE, SIZE), head

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.base(features), labels)


def moved(loss: nn.Module) -> dict[str, Tensor]:
    """All that a call leaves behind."""
    left = dict(loss.state_dict())
    if getattr(loss, "sample_losses", None) is not None:
        left["sample_losses"] = loss.sample_losses
    return left


def six_steps(name: str, together: int, run: Callable[..., Tensor]) -> tuple[object, ...]:
    """Gradients and state after calls of a model, with a backward for each `together` of them."""
    changes: dict[str, object] = {}
    if name == "DomainBalancingLoss":
        # So many classes that no step sees them all, and margins that matter.
        changes = {"num_classes": 400, "margin": 0.3}
    model = Model(make(name, **changes))
    nn.init.eye_(model.base.weight)
    batches = [batch(seed) for seed in range(6)]
    if changes:
        rows = nn.functional.normalize(model.head.weight.detach())
        batches = [(rows[labels] + 0.1 * features, labels) for features, labels in batches]
    for features, _ in batches:
        features.requires_grad_()
    for first in range(0, 6, together):
        group = batches[first : first + together]
        sum(run(model, features, labels.int()) for features, labels in group).backward()
    return [features.grad for features, _ in batches], moved(model.head), model.base.weight.grad


@pytest.mark.parametrize("together", [1, 3], ids=["a backward for each", "one for three"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing_changes_nothing(name, reentrant, together):
    """Calls in a backward are repetitions, whatever was called in between."""
    plain = six_steps(name, together, lambda model, *arguments: model(*arguments))
    checkpointed = six_steps(
        name, together, lambda *arguments: checkpoint(*arguments, use_reentrant=reentrant)
    )
    torch.testing.assert_close(checkpointed, plain, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_torch_func_leave_the_state(name):
    loss, alone = make(name), make(name)
    features, labels = batch()
    with facelt_ext.use_backend("reference"):
        train(loss, 1)
        before = {key: tensor.clone() for key, tensor in moved(loss).items()}
        grad = torch.func.grad(lambda x: loss(x, labels))(features)
        torch.testing.assert_close(moved(loss), before, equal_nan=True, rtol=0, atol=0)
        if name != "DomainBalancingLoss":  # for which autograd's is a step
            alone(features.requires_grad_(), labels).backward()
            torch.testing.assert_close(grad, features.grad)
        loss.eval()
        assert torch.func.grad(lambda x: loss(x, labels))(features.detach()).isfinite().all()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory) -> Iterator[object]:
    """This process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    place = tmp_path_factory.mktemp("ranks") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(name: str, mesh: object, meta: bool = False) -> Model:
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta" if meta else "cpu"):
        model = Model(make(name))
    for module in (model.head, model):
        fully_shard(module, mesh=mesh)
    return model


def trained(model: nn.Module) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for seed in range(3):
        losses.append(model(*batch(seed)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [loss.detach() for loss in losses]


@pytest.mark.parametrize("name", HEADS)
def test_a_sharded_head_trains_and_is_saved(name, mesh):
    model, plain = sharded(name, mesh), Model(make(name))
    torch.testing.assert_close(trained(model), trained(plain))
    torch.testing.assert_close(value(model), value(plain))
    assert sorted(model.head.state_dict()) == sorted(STATE[name])
    other = sharded(name, mesh)
    other.load_state_dict(model.state_dict())
    assert torch.equal(value(other), value(model))


@pytest.mark.parametrize("name", HEADS)
def test_a_sharded_head_says_what_other_methods_need(name, mesh):
    from torch.distributed.fsdp import register_fsdp_forward_method

    model, plain = sharded(name, mesh), make(name)
    features, labels = batch()
    calls = {
        method: argument
        for method, argument in {
            "logits": (features,), "indicators": (labels,), "dfi": (),
        }.items()
        if hasattr(plain, method)
    }  # fmt: skip
    model(features, labels)
    plain(model.base(features), labels)
    for method, arguments in calls.items():
        with pytest.raises(
            TypeError, match=rf"weight: expected .* weight.full_tensor\(\).*{method}"
        ):
            getattr(model.head, method)(*arguments)
        register_fsdp_forward_method(model.head, method)
        actual = getattr(model.head, method)(*arguments)
        torch.testing.assert_close(actual, getattr(plain, method)(*arguments), equal_nan=True)


@pytest.mark.parametrize("name", HEADS)
def test_sharded_on_the_meta_device(name, mesh):
    model = sharded(name, mesh, meta=True).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    source = sharded(name, mesh)
    model.load_state_dict(source.state_dict())
    assert torch.equal(value(model), value(source))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_fully_sharded_data_parallel(name, flat, mesh):
    """With buffers in bfloat16, as recipes have them."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    def wrapped() -> nn.Module:
        return FullyShardedDataParallel(
            Model(make(name)), device_id=torch.device("cpu"), use_orig_params=not flat,
            mixed_precision=MixedPrecision(buffer_dtype=torch.bfloat16),
        )  # fmt: skip

    model, plain, other = wrapped(), Model(make(name)), wrapped()
    torch.testing.assert_close(trained(model), trained(plain), rtol=0.01, atol=0)
    state = model.state_dict()
    assert sorted(state) == sorted(plain.state_dict())
    for key in STATE[name]:
        if not state["head." + key].is_floating_point():
            assert torch.equal(state["head." + key], plain.head.state_dict()[key])
    other.load_state_dict(state)
    assert torch.equal(value(other), value(model))
    assert f"{name}(" in repr(model)


GROWN = torch.randn(CLASSES + 5, SIZE, generator=torch.Generator().manual_seed(3))
SHRUNK = GROWN[: CLASSES - 5]
NEW_CLASSES = torch.arange(BATCH) % 5 + CLASSES


@pytest.mark.parametrize("rows", [GROWN, SHRUNK], ids=["grown", "shrunk"])
def test_the_running_mean_follows_the_weight(rows):
    loss = make("DomainBalancingLoss", margin=0.3)
    train(loss, 4)
    known = loss.compactness.clone()
    assert not known.isnan().any()
    loss.weight = nn.Parameter(rows.clone())
    saved = loss.state_dict()["compactness"]
    if len(rows) > len(known):
        assert torch.equal(saved[: len(known)], known) and saved[len(known) :].isnan().all()
    else:
        assert saved.isnan().all(), "who left is not known"
    other = make("DomainBalancingLoss", margin=0.3, num_classes=len(rows))
    other.load_state_dict(loss.state_dict())
    features, labels = batch()
    labels = NEW_CLASSES if len(rows) > len(known) else labels % len(rows)
    first = loss(features, labels)
    first.backward()
    assert torch.equal(other(features, labels), first)
    assert loss.compactness[labels].isfinite().all() and loss.weight.grad.shape == rows.shape
    for _ in range(4):
        loss(features, labels)
    torch.testing.assert_close(loss.compactness, loss.dfi().compactness)


@pytest.mark.parametrize("rows", [GROWN, SHRUNK], ids=["grown", "shrunk"])
@pytest.mark.parametrize("name", HEADS)
def test_a_weight_with_other_rows(name, rows):
    """It is used, or an error names both sizes and what mends it."""
    loss = make(name)
    expected = CLASSES if "label_map" not in STATE[name] else len(loss.weight)
    loss.weight = nn.Parameter(rows.clone())
    features, labels = batch()
    labels = labels % len(rows)
    if name == "SphereFaceLoss":
        fresh = make(name, num_classes=len(rows))
        fresh.load_state_dict({"weight": rows})
        assert torch.equal(loss(features, labels), fresh(features, labels))
        return
    with pytest.raises(ValueError) as error:
        loss(features, labels)
    message = str(error.value)
    assert str(expected) in message and str(len(rows)) in message
    if "margin" in STATE[name]:
        assert message.startswith("margin: ") and "set head.margin" in message
        loss.margin = torch.full((len(rows),), 0.2)
        fresh = make(name, num_classes=len(rows), margin=0.2)
        fresh.load_state_dict({"weight": rows})
        torch.testing.assert_close(loss(features, labels), fresh(features, labels))
    else:
        assert message.startswith("weight: ") and f"{name}(num_classes" in message


def test_heads_export_with_their_maps():
    """They are constants of the program, as is the mean of an evaluated head."""
    from torch.export import Dim, export

    for name in ("AggregatedSoftmaxLoss", "DomainBalancingLoss", "CosFaceLoss"):
        loss = make(name).eval()
        loss(*batch())
        sizes = {0: Dim("batch", min=2)}
        program = export(loss, batch(), dynamic_shapes=(sizes, sizes)).module()
        features, labels = batch(1)
        torch.testing.assert_close(
            program(features[:5], labels[:5]), loss(features[:5], labels[:5])
        )
