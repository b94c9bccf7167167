"""The pictures of the report, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve
from torch import Tensor

from .data import LongTailSplit
from .metrics import FALSE_ACCEPT_RATE, Pairs

HEAD_COLOUR, TAIL_COLOUR = "#2f6f8f", "#e0a030"
METHOD_COLOURS = ["#7a7a7a", "#c8553d"]
MAX_SHOWN_IDENTITIES = 20

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
        figure.savefig(path)


def plot_training(histories: Mapping[str, Sequence[dict[str, list[float]]]], path: Path) -> None:
    """Both loss terms over the epochs: a line for the mean over seeds, a band for their spread.

    Args:
        histories: for each method one dictionary a seed, with the curves ``cross_entropy`` and
            ``range_loss``.
        path: PNG file to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6))
        panels = figure.subplots(1, 2)
        titles = {
            "cross_entropy": "cross-entropy",
            "range_loss": "Range Loss, also where it is not trained on",
        }
        for axes, (term, title) in zip(panels, titles.items(), strict=True):
            for (method, seeds), colour in zip(histories.items(), METHOD_COLOURS, strict=True):
                curves = np.array([history[term] for history in seeds])
                epochs = np.arange(1, curves.shape[1] + 1)
                _line_with_band(axes, epochs, curves, colour, method)
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.set_ylabel("mean over the epoch's batches")
        panels[0].set_yscale("log")
        panels[0].legend()
        panels[1].set_ylim(bottom=0)
        figure.savefig(path)


def plot_roc(pairs: Mapping[str, Sequence[Pairs]], path: Path) -> None:
    """True accept rate over false accept rate (logarithmic) on the unseen identities.

    Args:
        pairs: for each method the scored pairs of every seed.
        path: PNG file to write.
    """
    impostors = min(int((~scored.same).sum()) for seeds in pairs.values() for scored in seeds)
    rates = np.geomspace(1 / impostors, 1, 200)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 4.2))
        axes = figure.add_subplot()
        for (method, seeds), colour in zip(pairs.items(), METHOD_COLOURS, strict=True):
            curves = np.array([_true_accept_rates(scored, rates) for scored in seeds])
            _line_with_band(axes, rates, curves, colour, method)
        axes.axvline(FALSE_ACCEPT_RATE, color="black", linewidth=0.8, linestyle=":")
        axes.text(FALSE_ACCEPT_RATE * 1.12, 0.03, "FAR = 1 %", transform=axes.get_xaxis_transform())
        axes.set_xscale("log")
        axes.set_xlim(rates[0], 1)
        axes.set_ylim(top=1.01)
        axes.set_xlabel("false accept rate")
        axes.set_ylabel("true accept rate")
        axes.legend(loc="lower right")
        figure.savefig(path)


def _true_accept_rates(scored: Pairs, rates: np.ndarray) -> np.ndarray:
    """The highest true accept rate whose false accept rate is at most each of ``rates``."""
    false_accepts, true_accepts, _ = roc_curve(scored.same, scored.scores, drop_intermediate=False)
    last = np.searchsorted(false_accepts, rates, side="right") - 1
    return true_accepts[last]


def _line_with_band(axes: Axes, x: np.ndarray, curves: np.ndarray, colour: str, label: str) -> None:
    """The mean of ``curves`` ``[seeds, len(x)]`` and, pale, all between the lowest and highest."""
    axes.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.2, lw=0)
    axes.plot(x, curves.mean(axis=0), color=colour, label=label)


def plot_embeddings(features: Mapping[str, Tensor], labels: Tensor, path: Path) -> None:
    """t-SNE view of the unseen identities, one panel a method and one colour an identity.

    Args:
        features: for each method L2-normalised features ``[N, D]``.
        labels: identities ``[N]``; at most the first twenty are shown.
        path: PNG file to write.
    """
    shown = labels < MAX_SHOWN_IDENTITIES
    names = labels[shown].numpy()
    with mpl.rc_context(STYLE | {"axes.spines.right": True, "axes.spines.top": True}):
        figure = Figure(figsize=(9, 4.6))
        for axes, (method, own) in zip(figure.subplots(1, 2), features.items(), strict=True):
            view = TSNE(
                perplexity=min(12.0, (len(names) - 1) / 3), init="pca", random_state=0
            ).fit_transform(own[shown].numpy())
            axes.scatter(*view.T, c=names, cmap="tab20", s=26, edgecolors="white", linewidths=0.4)
            axes.set_title(method)
            axes.set(xticks=[], yticks=[])
        figure.savefig(path)
