"""The dispersion softmax as a user would write it from the paper; what ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from facelt_ext import functional
from facelt_ext.functional import SuperClassIndex


def ours(
    features: Tensor,
    head: Tensor,
    tail: Tensor,
    index: SuperClassIndex,
    labels: Tensor,
    workspace: str = "auto",
) -> Tensor:
    return functional.dispersion_softmax_loss(
        features, head, tail, index, labels, workspace=workspace
    )


def ours_high(*inputs: object) -> Tensor:
    return ours(*inputs, workspace="high")


def ours_low(*inputs: object) -> Tensor:
    return ours(*inputs, workspace="low")


def all_logits(
    features: Tensor, head: Tensor, tail: Tensor, index: SuperClassIndex, labels: Tensor
) -> Tensor:
    """Eqs. 6-8 to the letter: a term for each of the N classes, its own or its mean's."""
    means, own = means_of(tail, index), own_super_class(head, index, labels)
    by_head, by_tail = features @ head.t(), features @ tail.t()
    aggregated = (features @ means.t() - index.counts().log())[:, index.index]
    dispersed = index.index == own[:, None]
    terms = torch.cat([by_head, torch.where(dispersed, by_tail, aggregated)], dim=1)
    target = torch.cat([by_head, by_tail], dim=1).gather(1, labels[:, None])[:, 0]
    return (torch.logsumexp(terms, dim=1) - target).mean()


def gathered_members(
    features: Tensor, head: Tensor, tail: Tensor, index: SuperClassIndex, labels: Tensor
) -> Tensor:
    """With one term for a super class, that of a sample's own replaced by the log of the sum over
    its members, whose rows are gathered for all samples at once."""
    means, own = means_of(tail, index), own_super_class(head, index, labels)
    logits = torch.cat([features @ head.t(), features @ means.t()], dim=1)
    (samples,) = (own >= 0).nonzero(as_tuple=True)
    sizes = index.counts()[own[samples]]
    sample = torch.arange(len(samples), device=labels.device).repeat_interleave(sizes)
    place = torch.arange(len(sample), device=labels.device) - (sizes.cumsum(0) - sizes)[sample]
    members = index.order[index.offsets[own[samples]][sample] + place]
    by_members = (tail[members] * features[samples][sample]).sum(1)
    padded = logits.new_full((len(samples), int(sizes.max())), -torch.inf)
    padded = padded.index_put((sample, place), by_members)
    dispersed = torch.logsumexp(padded, dim=1)
    logits = logits.index_put((samples, len(head) + own[samples]), dispersed)
    by_head = logits.gather(1, labels.clamp(max=len(head) - 1)[:, None])[:, 0]
    is_own = members == labels[samples][sample] - len(head)
    target = by_head.index_put((samples,), by_members[is_own])
    return (torch.logsumexp(logits, dim=1) - target).mean()


def all_classes(
    features: Tensor, head: Tensor, tail: Tensor, index: SuperClassIndex, labels: Tensor
) -> Tensor:
    """Plain softmax over all N classes: another loss, there for its time and its memory."""
    return F.cross_entropy(torch.cat([features @ head.t(), features @ tail.t()], dim=1), labels)


def means_of(tail: Tensor, index: SuperClassIndex) -> Tensor:
    sums = tail.new_zeros(index.num_super_classes, tail.shape[1])
    return sums.index_add(0, index.index, tail) / index.counts()[:, None]


def own_super_class(head: Tensor, index: SuperClassIndex, labels: Tensor) -> Tensor:
    """-1 for a sample of a head."""
    tails = (labels - len(head)).clamp(min=0)
    return torch.where(labels < len(head), -1, index.index[tails])
