from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from facelt_ext import functional
from facelt_ext._checks import (
    FLOATING,
    check_count,
    check_integers,
    check_margin,
    check_number,
    check_positive,
    check_size,
    check_tensor,
    check_weight,
)
from facelt_ext._kept_tensors import check_saved_integers
from facelt_ext.functional.compactness import check_epsilon
from facelt_ext.losses._arguments import checked_kind, in_transform, is_step, whole_weight
from facelt_ext.losses.margin_softmax import MarginSoftmaxLoss
from facelt_ext.reference.compactness import indicator
from facelt_ext.reference.margin_softmax import reduced
from facelt_ext.types import DomainFrequency, compute_dtype

# Classes that a step looks at besides its batch's, in rotation, for the mean of epsilon="auto".
PROBES = 32
# Its numbers are worth nothing after a change of one of these.
WHAT_IC_DEPENDS_ON = ("k", "scale", "indicator_scale")
# Steps of which a backward may run the forward again, under activation checkpointing.
REMEMBERED = 64


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
        margin: the margin at DFI = 1; a number, or one per class, [N].
        k: how many nearest classes IC looks at; 0 makes the loss plain CosFace.
        epsilon: of eq. 2, positive; or "auto", the mean IC over the classes. IC of the batch's
            classes is renewed at every training step, and of 32 more in rotation, so that of every
            class at least every N / 32 steps; classes not yet seen do not count. Nothing waits for
            the GPU. In evaluation, IC of the classes that lack it is computed first: once, at up to
            N / B times the cost of a step's product.
        rbm_weight: lambda of eq. 6.
        indicator_scale: of the cosines in IC; None: `scale`.
        max_indicator: no class's indicator is larger.
        options: see `MarginSoftmaxLoss`.

    Attributes:
        weight: [N, D].
        compactness: [N], the IC last seen with epsilon="auto", NaN before that; a buffer, saved
            with the weight. It follows the weight when that gets another number of rows: new rows
            at its end are not yet seen; of a shorter weight no class is.
        cursor: int64 [], where the rotation is; saved with the weight.

    All hyper-parameters may be changed between steps; after a change of k or of a scale the mean of
    epsilon="auto" starts anew. Under DistributedDataParallel the first process's `compactness` is
    that of all; under DataParallel it sees the first device's part of each batch. Activation
    checkpointing runs forward twice and moves it once. A program of torch.export keeps the mean
    that it was exported with, and transforms of torch.func leave it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
    """

    _moved = ("margin", "cursor")
    _saved = {"margin": False, "cursor": False}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        margin: float | Tensor = 0.35,
        k: int = 100,
        epsilon: float | str = 5.5,
        rbm_weight: float = 0.01,
        *,
        indicator_scale: float | None = None,
        max_indicator: float = 2.0,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, device=device, **options)
        self.k = check_count(k, "k", minimum=0)
        self.epsilon = epsilon if is_auto(epsilon) else check_epsilon(epsilon, self.weight)
        self.rbm_weight = check_number(rbm_weight, "rbm_weight", torch.float32)
        if indicator_scale is not None:
            indicator_scale = check_positive(indicator_scale, "indicator_scale", torch.float32)
        self.indicator_scale = indicator_scale
        self.max_indicator = check_positive(max_indicator, "max_indicator", torch.float32)
        compute = compute_dtype(self.weight.dtype)
        nothing = torch.full((len(self.weight),), torch.nan, dtype=compute)
        self.register_buffer("compactness", nothing.to(self.weight.device))
        self.cursor = torch.zeros((), dtype=torch.int64, device="cpu")
        self._keep_where(self.weight)
        self._forget()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "cursor"):
            self._forget()

    def __setattr__(self, name, value):
        changes = name in WHAT_IC_DEPENDS_ON and hasattr(self, "compactness")
        before = self._ic_depends_on() if changes else None
        super().__setattr__(name, value)
        if changes and self._ic_depends_on() != before:
            self.compactness.fill_(torch.nan)

    def _ic_depends_on(self) -> str:
        """As text: what a number is compared with may be anything."""
        scale = self.scale if self.indicator_scale is None else self.indicator_scale
        return f"{self.k}, {scale}"

    def _forget(self) -> None:
        """As before the first step."""
        self.compactness.fill_(torch.nan)
        self.cursor.zero_()
        # The mean of the last steps, by where their labels lie.
        self._means: OrderedDict[tuple[int, int, int], Tensor] = OrderedDict()
        # The state of `compactness` in which evaluation found all classes.
        self._complete: tuple[int, int] | None = None

    def forward(self, features: Tensor, labels: Tensor, gate: Tensor | None = None) -> Tensor:
        """features [B, D], integer labels [B] and the gate [B] (or None) -> the loss.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        """
        weight, features = check_weight(self.weight, features)
        indices = check_integers(labels, "labels", features, "features")
        if gate is not None:
            gate = check_gate(gate, indices)
        rbm_weight = check_number(self.rbm_weight, "rbm_weight", torch.float32)
        margin = check_margin(self._margin(), "margin", features, weight)
        if isinstance(margin, Tensor):
            own = indices.clamp(0, len(weight) - 1)
            margin = margin[own] if margin.ndim == 1 else margin[:, 0]
        indicators = self.indicators(labels)
        loss = self._loss(features, indices, None, cosine_margin=(margin * indicators)[:, None])
        if gate is None:
            return loss
        taking_part = indices != self.ignore_index
        squares = torch.where(taking_part, (gate.to(indicators.dtype) - indicators).square(), 0)
        return loss + rbm_weight * reduced(squares, taking_part, self.reduction)

    @torch.no_grad()
    def indicators(self, labels: Tensor) -> Tensor:
        """DFI of each sample's class, [B]; in training also renews the mean of epsilon="auto"."""
        weight = whole_weight(self, "indicators")
        classes = check_integers(labels, "labels").clamp(0, len(weight) - 1)
        if check_count(self.k, "k", minimum=0) == 0:
            return torch.ones_like(classes, dtype=compute_dtype(weight.dtype))
        self._follow_weight()
        compactness = self._renewed(classes) if self._renews() else self._compactness(classes)
        if is_auto(self.epsilon):
            epsilon = self._mean(compactness, labels)
        else:
            epsilon = check_epsilon(self.epsilon, weight)
        return indicator(compactness, epsilon, self._max_indicator())

    @torch.no_grad()
    def dfi(self) -> DomainFrequency:
        """DFI and IC of all classes, for looking at, and how many indicators were clamped.

        It costs N / B products of a step. With epsilon="auto" the mean is over these IC.
        """
        weight, largest = whole_weight(self, "dfi"), self._max_indicator()
        if check_count(self.k, "k", minimum=0) == 0:
            ones = weight.new_ones(len(weight), dtype=compute_dtype(weight.dtype))
            none = torch.zeros((), dtype=torch.int64, device=weight.device)
            return DomainFrequency(ones, torch.full_like(ones, torch.nan), none)
        compactness = self._compactness(None)
        if is_auto(self.epsilon):
            epsilon = positive(compactness.mean())
        else:
            epsilon = check_epsilon(self.epsilon, weight)
        indicators = indicator(compactness, epsilon, largest)
        return DomainFrequency(indicators, compactness, (compactness <= epsilon / largest).sum())

    def _compactness(self, classes: Tensor | None) -> Tensor:
        return functional.inter_class_compactness(
            self.weight, classes, k=self.k, scale=self._scale_of_compactness()
        )

    def _scale_of_compactness(self) -> float:
        if self.indicator_scale is None:
            return self.scale
        return check_positive(self.indicator_scale, "indicator_scale", torch.float32)

    def _max_indicator(self) -> float:
        return check_positive(self.max_indicator, "max_indicator", torch.float32)

    def _renews(self) -> bool:
        return self.training and is_auto(self.epsilon) and is_step()

    def _renewed(self, classes: Tensor) -> Tensor:
        """IC of the classes; it and that of the next probes are kept."""
        cursor = self._kept_on("cursor", classes.device)
        probes = (cursor + torch.arange(PROBES, device=classes.device)) % len(self.weight)
        looked_at = torch.cat([classes, probes])
        compactness = self._compactness(looked_at)
        # A surrounding FSDP may have cast the buffer.
        self.compactness[looked_at] = compactness.to(self.compactness.dtype)
        cursor.add_(PROBES)
        return compactness[: classes.shape[0]]

    def _mean(self, compactness: Tensor, labels: Tensor) -> Tensor:
        """The mean of what is known, or, while that is nothing, of the batch's own."""
        if not self.training:
            self._complete_compactness()
        mean = self.compactness.to(compactness.dtype).nanmean()
        mean = positive(torch.where(mean.isnan(), compactness.mean(), mean))
        if not self.training or torch.compiler.is_compiling() or in_transform():
            return mean
        return self._remembered(mean, labels)

    def _remembered(self, mean: Tensor, labels: Tensor) -> Tensor:
        """That of the step itself where a backward runs it again, after other steps perhaps."""
        where = labels.untyped_storage()._cdata, labels.storage_offset(), labels.numel()
        if not is_step():
            return self._means.get(where, mean)
        # Replicas of DataParallel share this: each of these is one step to other threads.
        self._means.pop(where, None)
        self._means[where] = mean
        if len(self._means) > REMEMBERED:
            self._means.popitem(last=False)
        return mean

    def _complete_compactness(self) -> None:
        """Computes IC where it was never seen, or an average has lost it; looking waits."""
        kept = self.compactness
        if torch.compiler.is_compiling() or in_transform() or state_of(kept) == self._complete:
            return
        if kept.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        missing = kept.isnan().nonzero()[:, 0]
        if len(missing):
            kept[missing] = self._compactness(missing).to(kept.dtype)
        self._complete = state_of(kept)

    def _follow_weight(self) -> None:
        classes, known = len(self.weight), len(self.compactness)
        # FullyShardedDataParallel flattens the weight.
        if classes == known or self.weight.ndim != 2:
            return
        with torch.inference_mode(False):
            compactness = self.compactness.new_full((classes,), torch.nan)
        if known < classes:
            compactness[:known] = self.compactness
        self.compactness = compactness

    def _apply(self, fn, recurse=True):
        """IC stays in the compute dtype where the weight becomes half."""
        before = self.compactness
        super()._apply(fn, recurse)
        after, compute = self.compactness, compute_dtype(self.weight.dtype)
        if before.is_meta and not after.is_meta:
            self._forget()
            before = after
        self.compactness = (after if after.is_meta else before).to(after.device, compute)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._follow_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """A head of another loss brings a weight only; what else is kept starts anew then."""
        self._follow_weight()
        weight, name = state_dict.get(prefix + "weight"), prefix + "compactness"
        if weight is not None and name not in state_dict:
            device = getattr(weight, "device", None)
            state_dict[name] = torch.full_like(self.compactness, torch.nan, device=device)
            state_dict[prefix + "cursor"] = torch.zeros((), dtype=torch.int64, device="cpu")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers", False):
            # Of its own dtype, and not the checkpoint's memory, which steps would change.
            compute = compute_dtype(self.weight.dtype)
            self.compactness = self.compactness.to(compute, copy=True)

    def _checked_value(self, name: str, value: Tensor) -> Tensor:
        if name == "cursor":
            return check_saved_integers(value, "cursor")
        return super()._checked_value(name, value)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, k={self.k}, epsilon={self.epsilon}, "
            f"rbm_weight={self.rbm_weight}"
        )


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Another one after each change."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


