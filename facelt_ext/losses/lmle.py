from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from facelt_ext._checks import check_count, check_ignore_index
from facelt_ext.functional import quintuplet_loss
from facelt_ext.functional.quintuplets import check_margins
from facelt_ext.losses._arguments import check_indices_tuple
from facelt_ext.losses._cluster_batch import checked_cluster_batch


class LMLELoss(nn.Module):
    """Large margin local embedding (LMLE, Huang et al., CVPR 2016; TPAMI 2020, eqs. 4-5), the
    predecessor of CLMLE.

    Takes batches of clusters, one after another, with `samples_per_cluster` samples of one class
    each, as `facelt_ext.samplers.ClusterBatchSampler` draws them. Features are divided by their
    norms, then it is `facelt_ext.functional.quintuplet_loss`.

    Args:
        margins: g1, g2 and g3, in squared distances, which are at most 4.
        samples_per_cluster: samples of each cluster in a batch.
        ignore_index: samples with this label take no part, and their gradient is 0; a cluster may
            hold some of them, or be made of them. None: every label is a class.

    All may be changed between steps.
    """

    def __init__(
        self,
        margins: Sequence[float],
        *,
        samples_per_cluster: int = 20,
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__()
        self.margins = margins
        self.samples_per_cluster = check_count(samples_per_cluster, "samples_per_cluster")
        self.ignore_index = check_ignore_index(ignore_index)

    @property
    def margins(self) -> tuple[float, float, float]:
        # Apart: torch.compile takes a tuple of numbers for a constant.
        return self._g1, self._g2, self._g3

    @margins.setter
    def margins(self, margins: Sequence[float]) -> None:
        self._g1, self._g2, self._g3 = check_margins(margins, torch.float32)

    def forward(self, features: Tensor, labels: Tensor, indices_tuple: None = None) -> Tensor:
        """features [B, D] and integer labels [B] -> the loss, [].

        A zero feature stays zero.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; B is no
                multiple of `samples_per_cluster`.
        """
        check_indices_tuple(indices_tuple)
        batch = checked_cluster_batch(features, labels, self.samples_per_cluster, self.ignore_index)
        return quintuplet_loss(
            batch.units,
            batch.labels,
            batch.cluster_index,
            margins=self.margins,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"margins={self.margins}, samples_per_cluster={self.samples_per_cluster}, "
            f"ignore_index={self.ignore_index}"
        )
