"""The package's functions in plain PyTorch: what the papers say, and the truth in the tests.

They have the signatures of `facelt_ext.functional`, take inputs that were already checked there,
and are differentiable any number of times.
"""

from facelt_ext.reference.centroids import class_centroids, min_centroid_distance
from facelt_ext.reference.groups import group_labels
from facelt_ext.reference.range_loss import range_loss
from facelt_ext.reference.ranges import class_ranges

__all__ = [
    "class_centroids",
    "class_ranges",
    "group_labels",
    "min_centroid_distance",
    "range_loss",
]
