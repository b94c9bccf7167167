"""The modules of Aggregate-and-Disperse: both steps with the data set's own labels."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from strategies import assert_close
from torch.nn.functional import cross_entropy

import facelt_ext
from facelt_ext import AggregatedSoftmaxLoss, ArcFaceLoss, DispersionLoss, functional
from facelt_ext.aggregation import SuperClasses

STEPS = [AggregatedSoftmaxLoss, DispersionLoss]
# Heads and tails in no order, so that every map between labels and rows differs from the identity.
HEAD, TAIL = [5, 0, 3], [6, 1, 4, 2, 7]
SUPER_CLASS = [1, 0, 1, 2, 0]
NUM_CLASSES, SIZE = 8, 6


def super_classes() -> SuperClasses:
    return SuperClasses(torch.tensor(HEAD), torch.tensor(TAIL), torch.tensor(SUPER_CLASS))


def batch(seed: int = 0, samples: int = 12, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, SIZE, generator=generator)
    labels = torch.randint(NUM_CLASSES, (samples,), generator=generator)
    labels[:NUM_CLASSES] = torch.arange(NUM_CLASSES)
    return features.to(device), labels.to(device)


def make(kind: type, **options: object) -> torch.nn.Module:
    torch.manual_seed(1)
    return kind(NUM_CLASSES, SIZE, super_classes(), **options)


def literal_loss(weight: dict[int, torch.Tensor], f: torch.Tensor, label: int) -> torch.Tensor:
    """Eqs. 6-8 over a row for each of the data set's labels, summed class by class."""
    group = dict(zip(TAIL, SUPER_CLASS, strict=True))
    members = {s: [t for t in TAIL if group[t] == s] for s in SUPER_CLASS}
    total = sum(torch.exp(weight[h] @ f) for h in HEAD)
    for tail in TAIL:
        if label in group and group[tail] == group[label]:
            total = total + torch.exp(weight[tail] @ f)
        else:
            rows = [weight[t] for t in members[group[tail]]]
            total = total + torch.exp(sum(rows) / len(rows) @ f) / len(rows)
    return torch.log(total) - weight[label] @ f


def test_step_one_is_cross_entropy_over_heads_and_super_classes(any_place):
    loss = make(AggregatedSoftmaxLoss, device=any_place.device)
    features, labels = batch(device=any_place.device)
    coarse = [HEAD.index(y) if y in HEAD else 3 + SUPER_CLASS[TAIL.index(y)] for y in labels]
    expected = cross_entropy(
        features @ loss.weight.t(), torch.tensor(coarse, device=any_place.device)
    )
    with any_place.run():
        assert_close(loss(features, labels), expected, torch.float32)


