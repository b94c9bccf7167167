"""The JSON file and the Markdown page of a comparison of methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from facelt_ext.aggregation import SuperClasses
from facelt_ext.clusters import ClusterIndex

from . import aggregation_report
from .data import FaceImages, LongTailSplit
from .files import write_text
from .methods import Method
from .metrics import Pairs
from .page import literal
from .tables import METRICS, Figures, differences, summarise, table

EXPLANATION = """\
All scores are cosines of features; figures are in per cent, mean ± standard deviation over the
seeds. Differences are taken seed by seed, and then their mean and standard deviation. With few
seeds a mean difference no larger than its standard deviation may well be chance, and among as many
differences as here so may a larger one.

- **Unseen**: all images of identities that were never trained on.
  *Accuracy*, of verification: as many impostor as genuine pairs, in ten folds; the threshold for
  each fold is the best one on the nine others (the folds divide pairs, not identities).
  *TAR*, at FAR = 1 %: over all pairs, the genuine pairs that are accepted where one impostor pair
  in a hundred is.
  *Rank-1*, of identification: one gallery image per identity, all others are probes; mean of ten
  galleries.
- **Head**, **tail**: images of the training identities that were cut off to make the long tail and
  not trained on. Each is compared with the mean feature of every training identity. Head identities
  keep at least half as many training images as the richest, tail identities fewer. The richest
  identity has no image left over, and the head has few.
"""


@dataclass(frozen=True)
class Run:
    """What one training gave.

    Attributes:
        history: curves over the epochs.
        figures: one for each of `METRICS`.
        unseen_pairs, unseen_features: scores and features of the unseen faces.
        indicators: domain frequency indicators of the training identities, if the loss has any.
        super_classes: that the method put tail identities into, if it does.
        milliseconds: wall time of a step of the last phase, and of its loss alone.
        clusters: that the method drew batches from, if it does.
        train_features: of the training images.
    """

    history: dict[str, list[float]]
    figures: Figures
    unseen_pairs: Pairs
    unseen_features: Tensor
    indicators: Tensor | None
    super_classes: SuperClasses | None
    milliseconds: dict[str, float]
    clusters: ClusterIndex | None
    train_features: Tensor


def first_clustered(runs: Mapping[str, Sequence[Run]]) -> str | None:
    """The first method that drew its batches from clusters."""
    return next((title for title, own in runs.items() if own[0].clusters is not None), None)


def first_super_classes(runs: Mapping[str, Sequence[Run]]) -> SuperClasses | None:
    """Of the first seed; all methods of a seed that have any have the same."""
    found = (own[0].super_classes for own in runs.values())
    return next((each for each in found if each is not None), None)


def correlation(indicators: Tensor, counts: Tensor) -> float | None:
    """Of the indicators and the numbers of training images; None where one of them is constant."""
    value = torch.corrcoef(torch.stack([indicators.double(), counts.double()]))[0, 1]
    return value.item() if value.isfinite() else None


def write_json(
    path: Path,
    config: dict,
    faces: FaceImages,
    split: LongTailSplit,
    methods: Mapping[str, Method],
    runs: Mapping[str, Sequence[Run]],
) -> None:
    """Everything that was measured, seed by seed, with the settings that led to it."""
    figures = {title: [run.figures for run in own] for title, own in runs.items()}
    baseline = next(iter(figures.values()))
    results = {
        "config": config,
        "data": _describe(faces, split),
        "methods": {
            title: {
                "settings": methods[title].settings,
                "per_seed": [
                    _describe_run(seed, run) for seed, run in zip(config["seeds"], own, strict=True)
                ],
                "summary": {
                    metric: summarise([each[metric] for each in figures[title]])
                    for metric in METRICS
                },
                "difference": {
                    metric: summarise(differences(baseline, figures[title], metric))
                    for metric in METRICS
                },
            }
            for title, own in runs.items()
        },
    }
    write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def _describe_run(seed: int, run: Run) -> dict:
    indicators = {} if run.indicators is None else {"indicators": run.indicators.tolist()}
    grouped = {} if run.super_classes is None else {"super_classes": _members(run.super_classes)}
    measured = {"figures": run.figures, "milliseconds": run.milliseconds, "history": run.history}
    return {"seed": seed, **measured, **indicators, **grouped}


def _members(super_classes: SuperClasses) -> list[list[int]]:
    """Training identities of each super class, richest first."""
    numbers = range(super_classes.num_super_classes)
    return [super_classes.members(number).tolist() for number in numbers]


def _describe(faces: FaceImages, split: LongTailSplit) -> dict:
    """Sizes of the data; they are the same for every seed."""
    return {
        "source": faces.source,
        "skipped_files": faces.skipped,
        "training_identities": len(split.train_counts),
        "training_images_per_identity": split.train_counts.tolist(),
        "head_identities": int(split.is_head.sum()),
        "heldout_images": len(split.heldout_labels),
        "unseen_identities": len(split.unseen_labels.unique()),
        "unseen_images": len(split.unseen_labels),
    }


def write_page(
    path: Path,
    config: dict,
    faces: FaceImages,
    split: LongTailSplit,
    methods: Mapping[str, Method],
    runs: Mapping[str, Sequence[Run]],
    tables: str,
) -> None:
    """The Markdown page that joins the tables and the pictures beside it."""
    data = _describe(faces, split)
    skipped = f"\n{len(faces.skipped)} file(s) could not be read.\n" if faces.skipped else ""
    left_out = f"\nLeft out: {config['left_out']}.\n" if config["left_out"] else ""
    figures = {title: [run.figures for run in own] for title, own in runs.items()}
    super_classes = first_super_classes(runs)
    about_tail = aggregation_report.section(split.minimums, methods, figures, super_classes)
    write_text(
        path,
        f"""\
