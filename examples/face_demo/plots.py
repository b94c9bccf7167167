"""The pictures of the report, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve
from torch import Tensor

from .data import LongTailSplit
from .files import save
from .metrics import FALSE_ACCEPT_RATE, Pairs
from .tables import METRICS, Figures, differences

HEAD_COLOUR, TAIL_COLOUR = "#2f6f8f", "#e0a030"
METHOD_COLOURS = ["#7a7a7a", "#c8553d", "#2f6f8f", "#5c9e5c", "#8a5fb0", "#e0a030"]
METHOD_COLOURS += ["#202020", "#d9779f", "#4fb3c4", "#8b5a2b", "#9aa531", "#37477d"]
MAX_SHOWN_IDENTITIES = 20
MAX_NAMED_IDENTITIES = 60
FACES_SHOWN = 6

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def plot_long_tail(split: LongTailSplit, path: Path) -> None:
    """Training images of each training identity, and what was cut off for testing."""
    counts = split.train_counts.numpy()
    heldout = np.bincount(split.heldout_labels.numpy(), minlength=len(counts))
    position = np.arange(1, len(counts) + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4))
        axes = figure.add_subplot()
        for name, members, colour in (
            ("head", split.is_head.numpy(), HEAD_COLOUR),
            ("tail", ~split.is_head.numpy(), TAIL_COLOUR),
        ):
            axes.bar(position[members], counts[members], color=colour, label=f"trained on, {name}")
        axes.bar(
            position,
            heldout,
            bottom=counts,
            color="#e4e4e4",
            label="cut off, held out for testing",
        )
        axes.set_xlabel("training identity, richest first")
        axes.set_ylabel("images")
        axes.set_xlim(0.3, len(counts) + 0.7)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=3)
        save(figure, path)


def plot_differences(figures: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """How far each method lies from the first in every metric: a dot a seed, a bar for the mean.

    Args:
        figures: for each method the figures of every seed.
        path: PNG file to write.
    """
    (baseline, first), *others = figures.items()
    unseen, heldout = list(METRICS)[:3], list(METRICS)[3:]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5))
        panels = figure.subplot_mosaic([[*unseen, "."], heldout], sharey=True)
        for metric, axes in panels.items():
            axes.set_title(METRICS[metric])
            axes.axvline(0, color="black", linewidth=0.8)
            for row, (_, seeds) in enumerate(others):
                values = [100 * v for v in differences(first, seeds, metric) if v is not None]
                colour = _colour(row + 1)
                axes.scatter(values, [row] * len(values), color=colour, s=18, alpha=0.5, lw=0)
                if values:
                    axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=colour, lw=2.5)
        panels[unseen[0]].set_yticks(range(len(others)), [method for method, _ in others])
        panels[unseen[0]].set_ylim(len(others) - 0.5, -0.5)
        for axes in panels.values():
            axes.label_outer()
            axes.tick_params(labelbottom=True)
        figure.supxlabel(f"difference from {baseline}, percentage points")
        save(figure, path)


def plot_training(histories: Mapping[str, Sequence[dict[str, list[float]]]], path: Path) -> None:
    """The curves of the loss and of the class spread over the epochs, means over the seeds.

    Args:
        histories: for each method one dictionary a seed, with the curves ``loss`` and ``spread``.
        path: PNG file to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 3.8))
        panels = figure.subplots(1, 2)
        titles = {"loss": "loss, each its own", "spread": "spread of an identity"}
        for axes, (term, title) in zip(panels, titles.items(), strict=True):
            for number, (method, seeds) in enumerate(histories.items()):
                curve = np.mean([history[term] for history in seeds], axis=0)
                epochs = np.arange(1, len(curve) + 1)
                axes.plot(epochs, curve, label=method, **_line(number))
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.set_ylabel("mean over the epoch's batches")
        panels[0].set_yscale("log")
        _legend_beside(figure, panels[0])
        panels[1].set_ylim(bottom=0)
        save(figure, path)


def plot_roc(pairs: Mapping[str, Sequence[Pairs]], path: Path) -> None:
    """True accept rate over false accept rate on the unseen identities, means over the seeds.

    Args:
        pairs: for each method the scored pairs of every seed.
        path: PNG file to write.
    """
    impostors = min(int((~scored.same).sum()) for seeds in pairs.values() for scored in seeds)
    rates = np.geomspace(1 / impostors, 1, 200)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.4))
        axes = figure.add_subplot()
        for number, (method, seeds) in enumerate(pairs.items()):
            curve = np.mean([_true_accept_rates(scored, rates) for scored in seeds], axis=0)
            axes.plot(rates, curve, label=method, **_line(number))
        axes.axvline(FALSE_ACCEPT_RATE, color="black", linewidth=0.8, linestyle=":")
        axes.text(FALSE_ACCEPT_RATE * 1.12, 0.03, "FAR = 1 %", transform=axes.get_xaxis_transform())
        axes.set_xscale("log")
        axes.set_xlim(rates[0], 1)
        axes.set_ylim(top=1.01)
        axes.set_xlabel("false accept rate")
        axes.set_ylabel("true accept rate")
        _legend_beside(figure, axes)
        save(figure, path)


