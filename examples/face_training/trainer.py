"""The loop: phase after phase, epoch after epoch, from a checkpoint on where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from face_demo.errors import DataError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from facelt_ext import CLMLELoss, ResidualBalancingModule
from facelt_ext.aggregation import SuperClasses, aggregate, class_means
from facelt_ext.clusters import ClusterIndex

from .backbones import Embedder, make_backbone
from .checkpoint import CHECKPOINT, check_same_run, restore, write_checkpoint
from .curves import Curves
from .divergence import check_losses, check_weights, mean_loss
from .images import Faces
from .options import AMP_TYPES, Options, Progress
from .phases import check_phase, make_loss, seen
from .rates import make_rates
from .recipes import Phase, Recipe, Start
from .sampling import make_batches, refresh_epochs
from .settings import describe

MOMENTUM = 0.9
# Fewer steps of a phase than this train no network.
FEW_STEPS = 500
# Steps after which the losses are looked at, which waits for the device.
LOOK = 10


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
        saved: the checkpoint to go on from, if there is one.

    Raises:
        DataError: the faces do not suit the recipe; the checkpoint is damaged, or of another run.
    """

    def __init__(
        self,
        faces: Faces,
        recipe: Recipe,
        options: Options,
        folder: Path,
        device: torch.device,
        evaluate: Callable[[Embedder], dict[str, dict[str, float]]],
        saved: dict | None,
    ) -> None:
        self.faces, self.recipe, self.options = faces, recipe, options
        self.folder, self.device, self.evaluate = folder, device, evaluate
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.progress = Progress()
        self.super_classes: SuperClasses | None = None
        self.criterion: nn.Module | None = None
        self._fingerprint = faces.fingerprint()
        self._mirror = torch.Generator().manual_seed(
            (options.seed * self.ranks + self.rank) % 2**64
        )
        torch.manual_seed(options.seed)
        size = options.embedding_size
        backbone = make_backbone(options.backbone, size, options.image_size)
        balancing = ResidualBalancingModule(size) if recipe.balanced else None
        self.network = Embedder(backbone, balancing).to(device)
        self._saved = saved
        if saved is not None:
            self._take(saved)
        for phase in recipe.phases:
            check_phase(phase, faces, self.network, options, self.ranks)

    @property
    def leads(self) -> bool:
        """This is the process that reports, evaluates and saves."""
        return self.rank == 0

    def train(self) -> Progress:
        """To the end.

        Raises:
            DataError: the loss or a weight is not finite; a file cannot be written.
        """
        with Curves(self.folder, self.progress.step) if self.leads else nullcontext() as curves:
            while self.progress.phase < len(self.recipe.phases):
                self._train_phase(self.recipe.phases[self.progress.phase], curves)
                self.progress.phase, self.progress.epoch = self.progress.phase + 1, 0
        return self.progress

    def _train_phase(self, phase: Phase, curves: Curves | None) -> None:
        run, self._saved = self._start_phase(phase, self._saved), None
        if self.leads and self.progress.epoch < phase.epochs:
            self._announce(run)
        clustered = run.clusters is not None
        every = refresh_epochs(phase.batches, len(run.loader)) if clustered else 0
        for epoch in range(self.progress.epoch, phase.epochs):
            if clustered and epoch % every == 0:
                self._refresh(run)
            self._train_epoch(run, epoch, curves)
            if self.leads:
                step = f"step {self.progress.step}"
                check_weights(self.network, self.criterion, run.optimizer, step)
                self._report(curves)
            self._save(run)

    def _start_phase(self, phase: Phase, saved: dict | None) -> _Run:
        """All that a phase trains with, as it was in ``saved`` where that is given."""
        faces = seen(phase, self.faces)
        batches, clusters = make_batches(
            phase.batches, faces.labels, self.ranks, self.rank, self.options.seed
        )
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
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.amp == "float16")
        if saved is not None:
            self._restore(saved, optimizer, scaler, clusters)
        return _Run(
            phase=phase,
            faces=faces,
            loader=loader,
            clusters=clusters,
            trainee=DistributedDataParallel(trainee) if self.ranks > 1 else trainee,
            optimizer=optimizer,
            rates=make_rates(
                phase,
                optimizer,
                self.options.schedule,
                len(batches),
                self.progress.epoch * len(batches),
            ),
            scaler=scaler,
        )

    def _train_epoch(self, run: _Run, epoch: int, curves: Curves | None) -> None:
        run.loader.batch_sampler.set_epoch(epoch)
        self.progress.rate.append(run.optimizer.param_groups[0]["lr"])
        start, losses = time.perf_counter(), []
        run.trainee.train()
        for images, labels, samples in self._batches(run, epoch):
            labels = run.faces.known(labels, samples)
            losses.append(self._step(run, images, labels))
            run.rates.step()
            if run.clusters is not None and isinstance(self.criterion, CLMLELoss):
                run.clusters.update_losses(samples, self.criterion.sample_losses)
            self.progress.step += 1
            if len(losses) % LOOK == 0:
                self._look(run, losses[-LOOK:])
                if curves is not None:
                    curves.add({"train/loss": losses[-1]}, self.progress.step)
        self._look(run, losses[-LOOK:])
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

    def _look(self, run: _Run, losses: list[Tensor]) -> None:
        """At the losses of the last steps."""
        check_losses(torch.stack(losses), self.progress.step - len(losses) + 1, run.scaler)

    def _make_criterion(self, phase: Phase, faces: Faces, saved: dict | None) -> None:
        if phase.aggregated and self.super_classes is None:
            self.super_classes = self._aggregate(phase)
        previous = None if saved is not None else self.criterion
        start = Start(len(faces.names), self.options.embedding_size, previous, self.super_classes)
        # A phase draws the same numbers whether the run was killed before it or not.
        torch.manual_seed(self.options.seed + self.progress.phase)
        self.criterion = make_loss(phase, start).to(self.device)
        if saved is not None:
            restore(self.folder / CHECKPOINT, saved, {"criterion": self.criterion})

    def _aggregate(self, phase: Phase) -> SuperClasses:
        """Of the mean features that the network has, by the first process for all."""
        found: list[SuperClasses | None] = [None]
        if self.leads:
            loader = self._in_order(self.faces)
            try:
                means, counts = class_means(self.network, loader, len(self.faces.names))
                found[0] = aggregate(means, counts, minimums=phase.minimums, seed=self.options.seed)
            except ValueError as error:
                raise DataError(f"super classes: {error}") from error
            tqdm.write(found[0].summary())
        if self.ranks > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def _refresh(self, run: _Run) -> None:
        loader = self._in_order(run.faces)
        try:
            run.clusters.refresh_from(self.network, loader, progress=self.leads)
        except ValueError as error:
            raise DataError(f"clusters: {error}") from error

    def _in_order(self, faces: Faces) -> DataLoader:
        return DataLoader(faces, batch_size=256, num_workers=self.options.workers)

    def _announce(self, run: _Run) -> None:
        steps = run.phase.epochs * len(run.loader)
        done = self.progress.epoch
        start = f", from epoch {done + 1} on with rate {run.rates.get_last_lr()[0]:g}"
        tqdm.write(
            f"{self._title()}: {len(run.faces)} images, {run.phase.epochs} epochs of "
            f"{len(run.loader)} batches{start if done else ''}"
        )
        if steps < FEW_STEPS:
            tqdm.write(
                f"{steps} steps are few: the papers' epochs are for hundreds of thousands of "
                f"images; give more --epochs, or smaller batches with --set"
            )

    def _title(self) -> str:
        return f"phase {self.progress.phase + 1}/{len(self.recipe.phases)}"

    def _batches(self, run: _Run, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        title = f"{self._title()}, epoch {epoch + 1}/{run.phase.epochs}"
        try:
            yield from tqdm(run.loader, title, unit="batch", leave=False, disable=not self.leads)
        except (OSError, EOFError) as error:
            # What the DataLoader meets where a worker was killed, before it notices that.
            raise DataError(
                f"a process that loads images has ended ({error}); give fewer --workers if memory "
                f"was short"
            ) from error

    def _mean(self, losses: Tensor) -> float:
        """Over the steps and the processes."""
        mean = mean_loss(losses, self.progress.step)
        if self.ranks > 1:
            dist.all_reduce(mean)
        return float(mean) / self.ranks

    def _report(self, curves: Curves) -> None:
        progress = self.progress
        figures = self.evaluate(self.network)
        progress.figures.append(figures)
        values = {
            "train/learning rate": progress.rate[-1],
            "train/epoch loss": progress.loss[-1],
            "train/seconds per step": progress.seconds_per_step[-1],
        }
        for name, own in figures.items():
            values |= {f"{name}/{figure}": value for figure, value in own.items()}
        curves.add(values, progress.step)
        curves.flush()
        accuracies = [f"{name} {100 * own['accuracy']:.2f} %" for name, own in figures.items()]
        judged = f", accuracy: {', '.join(accuracies)}" if accuracies else ""
        tqdm.write(
            f"{self._title()}, epoch {progress.epoch}: loss {progress.loss[-1]:.4f}, "
            f"{1e3 * progress.seconds_per_step[-1]:.0f} ms a step{judged}"
        )

    def _save(self, run: _Run) -> None:
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
        content = {
            **self._facts(),
            "ranks": everyone,
            "progress": asdict(self.progress),
            "network": self.network.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "super_classes": None if self.super_classes is None else vars(self.super_classes),
        }
        write_checkpoint(self.folder / CHECKPOINT, content)

    def _facts(self) -> dict[str, object]:
        """What has to be the same where a run goes on."""
        return {
            "options": asdict(self.options),
            "recipe": describe(self.recipe),
            "images": len(self.faces),
            "names": self.faces.names,
            "fingerprint": self._fingerprint,
            "ranks": [None] * self.ranks,
        }

    def _take(self, saved: dict) -> None:
        """All of a checkpoint but what a phase has of its own."""
        path = self.folder / CHECKPOINT
        check_same_run(path, saved, self._facts())
        if self.leads and "fingerprint" not in saved:
            tqdm.write(f"{path} is of an older version: images may have changed since")
        self.progress = Progress(**{name: saved["progress"][name] for name in vars(Progress())})
        restore(path, saved, {"network": self.network})
        try:
            if saved["super_classes"] is not None:
                self.super_classes = SuperClasses(**saved["super_classes"])
            self._mirror.set_state(saved["ranks"][self.rank]["mirror"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error

    def _restore(
        self,
        saved: dict,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clusters: ClusterIndex | None,
    ) -> None:
        """What a phase has of its own."""
        path = self.folder / CHECKPOINT
        restore(path, saved, {"optimizer": optimizer, "scaler": scaler})
        if clusters is not None:
            restore(path, saved["ranks"][self.rank], {"clusters": clusters})
        check_weights(self.network, self.criterion, optimizer, str(path))