def test_step_two_is_the_literal_equations(any_place):
    loss = make(DispersionLoss, device=any_place.device, dtype=torch.float64, reduction="none")
    with torch.no_grad():
        loss.weight.normal_()
    features, labels = batch(device=any_place.device)
    features = features.double().requires_grad_()
    rows = loss.weight.detach().clone().requires_grad_()
    weight = dict(zip(HEAD + TAIL, rows, strict=True))
    expected = torch.stack(
        [literal_loss(weight, f, int(y)) for f, y in zip(features, labels, strict=True)]
    )
    upstream = torch.linspace(-1, 2, len(labels), dtype=torch.float64, device=any_place.device)
    with any_place.run():
        actual = loss(features, labels)
        grads = torch.autograd.grad(actual, (features, loss.weight), upstream)
    assert_close(actual, expected, torch.float64)
    for grad, truth in zip(
        grads, torch.autograd.grad(expected, (features, rows), upstream), strict=True
    ):
        assert_close(grad, truth, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_step_two_begins_where_step_one_ended(any_place, dtype):
    """A head's sample has the same loss; a tail's has as many equal terms as its super class has
    members in place of one, and its own term is one of them."""
    one = make(AggregatedSoftmaxLoss, dtype=dtype, device=any_place.device, reduction="none")
    two = DispersionLoss.from_aggregated(one, super_classes())
    for label, row in zip(HEAD, range(3), strict=True):
        assert torch.equal(two.weight[two.label_map[label]], one.weight[row])
    for label, s in zip(TAIL, SUPER_CLASS, strict=True):
        assert torch.equal(two.weight[two.label_map[label]], one.weight[3 + s])
    features, labels = batch(device=any_place.device)
    features = features.to(dtype)
    with any_place.run():
        before, after = one(features, labels), two(features, labels)
    is_head = torch.isin(labels.cpu(), torch.tensor(HEAD))
    assert is_head.any() and not is_head.all()
    assert_close(after[is_head], before[is_head], dtype)
    assert (after[~is_head] > before[~is_head] + 1e-3)[labels[~is_head] != 2].all()
    # Class 2 is alone in its super class.
    assert_close(after[labels == 2], before[labels == 2], dtype)


def test_from_aggregated_takes_over_the_options():
    one = make(
        AggregatedSoftmaxLoss, reduction="sum", ignore_index=3, workspace="low", dtype=torch.float64
    )
    two = DispersionLoss.from_aggregated(one, super_classes())
    assert (two.reduction, two.ignore_index, two.workspace) == ("sum", 3, "low")
    assert two.weight.dtype == torch.float64
    two.weight.data.zero_()
    assert one.weight.any(), "the weight is a copy"


def test_from_aggregated_refuses_other_super_classes():
    other = SuperClasses(torch.tensor(HEAD), torch.tensor(TAIL), torch.tensor([1, 0, 1, 2, 1]))
    with pytest.raises(ValueError, match="super_classes: expected those that step_one_loss"):
        DispersionLoss.from_aggregated(make(AggregatedSoftmaxLoss), other)


def test_arcface_and_ours_is_their_sum(any_place):
    """The paper's ArcFace + Ours: one network, two classifiers, the same labels."""
    arcface = ArcFaceLoss(NUM_CLASSES, SIZE, device=any_place.device)
    ours = make(DispersionLoss, device=any_place.device)
    features, labels = batch(device=any_place.device)
    alone, grads = [], []
    with any_place.run():
        for loss in (arcface, ours):
            x = features.clone().requires_grad_()
            alone.append(loss(x, labels))
            grads.append(torch.autograd.grad(alone[-1], (x, loss.weight)))
        x = features.clone().requires_grad_()
        total = ours(x, labels) + arcface(x, labels)
        total.backward()
    assert_close(total, alone[0] + alone[1], torch.float32)
    assert_close(x.grad, grads[0][0] + grads[1][0], torch.float32)
    assert torch.equal(arcface.weight.grad, grads[0][1])
    assert torch.equal(ours.weight.grad, grads[1][1])


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("ignored", [-100, 3, 6])
def test_ignored_samples(any_place, kind, ignored):
    """Also where the number is a class's, or that of another row."""
    loss = make(kind, reduction="none", ignore_index=ignored, device=any_place.device)
    features, labels = batch(device=any_place.device)
    labels[2] = ignored
    features[2] = torch.nan
    features.requires_grad_()
    others = labels != ignored
    with any_place.run():
        losses = loss(features, labels)
        losses.sum().backward()
        loss.reduction = "mean"
        assert_close(loss(features, labels), losses[others].mean(), torch.float32)
        loss.ignore_index = -100
        loss.reduction = "none"
        assert_close(losses[others], loss(features[others], labels[others]), torch.float32)
    assert (losses[~others] == 0).all() and (features.grad[~others] == 0).all()
    assert (features.grad[others] != 0).any() and loss.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", STEPS)
def test_reductions_and_workspaces(any_place, kind):
    loss = make(kind, device=any_place.device)
    features, labels = batch(device=any_place.device)
    with any_place.run():
        loss.reduction = "none"
        each = loss(features, labels)
        for reduction, expected in [("sum", each.sum()), ("mean", each.mean())]:
            for workspace in ("low", "high", "auto"):
                loss.reduction, loss.workspace = reduction, workspace
                assert_close(loss(features, labels), expected, torch.float32, 100.0)


@pytest.mark.parametrize("kind", STEPS)
def test_labels_out_of_range(kind):
    loss = make(kind)
    features, labels = batch()
    for wrong in (NUM_CLASSES, -1):
        labels[4] = wrong
        with pytest.raises(ValueError, match=rf"labels: .*\[0, 8\) or -100, got {wrong} at .* 4"):
            loss(features, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", STEPS)
def test_labels_out_of_range_on_a_gpu(kind):
    loss = make(kind, reduction="none", device="cuda")
    features, labels = batch(device="cuda")
    features.requires_grad_()
    labels[4], labels[5] = NUM_CLASSES, -1
    losses = loss(features, labels)
    losses.sum().backward()
    wrong = torch.tensor([4, 5])
    assert losses[wrong].isnan().all() and losses.isnan().sum() == 2
    assert features.grad[wrong].isnan().all() and features.grad.isnan().sum() == 2 * SIZE
    assert loss.weight.grad.isfinite().all()
    facelt_ext.debug_checks(True)
    try:
        with pytest.raises(ValueError, match="labels"):
            loss(features, labels)
    finally:
        facelt_ext.debug_checks(False)


@pytest.mark.parametrize("kind", STEPS)
def test_wrong_arguments(kind):
    with pytest.raises(ValueError, match="num_classes: expected 8, as super_classes has, got 9"):
        kind(9, SIZE, super_classes())
    with pytest.raises(ValueError, match="embedding_size"):
        kind(NUM_CLASSES, 0, super_classes())
    loss = make(kind)
    features, labels = batch()
    with pytest.raises(ValueError, match="labels: expected shape"):
        loss(features, labels[:-1])
    with pytest.raises(TypeError, match="labels"):
        loss(features, labels.float())
    with pytest.raises(ValueError, match=rf"weight: expected shape .*{SIZE - 1}"):
        loss(features[:, 1:], labels)


@pytest.mark.parametrize("kind", STEPS)
def test_the_weight(kind):
    loss = kind(NUM_CLASSES, 500, super_classes(), dtype=torch.float64)
    assert [name for name, _ in loss.named_parameters()] == ["weight"]
    # torch.nn.Linear draws from [-1, 1] / sqrt(D).
    assert loss.weight.abs().max().item() == pytest.approx(500**-0.5, rel=0.01)
    assert loss.weight.std().item() == pytest.approx((3 * 500) ** -0.5, rel=0.1)
    before = loss.weight.detach().clone()
    loss.reset_parameters()
    assert not torch.equal(loss.weight, before)
    if kind is DispersionLoss:
        rows = loss.weight[loss.label_map]
        assert torch.equal(rows[1], rows[7]) and not torch.equal(rows[1], rows[6])
    assert make(kind, device="meta").weight.is_meta
    assert repr(loss).startswith(f"{kind.__name__}(") and "num_classes=8" in repr(loss)


@pytest.mark.parametrize("kind", STEPS)
def test_logits(kind):
    loss = make(kind, dtype=torch.float64)
    with torch.no_grad():
        loss.weight.normal_()
    features, labels = batch()
    logits = loss.logits(features.double())
    rows = loss.label_map[labels]
    own = (features.double() * loss.weight[rows]).sum(1)
    columns = rows if kind is AggregatedSoftmaxLoss else labels
    assert logits.shape == (len(labels), 6 if kind is AggregatedSoftmaxLoss else 8)
    assert_close(logits.gather(1, columns[:, None])[:, 0], own, torch.float64)
    assert loss.logits(features).dtype == torch.float32


@pytest.mark.parametrize("kind", STEPS)
def test_state_and_copies(any_place, kind):
    loss = make(kind, device=any_place.device)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    # Made with other super classes, and then given those of the first.
    other = SuperClasses(
        torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6, 7]), torch.tensor([0, 0, 1, 1, 2])
    )
    loaded = kind(NUM_CLASSES, SIZE, other, device=any_place.device)
    features, labels = batch(device=any_place.device)
    with any_place.run():
        expected = loss(features, labels)
        assert not torch.equal(loaded(features, labels), expected)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(loaded(features, labels), expected)
        assert torch.equal(copy.deepcopy(loss)(features, labels), expected)
        assert_close(loss.double()(features.double(), labels), expected.double(), torch.float32)


