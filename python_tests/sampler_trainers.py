"""Training loops of real frameworks: from a batch sampler to the batches that each delivers.

Run as a script it is one of several processes: RANK, WORLD_SIZE and MASTER_PORT tell which.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import lightning
import torch
import torch.distributed as dist
import transformers
from ignite.engine import Engine
from lightning.pytorch.callbacks import ModelCheckpoint
from sampler_cases import NUM_BATCHES, SAMPLERS, Batches, Make, Numbers
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from facelt_ext.samplers import ClusterBatchSampler, PKSampler

EPOCHS, STOP = 3, 7
WORLD = int(os.environ.get("WORLD_SIZE", 1))

Epochs = list[Batches]


class Recorder(nn.Module):
    """Keeps the batches of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.epochs: Epochs = []

    def forward(self, index: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        self.epochs[-1].append(index.tolist())
        return {"loss": self.weight.square()}


def iterated(loader: DataLoader) -> Epochs:
    assert len(loader) == NUM_BATCHES
    return [[batch["index"].tolist() for batch in loader] for _ in range(EPOCHS)]


def plain(make: Make) -> Epochs:
    return iterated(DataLoader(Numbers(), batch_sampler=make()))


def with_workers(make: Make) -> Epochs:
    loader = DataLoader(Numbers(), batch_sampler=make(), num_workers=2, persistent_workers=True)
    return iterated(loader)


def stateful(make: Make) -> Epochs:
    return iterated(StatefulDataLoader(Numbers(), batch_sampler=make()))


def prepared(make: Make, **options: object) -> DataLoader:
    settings = accelerate.DataLoaderConfiguration(**options)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=settings)
    return accelerator.prepare(DataLoader(Numbers(), batch_sampler=make()))


def accelerated(make: Make) -> Epochs:
    return iterated(prepared(make))


def accelerated_stateful(make: Make) -> Epochs:
    return iterated(prepared(make, use_stateful_dataloader=True))


def accelerated_dispatched(make: Make) -> Epochs:
    return iterated(prepared(make, dispatch_batches=True))


def accelerated_resumed(make: Make) -> Epochs:
    """Begun by one loader, left, and ended by another from the count of batches."""
    loader, found = prepared(make), []
    for number in range(STOP):
        if number % NUM_BATCHES == 0:
            loader.set_epoch(number // NUM_BATCHES)
            batches = iter(loader)
            found.append([])
        found[-1].append(next(batches)["index"].tolist())
    loader = prepared(make)
    first, done = divmod(STOP, NUM_BATCHES)
    for epoch in range(first, EPOCHS):
        loader.set_epoch(epoch)
        if epoch > first:
            found.append([])
        rest = accelerate.skip_first_batches(loader, done) if epoch == first else loader
        found[-1] += [batch["index"].tolist() for batch in rest]
    return found


class HuggingFaceTrainer(transformers.Trainer):
    batch_sampler: PKSampler | ClusterBatchSampler

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.batch_sampler, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


class Epoch(transformers.TrainerCallback):
    """Begins a list; tells the epoch, which Trainer does not in a resumed one of several ranks."""

    def __init__(self, epochs: Epochs, sampler: PKSampler | ClusterBatchSampler | None) -> None:
        self.epochs, self.sampler = epochs, sampler

    def on_epoch_begin(
        self, arguments: object, state: transformers.TrainerState, *_: object, **__: object
    ) -> None:
        self.epochs.append([])
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch))


def huggingface_run(make: Make, folder: str, steps: int, tell: bool, resume: bool) -> Epochs:
    arguments = transformers.TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        max_steps=steps,
        use_cpu=True,
        ddp_backend="gloo" if WORLD > 1 else None,
        save_strategy="steps",
        save_steps=steps,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model, sampler = Recorder(), make()
    epoch = Epoch(model.epochs, sampler if tell else None)
    trainer = HuggingFaceTrainer(model, arguments, train_dataset=Numbers(), callbacks=[epoch])
    trainer.batch_sampler = sampler
    trainer.train(resume_from_checkpoint=resume)
    return model.epochs


def huggingface(make: Make) -> Epochs:
    with tempfile.TemporaryDirectory() as folder:
        return huggingface_run(make, folder, EPOCHS * NUM_BATCHES, tell=False, resume=False)


