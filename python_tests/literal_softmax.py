"""The margin softmax as literal loops over NumPy float64; its gradients are written out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

Array = np.ndarray
LEAST_SINE = 1e-4


def norm(x: Array) -> float:
    largest = float(np.max(np.abs(x)))
    return largest * math.sqrt(sum((v / largest) ** 2 for v in x.tolist())) if largest else 0.0


def direction(x: Array) -> Array:
    return x / norm(x) if norm(x) else np.zeros_like(x)


def dot(x: Array, y: Array) -> float:
    return sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))


def sine_and_cosine(x: Array, w: Array) -> tuple[float, float]:
    """Of the angle between two rows; 1 and 0 where one is zero. The sine is Lagrange's, from the
    areas of the parallelograms, which loses nothing where rows are parallel."""
    if not norm(x) or not norm(w):
        return 1.0, 0.0
    x, w = x / np.max(np.abs(x)), w / np.max(np.abs(w))
    areas = [x[a] * w[b] - x[b] * w[a] for a, b in combinations(range(len(x)), 2)]
    size = norm(x) * norm(w)
    return math.sqrt(sum(area**2 for area in areas)) / size, dot(x, w) / size


def psi(sine: float, cosine: float, margin: float, k: int) -> tuple[float, float]:
    """psi(k theta + m) and its derivative by cos(theta)."""
    if k == 1 and margin == 0:
        return cosine, 1.0
    theta = math.atan2(sine, cosine)
    phi = k * theta + margin
    j = max(math.ceil(phi / math.pi) - 1, 0)
    if sine > LEAST_SINE:
        ratio = math.sin(k * theta) / math.sin(theta)
    else:
        ratio = k * math.copysign(1.0, cosine) ** (k - 1)
    by_sine = math.cos(k * theta) / max(sine, LEAST_SINE)
    slope = (-1) ** j * k * (math.cos(margin) * ratio + math.sin(margin) * by_sine)
    return (-1) ** j * math.cos(phi) - 2 * j, slope


def cosine_gradients(x: Array, w: Array) -> tuple[Array, Array]:
    """Of cos(theta) by x and by w."""
    if not norm(x) or not norm(w):
        return np.zeros_like(x), np.zeros_like(w)
    u, v = direction(x), direction(w)
    return (v - dot(u, v) * u) / norm(x), (u - dot(u, v) * v) / norm(w)


def logit(
    x: Array,
    w: Array,
    scale: float,
    cosine_margin: float,
    angular_margin: float,
    k: int,
    normalize_features: bool,
    normalize_weight: bool,
) -> tuple[float, Array, Array]:
    """A logit with its gradients by the feature and by the class's row."""
    if not normalize_weight and not normalize_features:
        return scale * dot(x, w), scale * w, scale * x
    if not normalize_weight:
        u = direction(x)
        by_x = (w - dot(u, w) * u) / norm(x) if norm(x) else np.zeros_like(x)
        return scale * dot(u, w), scale * by_x, scale * u
    value, slope = psi(*sine_and_cosine(x, w), angular_margin, k)
    value -= cosine_margin
    by_x, by_w = (slope * gradient for gradient in cosine_gradients(x, w))
    if not normalize_features:
        by_x, by_w = norm(x) * by_x + value * direction(x), norm(x) * by_w
        value *= norm(x)
    return scale * value, scale * by_x, scale * by_w


def margin_softmax_loss(
    features: Array,
    weight: Array,
    labels: Array,
    upstream: Array,
    *,
    scale: float,
    cosine_margin: Array,
    angular_margin: Array,
    angular_multiplier: int,
    normalize_features: bool,
    normalize_weight: bool,
    ignore_index: int,
) -> tuple[Array, Array, Array]:
    """The loss of each sample, and the gradients of their sum, weighted with `upstream`, by the
    features and the weight. Margins are given for each sample."""
    losses = np.zeros(len(features))
    grad_x, grad_w = np.zeros_like(features), np.zeros_like(weight)
    for i, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        logits = []
        for n in range(len(weight)):
            margins = (cosine_margin[i], angular_margin[i], angular_multiplier)
            chosen = margins if n == label else (0.0, 0.0, 1)
            logits.append(
                logit(features[i], weight[n], scale, *chosen, normalize_features, normalize_weight)
            )
        largest = max(value for value, _, _ in logits)
        total = sum(math.exp(value - largest) for value, _, _ in logits)
        losses[i] = largest + math.log(total) - logits[label][0]
        for n, (value, by_x, by_w) in enumerate(logits):
            by_logit = math.exp(value - largest) / total - (n == label)
            grad_x[i] += upstream[i] * by_logit * by_x
            grad_w[n] += upstream[i] * by_logit * by_w
    return losses, grad_x, grad_w