def is_auto(epsilon: float | str) -> bool:
    return isinstance(epsilon, str) and epsilon == "auto"


def check_gate(gate: Tensor, labels: Tensor) -> Tensor:
    gate = check_tensor(gate, "gate")
    if gate.dtype not in FLOATING:
        raise TypeError(f"gate: expected a floating dtype, got {gate.dtype}")
    if gate.shape != labels.shape:
        raise ValueError(
            f"gate: expected shape {list(labels.shape)}, one for each label, got {list(gate.shape)}"
        )
    if gate.device != labels.device:
        raise ValueError(
            f"gate: expected device {labels.device}, where labels is, got {gate.device}"
        )
    return gate


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
        embedding_size = check_count(embedding_size, "embedding_size")
        check_size("embedding_size", embedding_size, embedding_size)
        kind = checked_kind(device, dtype)
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
            TypeError, ValueError: features of the wrong type, dtype or shape; fewer than two rows
                in training, which the batch norm needs.
        """
        weight = self.gate.weight
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a tensor, got {type(features).__name__}")
        autocast = torch.is_autocast_enabled(features.device.type)
        if features.dtype not in FLOATING or not (autocast or features.dtype == weight.dtype):
            raise TypeError(f"features: expected dtype {weight.dtype}, got {features.dtype}")
        if features.ndim != 2 or features.shape[1] != weight.shape[1]:
            raise ValueError(
                f"features: expected shape [rows, {weight.shape[1]}], got {list(features.shape)}"
            )
        if self.training and features.shape[0] < 2:
            raise ValueError(
                f"features: expected at least 2 rows in training, for the batch norm, got "
                f"{features.shape[0]}"
            )
        gate = self.gate(features)
        return features + gate * self.residual(features), gate[:, 0]
