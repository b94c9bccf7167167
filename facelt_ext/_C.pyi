"""The native kernels. Each takes contiguous tensors and writes its outputs (csrc/launchers.inc).

`execution` is a CUDA stream's handle for `cuda`, and a number of threads for `cpu`.
"""

from typing import Protocol

from torch import Tensor

class Backend(Protocol):
    def group_labels(
        self,
        labels: Tensor,
        ignored: int | None,
        order: Tensor,
        segment: Tensor,
        offsets: Tensor,
        num_classes: Tensor,
        workspace: Tensor,
        execution: int,
    ) -> None: ...
    def group_labels_workspace(self, batch: int) -> int: ...
    def class_ranges_forward(
        self,
        features: Tensor,
        labels: Tensor,
        order: Tensor,
        offsets: Tensor,
        num_classes: Tensor,
        squared: bool,
        ranges: Tensor,
        pairs: Tensor,
        workspace: Tensor,
        execution: int,
    ) -> None: ...
    def class_ranges_workspace(self, batch: int, k: int) -> int: ...
    def class_ranges_backward(
        self,
        features: Tensor,
        segment: Tensor,
        pairs: Tensor,
        pair_scale: Tensor,
        grad_features: Tensor,
        execution: int,
    ) -> None: ...
    def class_centroids_forward(
        self,
        features: Tensor,
        order: Tensor,
        offsets: Tensor,
        num_classes: Tensor,
        centroids: Tensor,
        counts: Tensor,
        execution: int,
    ) -> None: ...
    def class_centroids_backward(
        self,
        grad_centroids: Tensor,
        segment: Tensor,
        counts: Tensor,
        grad_features: Tensor,
        execution: int,
    ) -> None: ...
    def min_centroid_distance_forward(
        self,
        centroids: Tensor,
        counts: Tensor,
        squared: bool,
        distance: Tensor,
        pair: Tensor,
        workspace: Tensor,
        execution: int,
    ) -> None: ...
    def min_centroid_distance_workspace(self, rows: int) -> int: ...
    def min_centroid_distance_backward(
        self,
        grad_distance: Tensor,
        centroids: Tensor,
        distance: Tensor,
        pair: Tensor,
        squared: bool,
        grad_centroids: Tensor,
        execution: int,
    ) -> None: ...
    def range_loss_forward(
        self,
        features: Tensor,
        labels: Tensor,
        options: tuple[int, float, float, float, bool, int | None],
        loss: Tensor,
        state_index: Tensor,
        state_value: Tensor,
        workspace: Tensor,
        execution: int,
    ) -> None: ...
    def range_loss_workspace(
        self, batch: int, dimensions: int, k: int, compute_size: int
    ) -> int: ...
    def range_loss_backward(
        self,
        grad_loss: Tensor,
        features: Tensor,
        k: int,
        state_index: Tensor,
        state_value: Tensor,
        grad_features: Tensor,
        execution: int,
    ) -> None: ...
    def normalize_rows(
        self, x: Tensor, inverse_norms: Tensor, normalized: Tensor, execution: int
    ) -> None: ...
    def project_rows(
        self,
        raw: Tensor,
        x: Tensor,
        inverse_norms: Tensor,
        gain: Tensor,
        scaled: bool,
        grad_x: Tensor,
        execution: int,
    ) -> None: ...
    def margin_softmax_targets(
        self,
        features: Tensor,
        inverse_feature_norms: Tensor,
        weight: Tensor,
        labels: Tensor,
        cosine_margin: Tensor,
        angular_margin: Tensor,
        options: tuple[float, int, bool, bool, int, int, int],
        targets: Tensor,
        execution: int,
    ) -> None: ...
    def margin_softmax_normalizer(
        self,
        products: Tensor,
        column_scales: Tensor,
        labels: Tensor,
        targets: Tensor,
        first_class: int,
        scale: float,
        start: bool,
        normalizer: Tensor,
        execution: int,
    ) -> None: ...
    def margin_softmax_coefficients(
        self,
        grad_losses: Tensor,
        labels: Tensor,
        targets: Tensor,
        inverse_feature_norms: Tensor,
        options: tuple[float, int, bool, bool, int, int, int],
        coefficients: Tensor,
        weight_gain: Tensor,
        feature_gain: Tensor,
        execution: int,
    ) -> None: ...
    def margin_softmax_gradient(
        self,
        products: Tensor,
        column_scales: Tensor,
        labels: Tensor,
        targets: Tensor,
        lse: Tensor,
        coefficients: Tensor,
        first_class: int,
        scale: float,
        gradient: Tensor,
        execution: int,
    ) -> None: ...
    def compactness_select(
        self,
        products: Tensor,
        column_scales: Tensor,
        classes: Tensor,
        first_class: int,
        k: int,
        start: bool,
        kept: Tensor,
        counts: Tensor,
        thresholds: Tensor,
        execution: int,
    ) -> None: ...
    def compactness_capacity(self, k: int) -> int: ...
    def compactness_reduce(
        self,
        kept: Tensor,
        counts: Tensor,
        k: int,
        scale: float,
        compactness: Tensor,
        execution: int,
    ) -> None: ...
    def super_class_mean_forward(
        self,
        weight: Tensor,
        order: Tensor,
        offsets: Tensor,
        means: Tensor,
        execution: int,
    ) -> None: ...
    def super_class_mean_backward(
        self,
        grad_means: Tensor,
        super_class: Tensor,
        order: Tensor,
        offsets: Tensor,
        grad_weight: Tensor,
        execution: int,
    ) -> None: ...
    def dispersion_targets(
        self,
        features: Tensor,
        head_weight: Tensor,
        tail_weight: Tensor,
        labels: Tensor,
        super_class: Tensor,
        order: Tensor,
        offsets: Tensor,
        ignore_index: int,
        classes: Tensor,
        targets: Tensor,
        execution: int,
    ) -> None: ...
    def dispersion_feature_gradient(
        self,
        features: Tensor,
        tail_weight: Tensor,
        labels: Tensor,
        classes: Tensor,
        order: Tensor,
        offsets: Tensor,
        lse: Tensor,
        coefficients: Tensor,
        num_head: int,
        raw_features: Tensor,
        execution: int,
    ) -> None: ...
    def dispersion_tail_gradient(
        self,
        raw: Tensor,
        gain: Tensor,
        features: Tensor,
        tail_weight: Tensor,
        labels: Tensor,
        order: Tensor,
        offsets: Tensor,
        sample_order: Tensor,
        sample_offsets: Tensor,
        lse: Tensor,
        coefficients: Tensor,
        num_head: int,
        first: int,
        grad_tail: Tensor,
        execution: int,
    ) -> None: ...
    def cluster_margin_forward(
        self,
        features: Tensor,
        cluster_index: Tensor,
        cluster_class: Tensor,
        sample_weight: Tensor | None,
        options: tuple[float, float, bool, int, int | None],
        part: int,
        loss: Tensor,
        losses: Tensor,
        state: Tensor,
        counts: Tensor,
        execution: int,
    ) -> None: ...
    def cluster_margin_backward(
        self,
        grad_loss: Tensor,
        features: Tensor,
        cluster_index: Tensor,
        options: tuple[float, float, bool, int, int | None],
        part: int,
        state: Tensor,
        counts: Tensor,
        grad_centroids: Tensor,
        grad_features: Tensor,
        execution: int,
    ) -> None: ...
    def quintuplet_forward(
        self,
        features: Tensor,
        labels: Tensor,
        cluster_index: Tensor,
        options: tuple[float, float, float, int, int | None],
        loss: Tensor,
        neighbors: Tensor,
        state: Tensor,
        workspace: Tensor,
        execution: int,
    ) -> None: ...
    def quintuplet_workspace(self, batch: int, compute_size: int) -> int: ...
    def quintuplet_backward(
        self,
        grad_loss: Tensor,
        features: Tensor,
        options: tuple[float, float, float, int, int | None],
        neighbors: Tensor,
        state: Tensor,
        grad_features: Tensor,
        execution: int,
    ) -> None: ...

class CudaBackend(Backend, Protocol):
    def require_driver(self) -> None: ...

class EmulatedBackend(Backend, Protocol):
    def launches(self) -> int: ...
    def set_schedule(self, schedule: str, seed: int = 0) -> None: ...

class LargeMemory:
    """Writable memory with the buffer protocol, kept for its next owner when it is freed."""

    def __init__(self, bytes: int) -> None: ...

cpu: Backend
cuda: CudaBackend
emulated: EmulatedBackend

def build_info() -> dict[str, object]: ...
def no_operation(tensor: Tensor) -> None: ...
