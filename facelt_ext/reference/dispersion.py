from __future__ import annotations

import torch
from torch import Tensor

from facelt_ext.reference.margin_softmax import reduced
from facelt_ext.reference.super_classes import super_class_mean
from facelt_ext.types import compute_dtype


def dispersion_softmax_loss(
    features: Tensor,
    head_weight: Tensor,
    tail_weight: Tensor,
    super_class: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_super_classes: int | None = None,
) -> Tensor:
    """See `facelt_ext.functional.dispersion_softmax_loss`; `super_class` is a tensor here."""
    dtype = compute_dtype(torch.promote_types(features.dtype, head_weight.dtype))
    taking_part = labels != ignore_index
    classes = torch.where(taking_part, labels, 0)
    features = torch.where(taking_part[:, None], features.to(dtype), 0)
    head_weight, tail_weight = head_weight.to(dtype), tail_weight.to(dtype)
    by_head = features @ head_weight.t()
    by_tail = features @ tail_weight.t()
    by_super_class = features @ super_class_mean(tail_weight, super_class, num_super_classes).t()

    # -1 for a sample of a head class: none of the super classes is dispersed for it.
    own = torch.cat([torch.full_like(head_weight[:, 0], -1, dtype=torch.int64), super_class])
    dispersed = own[classes][:, None]
    others = torch.arange(by_super_class.shape[1], device=labels.device) != dispersed
    terms = torch.cat(
        [
            by_head,
            torch.where(super_class == dispersed, by_tail, -torch.inf),
            torch.where(others, by_super_class, -torch.inf),
        ],
        dim=1,
    )
    logits = torch.cat([by_head, by_tail], dim=1)
    target = logits.gather(1, classes[:, None])[:, 0]
    lse = torch.logsumexp(terms, dim=1)
    # An infinite feature makes logits of both signs: NaN, whatever its target's is.
    lse = lse + (lse - lse).detach()
    losses = torch.where(taking_part, lse - target, 0)
    return reduced(losses, taking_part, reduction)