def _true_accept_rates(scored: Pairs, rates: np.ndarray) -> np.ndarray:
    """The highest true accept rate whose false accept rate is at most each of ``rates``."""
    false_accepts, true_accepts, _ = roc_curve(scored.same, scored.scores, drop_intermediate=False)
    last = np.searchsorted(false_accepts, rates, side="right") - 1
    return true_accepts[last]


def _colour(number: int) -> str:
    """Of the method with this number; the first one, which others are compared with, is grey."""
    return METHOD_COLOURS[number % len(METHOD_COLOURS)]


def _line(number: int) -> dict[str, str]:
    """How the curve of the method with this number looks; neighbours are told apart in grey too."""
    return {"color": _colour(number), "linestyle": "--" if number % 2 else "-"}


def _legend_beside(figure: Figure, axes: Axes) -> None:
    """Of the methods' curves, to the right of all panels."""
    handles, methods = axes.get_legend_handles_labels()
    figure.legend(handles, methods, loc="outside right upper", fontsize="small")


def plot_indicators(indicators: Tensor, split: LongTailSplit, path: Path) -> None:
    """Domain frequency indicators of the training identities, highest first.

    A bar's colour is the number of its identity's training images; above them are faces of the
    identities with the highest and with the lowest indicators.

    Args:
        indicators: ``[T]``.
        split: the T identities.
        path: PNG file to write.
    """
    order = indicators.argsort(descending=True).tolist()
    counts = split.train_counts[order].numpy()
    colours = mpl.colormaps["viridis"]
    scale = BoundaryNorm(np.arange(0.5, counts.max() + 1), colours.N)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.8))
        faces, chart = figure.subfigures(2, 1, height_ratios=[1, 2.4])
        _show_extremes(faces, order, split)
        axes = chart.add_subplot()
        axes.bar(range(len(order)), indicators[order].numpy(), color=colours(scale(counts)))
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(-0.7, len(order) - 0.3)
        axes.set_xlabel("training identity, tail domains first")
        axes.set_ylabel("domain frequency indicator")
        axes.grid(axis="x", visible=False)
        names = [split.train_names[identity] for identity in order]
        shown = names if len(names) <= MAX_NAMED_IDENTITIES else []
        axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize="small")
        mappable = ScalarMappable(scale, colours)
        whole = MaxNLocator(integer=True)
        chart.colorbar(mappable, ax=axes, label="training images", ticks=whole, pad=0.01)
        save(figure, path)


def _show_extremes(figure: SubFigure, order: Sequence[int], split: LongTailSplit) -> None:
    """A face of each of the first and of the last identities in ``order``."""
    each = min(FACES_SHOWN, len(order) // 2)
    groups = {"highest indicators": order[:each], "lowest indicators": order[-each:]}
    for part, (title, members) in zip(figure.subfigures(1, 2), groups.items(), strict=True):
        part.suptitle(title, fontsize="medium")
        for axes, identity in zip(part.subplots(1, each), members, strict=True):
            face = split.train_images[split.train_labels == identity][0]
            axes.imshow(face.numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set_xlabel(split.train_names[identity], fontsize="small")
            axes.set(xticks=[], yticks=[])


def plot_embeddings(features: Mapping[str, Tensor], labels: Tensor, path: Path) -> None:
    """t-SNE view of the unseen identities, one panel a method and one colour an identity.

    Args:
        features: for each method L2-normalised features ``[N, D]``.
        labels: identities ``[N]``; at most the first twenty are shown.
        path: PNG file to write.
    """
    shown = labels < MAX_SHOWN_IDENTITIES
    names = labels[shown].numpy()
    rows = math.ceil(len(features) / 5)
    columns = math.ceil(len(features) / rows)
    with mpl.rc_context(STYLE | {"axes.spines.right": True, "axes.spines.top": True}):
        figure = Figure(figsize=(3 * columns, 3 * rows))
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (method, own) in zip(panels, features.items(), strict=False):
            view = TSNE(
                perplexity=min(12.0, (len(names) - 1) / 3), init="pca", random_state=0
            ).fit_transform(own[shown].numpy())
            axes.scatter(*view.T, c=names, cmap="tab20", s=20, edgecolors="white", linewidths=0.3)
            axes.set_title(method)
        for axes in panels:
            axes.set(xticks=[], yticks=[])
        for unused in panels[len(features) :]:
            unused.set_axis_off()
        save(figure, path)