def huggingface_resumed(make: Make) -> Epochs:
    with shared_folder() as folder:
        begun = huggingface_run(make, folder, STOP, tell=True, resume=False)
        rest = huggingface_run(make, folder, EPOCHS * NUM_BATCHES, tell=True, resume=True)
    return [*begun[:-1], begun[-1] + rest[0], *rest[1:]]


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """The same for all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        if WORLD > 1:
            dist.broadcast_object_list(folders)
        yield folders[0]
        if WORLD > 1:
            dist.barrier()


class LightningRecorder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()

    def on_train_epoch_start(self) -> None:
        self.recorder.epochs.append([])

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.recorder(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning_trainer(**options: object) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp" if WORLD > 1 else "auto",
        **{"max_epochs": EPOCHS, "enable_checkpointing": False, **quiet, **options},
    )


def lightning_fitted(make: Make, **options: object) -> Epochs:
    module, loader = LightningRecorder(), DataLoader(Numbers(), batch_sampler=make(), **options)
    lightning_trainer(use_distributed_sampler=False).fit(module, loader)
    return module.recorder.epochs


def lightning_with_workers(make: Make) -> Epochs:
    return lightning_fitted(make, num_workers=1)


def lightning_resumed(make: Make) -> Epochs:
    """From a checkpoint within an epoch, with the loader that Lightning can save and restore."""
    found: Epochs = [[]]
    with shared_folder() as folder:
        saved = ModelCheckpoint(folder, "half", every_n_train_steps=STOP, save_top_k=-1)
        runs = [
            ({"max_steps": STOP, "enable_checkpointing": True, "callbacks": [saved]}, None),
            ({"max_epochs": EPOCHS}, Path(folder, "half.ckpt")),
        ]
        for options, path in runs:
            module = LightningRecorder()
            module.recorder.epochs.append(found.pop())
            loader = StatefulDataLoader(Numbers(), batch_sampler=make(), num_workers=2)
            trainer = lightning_trainer(use_distributed_sampler=False, **options)
            trainer.fit(module, loader, ckpt_path=path)
            found += [epoch for epoch in module.recorder.epochs if epoch]
    return found


def fabric(make: Make) -> Epochs:
    strategy = "ddp" if WORLD > 1 else "auto"
    runner = lightning.Fabric(accelerator="cpu", devices=WORLD, strategy=strategy)
    runner.launch()
    loader = DataLoader(Numbers(), batch_sampler=make())
    return iterated(runner.setup_dataloaders(loader, use_distributed_sampler=False))


def ignite(make: Make) -> Epochs:
    found: Epochs = [[] for _ in range(EPOCHS)]

    def step(engine: Engine, batch: dict[str, torch.Tensor]) -> None:
        found[engine.state.epoch - 1].append(batch["index"].tolist())

    Engine(step).run(DataLoader(Numbers(), batch_sampler=make()), max_epochs=EPOCHS)
    return found


TRAINERS: dict[str, Callable[[Make], Epochs]] = {
    each.__name__: each
    for each in (
        plain,
        with_workers,
        stateful,
        accelerated,
        accelerated_stateful,
        accelerated_dispatched,
        accelerated_resumed,
        huggingface,
        huggingface_resumed,
        lightning_fitted,
        lightning_with_workers,
        lightning_resumed,
        fabric,
        ignite,
    )
}


def lightning_refused(make: Make) -> str:
    """What Lightning says where it is to put its own sampler into ours, on several processes."""
    loader = DataLoader(Numbers(), batch_sampler=make())
    return refusal(lambda: lightning_trainer().fit(LightningRecorder(), loader))


def lightning_wrong_place(make: Make) -> str:
    loader = DataLoader(Numbers(), batch_size=2, sampler=make())
    return refusal(lambda: lightning_trainer().fit(LightningRecorder(), loader))


def accelerate_other_world(make: Make) -> str:
    loader = DataLoader(Numbers(), batch_sampler=make(num_replicas=3, rank=0))
    return refusal(lambda: len(accelerate.Accelerator(cpu=True).prepare(loader)))


def in_turn(make: Make) -> Batches:
    """The batches of one process, handed out by Accelerate."""
    loader = prepared(lambda: make(num_replicas=1, rank=0))
    return [batch["index"].tolist() for batch in loader]


REFUSALS = (lightning_refused, lightning_wrong_place, accelerate_other_world)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


def main(path: str) -> None:
    """All of it over all samplers, as one of several ranks, into a file.

    The samplers are made before the ranks know of each other.
    """
    warnings.simplefilter("ignore")
    ready = {
        (trainer, sampler): [make(), make()]
        for trainer in TRAINERS
        for sampler, make in SAMPLERS.items()
    }
    dist.init_process_group("gloo")
    found = {
        "delivered": {
            f"{trainer} {sampler}": TRAINERS[trainer](made.pop)
            for (trainer, sampler), made in ready.items()
        },
        "refused": {
            f"{each.__name__} {sampler}": each(make)
            for each in REFUSALS
            for sampler, make in SAMPLERS.items()
        },
        "in turn": {sampler: in_turn(make) for sampler, make in SAMPLERS.items()},
    }
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
