"""The picture of the clusters that batches were drawn from."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from facelt_ext.clusters import ClusterIndex

from .files import save
from .plots import STYLE


def plot_clusters(clusters: ClusterIndex, features: Tensor, path: Path) -> None:
    """t-SNE of training images, joined with the centre of their cluster; a colour is an identity.

    Args:
        clusters: of the images.
        features: L2-normalised ``[N, D]``, from which the centres shown are taken anew.
        path: PNG file to write.
    """
    members = [clusters.members(number) for number in range(clusters.num_clusters)]
    centres = torch.stack([features[own].mean(dim=0) for own in members])
    together = torch.cat([features, centres]).numpy()
    view = TSNE(perplexity=min(12.0, (len(together) - 1) / 3), init="pca", random_state=0)
    places = view.fit_transform(together)
    images, middles = places[: len(features)], places[len(features) :]
    colours = mpl.colormaps["tab20"](clusters.labels.numpy() % 20)
    with mpl.rc_context(STYLE | {"axes.spines.right": True, "axes.spines.top": True}):
        figure = Figure(figsize=(8.6, 5))
        axes = figure.add_subplot()
        for number, own in enumerate(members):
            for image in own.tolist():
                ends = images[image], middles[number]
                axes.plot(*zip(*ends, strict=True), color=colours[image], linewidth=1.1, zorder=1)
        axes.scatter(*images.T, c=colours, s=42, edgecolors="white", linewidths=0.5, zorder=2)
        axes.scatter(*middles.T, c="black", s=26, marker="x", linewidths=1.3, zorder=3)
        axes.set(xticks=[], yticks=[])
        save(figure, path)
