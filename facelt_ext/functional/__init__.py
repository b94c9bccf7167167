"""The losses and their parts as functions; see each one's docstring for the paper and equation."""

from facelt_ext.functional.centroids import class_centroids, min_centroid_distance
from facelt_ext.functional.cluster_margin import cluster_margin_loss
from facelt_ext.functional.compactness import domain_frequency_indicator, inter_class_compactness
from facelt_ext.functional.dispersion import dispersion_softmax_loss
from facelt_ext.functional.margin_softmax import margin_softmax_loss
from facelt_ext.functional.quintuplets import quintuplet_loss
from facelt_ext.functional.range_loss import range_loss
from facelt_ext.functional.ranges import class_ranges
from facelt_ext.functional.super_classes import SuperClassIndex, super_class_mean

__all__ = [
    "SuperClassIndex",
    "class_centroids",
    "class_ranges",
    "cluster_margin_loss",
    "dispersion_softmax_loss",
    "domain_frequency_indicator",
    "inter_class_compactness",
    "margin_softmax_loss",
    "min_centroid_distance",
    "quintuplet_loss",
    "range_loss",
    "super_class_mean",
]
