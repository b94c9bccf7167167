"""The batches that losses over classes and over clusters need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from facelt_ext._cluster_batches import ClusterBatchSampler
from facelt_ext._sampling import checked_integer, distributed_defaults

__all__ = ["ClusterBatchSampler", "PKSampler"]


class PKSampler(Sampler[list[int]]):
    """Draws batches of ``classes_per_batch`` classes with ``samples_per_class`` samples each.

    Range Loss (Zhang et al. 2017, arXiv:1611.08976, section 4.1) asks for such batches: 16 x 16 =
    256 images for small networks, 4 x 8 = 32 for VGG. In a batch drawn without regard to the
    labels, a class of a long-tailed data set is mostly alone and has no range to reduce.

    Classes and samples both come from shuffled decks, which start anew with every epoch:

    - within an epoch every class comes up before any class comes up twice, and no class comes up
      twice in one batch;
    - a class with at least ``samples_per_class`` samples gives distinct ones to each batch, and
      all of its samples before any of them again;
    - a poorer class repeats its samples. How often two of them occur in a batch differs by at
      most one, and the samples that occur once more take turns.

    With several replicas, one step draws ``num_replicas * classes_per_batch`` distinct classes
    from a sequence that the seed alone determines, and every rank takes its own part. Each rank
    must be given the same labels and the same seed.

    The order depends on ``seed`` and on the epoch. Call :meth:`set_epoch` before each epoch, as
    with ``torch.utils.data.DistributedSampler``; without it every epoch draws the same batches.
    No global random state is read or written.

    Args:
        labels: class of every sample of the data set, ``[N]``: a sequence, NumPy array or tensor
            of any integers.
        classes_per_batch: P, the classes in a batch of one replica.
        samples_per_class: K, the samples that each of these classes has in the batch.
        num_batches: batches that an epoch yields on each replica. Default: as many as it takes
            for an epoch to draw about N samples, ``ceil(N / (P * K * num_replicas))``.
        num_replicas: processes that share an epoch. Default: the world size of
            ``torch.distributed`` where it is initialised, else 1.
        rank: which of these processes this one is. Default: its rank in ``torch.distributed``
            where that is initialised, else 0.
        seed: non-negative integer.

    Yields:
        ``P * K`` indices into ``labels``, class after class.

    Raises:
        TypeError: ``labels`` are not integers, or a number is not an integer.
        ValueError: ``labels`` are empty or not one-dimensional, a number is out of its range, or
            the data set has fewer than ``num_replicas * classes_per_batch`` classes.

    Example:
        >>> sampler = PKSampler([7, 7, 7, 3, 3, 5], classes_per_batch=2, samples_per_class=2)
        >>> loader = DataLoader(dataset, batch_sampler=sampler)  # doctest: +SKIP
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray | torch.Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        num_batches: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        labels = _label_array(labels)
        default_replicas, default_rank = distributed_defaults()
        self.classes_per_batch = checked_integer("classes_per_batch", classes_per_batch, minimum=1)
        self.samples_per_class = checked_integer("samples_per_class", samples_per_class, minimum=1)
        self.num_replicas = checked_integer(
            "num_replicas", default_replicas if num_replicas is None else num_replicas, minimum=1
        )
        self.rank = checked_integer("rank", default_rank if rank is None else rank, minimum=0)
        if self.rank >= self.num_replicas:
            raise ValueError(
                f"rank must be in [0, num_replicas) = [0, {self.num_replicas}), got {self.rank}"
            )
        self.seed = checked_integer("seed", seed, minimum=0)
        self.epoch = 0

        _, counts = np.unique(labels, return_counts=True)
        self._classes_per_step = self.num_replicas * self.classes_per_batch
        if self._classes_per_step > len(counts):
            raise ValueError(
                f"classes_per_batch must be at most the number of classes / num_replicas = "
                f"{len(counts)} / {self.num_replicas}, got {self.classes_per_batch}"
            )
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])

        if num_batches is None:
            samples_per_step = self._classes_per_step * self.samples_per_class
            num_batches = -(-len(labels) // samples_per_step)
        self.num_batches = checked_integer("num_batches", num_batches, minimum=1)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches the next iteration draws.

        Args:
            epoch: non-negative integer.

        Raises:
            TypeError: ``epoch`` is not an integer.
            ValueError: ``epoch`` is negative.
        """
        self.epoch = checked_integer("epoch", epoch, minimum=0)

    def __len__(self) -> int:
        """Batches that an iteration yields; the same on every rank."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        class_deck = _Deck(len(self._members), generator)
        sample_decks: dict[int, _Deck] = {}
        first = self.rank * self.classes_per_batch
        for _ in range(self.num_batches):
            drawn = []
            # The samples of the other ranks' classes are drawn too, so that the decks and the
            # generator stand the same on every rank.
            for label in class_deck.deal(self._classes_per_step).tolist():
                deck = sample_decks.get(label)
                if deck is None:
                    deck = sample_decks[label] = _Deck(len(self._members[label]), generator)
                drawn.append((label, deck.deal(self.samples_per_class % deck.size)))
            own = drawn[first : first + self.classes_per_batch]
            yield np.concatenate([self._samples(*draw) for draw in own]).tolist()

    def _samples(self, label: int, extra: np.ndarray) -> np.ndarray:
        """All samples of a class as often as K holds them in full, then the ``extra`` ones."""
        members = self._members[label]
        rounds = self.samples_per_class // len(members)
        return np.concatenate([np.tile(members, rounds), members[extra]])


class _Deck:
    """Cards ``0 .. size - 1``, dealt so that every card is seen before any is seen again."""

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self.size = size
        self._generator = generator
        self._cards = np.empty(0, dtype=np.int64)

    def deal(self, hand: int) -> np.ndarray:
        """The next ``hand <= size`` cards, all distinct, also where a new deck begins."""
        if hand <= len(self._cards):
            dealt, self._cards = self._cards[:hand], self._cards[hand:]
            return dealt
        rest = self._cards
        in_rest = np.zeros(self.size, dtype=bool)
        in_rest[rest] = True
        fresh = self._generator.permutation(np.flatnonzero(~in_rest))
        missing = hand - len(rest)
        self._cards = self._generator.permutation(np.concatenate([fresh[missing:], rest]))
        return np.concatenate([rest, fresh[:missing]])


def _label_array(labels: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    """``labels`` as a checked one-dimensional integer array."""
    if isinstance(labels, torch.Tensor):
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got a tensor of {labels.dtype}")
        labels = labels.detach().cpu().numpy()
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"labels must be one-dimensional, got nested sequences: {error}") from None
    if array.ndim == 1 and array.size == 0:
        raise ValueError("labels must hold at least one label, got none")
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"labels must be a sequence, array or tensor of integers, "
            f"got {type(labels).__name__} of {array.dtype}"
        )
    if array.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, got shape {array.shape}")
    return array
