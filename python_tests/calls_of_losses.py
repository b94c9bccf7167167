"""Calls of functions, losses and samplers, for `public_calls`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from calls import (
    B,
    Call,
    D,
    M,
    N,
    S,
    also_naming,
    features,
    labels,
    pairs_of_labels,
    refreshed,
    super_classes,
    then,
)

import facelt_ext
from facelt_ext import functional, samplers

HEADS = ("CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss", "DomainBalancingLoss")
SUPER_CLASS_HEADS = ("AggregatedSoftmaxLoss", "DispersionLoss")
SOFTMAX = {"reduction": "mean", "ignore_index": -100, "workspace": "low"}
TAILS = torch.tensor([0, 1, 0, 1, 1])


def run_loss(loss: torch.nn.Module) -> object:
    rows, dimensions = getattr(loss, "weight", torch.empty(N, D)).shape
    return loss(torch.randn(B, dimensions, requires_grad=True), labels(min(rows, N)))


def run_module(module: facelt_ext.ResidualBalancingModule) -> object:
    return module(torch.randn(B, module.gate.in_features))


def run_index(index: functional.SuperClassIndex) -> object:
    return functional.super_class_mean(features(len(index.index)), index)


def forward(loss: torch.nn.Module, **arguments: object) -> Call:
    """Through `__call__`."""
    call = also_naming(functools.partial(loss), "weight")
    return call, {"features": features(), "labels": labels(), **arguments}


def logits(head: torch.nn.Module) -> Call:
    return also_naming(functools.partial(head.logits), "weight"), {"features": features()}


def made_and_run(name: str, **arguments: object) -> Call:
    return then(getattr(facelt_ext, name), run_loss, "features", "labels", "weight"), arguments


def head(name: str) -> torch.nn.Module:
    return getattr(facelt_ext, name)(N, D, *[super_classes()] * (name in SUPER_CLASS_HEADS))


def cluster_batch() -> dict[str, object]:
    return {"features": features(), "labels": torch.tensor([0, 0, 0, 0, 1, 1])}


def pk_sampler() -> samplers.PKSampler:
    return samplers.PKSampler(pairs_of_labels(), 2, 2)


def cluster_sampler() -> samplers.ClusterBatchSampler:
    return samplers.ClusterBatchSampler(refreshed(), clusters_per_batch=2, samples_per_cluster=2)


def drawn(cls: type, **arguments: object) -> Call:
    return then(cls, lambda sampler: next(iter(sampler))), arguments


def entered(context: facelt_ext.use_backend) -> None:
    with context:
        pass


def debug_checks(enabled: bool) -> None:
    try:
        facelt_ext.debug_checks(enabled)
    finally:
        facelt_ext.debug_checks(False)


CALLS: dict[str, Callable[[], Call]] = {
    "range_loss": lambda: (
        functional.range_loss,
        {"features": features(), "labels": labels(), "margin": 2.0, "alpha": 0.1, "beta": 0.1},
    ),
    "class_ranges": lambda: (
        functional.class_ranges,
        {"features": features(), "labels": labels(), "k": 2},
    ),
    "class_centroids": lambda: (
        functional.class_centroids,
        {"features": features(), "labels": labels()},
    ),
    "min_centroid_distance": lambda: (
        functional.min_centroid_distance,
        {"centroids": features(3), "counts": torch.ones(3, dtype=torch.int64)},
    ),
    "cluster_margin_loss": lambda: (
        functional.cluster_margin_loss,
        {
            "features": features(),
            "cluster_index": labels(M),
            "cluster_class": torch.tensor([0, 0, 1]),
            "between_margin": 0.3,
            "within_margin": 0.1,
            "sample_weight": torch.rand(B),
        },
    ),
    "quintuplet_loss": lambda: (
        functional.quintuplet_loss,
        {
            "features": features(),
            "labels": labels(2),
            "cluster_index": labels(2),
            "margins": (0.1, 0.2, 0.3),
        },
    ),
    "super_class_mean": lambda: (
        functional.super_class_mean,
        {"weight": features(N), "super_class": TAILS.clone(), "num_super_classes": S},
    ),
    "SuperClassIndex": lambda: (
        then(functional.SuperClassIndex, run_index),
        {"super_class": TAILS.clone(), "num_super_classes": S},
    ),
    "dispersion_softmax_loss": lambda: (
        functional.dispersion_softmax_loss,
        {
            "features": features(),
            "head_weight": features(3),
            "tail_weight": features(N),
            "super_class": TAILS.clone(),
            "labels": labels(8),
        },
    ),
    "margin_softmax_loss": lambda: (
        functional.margin_softmax_loss,
        {
            "features": features(),
            "weight": features(N),
            "labels": labels(),
            "scale": 8.0,
            "cosine_margin": 0.1,
            "angular_margin": 0.1,
        },
    ),
    "inter_class_compactness": lambda: (
        functional.inter_class_compactness,
        {"weight": features(N), "index": torch.tensor([0, 2]), "k": 2, "scale": 8.0},
    ),
    "domain_frequency_indicator": lambda: (
        functional.domain_frequency_indicator,
        {"weight": features(N), "index": torch.tensor([0, 2]), "k": 2, "scale": 8.0},
    ),
    "CosFaceLoss": lambda: made_and_run(
        "CosFaceLoss", num_classes=N, embedding_size=D, scale=8.0, **SOFTMAX
    ),
    "ArcFaceLoss": lambda: made_and_run("ArcFaceLoss", num_classes=N, embedding_size=D, margin=0.3),
    "SphereFaceLoss": lambda: made_and_run(
        "SphereFaceLoss", num_classes=N, embedding_size=D, margin=4
    ),
    "DomainBalancingLoss": lambda: made_and_run(
        "DomainBalancingLoss", num_classes=N, embedding_size=D, k=2, scale=8.0
    ),
    "DomainBalancingLoss.indicators": lambda: (
        facelt_ext.DomainBalancingLoss(N, D, k=2).indicators,
        {"labels": labels()},
    ),
    "AggregatedSoftmaxLoss": lambda: made_and_run(
        "AggregatedSoftmaxLoss",
        num_classes=N,
        embedding_size=D,
        super_classes=super_classes(),
        **SOFTMAX,
    ),
    "DispersionLoss": lambda: made_and_run(
        "DispersionLoss", num_classes=N, embedding_size=D, super_classes=super_classes(), **SOFTMAX
    ),
    "DispersionLoss.from_aggregated": lambda: (
        facelt_ext.DispersionLoss.from_aggregated,
        {"step_one_loss": head("AggregatedSoftmaxLoss"), "super_classes": super_classes()},
    ),
    "ResidualBalancingModule": lambda: (
        then(facelt_ext.ResidualBalancingModule, run_module, "features"),
        {"embedding_size": D},
    ),
    "ResidualBalancingModule.forward": lambda: (
        facelt_ext.ResidualBalancingModule(D),
        {"features": features()},
    ),
    "RangeLoss": lambda: made_and_run("RangeLoss", k=2, margin=2.0, alpha=0.1, beta=0.1),
    "RangeLoss.forward": lambda: forward(facelt_ext.RangeLoss(margin=2.0)),
    "CLMLELoss": lambda: made_and_run(
        "CLMLELoss", between_margin=0.3, within_margin=0.1, samples_per_cluster=2
    ),
    "CLMLELoss.forward": lambda: forward(
        facelt_ext.CLMLELoss(0.3, 0.1, samples_per_cluster=2), **cluster_batch()
    ),
    "LMLELoss": lambda: made_and_run("LMLELoss", margins=(0.1, 0.2, 0.3), samples_per_cluster=2),
    "LMLELoss.forward": lambda: forward(
        facelt_ext.LMLELoss((0.1, 0.2, 0.3), samples_per_cluster=2), **cluster_batch()
    ),
    "between_margin_max": lambda: (facelt_ext.between_margin_max, {"num_classes": 5}),
    "within_margin_max": lambda: (
        facelt_ext.within_margin_max,
        {"class_samples": 5, "samples": 50},
    ),
    "convert_state_dict": lambda: (
        facelt_ext.convert_state_dict,
        {"state_dict": {"kernel": features(D, N)}},
    ),
    "use_backend": lambda: (then(facelt_ext.use_backend, entered), {"name": "reference"}),
    "debug_checks": lambda: (debug_checks, {"enabled": True}),
    "PKSampler": lambda: drawn(
        samplers.PKSampler,
        labels=pairs_of_labels(),
        classes_per_batch=2,
        samples_per_class=2,
        num_batches=3,
    ),
    "PKSampler.set_epoch": lambda: (pk_sampler().set_epoch, {"epoch": 1}),
    "PKSampler.load_state_dict": lambda: (
        pk_sampler().load_state_dict,
        {"state": {"epoch": 1, "drawn": 1}},
    ),
    "ClusterBatchSampler": lambda: drawn(
        samplers.ClusterBatchSampler,
        clusters=refreshed(),
        clusters_per_batch=2,
        samples_per_cluster=2,
        num_batches=3,
    ),
    "ClusterBatchSampler.set_epoch": lambda: (cluster_sampler().set_epoch, {"epoch": 1}),
    "ClusterBatchSampler.load_state_dict": lambda: (
        cluster_sampler().load_state_dict,
        {"state": cluster_sampler().state_dict()},
    ),
}
for _name in (*HEADS, *SUPER_CLASS_HEADS):
    CALLS[f"{_name}.forward"] = lambda name=_name: forward(head(name))
    CALLS[f"{_name}.logits"] = lambda name=_name: logits(head(name))
