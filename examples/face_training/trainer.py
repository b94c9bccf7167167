"""The loop: phase after phase, epoch after epoch, from a checkpoint on where there is one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from face_demo.data import DataError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from facelt_ext import CLMLELoss, ResidualBalancingModule
from facelt_ext.aggregation import SuperClasses, aggregate, class_means, split_classes
from facelt_ext.clusters import ClusterIndex

from .backbones import Embedder, make_backbone
from .images import Faces
from .options import AMP_TYPES, Options, Progress
from .recipes import Phase, Recipe, Start
from .sampling import make_batches, refresh_epochs
from .settings import describe

MOMENTUM = 0.9
# Fewer steps of a phase than this train no network.
FEW_STEPS = 500
CHECKPOINT = "checkpoint.pt"


class Trainee(nn.Module):
    """Network and loss in one module, so that gradients of both are averaged over processes."""

    def __init__(self, network: Embedder, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features, gate = self.network.forward_with_gate(images)
        return self.criterion(features, labels, *([] if gate is None else [gate]))


@dataclass(frozen=True)
class _Run:
    """What one phase trains with."""

    phase: Phase
    faces: Faces
    loader: DataLoader
    clusters: ClusterIndex | None
    trainee: nn.Module
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    @property
    def refresh(self) -> int:
        """Epochs after which clusters are found anew."""
        return refresh_epochs(self.phase.batches, len(self.loader))

    def states(self) -> dict[str, object]:
        """What a checkpoint holds of it, apart from what each process has of its own."""
        return {"optimizer": self.optimizer, "rates": self.rates, "scaler": self.scaler}


class Trainer:
    """Trains a recipe.

    Args:
        faces: what to train on.
        recipe: phases, with their numbers.
        options: all else.
        folder: where checkpoints and TensorBoard's files go.
        device: of this process.
        evaluate: called with the network after every epoch, in the first process alone; gives
            figures by the names of evaluation sets.

    Raises:
        DataError: the faces do not suit the recipe.
    """

    def __init__(
        self,
        faces: Faces,
        recipe: Recipe,
        options: Options,
        folder: Path,
        device: torch.device,
        evaluate: Callable[[Embedder], dict[str, dict[str, float]]],
    ) -> None:
        self.faces, self.recipe, self.options = faces, recipe, options
        self.folder, self.device, self.evaluate = folder, device, evaluate
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.progress = Progress()
        self.super_classes: SuperClasses | None = None
        self.criterion: nn.Module | None = None
        self._mirror = torch.Generator().manual_seed(options.seed * self.ranks + self.rank)
        for phase in recipe.phases:
            self._check(phase)
        torch.manual_seed(options.seed)
        size = options.embedding_size
        backbone = make_backbone(options.backbone, size, options.image_size)
        balancing = ResidualBalancingModule(size) if recipe.balanced else None
        self.network = Embedder(backbone, balancing).to(device)

    @property
    def leads(self) -> bool:
        """This is the process that reports, evaluates and saves."""
        return self.rank == 0

    def train(self, resume: bool) -> Progress:
        """To the end; with ``resume`` from the last checkpoint on."""
        saved = self._load() if resume else None
        writer = SummaryWriter(self.folder, purge_step=self.progress.step) if self.leads else None
        while self.progress.phase < len(self.recipe.phases):
            self._train_phase(self.recipe.phases[self.progress.phase], saved, writer)
            saved = None
            self.progress.phase, self.progress.epoch = self.progress.phase + 1, 0
        if writer is not None:
            writer.close()
        return self.progress

    def _train_phase(self, phase: Phase, saved: dict | None, writer: SummaryWriter | None) -> None:
        run = self._start_phase(phase, saved)
        if self.leads:
            self._announce(run)
        for epoch in range(self.progress.epoch, phase.epochs):
            if run.clusters is not None and epoch % run.refresh == 0:
                loader = self._in_order(run.faces)
                run.clusters.refresh_from(self.network, loader, progress=self.leads)
            self._train_epoch(run, epoch, writer)
            self._report(writer)
            self._save(run)

    def _start_phase(self, phase: Phase, saved: dict | None) -> _Run:
        """All that a phase trains with, as it was in ``saved`` where that is given."""
        seen = self._seen(phase)
        faces = self.faces if len(seen) == len(self.faces) else self.faces.keep(seen)
        batches, clusters = make_batches(
            phase.batches, faces.labels, self.ranks, self.rank, self.options.seed
        )
        if len(batches) == 0:
            raise DataError(f"{len(faces)} images make no batch")
        self._make_criterion(phase, faces, saved)
        trainee = Trainee(self.network, self.criterion)
        optimizer = torch.optim.SGD(
            trainee.parameters(), phase.rate, MOMENTUM, weight_decay=self.options.weight_decay
        )
        loader = DataLoader(
            faces,
            batch_sampler=batches,
            num_workers=self.options.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.options.workers > 0,
        )
        run = _Run(
            phase=phase,
            faces=faces,
            loader=loader,
            clusters=clusters,
            trainee=DistributedDataParallel(trainee) if self.ranks > 1 else trainee,
            optimizer=optimizer,
            rates=self._schedule(phase, optimizer, len(batches)),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.options.amp == "float16"),
        )
        if saved is not None:
            for name, each in run.states().items():
                each.load_state_dict(saved[name])
            if clusters is not None:
                clusters.load_state_dict(saved["ranks"][self.rank]["clusters"])
        return run

    def _train_epoch(self, run: _Run, epoch: int, writer: SummaryWriter | None) -> None:
        run.loader.batch_sampler.set_epoch(epoch)
        self.progress.rate.append(run.optimizer.param_groups[0]["lr"])
        start, losses = time.perf_counter(), []
        run.trainee.train()
        for images, labels, samples in self._bar(run, epoch):
            labels = run.faces.known(labels, samples)
            losses.append(self._step(run, images, labels))
            run.rates.step()
            if run.clusters is not None and isinstance(self.criterion, CLMLELoss):
                run.clusters.update_losses(samples, self.criterion.sample_losses)
            self.progress.step += 1
            if writer is not None and self.progress.step % 10 == 0:
                writer.add_scalar("train/loss", losses[-1], self.progress.step)
        self.progress.loss.append(self._mean(torch.stack(losses)))
        self.progress.seconds_per_step.append((time.perf_counter() - start) / len(losses))
        self.progress.epoch = epoch + 1

    def _step(self, run: _Run, images: Tensor, labels: Tensor) -> Tensor:
        mirrored = torch.rand(len(images), generator=self._mirror) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        amp = AMP_TYPES[self.options.amp]
        with torch.autocast(self.device.type, amp or torch.bfloat16, enabled=amp is not None):
            loss = run.trainee(images, labels)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        if self.options.clip_norm > 0:
            parameters = run.optimizer.param_groups[0]["params"]
            nn.utils.clip_grad_norm_(parameters, self.options.clip_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return loss.detach()

    def _check(self, phase: Phase) -> None:
        if not phase.minimums:
            return
        try:
            groups = split_classes(self.faces.counts(), phase.minimums)
        except ValueError as error:
            raise DataError(f"--set {error}") from None
        tail = sum(len(each) for each in groups.tails)
        if len(groups.head) < 2 or tail == 0:
            raise DataError(
                f"the recipe needs at least two identities of the head, with {phase.minimums[0]} "
                f"images or more, and one of the tail, with fewer: found {len(groups.head)} and "
                f"{tail}; choose other limits with --set minimums=..."
            )

    def _seen(self, phase: Phase) -> Tensor:
        """The images that the phase sees."""
        if not phase.head_only:
            return torch.arange(len(self.faces))
        head = split_classes(self.faces.counts(), phase.minimums).head
        return torch.isin(self.faces.labels, head).nonzero()[:, 0]

    def _make_criterion(self, phase: Phase, faces: Faces, saved: dict | None) -> None:
        if phase.aggregated and self.super_classes is None:
            self.super_classes = self._aggregate(phase)
        previous = None if saved is not None else self.criterion
        start = Start(len(faces.names), self.options.embedding_size, previous, self.super_classes)
        # A phase draws the same numbers whether the run was killed before it or not.
        torch.manual_seed(self.options.seed + self.progress.phase)
        try:
            self.criterion = phase.make_loss(start, **phase.loss).to(self.device)
        except (TypeError, ValueError) as error:
            raise DataError(f"--set {error}") from error
        if saved is not None:
            self.criterion.load_state_dict(saved["criterion"])

    def _aggregate(self, phase: Phase) -> SuperClasses:
        """Of the mean features that the network has, by the first process for all."""
        found: list[SuperClasses | None] = [None]
        if self.leads:
            loader = self._in_order(self.faces)
            means, counts = class_means(self.network, loader, len(self.faces.names))
            found[0] = aggregate(means, counts, minimums=phase.minimums, seed=self.options.seed)
            tqdm.write(found[0].summary())
        if self.ranks > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def _in_order(self, faces: Faces) -> DataLoader:
        return DataLoader(faces, batch_size=256, num_workers=self.options.workers)

    def _schedule(
        self, phase: Phase, optimizer: torch.optim.Optimizer, batches: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        steps = phase.epochs * batches
        if self.options.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        # Of few epochs milestones fall together: one division at each, none at the start.
        ends = {round(share * phase.epochs) for share in phase.milestones} - {0, phase.epochs}
        return torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [end * batches for end in sorted(ends)]
        )

    def _announce(self, run: _Run) -> None:
        steps = run.phase.epochs * len(run.loader)
        tqdm.write(
            f"{self._title()}: {len(run.faces)} images, {run.phase.epochs} epochs of "
            f"{len(run.loader)} batches"
        )
        if steps < FEW_STEPS:
            tqdm.write(
                f"{steps} steps are few: the papers' epochs are for hundreds of thousands of "
                f"images; give more --epochs, or smaller batches with --set"
            )

    def _title(self) -> str:
        return f"phase {self.progress.phase + 1}/{len(self.recipe.phases)}"

    def _bar(self, run: _Run, epoch: int) -> Iterator:
        title = f"{self._title()}, epoch {epoch + 1}/{run.phase.epochs}"
        return tqdm(run.loader, title, unit="batch", leave=False, disable=not self.leads)

    def _mean(self, losses: Tensor) -> float:
        """Over the steps and the processes."""
        mean = losses.double().mean()
        if self.ranks > 1:
            dist.all_reduce(mean)
        return float(mean) / self.ranks

    def _report(self, writer: SummaryWriter | None) -> None:
        if writer is None:
            return
        progress = self.progress
        figures = self.evaluate(self.network)
        progress.figures.append(figures)
        writer.add_scalar("train/learning rate", progress.rate[-1], progress.step)
        writer.add_scalar("train/epoch loss", progress.loss[-1], progress.step)
        writer.add_scalar("train/seconds per step", progress.seconds_per_step[-1], progress.step)
        for name, own in figures.items():
            for figure, value in own.items():
                writer.add_scalar(f"{name}/{figure}", value, progress.step)
        writer.flush()
        accuracies = [f"{name} {100 * own['accuracy']:.2f} %" for name, own in figures.items()]
        judged = f", accuracy: {', '.join(accuracies)}" if accuracies else ""
        tqdm.write(
            f"{self._title()}, epoch {progress.epoch}: loss {progress.loss[-1]:.4f}, "
            f"{1e3 * progress.seconds_per_step[-1]:.0f} ms a step{judged}"
        )

    def _save(self, run: _Run) -> None:
        """Replaces the checkpoint at once, so that a run killed meanwhile keeps the one before."""
        own = {
            "mirror": self._mirror.get_state(),
            "clusters": None if run.clusters is None else run.clusters.state_dict(),
        }
        everyone = [own]
        if self.ranks > 1:
            everyone = [None] * self.ranks
            dist.all_gather_object(everyone, own)
        if not self.leads:
            return
        content = {name: each.state_dict() for name, each in run.states().items()} | {
            "options": asdict(self.options),
            "recipe": describe(self.recipe),
            "images": len(self.faces),
            "names": self.faces.names,
            "progress": asdict(self.progress),
            "network": self.network.state_dict(),
            "criterion": self.criterion.state_dict(),
            "super_classes": None if self.super_classes is None else vars(self.super_classes),
            "ranks": everyone,
        }
        path = self.folder / CHECKPOINT
        torch.save(content, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def _load(self) -> dict:
        saved = torch.load(self.folder / CHECKPOINT, map_location="cpu", weights_only=True)
        now = {
            "options": asdict(self.options),
            "recipe": describe(self.recipe),
            "images": len(self.faces),
            "names": self.faces.names,
            "processes": self.ranks,
        }
        before = {**saved, "processes": len(saved["ranks"])}
        for name, value in now.items():
            if before[name] != value:
                raise DataError(
                    f"{self.folder / CHECKPOINT} was written with other {name}; give the same "
                    f"arguments as then, or another --output"
                )
        self.progress = Progress(**saved["progress"])
        self.network.load_state_dict(saved["network"])
        if saved["super_classes"] is not None:
            self.super_classes = SuperClasses(**saved["super_classes"])
        self._mirror.set_state(saved["ranks"][self.rank]["mirror"])
        return saved
