"""The table, the JSON file and the Markdown page of a comparison of two methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from .data import FaceImages, LongTailSplit

Figures = dict[str, float | None]

METRICS = {
    "accuracy": "unseen: verification accuracy",
    "tar": "unseen: TAR at FAR = 1 %",
    "rank1": "unseen: rank-1 identification",
    "rank1_head": "held out, head: rank-1",
    "rank1_tail": "held out, tail: rank-1",
    "tar_head": "held out, head: TAR at FAR = 1 %",
    "tar_tail": "held out, tail: TAR at FAR = 1 %",
}

EXPLANATION = """\
All scores are cosines of features; figures are in per cent, mean ± standard deviation over the
seeds. The last column is the mean ± standard deviation of the differences seed by seed.

- **Unseen**: all images of identities that were never trained on.
  *Verification accuracy*: as many impostor as genuine pairs, in ten folds; the threshold for each
  fold is the best one on the nine others (the folds divide pairs, not identities).
  *TAR at FAR = 1 %*: over all pairs, the genuine pairs that are accepted where one impostor pair
  in a hundred is.
  *Rank-1*: one gallery image per identity, all others are probes; mean of ten galleries.
- **Held out**: images of the training identities that were cut off to make the long tail and not
  trained on. Each is compared with the mean feature of every training identity. Head identities
  keep at least half as many training images as the richest, tail identities fewer. The richest
  identity has no image left over, and the head has few.
"""


def summarise(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and sample standard deviation (0 for a single value); None if a value is missing."""
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None
    return {"mean": fmean(present), "std": stdev(present) if len(present) > 1 else 0.0}


def differences(
    first: Sequence[Figures], second: Sequence[Figures], metric: str
) -> list[float | None]:
    """``second - first`` of one metric, seed by seed."""
    pairs = [(a[metric], b[metric]) for a, b in zip(first, second, strict=True)]
    return [None if a is None or b is None else b - a for a, b in pairs]


def markdown_table(figures: Mapping[str, Sequence[Figures]]) -> str:
    """One line a metric, one column a method, and the difference between the two methods.

    Args:
        figures: for each of the two methods the figures of every seed, in the same order.
    """
    (first, second), names = figures.values(), list(figures)
    header = ["metric (%)", *names, "difference"]
    rows = [
        [
            description,
            *(_cell([own[metric] for own in seeds]) for seeds in (first, second)),
            _cell(differences(first, second, metric), sign="+"),
        ]
        for metric, description in METRICS.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_table_line(row, widths) for row in [header, rule, *rows])


def _cell(values: Sequence[float | None], sign: str = "") -> str:
    summary = summarise(values)
    if summary is None:
        return "n/a"
    mean = f"{100 * summary['mean']:{sign}.1f}"
    return f"{mean} ± {100 * summary['std']:.1f}" if len(values) > 1 else mean


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [cells[0].ljust(widths[0])]
    aligned += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join(aligned)} |"


def write_json(
    path: Path,
    config: dict,
    faces: FaceImages,
    split: LongTailSplit,
    figures: Mapping[str, Sequence[Figures]],
    histories: Mapping[str, Sequence[dict[str, list[float]]]],
) -> None:
    """Everything that was measured, seed by seed, with the settings that led to it."""
    methods = {
        method: {
            "per_seed": [
                {"seed": seed, "figures": own, "history": history}
                for seed, own, history in zip(
                    config["seeds"], seeds, histories[method], strict=True
                )
            ],
            "summary": {metric: summarise([own[metric] for own in seeds]) for metric in METRICS},
        }
        for method, seeds in figures.items()
    }
    first, second = figures.values()
    results = {
        "config": config,
        "data": _describe(faces, split),
        "methods": methods,
        "difference": {metric: summarise(differences(first, second, metric)) for metric in METRICS},
    }
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
    path: Path, config: dict, faces: FaceImages, split: LongTailSplit, table: str
) -> None:
    """The Markdown page that joins the table and the pictures beside it."""
    data = _describe(faces, split)
    skipped = f"\n{len(faces.skipped)} file(s) could not be read.\n" if faces.skipped else ""
    path.write_text(
        f"""\
# Range Loss on long-tailed faces

Images: {faces.source}.
{skipped}
A small CNN was trained on {len(split.train_labels)} images of {data["training_identities"]} \
identities, once with softmax alone and once with softmax and Range Loss (Zhang et al. 2017,
arXiv:1611.08976), with the same batches and the same number of steps, for each of
{len(config["seeds"])} seed(s). A seed decides who is head and who is tail, which images are kept,
the initial weights and the batches. {data["unseen_identities"]} identities were kept unseen.

{table}

{EXPLANATION}
Settings: {config["epochs"]} epochs of {config["steps_per_epoch"]} batches of \
{config["classes_per_batch"]} x {config["samples_per_class"]} images; Range Loss with \
alpha = {config["alpha"]:g}, beta = {config["beta"]:g}, margin = {config["margin"]:g}, \
lambda = {config["range_weight"]:g}. All figures of every seed are in `results.json`.

## The long tail

![Training images of each identity](long_tail.png)

## Training

Mean over the seeds, and all between the lowest and the highest seed. The softmax runs do not
train on the Range Loss; it is only measured there.

![Loss curves](training.png)

## Verification of unseen identities

Mean over the seeds, and all between the lowest and the highest seed.

![ROC curves](roc.png)

## Features of unseen identities

t-SNE of seed {config["seeds"][0]}; a colour is an identity.

![t-SNE of the features](embeddings.png)
""",
        encoding="utf-8",
    )
