"""The package's functions in plain PyTorch: what the papers say, and the truth in the tests.

They have the signatures of `facelt_ext.functional`, take inputs that were already checked there,
and are differentiable any number of times.
"""

from facelt_ext.reference.centroids import class_centroids, min_centroid_distance
from facelt_ext.reference.cluster_margin import cluster_margin_loss
from facelt_ext.reference.compactness import (
    domain_frequency_indicator,
    inter_class_compactness,
)
from facelt_ext.reference.dispersion import dispersion_softmax_loss
from facelt_ext.reference.groups import group_labels
from facelt_ext.reference.margin_softmax import margin_softmax_loss
from facelt_ext.reference.quintuplets import quintuplet_loss
from facelt_ext.reference.range_loss import range_loss
from facelt_ext.reference.ranges import class_ranges
from facelt_ext.reference.super_classes import super_class_mean

__all__ = [
    "class_centroids",
    "class_ranges",
    "cluster_margin_loss",
    "dispersion_softmax_loss",
    "domain_frequency_indicator",
    "group_labels",
    "inter_class_compactness",
    "margin_softmax_loss",
    "min_centroid_distance",
    "quintuplet_loss",
    "range_loss",
    "super_class_mean",
]
