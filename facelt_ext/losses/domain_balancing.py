from __future__ import annotations

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import check_count, check_integers, check_positive, check_weight
from facelt_ext.functional.compactness import check_epsilon
from facelt_ext.losses.margin_softmax import MarginSoftmaxLoss
from facelt_ext.reference.compactness import indicator
from facelt_ext.reference.margin_softmax import reduced
from facelt_ext.types import DomainFrequency, compute_dtype

# Classes that a step looks at besides its batch's, in rotation, for the mean of epsilon="auto".
PROBES = 32


class DomainBalancingLoss(MarginSoftmaxLoss):
    """Domain Balancing (Cao et al., CVPR 2020, eqs. 1, 2 and 4-6): margins by how rare a domain is.

    CosFace whose margin is multiplied with the class's domain frequency indicator DFI = epsilon /
    IC (see `facelt_ext.functional.domain_frequency_indicator`), so that classes with few others
    around them get larger margins; and the loss `rbm_weight * mean (gate - DFI)^2` of the gate of a
    `ResidualBalancingModule`. The indicators come from the weight before the step's update, for the
    batch's classes only.

    Eqs. 1 and 5 share one scale. With 64 and the paper's epsilon = 5.5 a trained head's indicators
    lie far below 1, and with them the margins: IC is about log k + scale * the neighbours' cosine,
    some 24 at a cosine of 0.3. Two ways out: `indicator_scale` near 1, which 5.5 fits (IC is then
    about 5, as log 100 = 4.6), keeps the paper's constant, and indicators close to 1 for all
    classes; `epsilon="auto"` keeps the scale, with margins that differ more, of which the mean over
    the classes stays close to `margin`.

    Args:
        num_classes: N.
        embedding_size: D.
        scale: of the cosines in the loss.
        margin: the margin at DFI = 1.
        k: how many nearest classes IC looks at; 0 makes the loss plain CosFace.
        epsilon: of eq. 2; or "auto", the mean IC over the classes. IC of the batch's classes is
            renewed at every training step, and of 32 more in rotation, so that of every class at
            least every N / 32 steps; classes not yet seen do not count. Nothing waits for the GPU.
        rbm_weight: lambda of eq. 6.
        indicator_scale: of the cosines in IC; None: `scale`.
        max_indicator: no class's indicator is larger.
        options: see `MarginSoftmaxLoss`.

    Attributes:
        weight: [N, D].
        compactness: [N], the IC last seen with epsilon="auto", NaN before that; saved with the
            weight.

    All hyper-parameters may be changed between steps; after a change of k or of a scale the mean of
    epsilon="auto" starts anew. Under DistributedDataParallel the first process's `compactness` is
    that of all.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        margin: float = 0.35,
        k: int = 100,
        epsilon: float | str = 5.5,
        rbm_weight: float = 0.01,
        *,
        indicator_scale: float | None = None,
        max_indicator: float = 2.0,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **options)
        self.k = k
        self.epsilon = epsilon
        self.rbm_weight = rbm_weight
        self.indicator_scale = indicator_scale
        self.max_indicator = max_indicator
        compute = compute_dtype(self.weight.dtype)
        self.register_buffer(
            "compactness", self.weight.new_full((num_classes,), torch.nan, dtype=compute)
        )
        self.register_buffer("cursor", self.weight.new_zeros((), dtype=torch.int64))
        self._seen_with: tuple[int, float] | None = None  # k and scale of `compactness`

    def forward(self, features: Tensor, labels: Tensor, gate: Tensor | None = None) -> Tensor:
        """features [B, D], integer labels [B] and the gate [B] (or None) -> the loss.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        """
        features = check_weight(self.weight, features)[1]
        labels = check_integers(labels, "labels", features, "features")
        if gate is not None and gate.shape != labels.shape:
            raise ValueError(
                f"gate: expected shape {list(labels.shape)}, one for each label, got "
                f"{list(gate.shape)}"
            )
        indicators = self.indicators(labels)
        loss = self._loss(features, labels, cosine_margin=(self.margin * indicators)[:, None])
        if gate is None:
            return loss
        taking_part = labels != self.ignore_index
        squares = torch.where(taking_part, (gate.to(indicators.dtype) - indicators).square(), 0)
        return loss + self.rbm_weight * reduced(squares, taking_part, self.reduction)

    @torch.no_grad()
    def indicators(self, labels: Tensor) -> Tensor:
        """DFI of each sample's class, [B]; in training also renews the mean of epsilon="auto"."""
        if self.k == 0:
            return torch.ones_like(labels, dtype=self.compactness.dtype)
        classes = labels.to(torch.int64).clamp(0, len(self.weight) - 1)
        renewing = self.training and self.epsilon == "auto"
        compactness = self._renewed(classes) if renewing else self._compactness(classes)
        return indicator(compactness, self._epsilon(compactness), self._max_indicator())

    @torch.no_grad()
    def dfi(self) -> DomainFrequency:
        """DFI and IC of all classes, for looking at, and how many indicators were clamped.

        It costs N / B products of a step. With epsilon="auto" the mean is over these IC.
        """
        if self.k == 0:
            ones = torch.ones_like(self.compactness)
            return DomainFrequency(ones, torch.full_like(ones, torch.nan), self.cursor * 0)
        compactness, largest = self._compactness(None), self._max_indicator()
        auto = self.epsilon == "auto"
        epsilon = positive(compactness.mean()) if auto else self._epsilon(compactness)
        indicators = indicator(compactness, epsilon, largest)
        return DomainFrequency(indicators, compactness, (compactness <= epsilon / largest).sum())

    def _compactness(self, classes: Tensor | None) -> Tensor:
        return functional.inter_class_compactness(
            self.weight, classes, k=self.k, scale=self._scale_of_compactness()
        )

    def _scale_of_compactness(self) -> float:
        return self.scale if self.indicator_scale is None else self.indicator_scale

    def _renewed(self, classes: Tensor) -> Tensor:
        """IC of the classes; it and that of the next probes are kept."""
        seen_with = (self.k, self._scale_of_compactness())
        if self._seen_with not in (None, seen_with):
            self.compactness.fill_(torch.nan)
        self._seen_with = seen_with
        probes = (self.cursor + torch.arange(PROBES, device=classes.device)) % len(self.weight)
        looked_at = torch.cat([classes, probes])
        compactness = self._compactness(looked_at)
        self.compactness[looked_at] = compactness
        self.cursor += PROBES
        return compactness[: len(classes)]

    def _epsilon(self, compactness: Tensor) -> float | Tensor:
        """The mean of what is known, or, while that is nothing, of the batch's own."""
        if self.epsilon != "auto":
            return check_epsilon(self.epsilon, self.weight)
        mean = self.compactness.nanmean()
        return positive(torch.where(mean.isnan(), compactness.mean(), mean))

    def _max_indicator(self) -> float:
        check_positive(self.max_indicator, "max_indicator", self.compactness.dtype)
        return self.max_indicator

    def _apply(self, fn, recurse=True):
        """IC stays in the compute dtype where the weight becomes half."""
        super()._apply(fn, recurse)
        self.compactness = self.compactness.to(compute_dtype(self.weight.dtype))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A head of another loss brings a weight only; what else is kept starts anew then."""
        if prefix + "weight" in state_dict and prefix + "compactness" not in state_dict:
            nothing = torch.full_like(self.compactness, torch.nan)
            state_dict[prefix + "compactness"] = nothing
            state_dict[prefix + "cursor"] = torch.zeros_like(self.cursor)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, k={self.k}, epsilon={self.epsilon}, "
            f"rbm_weight={self.rbm_weight}"
        )


def positive(mean: Tensor) -> Tensor:
    """A mean that is not positive would turn margins round."""
    return mean.clamp(min=torch.finfo(mean.dtype).tiny)


class ResidualBalancingModule(nn.Module):
    """The residual balancing module of Domain Balancing (Cao et al., CVPR 2020, eqs. 3 and 4).

    `x + f(x) R(x)`, with a linear gate f and R = linear - batch norm - ReLU - linear. It is a part
    of the model, which is needed at test time too; `DomainBalancingLoss` trains the gate.

    Args:
        embedding_size: D.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embedding_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(embedding_size, "embedding_size")
        kind = {"device": device, "dtype": dtype}
        self.residual = nn.Sequential(
            nn.Linear(embedding_size, embedding_size, **kind),
            nn.BatchNorm1d(embedding_size, **kind),
            nn.ReLU(),
            nn.Linear(embedding_size, embedding_size, **kind),
        )
        self.gate = nn.Linear(embedding_size, 1, **kind)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, D] -> the balanced features [B, D] and the gate [B], in their dtype.

        Raises:
            ValueError: fewer than two rows in training, which the batch norm needs.
        """
        if self.training and len(features) < 2:
            raise ValueError(
                f"features: expected at least 2 rows in training, for the batch norm, got "
                f"{len(features)}"
            )
        gate = self.gate(features)
        return features + gate * self.residual(features), gate[:, 0]
