"""Calls of evaluation, clustering, aggregation and classification, for `public_calls`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch
from calls import (
    Call,
    crowded,
    features,
    labels_of_clusters,
    pairs_of_labels,
    refreshed,
    super_classes,
)
from torch import Tensor

from facelt_ext import aggregation, clustering, evaluation
from facelt_ext.aggregation import SuperClasses
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.clusters import ClusterIndex


def fitted() -> NearestClusterClassifier:
    return NearestClusterClassifier(3).fit(refreshed())


def scored() -> dict[str, object]:
    return {"scores": torch.rand(40), "same": torch.arange(40) % 2 == 0}


def faces(count: int = 8, images: int = 2) -> dict[str, object]:
    return {"features": crowded(count), "labels": torch.arange(count) // images}


def gallery(classes: int = 4) -> dict[str, object]:
    return {
        "gallery": crowded(classes),
        "gallery_labels": torch.arange(classes),
        "probes": crowded(8),
        "probe_labels": pairs_of_labels(),
    }


def told() -> dict[str, object]:
    return {"predicted": pairs_of_labels().flip(0), "labels": pairs_of_labels()}


def trials(count: int = 40) -> list[evaluation.Trial]:
    return evaluation.random_trials(torch.arange(count) // 4, num_trials=2)


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(zip(crowded(8).split(3), labels_of_clusters().split(3), strict=True))


def model(inputs: Tensor) -> Tensor:
    return inputs * 2


def new_path() -> str:
    return os.path.join(tempfile.mkdtemp(), "file")


def written(write: Callable[[str], object]) -> str:
    path = new_path()
    write(path)
    return path


def list_of_pairs(path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("a.png b.png 1\na.png c.png 0\n")


CALLS: dict[str, Callable[[], Call]] = {
    "roc": lambda: (evaluation.roc, scored()),
    "tar_at_far": lambda: (evaluation.tar_at_far, {**scored(), "far": 0.1}),
    "fold_accuracy": lambda: (evaluation.fold_accuracy, {**scored(), "folds": 4}),
    "all_pairs": lambda: (evaluation.all_pairs, faces()),
    "all_pairs_tar_at_far": lambda: (
        evaluation.all_pairs_tar_at_far,
        {**faces(), "far": [0.1, 0.01]},
    ),
    "identification_ranks": lambda: (
        evaluation.identification_ranks,
        {**gallery(), "distractors": crowded(5)},
    ),
    "distractor_ranks": lambda: (
        evaluation.distractor_ranks,
        {**faces(), "distractors": crowded(5)},
    ),
    "open_set_identification": lambda: (
        evaluation.open_set_identification,
        {**gallery(3), "far": 0.5, "rank": 1},
    ),
    "cmc": lambda: (evaluation.cmc, {"ranks": torch.tensor([1, 2, 3]), "max_rank": 3}),
    "mean_templates": lambda: (
        evaluation.mean_templates,
        {"features": crowded(8), "template": pairs_of_labels(), "num_templates": 4},
    ),
    "flip_sum": lambda: (
        evaluation.flip_sum,
        {"features": features(), "mirrored": features()},
    ),
    "pair_scores": lambda: (
        evaluation.pair_scores,
        {
            "features": crowded(8),
            "first": torch.tensor([0, 1]),
            "second": torch.tensor([2, 3]),
        },
    ),
    "draw_pairs": lambda: (
        evaluation.draw_pairs,
        {"labels": torch.arange(40) // 4, "num_folds": 2, "pairs_per_fold": 5, "seed": 0},
    ),
    "random_trials": lambda: (
        evaluation.random_trials,
        {"labels": torch.arange(40) // 4, "num_trials": 2, "seed": 0},
    ),
    "blufr": lambda: (evaluation.blufr, {**faces(40, 4), "trials": trials()}),
    "class_accuracy": lambda: (evaluation.class_accuracy, {**told(), "num_classes": 4}),
    "accuracy_by_band": lambda: (
        evaluation.accuracy_by_band,
        {**told(), "train_counts": torch.tensor([200, 50, 5, 1]), "minimums": (101, 20, 1)},
    ),
    "balanced_accuracy": lambda: (
        evaluation.balanced_accuracy,
        {"predicted": torch.rand(8, 3) > 0.5, "targets": torch.rand(8, 3) > 0.5},
    ),
    "embed": lambda: (
        evaluation.embed,
        {"model": model, "loader": batches(), "flip": True, "progress": False},
    ),
    "read_pairs": lambda: (evaluation.read_pairs, {"path": written(list_of_pairs)}),
    "plot_roc": lambda: (evaluation.plot_roc, {"curves": {"ours": evaluation.roc(**scored())}}),
    "plot_cmc": lambda: (evaluation.plot_cmc, {"curves": {"ours": torch.rand(5)}}),
    "plot_class_size": lambda: (
        evaluation.plot_class_size,
        {"accuracies": {"ours": torch.rand(3)}, "train_counts": torch.tensor([9, 3, 1])},
    ),
    "kmeans": lambda: (
        clustering.kmeans,
        {"x": crowded(20), "k": 3, "max_iterations": 5, "balanced": True},
    ),
    "aggregate": lambda: (
        aggregation.aggregate,
        {
            "means": crowded(12),
            "counts": torch.tensor([20, 15, 12, 9, 8, 7, 5, 3, 3, 2, 1, 1]),
            "num_super_classes": (2, 2),
        },
    ),
    "split_classes": lambda: (
        aggregation.split_classes,
        {"counts": torch.tensor([20, 5, 1]), "minimums": (10, 4, 1)},
    ),
    "class_means": lambda: (
        aggregation.class_means,
        {"model": model, "loader": batches(), "num_classes": 4, "progress": False},
    ),
    "SuperClasses": lambda: (
        SuperClasses,
        {
            "head": torch.tensor([0, 3]),
            "tail": torch.tensor([2, 1, 4]),
            "super_class": torch.tensor([0, 1, 0]),
            "counts": torch.tensor([20, 2, 3, 15, 1]),
            "groups": torch.tensor([0, 1]),
        },
    ),
    "SuperClasses.coarse_labels": lambda: (
        super_classes().coarse_labels,
        {"labels": torch.tensor([4, 0, -100])},
    ),
    "SuperClasses.dispersed_labels": lambda: (
        super_classes().dispersed_labels,
        {"labels": torch.tensor([4, 0, -100])},
    ),
    "SuperClasses.members": lambda: (super_classes().members, {"super_class": 1}),
    "SuperClasses.plot_sizes": lambda: (super_classes().plot_sizes, {"ax": None}),
    "SuperClasses.save": lambda: (super_classes().save, {"path": new_path()}),
    "SuperClasses.load": lambda: (SuperClasses.load, {"path": written(super_classes().save)}),
    "ClusterIndex": lambda: (
        ClusterIndex,
        {"labels": labels_of_clusters(), "cluster_size": 2, "seed": 0},
    ),
    "ClusterIndex.members": lambda: (refreshed().members, {"cluster": 1}),
    "ClusterIndex.clusters_of": lambda: (refreshed().clusters_of, {"label": 1}),
    "ClusterIndex.cluster_loss": lambda: (refreshed().cluster_loss, {"cluster": 1}),
    "ClusterIndex.refresh": lambda: (refreshed().refresh, {"features": crowded(8)}),
    "ClusterIndex.refresh_from": lambda: (
        refreshed().refresh_from,
        {"model": model, "loader": batches(), "progress": False},
    ),
    "ClusterIndex.update_losses": lambda: (
        refreshed().update_losses,
        {"samples": torch.tensor([3, 0]), "losses": torch.rand(2)},
    ),
    "ClusterIndex.load_state_dict": lambda: (
        refreshed().load_state_dict,
        {"state": refreshed().state_dict()},
    ),
    "ClusterIndex.save": lambda: (refreshed().save, {"path": new_path()}),
    "ClusterIndex.load": lambda: (ClusterIndex.load, {"path": written(refreshed().save)}),
    "NearestClusterClassifier": lambda: (
        NearestClusterClassifier,
        {"num_neighbors": 2, "search": "products"},
    ),
    "NearestClusterClassifier.fit": lambda: (
        NearestClusterClassifier(3).fit,
        {"clusters": refreshed()},
    ),
    "NearestClusterClassifier.add": lambda: (fitted().add, {"clusters": refreshed()}),
    "NearestClusterClassifier.predict": lambda: (fitted().predict, {"features": crowded(6)}),
    "NearestClusterClassifier.decision_function": lambda: (
        fitted().decision_function,
        {"features": crowded(6)},
    ),
}
