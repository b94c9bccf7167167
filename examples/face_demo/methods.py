"""The methods that are compared: what turns a network's features into a loss, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from facelt_ext import (
    AggregatedSoftmaxLoss,
    ArcFaceLoss,
    CLMLELoss,
    CosFaceLoss,
    DispersionLoss,
    DomainBalancingLoss,
    LMLELoss,
    ResidualBalancingModule,
)
from facelt_ext.aggregation import SuperClasses

from .losses import CosFaceRangeLoss, SoftmaxLoss, SoftmaxRangeLoss, SumLoss
from .model import EMBEDDING_SIZE, FaceNet

Settings = dict[str, float | str | list[float]]


@dataclass(frozen=True)
class Start:
    """What the loss of a phase is made from.

    Attributes:
        num_classes: the identities whose images the phase sees; theirs are the first labels.
        previous: the trained loss of the phase before; None in the first.
        super_classes: of the tail identities; None unless the phase asks for them.
    """

    num_classes: int
    previous: nn.Module | None = None
    super_classes: SuperClasses | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a training, with an optimiser and a learning rate schedule of its own.

    Attributes:
        make_loss: called with a `Start` and ``settings``; gives a module that is called with
            features and labels.
        settings: its hyper-parameters.
        share: its part of the epochs.
        rate: what the learning rate is multiplied by.
        head_only: it sees the images of head identities alone.
        aggregated: its loss is made from super classes.
        clustered: its batches are clusters of images, by the features that the network has.
    """

    make_loss: Callable[..., nn.Module]
    settings: Settings = field(default_factory=dict)
    share: float = 1.0
    rate: float = 1.0
    head_only: bool = False
    aggregated: bool = False
    clustered: bool = False


@dataclass(frozen=True)
class Method:
    """A way to train the network.

    Attributes:
        title: its name in the report.
        paper: where it comes from.
        phases: what it does one after the other; their shares add up to 1.
        balanced: the features pass through a residual balancing module, whose gate the loss gets.
    """

    title: str
    paper: str
    phases: tuple[Phase, ...]
    balanced: bool = False

    @property
    def aggregated(self) -> bool:
        """A phase of it needs super classes."""
        return any(phase.aggregated for phase in self.phases)

    @property
    def clustered(self) -> bool:
        """A phase of it has clusters for batches."""
        return any(phase.clustered for phase in self.phases)

    @property
    def tells_head_from_tail(self) -> bool:
        """It needs identities of both kinds."""
        return any(phase.aggregated or phase.head_only for phase in self.phases)

    @property
    def settings(self) -> Settings:
        """The hyper-parameters of all phases."""
        merged: Settings = {}
        for phase in self.phases:
            merged |= phase.settings
        if len(self.phases) > 1:
            merged["epochs"] = " + ".join(f"{100 * phase.share:g} %" for phase in self.phases)
            merged["learning rate"] = ", then ".join(f"x {phase.rate:g}" for phase in self.phases)
        return merged

    def make_network(self) -> FaceNet:
        """A new network; all methods draw its parameters in the same order."""
        network = FaceNet()
        if self.balanced:
            network.balancing = ResidualBalancingModule(EMBEDDING_SIZE)
        return network

    def schedule(self, epochs: int) -> Iterator[tuple[Phase, range]]:
        """Each phase with its epochs of ``range(epochs)``; with few of them it may have none."""
        first, share = 0, 0.0
        for phase in self.phases:
            share += phase.share
            last = round(share * epochs)
            yield phase, range(first, last)
            first = last


def one_phase(
    title: str,
    paper: str,
    loss: Callable[..., nn.Module],
    settings: Settings | None = None,
    *,
    head_only: bool = False,
    balanced: bool = False,
) -> Method:
    """A method with one loss; it is made from numbers of classes and features, and settings."""
    phase = Phase(fresh(loss), settings or {}, head_only=head_only)
    return Method(title, paper, (phase,), balanced)


