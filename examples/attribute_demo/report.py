"""The page and the picture of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from face_demo.files import save, write_text
from face_demo.plots import METHOD_COLOURS, STYLE
from face_demo.tables import cell, table
from matplotlib.figure import Figure
from torch import Tensor

from .data import Attributes

# Of each method, for each seed the balanced accuracy of each attribute.
Accuracies = Mapping[str, Sequence[Tensor]]


def markdown_table(attributes: Attributes, accuracies: Accuracies) -> str:
    """Attributes from the least to the most imbalanced, then their mean, as in the paper."""
    order = attributes.imbalance().argsort(stable=True).tolist()
    header = ["balanced accuracy, %", *(attributes.names[a] for a in order), "mean"]
    rows = [["imbalance", *(f"{attributes.imbalance()[a]:.1f}" for a in order), ""]]
    for method, seeds in accuracies.items():
        own = [[float(accuracy[a]) for accuracy in seeds] for a in order]
        means = [fmean(values) for values in zip(*own, strict=True)]
        rows.append([method, *(cell(values) for values in own), cell(means)])
    return table(header, rows)


def plot(attributes: Attributes, accuracies: Accuracies, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6))
        axes = figure.subplots()
        width = 0.8 / len(accuracies)
        order = attributes.imbalance().argsort(stable=True).numpy()
        for number, (method, seeds) in enumerate(accuracies.items()):
            values = 100 * np.stack([accuracy.numpy()[order] for accuracy in seeds])
            axes.bar(
                np.arange(len(order)) + (number - (len(accuracies) - 1) / 2) * width,
                values.mean(0),
                width,
                yerr=values.std(0),
                color=METHOD_COLOURS[number],
                label=method,
            )
        axes.set_xticks(range(len(order)), [attributes.names[a] for a in order])
        axes.set_ylim(40, 100)
        axes.set_ylabel("balanced accuracy, %")
        figure.legend(loc="outside upper center", ncols=len(accuracies))
        save(figure, path)


def write_page(
    path: Path, source: str, config: Mapping[str, int], people: int, images: int, tables: str
) -> None:
    write_text(
        path,
        f"""# Imbalanced attributes of faces

{images} images of {people} people: {source}. The attributes are our own judgement by eye:
glasses; beard or moustache; bald, at least in front; female; teeth that can be seen.

Each image is judged by a network that has seen no image of its person, in {config["folds"]} folds
and with {config["seeds"]} seed(s): mean ± standard deviation over the seeds of
0.5 (tp / Np + tn / Nn). Imbalance is how far the share of images with the attribute is from 50 %.
All have {config["steps"]} steps of as many images and the same augmentation.

{tables}

![Balanced accuracy of each attribute](accuracy.png)

- **Over-sampling**: batches with as many images with an attribute as without. What balances one
  attribute does not balance another, so they take turns.
- **Cost-sensitive**: cross-entropy whose samples weigh by the inverse frequency of their attribute.
- **CLMLE**: cost-sensitive cross-entropy for the first steps, then a CLMLE loss for each head, and
  classification by the nearest clusters.

People are few: four are bald, and four are women. Differences of a few points are chance.
""",
    )
