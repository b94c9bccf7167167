"""Domain Balancing's indicator as a user would write it; what ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from facelt_ext import functional

SCALE, EPSILON, LARGEST = 64.0, 5.5, 2.0


def ours(weight: Tensor, index: Tensor, k: int) -> Tensor:
    return functional.domain_frequency_indicator(
        weight, index, k=k, scale=SCALE, epsilon=EPSILON, max_indicator=LARGEST
    )


@torch.no_grad()
def top_k(weight: Tensor, index: Tensor, k: int) -> Tensor:
    rows = F.normalize(weight)
    cosines = torch.mm(rows[index], rows.t())
    cosines.scatter_(1, index[:, None], -torch.inf)  # a class is not its own neighbour
    compactness = torch.logsumexp(SCALE * cosines.topk(k, dim=1).values, dim=1)
    return torch.where(compactness > 0, EPSILON / compactness, LARGEST).clamp(max=LARGEST)
