"""What the batch samplers share: epochs, ranks, and going on in the middle of an epoch."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.utils.data import Sampler

from facelt_ext._checks import LARGEST_SIZE, check_count

# Indices in a batch, which is a list: of more, not even the list fits into common memory.
LARGEST_BATCH = 2**24
LARGEST_WORLD = 2**31 - 1
_LOADERS = ("torch.utils.data.dataloader", "torchdata.stateful_dataloader.stateful_dataloader")
# Code in which a sampler is iterated for single indices, to make batches of them.
_COLLECTORS = (
    "torch.utils.data.sampler",
    "torchdata.stateful_dataloader.sampler",
    "lightning.fabric.utilities.distributed",
    "lightning_fabric.utilities.distributed",
    "ignite.distributed.auto",
)


@dataclass(eq=False)
class _Pass:
    """An iteration over an epoch, from batch `start` on; until `drawn` exceeds it, not begun."""

    epoch: int
    start: int = 0
    drawn: int = 0

    @property
    def begun(self) -> bool:
        return self.drawn > self.start


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of one epoch after another, for one or several replicas.

    Args:
        samples, batch_size: an epoch draws about `samples` in batches of `batch_size`.
        num_batches, num_replicas, rank, seed: as in `PKSampler`.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        num_batches: int | None,
        num_replicas: int | None,
        rank: int | None,
        seed: int,
    ) -> None:
        self._epoch_samples, self._batch_size = samples, batch_size
        if num_batches is not None:
            num_batches = check_count(num_batches, "num_batches", maximum=LARGEST_SIZE)
        if num_replicas is not None:
            num_replicas = check_count(num_replicas, "num_replicas", maximum=LARGEST_WORLD)
        if rank is not None:
            rank = check_count(rank, "rank", minimum=0)
        self._num_batches, self._num_replicas, self._rank = num_batches, num_replicas, rank
        self.seed = check_count(seed, "seed", minimum=0)
        # What the next iteration goes over if not begun, otherwise it goes over the next epoch;
        # what the newest iterator goes over; what `state_dict` tells.
        self._next = self._newest = self._told = _Pass(0)
        if num_replicas is not None or _world() is not None:
            self._replicas_and_rank()

    @property
    def num_replicas(self) -> int:
        """Replicas that share an epoch, as of now."""
        if self._num_replicas is not None:
            return self._num_replicas
        return (_world() or (1, 0))[0]

    @property
    def rank(self) -> int:
        """Which of the replicas this one is, as of now."""
        return (_world() or (1, 0))[1] if self._rank is None else self._rank

    @property
    def num_batches(self) -> int:
        """Batches of an epoch on each replica, as of now."""
        return self._batches_each(self.num_replicas)

    @property
    def epoch(self) -> int:
        """The epoch that is drawn or, between two epochs, the next one."""
        return self._told.epoch

    @property
    def sampler(self) -> EpochBatchSampler:
        """The sampler itself: trainers call ``loader.batch_sampler.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches the next iteration draws, from the first batch on.

        Without it each iteration draws the epoch after the one begun last. An epoch that
        :meth:`load_state_dict` restored still goes on where it was.

        Args:
            epoch: non-negative integer.

        Raises:
            TypeError: ``epoch`` is not an integer.
            ValueError: ``epoch`` is negative or has more than 64 bits.
        """
        epoch = check_count(epoch, "epoch", minimum=0)
        if self._next.begun or epoch != self._next.epoch:
            self._place(epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """``{"epoch": e, "drawn": n}``: ``n`` batches of epoch ``e`` have been drawn.

        Drawn is not always consumed: a ``DataLoader`` with workers draws ``num_workers *
        prefetch_factor`` batches ahead, and a loader of Accelerate one. The
        ``StatefulDataLoader`` of torchdata allows for that and restores the batch after the last
        one consumed. With other loaders that draw ahead, count the consumed batches in the
        training loop and save ``{"epoch": e, "drawn": count}`` instead.
        """
        return {"epoch": self._told.epoch, "drawn": self._told.drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration draws epoch ``state["epoch"]`` without its first ``state["drawn"]``.

        Args:
            state: of :meth:`state_dict`, or made by hand where workers draw ahead.

        Raises:
            TypeError: ``state`` is not a mapping to integers.
            ValueError: it lacks a key, or an epoch has fewer batches than ``drawn``.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a dict, got {type(state).__name__}")
        if not {"epoch", "drawn"} <= state.keys():
            raise ValueError(f"state: expected the keys epoch and drawn, got {list(state)}")
        epoch = check_count(state["epoch"], "state epoch", minimum=0)
        drawn = check_count(state["drawn"], "state drawn", minimum=0)
        _check_drawn(drawn, self.num_batches)
        self._place(epoch, drawn)

    def __len__(self) -> int:
        """Batches of a whole epoch; the same on every rank."""
        replicas, ranks = self._share(*_asker())
        return self._batches_each(replicas) * len(ranks)

    def __iter__(self) -> Iterator[list[int]]:
        module, asker = _asker()
        if module in _COLLECTORS:
            name = type(self).__name__
            raise TypeError(
                f"sampler: {name} yields whole batches; expected DataLoader(dataset, "
                f"batch_sampler={name}(...)) without batch_size, got it as sampler="
            )
        replicas, ranks = self._share(module, asker)
        if self._next.begun:
            self._next = _Pass(self._next.epoch + 1)
        self._newest = self._told = self._next
        return self._draw(self._newest, replicas, ranks)

    def _draw(self, own: _Pass, replicas: int, ranks: range) -> Iterator[list[int]]:
        epoch, start, num_batches = own.epoch, own.start, self._batches_each(replicas)
        _check_drawn(start, num_batches)
        steps = self._steps(epoch, range(start, num_batches), replicas, ranks)
        for number, batches in enumerate(steps, start):
            own.drawn = number + 1
            if own is self._newest:
                self._told = own
            yield from batches
        if own is self._next:
            self._next = _Pass(epoch + 1)
        if own is self._newest:
            self._told = self._next

    @abstractmethod
    def _steps(
        self, epoch: int, numbers: range, replicas: int, ranks: range
    ) -> Iterator[list[list[int]]]:
        """In each of these steps of an epoch the batches of some of its replicas."""

    def _check_replicas(self, replicas: int) -> None:
        """Raises if there is too little for so many."""

    def _place(self, epoch: int, drawn: int) -> None:
        if self._next.begun:
            self._next = _Pass(epoch)
        # An iterator that has not begun follows: loaders make some before they tell the epoch.
        self._next.epoch, self._next.start, self._next.drawn = epoch, drawn, drawn
        self._told = self._next

    def _batches_each(self, replicas: int) -> int:
        if self._num_batches is not None:
            return self._num_batches
        return -(-self._epoch_samples // (replicas * self._batch_size))

    def _replicas_and_rank(self) -> tuple[int, int]:
        replicas, rank = self.num_replicas, self.rank
        if rank >= replicas:
            raise ValueError(
                f"rank: expected a number in [0, {replicas}), below num_replicas, got {rank}"
            )
        self._check_replicas(replicas)
        return replicas, rank

    def _share(self, module: str, asker: object) -> tuple[int, range]:
        """Replicas of an epoch, and those whose batches an iteration yields in each step.

        Accelerate hands out in turn, to each process one, the batches that a sampler yields. It
        gets those of all ranks, and so each process has what it would have without Accelerate.
        """
        processes = _accelerate_processes(asker) if module == "accelerate.data_loader" else 1
        if processes == 1 or self._num_replicas == 1:
            replicas, rank = self._replicas_and_rank()
            return replicas, range(rank, rank + 1)
        if self._num_replicas not in (None, processes):
            raise ValueError(
                f"num_replicas: expected None, 1 or {processes}, the processes to which Accelerate "
                f"hands out batches, got {self._num_replicas}"
            )
        self._check_replicas(processes)
        return processes, range(processes)


def check_batch_size(name: str, groups: int, members: int) -> None:
    """That a batch of so many groups of so many members is one; `name` tells the members."""
    if groups * members > LARGEST_BATCH:
        raise ValueError(
            f"{name}: expected a batch of at most {LARGEST_BATCH} indices, got {groups} x {members}"
        )


def _check_drawn(drawn: int, num_batches: int) -> None:
    if drawn > num_batches:
        raise ValueError(
            f"state drawn: expected at most {num_batches}, the batches of an epoch, got {drawn}"
        )


def _world() -> tuple[int, int] | None:
    """World size and rank of this process, where `torch.distributed` is initialized."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return None


def _asker() -> tuple[str, object]:
    """What called the method that calls this, or whose loader did: its module and its `self`.

    Nothing else tells a sampler what it was put into.
    """
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in _LOADERS and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_globals.get("__name__", ""), frame.f_locals.get("self")


def _accelerate_processes(asker: object) -> int:
    """To how many processes this object of Accelerate hands out batches."""
    kind = type(asker).__name__
    if kind == "BatchSamplerShard":
        return asker.num_processes
    if kind == "DataLoaderDispatcher":
        return sys.modules["accelerate.state"].PartialState().num_processes
    return 1
