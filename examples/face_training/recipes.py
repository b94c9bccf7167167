"""What is trained: the losses, batches and schedules of each recipe, with the papers' numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from face_demo.losses import SoftmaxLoss, SoftmaxRangeLoss
from torch import nn

from facelt_ext import (
    AggregatedSoftmaxLoss,
    ArcFaceLoss,
    CLMLELoss,
    CosFaceLoss,
    DispersionLoss,
    DomainBalancingLoss,
    LMLELoss,
)
from facelt_ext.aggregation import SuperClasses

Setting = int | float | str | tuple[float, ...]


@dataclass(frozen=True)
class Start:
    """What the loss of a phase is made from.

    Attributes:
        num_classes: the identities whose images the phase sees.
        embedding_size: dimensions of the features.
        previous: the trained loss of the phase before; None in the first, and where a killed run
            goes on, which loads what it had.
        super_classes: of the tail identities; None unless the phase is `aggregated`.
    """

    num_classes: int
    embedding_size: int
    previous: nn.Module | None = None
    super_classes: SuperClasses | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a training, with a loss, an optimiser and a schedule of its own.

    Attributes:
        make_loss: called with a `Start` and ``loss``.
        loss: hyper-parameters of the loss.
        batches: what a batch is: ``batch_size`` random images; or ``classes_per_batch`` identities
            of ``samples_per_class`` images each; or ``clusters_per_batch`` clusters of
            ``samples_per_cluster``, from clusters of ``cluster_size`` images, found anew after
            every ``refresh`` batches or so.
        epochs, rate: how long, and the learning rate that it begins with.
        milestones: shares of the epochs after which the rate is divided by ten.
        head_only: it sees the identities of the head alone.
        minimums: images that an identity of the head has at least, and of each tail group; empty
            where the phase does not tell them apart.
        aggregated: its loss is made from super classes.
    """

    make_loss: Callable[..., nn.Module]
    loss: dict[str, Setting]
    batches: dict[str, int]
    epochs: int
    rate: float
    milestones: tuple[float, ...] = (5 / 15, 8 / 15, 11 / 15)
    head_only: bool = False
    minimums: tuple[int, ...] = ()
    aggregated: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole training.

    Attributes:
        source: where it comes from.
        phases: one after the other; each goes on with the network of the one before.
        balanced: features pass through a residual balancing module, whose gate the loss gets.
    """

    source: str
    phases: tuple[Phase, ...]
    balanced: bool = False


def fresh(loss: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes a loss over classes that takes nothing over from the phase before."""
    return lambda start, **own: loss(start.num_classes, start.embedding_size, **own)


def without_classes(loss: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes a loss that has no weights."""
    return lambda start, **own: loss(**own)


def domain_balancing(start: Start, k: int, **own: Setting) -> DomainBalancingLoss:
    """Of few identities all others are neighbours."""
    k = min(k, start.num_classes - 1)
    return DomainBalancingLoss(start.num_classes, start.embedding_size, k=k, **own)


def aggregated_softmax(start: Start) -> AggregatedSoftmaxLoss:
    return AggregatedSoftmaxLoss(start.num_classes, start.embedding_size, start.super_classes)


def dispersion(start: Start) -> DispersionLoss:
    """Step II, from where step I ended."""
    if start.previous is None:
        return DispersionLoss(start.num_classes, start.embedding_size, start.super_classes)
    return DispersionLoss.from_aggregated(start.previous, start.super_classes)


RANDOM = {"batch_size": 256}
TEN_FOUR_ONE = (10, 4, 1)
SOFTMAX = Phase(fresh(SoftmaxLoss), {}, RANDOM, epochs=15, rate=0.1)
CLUSTERS = {
    "clusters_per_batch": 12,
    "samples_per_cluster": 20,
    "cluster_size": 200,
    "refresh": 3000,
}

# From the papers: the losses' numbers, the batches of Range Loss (16 x 16 for small networks),
# CLMLE and LMLE (12 x 20, clusters of 200, refreshed after 2,000 to 5,000 batches), Domain
# Balancing's 15 epochs from 0.1 on with a tenth after 5, 8 and 11, which all without numbers of
# their own have too, and Aggregate-and-Disperse's 40 and 60 epochs from 0.1 and from 0.02 on.
# Ours: the epochs of the base model on the head; that step I goes on from it; the epochs and rate
# of CLMLE and LMLE after softmax, and their margins, which the papers search for each data set
# below `between_margin_max` and `within_margin_max`; epsilon and indicator_scale, which keep the
# mean margin near `margin` at any scale.
RECIPES = {
    "softmax": Recipe("", (SOFTMAX,)),
    "range": Recipe(
        "Range Loss: Zhang et al., arXiv:1611.08976",
        (
            replace(
                SOFTMAX,
                make_loss=fresh(SoftmaxRangeLoss),
                loss={"k": 2, "margin": 2e4, "alpha": 1e-5, "beta": 1e-4},
                batches={"classes_per_batch": 16, "samples_per_class": 16},
            ),
        ),
    ),
    "cosface": Recipe(
        "Wang et al., arXiv:1801.09414",
        (replace(SOFTMAX, make_loss=fresh(CosFaceLoss), loss={"margin": 0.35, "scale": 64.0}),),
    ),
    "arcface": Recipe(
        "Deng et al., arXiv:1801.07698",
        (replace(SOFTMAX, make_loss=fresh(ArcFaceLoss), loss={"margin": 0.5, "scale": 64.0}),),
    ),
    "domain-balancing": Recipe(
        "Cao et al., arXiv:2003.13791",
        (
            replace(
                SOFTMAX,
                make_loss=domain_balancing,
                loss={
                    "margin": 0.35,
                    "scale": 64.0,
                    "k": 100,
                    "epsilon": "auto",
                    "indicator_scale": 4.0,
                    "rbm_weight": 0.01,
                },
            ),
        ),
        balanced=True,
    ),
    "aggregate-disperse": Recipe(
        "Ma et al., Pattern Recognition 2020",
        (
            replace(SOFTMAX, head_only=True, minimums=TEN_FOUR_ONE),
            replace(
                SOFTMAX,
                make_loss=aggregated_softmax,
                epochs=40,
                minimums=TEN_FOUR_ONE,
                aggregated=True,
            ),
            replace(
                SOFTMAX,
                make_loss=dispersion,
                epochs=60,
                rate=0.02,
                minimums=TEN_FOUR_ONE,
                aggregated=True,
            ),
        ),
    ),
    "clmle": Recipe(
        "Huang et al., arXiv:1806.00194",
        (
            SOFTMAX,
            replace(
                SOFTMAX,
                make_loss=without_classes(CLMLELoss),
                loss={"between_margin": 0.03, "within_margin": 0.1, "samples_per_cluster": 20},
                batches=CLUSTERS,
                rate=0.01,
            ),
        ),
    ),
    "lmle": Recipe(
        "Huang et al., CVPR 2016",
        (
            SOFTMAX,
            replace(
                SOFTMAX,
                make_loss=without_classes(LMLELoss),
                loss={"margins": (0.1, 0.1, 0.6), "samples_per_cluster": 20},
                batches=CLUSTERS,
                rate=0.01,
            ),
        ),
    ),
}
