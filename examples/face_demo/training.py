"""The trainings of one seed: phase after phase, and the super classes that some of them need."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from facelt_ext import CLMLELoss
from facelt_ext.aggregation import SuperClasses, aggregate, class_means
from facelt_ext.clusters import ClusterIndex
from facelt_ext.functional import class_ranges
from facelt_ext.samplers import ClusterBatchSampler, PKSampler

from .data import LongTailSplit
from .methods import HEAD_ONLY, Method, Phase, Start
from .model import FaceNet, augment, embed, network_input

CLASSES_PER_BATCH = 16
SAMPLES_PER_CLASS = 4
# Epochs after which the clusters are found anew.
REFRESH = 6
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 5e-4

History = dict[str, list[float]]


@dataclass(frozen=True)
class Trained:
    """A trained network and what came of its training.

    Attributes:
        network, criterion: as the last phase left them.
        history: curves of the loss and of the class spread.
        milliseconds: wall time of a ``step`` of the last phase, and of the ``loss`` alone, forward
            and backward, on the last batch.
        clusters: that the last phase drew its batches from, if it did.
    """

    network: FaceNet
    criterion: nn.Module
    history: History
    milliseconds: dict[str, float]
    clusters: ClusterIndex | None


class Course:
    """The trainings of one seed.

    Every method gets the same images, equally augmented, as long as it sees all identities, and
    starts from the same convolutions.

    Args:
        split: the images.
        epochs: of each training.
        seed: of weights, batches, augmentation and clusters.
        device: where to train.
        progress: is moved on by one with each epoch.
    """

    def __init__(
        self, split: LongTailSplit, epochs: int, seed: int, device: torch.device, progress: tqdm
    ) -> None:
        self.split = split
        self.epochs = epochs
        self.seed = seed
        self.device = device
        self.progress = progress
        self.inputs = network_input(split.train_images)

    def train(self, method: Method) -> Trained:
        return self.head_only if method is HEAD_ONLY else self._train(method)

    @cached_property
    def head_only(self) -> Trained:
        """A method of its own, and the base model that super classes are made with."""
        return self._train(HEAD_ONLY)

    @cached_property
    def super_classes(self) -> SuperClasses:
        """Of the tail identities, by the mean features of the network trained on the head only."""
        # Whether it is made now or was before, the method that asks must draw the same numbers.
        with torch.random.fork_rng():
            network = self.head_only.network.eval()
            images = TensorDataset(self.inputs, self.split.train_labels)
            means, counts = class_means(
                lambda batch: network(batch)[0],
                DataLoader(images, batch_size=256),
                len(self.split.train_counts),
                device=self.device,
                progress=False,
            )
            return aggregate(means, counts, minimums=self.split.minimums, seed=self.seed)

    def _train(self, method: Method) -> Trained:
        torch.manual_seed(self.seed)
        network, criterion = None, None
        history: History = {"loss": [], "spread": []}
        for phase, epochs in method.schedule(self.epochs):
            # The methods draw different numbers of parameters; the augmentation must not notice.
            with torch.random.fork_rng():
                if network is None:
                    network = method.make_network().to(self.device)
                criterion = phase.make_loss(self._start(phase, criterion), **phase.settings)
            criterion.to(self.device)
            milliseconds, clusters = self._train_phase(network, criterion, phase, epochs, history)
        return Trained(network, criterion, history, milliseconds, clusters)

    def _start(self, phase: Phase, previous: nn.Module | None) -> Start:
        return Start(
            num_classes=self._num_classes(phase),
            previous=previous,
            super_classes=self.super_classes if phase.aggregated else None,
        )

    def _num_classes(self, phase: Phase) -> int:
        """Identities come richest first, so those of the head are the first ones."""
        return int(self.split.is_head.sum()) if phase.head_only else len(self.split.is_head)

    def _train_phase(
        self, network: FaceNet, criterion: nn.Module, phase: Phase, epochs: range, history: History
    ) -> tuple[dict[str, float], ClusterIndex | None]:
        """Trains both, adds to the curves, and gives the times and the clusters of `Trained`."""
        if not epochs:
            return {}, None
        labels = self.split.train_labels
        seen = (labels < self._num_classes(phase)).nonzero()[:, 0]
        clusters = None
        sampler = make_sampler(self.split, self._num_classes(phase), self.seed)
        if phase.clustered:
            size = criterion.samples_per_cluster
            clusters = ClusterIndex(labels, cluster_size=size, seed=self.seed)
            sampler = make_cluster_sampler(clusters, size, len(sampler))
        loader = DataLoader(
            TensorDataset(self.inputs[seen], labels[seen], seen), batch_sampler=sampler
        )
        rate = LEARNING_RATE * phase.rate
        parameters = [*network.parameters(), *criterion.parameters()]
        optimizer = torch.optim.Adam(parameters, rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=len(epochs) * len(sampler)
        )
        criterion.train()
        seconds = 0.0
        for epoch in epochs:
            if clusters is not None and (epoch - epochs.start) % REFRESH == 0:
                clusters.refresh(embed(network, self.inputs))
            network.train()
            sampler.set_epoch(epoch)
            sums = torch.zeros(2)
            start = time.perf_counter()
            for batch, labels, samples in loader:
                labels = labels.to(self.device)
                features, gate = network(augment(batch.to(self.device)))
                loss = criterion(features, labels, *([] if gate is None else [gate]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if isinstance(criterion, CLMLELoss):
                    clusters.update_losses(samples, criterion.sample_losses)
                sums += torch.stack([loss.detach(), class_spread(features, labels)]).cpu()
            seconds += time.perf_counter() - start
            for name, value in zip(history, sums.tolist(), strict=True):
                history[name].append(value / len(sampler))
            self.progress.update()
        milliseconds = {
            "step": 1e3 * seconds / (len(epochs) * len(sampler)),
            "loss": loss_milliseconds(criterion, features, labels, gate),
        }
        return milliseconds, clusters


def loss_milliseconds(
    criterion: nn.Module, features: Tensor, labels: Tensor, gate: Tensor | None
) -> float:
    """Median wall time of a loss, forward and backward."""
    inputs = [features.detach().requires_grad_()]
    gates = [] if gate is None else [gate.detach().requires_grad_()]
    timer = Timer(
        "criterion(*inputs, labels, *gates).backward()",
        globals={
            "criterion": copy.deepcopy(criterion),
            "inputs": inputs,
            "labels": labels,
            "gates": gates,
        },
    )
    return 1e3 * timer.blocked_autorange(min_run_time=0.05).median


@torch.no_grad()
def class_spread(features: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the largest squared distance between normalised features of one."""
    return class_ranges(F.normalize(features), labels, k=1).ranges.mean()


def make_sampler(split: LongTailSplit, num_classes: int, seed: int) -> PKSampler:
    """Batches with several images of every class that they hold; poor classes repeat theirs.

    With the first ``num_classes`` alone there are as many batches as with all, and of nearly the
    same size.
    """
    batch_size = min(CLASSES_PER_BATCH, len(split.train_counts)) * SAMPLES_PER_CLASS
    classes = min(CLASSES_PER_BATCH, num_classes)
    return PKSampler(
        split.train_labels[split.train_labels < num_classes],
        classes,
        batch_size // classes,
        num_batches=math.ceil(len(split.train_labels) / batch_size),
        seed=seed,
    )


def make_cluster_sampler(
    clusters: ClusterIndex, samples_per_cluster: int, num_batches: int
) -> ClusterBatchSampler:
    """Batches of nearly as many images as the other methods have."""
    return ClusterBatchSampler(
        clusters,
        clusters_per_batch=min(CLASSES_PER_BATCH, clusters.num_clusters),
        samples_per_cluster=samples_per_cluster,
        num_batches=num_batches,
        seed=clusters.seed,
    )