@pytest.mark.parametrize("kind", STEPS)
def test_compiles_whole(place, kind):
    loss = make(kind, device=place.device)
    features, labels = batch(device=place.device)
    features.requires_grad_()
    with place.run():
        expected = loss(features, labels)
        grads = torch.autograd.grad(expected, (features, loss.weight))
        compiled = torch.compile(loss, fullgraph=True)
        actual = compiled(features, labels)
        assert_close(actual, expected, torch.float32)
        for grad, truth in zip(
            torch.autograd.grad(actual, (features, loss.weight)), grads, strict=True
        ):
            assert_close(grad, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", STEPS)
def test_half_features_and_float32_weight(any_place, kind, dtype):
    loss = make(kind, device=any_place.device)
    features, labels = batch(device=any_place.device)
    half = features.to(dtype).requires_grad_()
    with any_place.run():
        value = loss(half, labels)
        value.backward()
        expected = loss(half.detach().float(), labels)
    assert value.dtype == torch.float32 and half.grad.dtype == dtype
    assert loss.weight.grad.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", STEPS)
def test_autocast(any_place, kind):
    loss = make(kind, device=any_place.device)
    features, labels = batch(device=any_place.device)
    with any_place.run(), torch.autocast(any_place.device, dtype=torch.bfloat16):
        value = loss(features, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(features, labels), rtol=0.02, atol=0)


def test_both_steps_learn():
    """Step I tells the super classes apart, step II their members."""
    torch.manual_seed(0)
    centers = torch.randn(NUM_CLASSES, SIZE)
    one = make(AggregatedSoftmaxLoss)
    labels = torch.arange(NUM_CLASSES).repeat(5)
    features = centers[labels] + 0.05 * torch.randn(len(labels), SIZE)
    learn(one, features, labels)
    assert torch.equal(one.logits(features).argmax(1), one.label_map[labels])
    two = DispersionLoss.from_aggregated(one, super_classes())
    assert not torch.equal(two.logits(features).argmax(1), labels)
    learn(two, features, labels)
    assert torch.equal(two.logits(features).argmax(1), labels)


def learn(loss: torch.nn.Module, features: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss(features, labels).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("head", "tail", "index"),
    [
        ([], [0, 1, 2], [0, 1, 0]),
        ([2, 0, 1], [], []),
        ([1], [0, 2], [0, 0]),
        ([1], [2, 0], [1, 0]),
    ],
    ids=["no head", "no tail", "one super class", "as many as tails"],
)
def test_edges_of_the_split(any_place, head, tail, index):
    split = [torch.tensor(values, dtype=torch.int64) for values in (head, tail, index)]
    classes = SuperClasses(*split)
    one = AggregatedSoftmaxLoss(3, SIZE, classes, device=any_place.device)
    two = DispersionLoss.from_aggregated(one, classes)
    features, labels = batch(device=any_place.device)
    labels %= 3
    with torch.no_grad():
        two.weight.normal_()
    with any_place.run():
        loss = two(features, labels)
        loss.backward()
        assert one(features, labels).isfinite() and two.weight.grad.isfinite().all()
        if len(set(index)) == len(tail):
            plain = cross_entropy(features @ two.weight[two.label_map].t(), labels)
            assert_close(loss, plain, torch.float32)


SCRIPT = """
    import sys
    import torch
    from facelt_ext import AggregatedSoftmaxLoss, DispersionLoss
    from facelt_ext.aggregation import SuperClasses

    parts, folder = sys.argv[1], sys.argv[2]
    torch.set_num_threads(2)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.PReLU())
    split = [torch.tensor(v) for v in ([5, 0, 3], [6, 1, 4, 2, 7], [1, 0, 1, 2, 0])]
    data = torch.Generator().manual_seed(1)
    images = torch.randn(40, 16, 5, generator=data)
    labels = torch.randint(8, (40, 16), generator=data)

    def train(loss, steps):
        parameters = [*network.parameters(), *loss.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for step in steps:
            optimizer.zero_grad()
            loss(network(images[step]), labels[step]).backward()
            optimizer.step()

    if "1" in parts:
        classes = SuperClasses(*split)
        one = AggregatedSoftmaxLoss(8, 6, classes)
        train(one, range(20))
        classes.save(folder + "/classes.pt")
        torch.save([network.state_dict(), one.state_dict()], folder + "/one.pt")
    else:
        torch.manual_seed(3)
        classes = SuperClasses.load(folder + "/classes.pt")
        one = AggregatedSoftmaxLoss(8, 6, classes)
        for module, state in zip((network, one), torch.load(folder + "/one.pt"), strict=True):
            module.load_state_dict(state)
    if "2" in parts:
        two = DispersionLoss.from_aggregated(one, classes)
        train(two, range(20, 40))
        torch.save([network.state_dict(), two.state_dict()], folder + f"/two-{parts}.pt")
"""


def test_a_run_stopped_after_step_one_goes_on_bit_by_bit(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for parts in ("12", "1", "2"):
        subprocess.run([sys.executable, script, parts, tmp_path], check=True)
    unbroken, stopped = (torch.load(tmp_path / f"two-{parts}.pt") for parts in ("12", "2"))
    begun = torch.load(tmp_path / "one.pt")
    for whole, halves in zip(unbroken, stopped, strict=True):
        assert list(whole) == list(halves)
        assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert not torch.equal(begun[0]["0.weight"], stopped[0]["0.weight"])


def test_index_follows_the_module():
    loss = make(DispersionLoss)
    assert isinstance(loss.super_class, functional.SuperClassIndex)
    assert loss.super_class.index.tolist() == SUPER_CLASS
    assert loss.super_class.offsets.tolist() == [0, 2, 4, 5]
    assert loss.half().super_class.index.dtype == torch.int64
