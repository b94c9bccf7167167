"""The protocols by which trained models are judged, over features and labels.

All take tensors on any device, or NumPy arrays, and none changes or shuffles them. Features may
have any length; scores are cosines, and higher means the same identity. A pair or probe is accepted
if it scores above the threshold. Autocast, the default device and the default dtype change no
result; only the model that `embed` is given runs under the caller's autocast.
"""

from facelt_ext.evaluation.identification import (
    OpenSetPoints,
    cmc,
    distractor_ranks,
    identification_ranks,
    open_set_identification,
)
from facelt_ext.evaluation.long_tail import (
    BalancedAccuracy,
    Band,
    accuracy_by_band,
    balanced_accuracy,
    class_accuracy,
)
from facelt_ext.evaluation.operating_points import (
    ROC,
    OperatingPoints,
    all_pairs,
    all_pairs_tar_at_far,
    roc,
    tar_at_far,
)
from facelt_ext.evaluation.pairs import IndexPairs, PairList, draw_pairs, read_pairs
from facelt_ext.evaluation.plots import plot_class_size, plot_cmc, plot_roc
from facelt_ext.evaluation.trials import BLUFR, Trial, blufr, random_trials, read_blufr
from facelt_ext.evaluation.verification import (
    FoldAccuracy,
    embed,
    flip_sum,
    fold_accuracy,
    mean_templates,
    pair_scores,
)

__all__ = [
    "BLUFR",
    "ROC",
    "BalancedAccuracy",
    "Band",
    "FoldAccuracy",
    "IndexPairs",
    "OpenSetPoints",
    "OperatingPoints",
    "PairList",
    "Trial",
    "accuracy_by_band",
    "all_pairs",
    "all_pairs_tar_at_far",
    "balanced_accuracy",
    "blufr",
    "class_accuracy",
    "cmc",
    "distractor_ranks",
    "draw_pairs",
    "embed",
    "flip_sum",
    "fold_accuracy",
    "identification_ranks",
    "mean_templates",
    "open_set_identification",
    "pair_scores",
    "plot_class_size",
    "plot_cmc",
    "plot_roc",
    "random_trials",
    "read_blufr",
    "read_pairs",
    "roc",
    "tar_at_far",
]