# Losses on long-tailed faces

Images: {literal(faces.source)}.
{skipped}
A small CNN was trained on {len(split.train_labels)} images of {data["training_identities"]} \
identities with each of {len(methods)} method(s), for each of {len(config["seeds"])} seed(s).
All have the same number of steps and, where they see all identities and draw no batches from
clusters, the same batches and augmentation.
A seed decides who is head and who is tail, which images are kept, the initial weights and the
batches. {data["unseen_identities"]} identities were kept unseen.
{left_out}
{tables}

{EXPLANATION}
![Differences of every seed](differences.png)
{about_tail}
## Settings

{config["epochs"]} epochs of {config["steps_per_epoch"]} batches of \
{config["classes_per_batch"]} x {config["samples_per_class"]} images. All figures of every seed are
in `results.json`. For ORL the hyper-parameters come from a few coarse trials on other seeds and
without the unseen identities, which `examples/face_demo/methods.py` lists.

{_list_of_methods(methods)}

## The long tail

![Training images of each identity](long_tail.png)

## Training

Mean over the seeds. The values of different losses cannot be compared with each other; the spread
can: it is the largest squared distance between the normalised features of two images of an
identity, averaged over the identities of a batch. A loss of two phases begins anew with the second;
while a method sees the head only, its curves are of the head.

![Curves of the training](training.png)

## Time

Wall time on {config["device"]} with {config["threads"]} thread(s): of a step of the last phase,
whole, and of the loss alone, forward and backward, on one of its batches; medians over the seeds.

{time_table(runs)}
{_cluster_section(config, runs)}{_indicator_section(config, split, runs)}
## Verification of unseen identities

Mean over the seeds.

![ROC curves](roc.png)

## Features of unseen identities

t-SNE of seed {config["seeds"][0]}; a colour is an identity.

![t-SNE of the features](embeddings.png)
""",
    )


def time_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Milliseconds of a step and of the loss of each method."""
    lines = [
        [
            title,
            *(f"{median(run.milliseconds[part] for run in own):.2f}" for part in ("step", "loss")),
        ]
        for title, own in runs.items()
        if all(run.milliseconds for run in own)
    ]
    return table(["method", "a step, ms", "the loss in it, ms"], lines)


def _cluster_section(config: dict, runs: Mapping[str, Sequence[Run]]) -> str:
    """Empty where no method drew batches from clusters."""
    title = first_clustered(runs)
    if title is None:
        return ""
    clusters = runs[title][0].clusters
    return f"""
## Clusters

The {clusters.num_clusters} clusters of the {len(clusters.labels)} training images that the method
"{title}" drew its last batches from, seed {config["seeds"][0]}; t-SNE of the features after the
training. Identities with twice {clusters.cluster_size} images and more have several clusters. A
colour is an identity, a cross the centre of a cluster.

![Clusters of the training images](clusters.png)
"""


def _list_of_methods(methods: Mapping[str, Method]) -> str:
    lines = []
    for title, method in methods.items():
        settings = ", ".join(f"{name} = {value}" for name, value in method.settings.items())
        paper = f" ({method.paper})" if method.paper else ""
        lines.append(f"- {title}{paper}" + (f": {settings}" if settings else ""))
    return "\n".join(lines)


def _indicator_section(
    config: dict, split: LongTailSplit, runs: Mapping[str, Sequence[Run]]
) -> str:
    """On the domain frequency indicators of the training identities; empty without any."""
    for title, own in runs.items():
        if own[0].indicators is not None:
            counts = split.train_counts
            found = summarise([correlation(run.indicators, counts) for run in own])
            relation = "n/a" if found is None else f"{found['mean']:+.2f} ± {found['std']:.2f}"
            return f"""
## Tail domains

The domain frequency indicator of each training identity, after the training of seed \
{config["seeds"][0]} with {title}: high
where the nearest class weights of other identities are far, whatever the number of images. Its
correlation with that number, mean ± standard deviation over the seeds: {relation}.

![Domain frequency indicators](indicators.png)
"""
    return ""