def fresh(loss: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes a loss that takes nothing over from the phase before."""
    return lambda start, **settings: loss(start.num_classes, EMBEDDING_SIZE, **settings)


@torch.no_grad()
def extended_softmax(start: Start) -> SoftmaxLoss:
    """Softmax over more classes than the phase before had; the rows of those are taken over."""
    loss = SoftmaxLoss(start.num_classes, EMBEDDING_SIZE)
    for new, old in zip(loss.parameters(), start.previous.parameters(), strict=True):
        new[: len(old)] = old
    return loss


def aggregated_softmax(start: Start) -> AggregatedSoftmaxLoss:
    """Step I of Aggregate-and-Disperse."""
    return AggregatedSoftmaxLoss(start.num_classes, EMBEDDING_SIZE, start.super_classes)


def dispersion(start: Start) -> DispersionLoss:
    """Step II, from where step I ended."""
    return DispersionLoss.from_aggregated(start.previous, start.super_classes)


def aggregated_softmax_with_arcface(start: Start, **arcface: float) -> SumLoss:
    """Step I beside ArcFace over all classes."""
    added = ArcFaceLoss(start.num_classes, EMBEDDING_SIZE, **arcface)
    return SumLoss(aggregated_softmax(start), added)


def dispersion_with_arcface(start: Start) -> SumLoss:
    """Step II beside the same ArcFace."""
    aggregated, arcface = start.previous.losses
    return SumLoss(DispersionLoss.from_aggregated(aggregated, start.super_classes), arcface)


def clustered(loss: Callable[..., nn.Module], settings: Settings) -> tuple[Phase, ...]:
    """Softmax, and then a loss over clusters, which need features to be found by."""
    return (
        Phase(fresh(SoftmaxLoss), share=FIRST),
        Phase(lambda start, **own: loss(**own), settings, SECOND, SECOND_RATE, clustered=True),
    )


# Scales, margins and weights come from coarse trials of 80 steps, with four seeds from 100 on,
# on the 25 training identities of the ORL faces alone, nine of which stood in for unseen ones;
# the highest mean of the report's seven figures won. Neither the 15 unseen identities nor the
# seeds of the report entered the choice. What was tried:
# - CosFace: 13 settings, scale 8 to 128, margin 0.05 to 0.35. ArcFace: 10 settings, scale 8 to
#   64, margin 0.05 to 0.4. Larger margins, which are usual for large data, gave the better
#   figures on held-out images of the tail there and the worse ones on unseen identities.
# - Range Loss on softmax, whose features are not normalised: 18 settings, alpha 0 to 3e-3, beta
#   0 to 1e-2, margin 300 to 4000. The paper's 1e-5, 1e-4 and 2e4 are for the features of large
#   networks; softmax alone brings this one to class ranges of about 120 (squared distances) and
#   to 190 to 270 between the two nearest centroids. The margin lies a little above that: with
#   1000 the hinge pulls at every batch and only inflates the features.
# - Range Loss on CosFace: 5 settings. Squared distances of normalised features are at most 4;
#   alpha 0.03 to 0.3, beta 0 to 3, margin 1 and 2.
# - Domain Balancing: 7 settings, margin 0.05 to 0.2, rbm_weight 0.01 and 0.1; of k (5 and 10 of
#   the 24 other classes) and indicator_scale (1, 4, 16) the means differed by less than 0.1, so
#   middle ones were taken. epsilon is the mean compactness: the paper's 5.5 is for k = 100.
# - Two phases: the paper's shares of the epochs, 40 % and 60 %; 20 % and 60 % for the first gave
#   Aggregate-and-Disperse lower means. The learning rate of the second phase times 0.2 (the
#   paper's), 0.5 and 1: 0.5 has the highest mean over head-then-all and both with Aggregate-and-
#   Disperse; each for itself would take 1, 0.5 and, with ArcFace, 0.2.
# - Aggregate-and-Disperse: four numbers of super classes in two tail groups, and one group. The
#   fewer, the lower the mean (88.9 to 92.8; softmax 92.9); with one for each tail identity it is
#   softmax. The package's own rule (91.1) was kept, as it does put identities together.
# - CLMLE after softmax: 9 settings, between_margin -2 to 0.6, within_margin -1 to 0.1. But for the
#   least they differed by less than 0.2: the log-sum over a dozen clusters keeps all hinges above
#   0. Margins below the paper's bounds were taken. LMLE: 6 settings, g1 and g2 from 0 to 0.3, g3
#   from 0.1 to 1.
# - ArcFace beside step II alone, where its weights have to start anew, gave lower means (90.3 and
#   92.0, at rates of 0.2 and 0.5) than beside both steps (94.4 and 93.5).
# - Random batches, which the paper has, gave lower means for softmax, ArcFace and all of two
#   phases, by 0.5 to 1.8. All have the same batches, so that all figures can be compared.
# For other data or another network, choose anew.
COSFACE = {"margin": 0.1, "scale": 64.0}
ARCFACE = {"margin": 0.1, "scale": 64.0}
FIRST, SECOND, SECOND_RATE = 0.4, 0.6, 0.5
CLUSTER_SIZE = 4
HEAD_ONLY = one_phase("head only", "", SoftmaxLoss, head_only=True)

METHODS = {
    "softmax": one_phase("softmax", "", SoftmaxLoss),
    "softmax+range": one_phase(
        "softmax + Range Loss",
        "Zhang et al., arXiv:1611.08976",
        SoftmaxRangeLoss,
        {"alpha": 1e-3, "beta": 1e-3, "margin": 300.0},
    ),
    "cosface": one_phase("CosFace", "Wang et al., arXiv:1801.09414", CosFaceLoss, COSFACE),
    "arcface": one_phase("ArcFace", "Deng et al., arXiv:1801.07698", ArcFaceLoss, ARCFACE),
    "cosface+range": one_phase(
        "CosFace + Range Loss",
        "",
        CosFaceRangeLoss,
        COSFACE | {"alpha": 0.1, "beta": 1.0, "range_margin": 1.0},
    ),
    "domain-balancing": one_phase(
        "Domain Balancing",
        "Cao et al., CVPR 2020",
        DomainBalancingLoss,
        COSFACE | {"k": 5, "epsilon": "auto", "indicator_scale": 4.0, "rbm_weight": 0.01},
        balanced=True,
    ),
    "clmle": Method(
        "softmax, then CLMLE",
        "Huang et al., arXiv:1806.00194",
        clustered(
            CLMLELoss,
            {"between_margin": 0.03, "within_margin": 0.1, "samples_per_cluster": CLUSTER_SIZE},
        ),
    ),
    "lmle": Method(
        "softmax, then LMLE",
        "Huang et al., CVPR 2016",
        clustered(LMLELoss, {"margins": [0.1, 0.1, 0.6], "samples_per_cluster": CLUSTER_SIZE}),
    ),
    "head-only": HEAD_ONLY,
    "head-then-all": Method(
        "head, then all",
        "",
        (
            Phase(fresh(SoftmaxLoss), share=FIRST, head_only=True),
            Phase(extended_softmax, share=SECOND, rate=SECOND_RATE),
        ),
    ),
    "aggregate-disperse": Method(
        "Aggregate-and-Disperse",
        "Ma et al., Pattern Recognition 2020",
        (
            Phase(aggregated_softmax, share=FIRST, aggregated=True),
            Phase(dispersion, share=SECOND, rate=SECOND_RATE, aggregated=True),
        ),
    ),
    "arcface+aggregate-disperse": Method(
        "ArcFace + Aggregate-and-Disperse",
        "",
        (
            Phase(aggregated_softmax_with_arcface, ARCFACE, share=FIRST, aggregated=True),
            Phase(dispersion_with_arcface, share=SECOND, rate=SECOND_RATE, aggregated=True),
        ),
    ),
}
