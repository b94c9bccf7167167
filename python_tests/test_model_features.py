"""What a pass of a model over a data set keeps of it."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from facelt_ext.aggregation import class_means
from facelt_ext.clusters import ClusterIndex
from facelt_ext.evaluation import embed

LABELS = torch.arange(24) // 6
INPUTS = torch.arange(96.0).reshape(24, 4).sin()


def refreshed(model, loader) -> Tensor:
    index = ClusterIndex(LABELS, cluster_size=6)
    index.refresh_from(model, loader, progress=False)
    return index.centroids


PASSES = {
    "embed": lambda model, loader: embed(model, loader, progress=False)[0],
    "embed of both": lambda model, loader: embed(model, loader, flip=True, progress=False)[0],
    "class_means": lambda model, loader: class_means(model, loader, 4, progress=False)[0],
    "refresh_from": refreshed,
}


def loader() -> list[tuple[Tensor, Tensor]]:
    return list(zip(INPUTS.split(5), LABELS.split(5), strict=True))


@pytest.mark.parametrize("name", PASSES)
def test_no_layer_is_kept_whose_first_token_the_features_are(name):
    layers = []

    def model(inputs: Tensor) -> Tensor:
        # Of the last call only, whose features are still looked at, and the one before.
        assert sum(layer() is not None for layer in layers) <= 2
        layer = np.repeat(inputs.numpy()[:, None], 50, axis=1)
        layers.append(weakref.ref(layer))
        return torch.from_numpy(layer)[:, 0]

    found = PASSES[name](model, loader())
    assert torch.equal(found, PASSES[name](lambda inputs: inputs, loader()))
    assert len(layers) >= 5 and all(layer() is None for layer in layers)


@pytest.mark.parametrize("name", PASSES)
def test_features_that_the_next_batch_overwrites(name):
    memory = torch.empty(5, 4)

    def model(inputs: Tensor) -> Tensor:
        return torch.mul(inputs, 2, out=memory[: len(inputs)])

    found = PASSES[name](model, loader())
    assert torch.equal(found, PASSES[name](lambda inputs: inputs * 2, loader()))


@pytest.mark.parametrize("name", PASSES)
def test_features_of_another_length_are_named(name):
    def model(inputs: Tensor) -> Tensor:
        return inputs if len(inputs) == 5 else inputs[:, :3]

    with pytest.raises(ValueError, match="features of batch 4: expected 4 dim.*batch 0, got 3"):
        PASSES[name](model, loader())


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        (None, [], TypeError, "^model: expected a module or a function, got NoneType"),
        (torch.neg, 3, TypeError, "^loader: expected an iterable of batches, got int"),
        (torch.neg, INPUTS, TypeError, "^loader: expected an iterable of batches, got Tensor"),
        (torch.neg, [3], TypeError, "^loader: batch 0: expected a tuple or list"),
        (torch.neg, [([1.0], LABELS)], TypeError, "^loader: inputs of batch 0: expected a tensor"),
        (torch.neg, [(INPUTS, [1])], TypeError, "^loader: labels of batch 0: expected a tensor"),
        (torch.neg, [(INPUTS, LABELS[1:])], ValueError, "^loader: labels of batch 0: .* rows?"),
        (torch.Tensor.to_sparse, loader(), TypeError, "^model: features of batch 0: .* dense"),
        (lambda x: x.to("meta"), loader(), TypeError, "^model: features of batch 0: .* meta"),
        (lambda x: x / 0, loader(), ValueError, "^model: features of batch 0: .* in row 0"),
    ],
)
def test_what_was_wrong_is_named(name, model, batches, error, message):
    with pytest.raises(error, match=message):
        PASSES[name](model, batches)


@pytest.mark.parametrize("device", ["abc", "cuda:99", torch.device("cuda", 99), 2**70])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match="^device: expected a device that is there"):
        embed(torch.neg, loader(), device=device, progress=False)
