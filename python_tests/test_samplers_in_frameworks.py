"""Batch samplers in the training loops of real frameworks, on one and on two processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pytest
import sampler_trainers
from sampler_cases import LABELS, NUM_BATCHES, SAMPLERS, Batches, Numbers, epoch_of
from sampler_trainers import EPOCHS, TRAINERS, Epochs
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

WORLD = 2


def epochs_of(sampler: str, replicas: int = 1, rank: int = 0) -> Epochs:
    return [epoch_of(SAMPLERS[sampler], epoch, replicas, rank) for epoch in range(EPOCHS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What `sampler_trainers` finds on each of two processes."""
    path = tmp_path_factory.mktemp("ranks") / "found"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "OMP_NUM_THREADS": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(WORLD):
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, sampler_trainers.__file__, str(path)]
        children.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=path.parent,
            )
        )
    try:
        said = [child.communicate(timeout=240)[0].decode() for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * WORLD, "\n".join(said)[-4000:]
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_process_has_one_epoch_after_another(trainer, sampler):
    epochs = TRAINERS[trainer](SAMPLERS[sampler])
    assert epochs == epochs_of(sampler)
    assert len({str(epoch) for epoch in epochs}) == EPOCHS


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_share_each_epoch(ranks, trainer, sampler):
    own = [found["delivered"][f"{trainer} {sampler}"] for found in ranks]
    for rank, epochs in enumerate(own):
        assert epochs == epochs_of(sampler, WORLD, rank)
        assert [len(epoch) for epoch in epochs] == [NUM_BATCHES] * EPOCHS


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_have_no_class_in_common(ranks, trainer):
    own = [found["delivered"][f"{trainer} PKSampler"] for found in ranks]
    for one, other in zip(*map(chain.from_iterable, own), strict=True):
        assert not set(LABELS[one].tolist()) & set(LABELS[other].tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_accelerate_hands_out_the_batches_of_one_process(ranks, sampler):
    alone = epoch_of(SAMPLERS[sampler], 0)
    for rank, found in enumerate(ranks):
        # It fills up the last step with the first batch.
        assert found["in turn"][sampler] == [*alone, alone[0]][rank::WORLD]


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ("lightning_refused", "use_distributed_sampler=False"),
        ("lightning_wrong_place", "batch_sampler="),
        ("accelerate_other_world", "num_replicas: expected None, 1 or 2, .* got 3"),
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_cannot_work_on_two_processes_says_what_does(ranks, refusal, words, sampler):
    for found in ranks:
        assert re.search(words, found["refused"][f"{refusal} {sampler}"])


def batches_of(loader: DataLoader) -> Iterator[list[int]]:
    for _ in range(EPOCHS):
        for batch in loader:
            yield batch["index"].tolist()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 8])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stateful_loader_goes_on_after_the_last_batch_it_gave(sampler, stop, workers, every):
    def loader() -> StatefulDataLoader:
        options = {"num_workers": workers, "snapshot_every_n_steps": every}
        return StatefulDataLoader(Numbers(), batch_sampler=SAMPLERS[sampler](), **options)

    left, resumed = loader(), loader()
    got = list(islice(batches_of(left), stop))
    resumed.load_state_dict(left.state_dict())
    rest = islice(batches_of(resumed), 2 * NUM_BATCHES - stop)
    assert got + list(rest) == list(chain(*epochs_of(sampler)[:2]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_loader_with_workers_goes_on_from_a_count(sampler, workers):
    def loader(state: dict[str, int]) -> DataLoader:
        made = SAMPLERS[sampler]()
        made.load_state_dict(state)
        return DataLoader(Numbers(), batch_sampler=made, num_workers=workers)

    state = {"epoch": 0, "drawn": 0}
    found: Batches = []
    for _ in range(4):  # stopped after every third batch
        epoch, drawn = state["epoch"], state["drawn"]
        for batch in islice(loader(state), 3):
            found.append(batch["index"].tolist())
            drawn += 1
        state = {"epoch": epoch, "drawn": drawn}
        if drawn == NUM_BATCHES:
            state = {"epoch": epoch + 1, "drawn": 0}
    assert found == list(chain(*epochs_of(sampler)[:2]))
