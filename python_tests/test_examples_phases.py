"""The demo's trainings of several phases, and the super classes that some of them need."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from demo_cases import (
    Image,
    aggregation_plots,
    aggregation_report,
    course,
    data,
    demo,
    losses,
    methods,
    model,
    train,
    training,
    write_people,
)
from torch import nn

from facelt_ext import AggregatedSoftmaxLoss, ArcFaceLoss, DispersionLoss
from facelt_ext.aggregation import SuperClasses

SUPER_CLASS_METHODS = ["aggregate-disperse", "arcface+aggregate-disperse"]
HEAD_AND_TAIL = ["head-only", "head-then-all", *SUPER_CLASS_METHODS]


@pytest.fixture(autouse=True)
def reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> data.LongTailSplit:
    """Fourteen identities with six images each; nine are trained on, four of them head."""
    people = {f"p{person}": 6 for person in range(14)}
    folder = write_people(tmp_path_factory.mktemp("faces") / "people", people)
    return data.split_long_tail(data.read_folder(folder), seed=0)


def recorded_phase(phase: methods.Phase, seen: list) -> methods.Phase:
    """The same phase; ``seen`` gets its `Start`, copies of what that holds and of the loss."""

    def make_loss(start: methods.Start, **settings: float) -> nn.Module:
        before = None if start.previous is None else state_of(start.previous)
        loss = phase.make_loss(start, **settings)
        seen.append((start, before, state_of(loss), loss))
        return loss

    return dataclasses.replace(phase, make_loss=make_loss)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def recorded_method(name: str) -> tuple[methods.Method, list]:
    seen: list = []
    method = methods.METHODS[name]
    phases = tuple(recorded_phase(phase, seen) for phase in method.phases)
    return dataclasses.replace(method, phases=phases), seen


def test_split_has_the_head_and_tails_that_the_tests_rely_on(split):
    assert split.train_counts.tolist() == [6, 5, 4, 3, 2, 2, 2, 1, 1]
    assert split.minimums == (3, 1)
    assert split.is_head.tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize(
    ("most", "minimums"),
    [
        (217, (109, 44, 1)),
        (20, (10, 4, 1)),
        (10, (5, 2, 1)),
        (4, (2, 1)),
        (3, (2, 1)),
        (2, (1,)),
    ],
)
def test_groups_are_in_the_papers_proportion(most, minimums):
    assert data.group_minimums(most) == minimums


@pytest.mark.parametrize("name", methods.METHODS)
def test_shares_of_the_phases_add_up_to_the_budget(name):
    method = methods.METHODS[name]
    for budget in range(31):
        phases, epochs = zip(*method.schedule(budget), strict=True)
        assert phases == method.phases
        assert list(itertools.chain(*epochs)) == list(range(budget))


def test_epochs_of_two_phases_by_hand():
    method = methods.METHODS["aggregate-disperse"]
    for budget, lengths in {30: [12, 18], 3: [1, 2], 2: [1, 1], 1: [0, 1]}.items():
        assert [len(epochs) for _, epochs in method.schedule(budget)] == lengths


def test_each_phase_has_its_epochs_and_its_learning_rate(split, monkeypatch):
    rates: list[list[float]] = []

    class Recording(torch.optim.Adam):
        def __init__(self, *arguments, **options):
            rates.append([])
            super().__init__(*arguments, **options)

        def step(self, *arguments, **options):
            rates[-1].append(self.param_groups[0]["lr"])
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", Recording)
    loss = methods.fresh(losses.SoftmaxLoss)
    shares = [(0.5, 1.0), (0.25, 0.125), (0.25, 1.0)]
    phases = tuple(methods.Phase(loss, share=share, rate=rate) for share, rate in shares)
    trained = train(split, methods.Method("three", "", phases), 16)
    assert [len(own) for own in rates] == [8, 4, 4]  # one batch an epoch
    assert 0.9e-3 < max(rates[0]) <= 1e-3
    assert rates[1] == pytest.approx([0.125 * rate for rate in rates[2]])
    assert min(rates[1]) < 0.01 * max(rates[1])
    assert all(len(curve) == 16 for curve in trained.history.values())


@pytest.mark.parametrize("name", HEAD_AND_TAIL)
def test_phases_see_the_images_of_their_identities_alone(split, name, monkeypatch):
    batches: list[torch.Tensor] = []
    monkeypatch.setattr(training, "augment", lambda images: batches.append(images) or images)
    own = course(split, 5)
    if methods.METHODS[name].aggregated:
        assert own.super_classes is not None
    batches.clear()
    own.train(methods.METHODS[name])
    inputs = model.network_input(split.train_images)
    assert len(inputs.unique(dim=0)) == len(inputs)
    seen = [
        {split.train_labels[(inputs == image).flatten(1).all(1)].item() for image in batch}
        for batch in batches
    ]
    expected = {
        "head-only": [range(4)] * 5,
        "head-then-all": [range(4)] * 2 + [range(9)] * 3,
    }.get(name, [range(9)] * 5)
    assert seen == [set(labels) for labels in expected]
    assert {len(batch) for batch in batches} == {36}  # nine times four, four times nine


def test_head_only_network_is_trained_on_as_many_classes_as_the_head_has(split):
    criterion = train(split, methods.HEAD_ONLY, 1).criterion
    assert criterion.classifier.weight.shape == (4, 64)


@pytest.mark.parametrize("name", SUPER_CLASS_METHODS)
def test_step_two_begins_where_step_one_ended(split, name):
    method, seen = recorded_method(name)
    course(split, 5).train(method)
    (start, _, drawn, step_one), (again, trained, begun, step_two) = seen
    groups = start.super_classes
    assert again.super_classes is groups and again.previous is step_one
    prefix = "losses.0." if name.startswith("arcface") else ""
    before, after = trained[f"{prefix}weight"], begun[f"{prefix}weight"]
    assert (before - drawn[f"{prefix}weight"]).abs().max() > 1e-4
    labels = torch.arange(9)
    assert after.shape == (9, 64)
    assert torch.equal(after[groups.dispersed_labels(labels)], before[groups.coarse_labels(labels)])

    features, head = torch.randn(4, 64), torch.arange(4)
    fresh = DispersionLoss(9, 64, groups)
    with torch.no_grad():
        fresh.weight.copy_(after)
    expected = F.cross_entropy(features @ before.T, head)
    torch.testing.assert_close(fresh(features, head), expected)
    if prefix:
        assert torch.equal(trained["losses.1.weight"], begun["losses.1.weight"])
        assert isinstance(step_two.losses[1], ArcFaceLoss)
        assert (step_two.losses[1].weight - begun["losses.1.weight"]).abs().max() > 1e-4


def test_convolutions_of_the_second_phase_are_those_of_the_first(split, monkeypatch):
    states: list[torch.Tensor] = []
    train_phase = training.Course._train_phase

    def recorded(self, network, *arguments):
        states.append(network.embedding.weight.detach().clone())
        result = train_phase(self, network, *arguments)
        states.append(network.embedding.weight.detach().clone())
        return result

    own = course(split, 5)
    assert own.super_classes is not None
    monkeypatch.setattr(training.Course, "_train_phase", recorded)
    own.train(methods.METHODS["aggregate-disperse"])
    begin, end, begin_again, end_again = states
    assert torch.equal(end, begin_again)
    assert not torch.equal(begin, end) and not torch.equal(begin_again, end_again)


def test_all_identities_take_over_the_rows_of_the_head(split):
    method, seen = recorded_method("head-then-all")
    course(split, 5).train(method)
    (_, _, drawn, _), (start, trained, begun, _) = seen
    assert start.num_classes == 9
    for name, rows in trained.items():
        assert rows.shape[0] == 4 and not torch.equal(rows, drawn[name])
        assert torch.equal(begun[name][:4], rows)
        assert len(begun[name]) == 9 and (begun[name][4:] != 0).all()


def test_sum_of_losses_with_the_same_labels(split):
    groups = course(split, 1).super_classes
    aggregated, arcface = AggregatedSoftmaxLoss(9, 64, groups), ArcFaceLoss(9, 64)
    features, labels = torch.randn(12, 64), torch.arange(12) % 9
    total = losses.SumLoss(aggregated, arcface)(features, labels)
    coarse = F.cross_entropy(features @ aggregated.weight.T, groups.coarse_labels(labels))
    torch.testing.assert_close(total, coarse + arcface(features, labels))


def test_super_classes_come_from_the_mean_features_of_the_head_only_network(split, monkeypatch):
    own = course(split, 2)
    given = {}

    def recorded(means, counts, **options):
        given.update(options, means=means, counts=counts)
        return SuperClasses(torch.arange(4), torch.arange(4, 9), torch.tensor([0, 1, 0, 1, 1]))

    monkeypatch.setattr(training, "aggregate", recorded)
    assert own.super_classes.num_super_classes == 2
    network = own.head_only.network.eval()
    with torch.no_grad():
        features = network(model.network_input(split.train_images))[0]
    means = torch.stack([features[split.train_labels == label].mean(0) for label in range(9)])
    torch.testing.assert_close(given["means"], means)
    assert torch.equal(given["counts"], split.train_counts)
    assert (given["minimums"], given["seed"]) == (split.minimums, 0)


def test_super_classes_agree_with_the_head_and_the_groups_of_the_split(split):
    groups = course(split, 1).super_classes
    assert torch.equal(groups.head, split.is_head.nonzero().flatten())
    # 8 images of the tail; 18 / 4 for an identity of the head.
    assert groups.num_super_classes == round(8 / 4.5)


@pytest.mark.parametrize("name", SUPER_CLASS_METHODS)
def test_training_is_the_same_whether_the_head_only_network_was_trained_before(split, name):
    networks = []
    for first in (["head-only"], []):
        own = course(split, 2)
        for each in [*first, name]:
            networks.append(own.train(methods.METHODS[each]).network)
    _, before, after = networks
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)


def test_head_only_network_is_trained_once_for_a_seed(split, monkeypatch):
    trained: list[str] = []
    original = training.Course._train
    monkeypatch.setattr(
        training.Course,
        "_train",
        lambda self, method: trained.append(method.title) or original(self, method),
    )
    own = course(split, 1)
    for name in HEAD_AND_TAIL:
        own.train(methods.METHODS[name])
    assert trained == [methods.METHODS[name].title for name in HEAD_AND_TAIL]


@pytest.mark.parametrize("first", [[], ["head-only"]])
def test_progress_ends_at_its_total(split, first, monkeypatch):
    bars = []

    class Recording(demo.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(demo, "tqdm", Recording)
    chosen = {name: methods.METHODS[name] for name in ["softmax", *first, *SUPER_CLASS_METHODS]}
    demo.compare([split, split], chosen, [0, 1], 1, torch.device("cpu"))
    assert bars[0].n == bars[0].total == 2 * 4


NO_TAIL = {f"p{person}": 2 for person in range(8)}
SINGLE_HEAD = {"p0": 20} | {f"p{person}": 2 for person in range(1, 8)}


@pytest.mark.parametrize(
    ("people", "found"),
    [
        (NO_TAIL, r"at least 1 image\(s\)\) and one in the tail \(fewer\): found 5 and 0"),
        (SINGLE_HEAD, r"at least 10 image\(s\)\) and one in the tail \(fewer\): found 1 and 4"),
    ],
)
def test_data_without_head_or_tail_names_the_methods_that_need_them(tmp_path, people, found):
    folder = write_people(tmp_path / "people", people)
    options = ["--data", str(folder), "--epochs", "1", "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match=f"head-only, aggregate-disperse: needs .*{found}"):
        demo.main([*options, "--methods", "cosface", "head-only", "aggregate-disperse"])
    assert not (tmp_path / "report").exists()


def test_methods_that_need_a_tail_are_left_out_by_default_and_the_report_says_so(tmp_path, capsys):
    folder, output = write_people(tmp_path / "people", NO_TAIL), tmp_path / "report"
    options = ["--epochs", "1", "--seeds", "1", "--output", str(output)]
    demo.main(["--data", str(folder), *options])
    names = ", ".join(HEAD_AND_TAIL)
    assert f"left out {names}: needs at least two" in capsys.readouterr().out
    page = (output / "report.md").read_text(encoding="utf-8")
    assert f"Left out: {names}: needs at least two" in page
    assert "ArcFace" in page and "uper class" not in page and "Head and tail" not in page
    assert not (output / "super_classes.png").exists()


def test_smallest_data_with_a_head_and_a_tail(tmp_path):
    people = {f"p{person}": 3 for person in range(8)}
    folder, output = write_people(tmp_path / "people", people), tmp_path / "report"
    options = ["--epochs", "1", "--seeds", "1", "--output", str(output)]
    demo.main(["--data", str(folder), *options, "--methods", *HEAD_AND_TAIL])
    with Image.open(output / "super_classes.png") as image:
        assert len(image.convert("L").getcolors()) > 2


def test_report_on_super_classes_without_the_head_only_row(tmp_path, split):
    figures = {"tar": 0.25, "rank1": 0.5}
    chosen = [methods.METHODS[name] for name in ("softmax", "cosface", "aggregate-disperse")]
    groups = course(split, 1).super_classes
    page = aggregation_report.section(
        split.minimums,
        {method.title: method for method in chosen},
        {method.title: [figures, figures] for method in chosen},
        groups,
    )
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row] for row in rows if "--" not in row[0]] == [
        ["groups or method", "VR @ FAR 1 %", "rank-1"],
        ["all identities (ABCD)", "25.0 ± 0.0", "50.0 ± 0.0"],
        ["Aggregate-and-Disperse (Ours)", "25.0 ± 0.0", "50.0 ± 0.0"],
    ]
    assert groups.summary() in page
    assert "at least 3 images" in page and "(1 to 2 images)" in page


def test_picture_shows_each_tail_identity_once_with_its_own_face(split, tmp_path, monkeypatch):
    figure = drawn(course(split, 1).super_classes, split, tmp_path, monkeypatch)
    faces = [axes for axes in figure.axes if axes.images]
    assert len(faces) == 5
    titles = set()
    for axes in faces:
        titles.add(axes.get_title())
        label = split.train_names.index(axes.get_title().split(" ")[0])
        shown = torch.from_numpy(axes.images[0].get_array().data)
        own = split.train_images[split.train_labels == label]
        assert (own == shown).flatten(1).all(1).any()
    counts = split.train_counts.tolist()
    assert titles == {f"{split.train_names[label]} ({counts[label]})" for label in range(4, 9)}


def test_picture_of_many_super_classes_is_cut_off(split, tmp_path, monkeypatch):
    tail = torch.arange(1, 40)
    super_class = torch.cat([torch.zeros(25, dtype=torch.int64), torch.arange(1, 15)])
    many = SuperClasses(torch.tensor([0]), tail, super_class)
    large = dataclasses.replace(
        split,
        train_images=split.train_images[:1].expand(40, -1, -1),
        train_labels=torch.arange(40),
        train_counts=torch.ones(40, dtype=torch.int64),
        train_names=[f"p{label}" for label in range(40)],
    )
    figure = drawn(many, large, tmp_path, monkeypatch)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sum(bool(axes.images) for axes in figure.axes) == 10 + 11
    assert "super class 12" in texts and "super class 13" not in texts
    assert sum("10 of them shown" in text for text in texts) == 1


def drawn(groups: SuperClasses, split: data.LongTailSplit, folder: Path, monkeypatch):
    figures = []

    class Recording(aggregation_plots.Figure):
        def savefig(self, *arguments, **options):
            figures.append(self)
            super().savefig(*arguments, **options)

    monkeypatch.setattr(aggregation_plots, "Figure", Recording)
    aggregation_plots.plot_super_classes(groups, split, folder / "super_classes.png")
    assert (folder / "super_classes.png").stat().st_size > 1000
    return figures[0]


@pytest.mark.parametrize("name", ["clmle", "lmle"])
def test_batches_of_clusters_follow_the_features(split, name, monkeypatch):
    """Each is of whole clusters, which are found anew; CLMLE's hardest come first."""
    indices, batches = [], []

    class Recorded(training.ClusterIndex):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.before = []
            indices.append(self)

        def refresh(self, features):
            super().refresh(features)
            self.before.append(self.assignments.clone())

    class Sampled(training.ClusterBatchSampler):
        def __iter__(self):
            for batch in super().__iter__():
                batches.append((self.clusters.assignments[batch], self.samples_per_cluster))
                yield batch

    monkeypatch.setattr(training, "ClusterIndex", Recorded)
    monkeypatch.setattr(training, "ClusterBatchSampler", Sampled)
    train(split, methods.METHODS[name], 20)
    (index,) = indices
    assert len(index.before) == 2 and batches
    for clusters, size in batches:
        assert all(len(own.unique()) == 1 for own in clusters.split(size))
    assert index.sample_losses.isfinite().any() == (name == "clmle")
