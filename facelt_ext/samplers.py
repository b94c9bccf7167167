"""The batches that losses over classes and over clusters need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from facelt_ext._checks import check_count, check_integer, check_integers
from facelt_ext._cluster_batches import ClusterBatchSampler
from facelt_ext._sampling import EpochBatchSampler, check_batch_size

__all__ = ["ClusterBatchSampler", "PKSampler"]


class PKSampler(EpochBatchSampler):
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

    Epochs: the order depends on ``seed`` and on the epoch. Each iteration draws the epoch after
    the one begun last, also if that was left early; :meth:`set_epoch` chooses another.
    No global random state is read or written.

    Ranks: one step draws ``num_replicas * classes_per_batch`` distinct classes from a sequence
    that the seed alone determines, and every rank takes its own part. Rank and world size are
    looked up in ``torch.distributed`` when an iteration starts. Every rank needs the same
    arguments, and has to begin as many iterations as the others or be told the same epochs.

    Frameworks, all with ``DataLoader(dataset, batch_sampler=sampler)``:

    - Lightning on several processes: ``Trainer(use_distributed_sampler=False)`` or
      ``fabric.setup_dataloaders(loader, use_distributed_sampler=False)``.
    - Accelerate (``accelerate``) and Hugging Face Trainer: ``accelerator.prepare(loader)``. It
      hands out the batches of a sampler to the processes. The sampler notices, and each process
      has the batches and the ``len(loader)`` that it would have without Accelerate. With
      ``num_replicas=1, rank=0`` the batches are instead those of one process, handed out in turn.
      ``split_batches=True`` is not supported.
    - To resume within an epoch: :meth:`state_dict` and :meth:`load_state_dict`.

    Args:
        labels: class of every sample of the data set, ``[N]``: a sequence, NumPy array or tensor
            of integers.
        classes_per_batch: P, the classes in a batch of one replica.
        samples_per_class: K, the samples that each of these classes has in the batch.
        num_batches: batches that an epoch yields on each replica. Default: as many as it takes
            for an epoch to draw about N samples, ``ceil(N / (P * K * num_replicas))``.
        num_replicas: processes that share an epoch. Default: the world size of
            ``torch.distributed`` where it is initialized, else 1.
        rank: which of these processes this one is. Default: its rank in ``torch.distributed``
            where that is initialized, else 0.
        seed: non-negative integer.
        ignore_index: samples with this label are never drawn and not counted in N. None: every
            label is a class.

    Yields:
        ``P * K`` indices into ``labels``, class after class.

    Raises:
        TypeError: ``labels`` are not integers, or a number is not an integer; or the sampler is
            iterated as the ``sampler`` of a ``DataLoader`` with a ``batch_size``.
        ValueError: ``labels`` are empty or not one-dimensional, a number is out of its range, or
            the data set has fewer than ``num_replicas * classes_per_batch`` classes. What depends
            on the world size is checked as soon as it is known, at the latest when an iteration
            starts.

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
        ignore_index: int | None = -100,
    ) -> None:
        labels = _label_array(labels)
        self.classes_per_batch = check_count(classes_per_batch, "classes_per_batch")
        self.samples_per_class = check_count(samples_per_class, "samples_per_class")
        drawn = np.arange(len(labels))
        if ignore_index is not None:
            ignore_index = check_integer(ignore_index, "ignore_index")
            drawn = np.flatnonzero(labels != ignore_index)
        self.ignore_index = ignore_index
        if len(drawn) == 0:
            raise ValueError(
                f"labels: expected at least one other than ignore_index, got {len(labels)} of "
                f"{ignore_index}"
            )
        _, counts = np.unique(labels[drawn], return_counts=True)
        order = drawn[np.argsort(labels[drawn], kind="stable")]
        self._members = np.split(order, np.cumsum(counts)[:-1])
        self._check_replicas(1)
        check_batch_size("samples_per_class", self.classes_per_batch, self.samples_per_class)
        super().__init__(
            len(drawn),
            self.classes_per_batch * self.samples_per_class,
            num_batches=num_batches,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )

    def _check_replicas(self, replicas: int) -> None:
        if replicas * self.classes_per_batch > len(self._members):
            raise ValueError(
                f"classes_per_batch: expected at most {len(self._members)} / {replicas}, the "
                f"number of classes / num_replicas, got {self.classes_per_batch}"
            )

    def _steps(
        self, epoch: int, numbers: range, replicas: int, ranks: range
    ) -> Iterator[list[list[int]]]:
        generator = np.random.default_rng([self.seed, epoch])
        class_deck = _Deck(len(self._members), generator)
        sample_decks: dict[int, _Deck] = {}
        for number in range(numbers.stop):
            drawn = []
            # The samples of the other ranks' classes are drawn too, so that the decks and the
            # generator stand the same on every rank.
            for label in class_deck.deal(replicas * self.classes_per_batch).tolist():
                deck = sample_decks.get(label)
                if deck is None:
                    deck = sample_decks[label] = _Deck(len(self._members[label]), generator)
                drawn.append((label, deck.deal(self.samples_per_class % deck.size)))
            if number in numbers:
                yield [self._batch(drawn, rank) for rank in ranks]

    def _batch(self, drawn: list[tuple[int, np.ndarray]], rank: int) -> list[int]:
        own = drawn[rank * self.classes_per_batch : (rank + 1) * self.classes_per_batch]
        return np.concatenate([self._samples(*draw) for draw in own]).tolist()

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
        labels = check_integers(labels, "labels").detach()
        if labels.is_meta:
            raise TypeError("labels: expected a tensor with data, got one on the meta device")
        labels = labels.cpu().numpy()
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"labels: expected shape [N], got {type(labels).__name__} that is no array: {error}"
        ) from None
    if array.ndim == 1 and array.size == 0:
        raise ValueError("labels: expected at least one label, got none")
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {type(labels).__name__} of {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"labels: expected shape [N], got {list(array.shape)}")
    return array
