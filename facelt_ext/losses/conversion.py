"""Weights of other libraries' heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from facelt_ext._checks import check_matrix

# As pytorch-metric-learning (W) and older heads of insightface (kernel) name their [D, N]; a matrix
# named weight may be any layer's.
TRANSPOSED = ("W", "kernel")
# insightface's checkpoint of all states has its head under this name.
INSIGHTFACE_HEAD = "state_dict_softmax_fc"
# Entries that an error names.
SHOWN = 8


def convert_state_dict(
    state_dict: Mapping[str, Any] | Tensor | Sequence[Mapping[str, Any] | Tensor],
    *,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """The weight of another library's head, as `load_state_dict` of a head here takes it.

    A whole checkpoint is searched, with the mappings in it: the head is the matrix named `W` or
    `kernel`, else the one in `state_dict_softmax_fc` (insightface), else the only matrix named
    `weight`.

    Args:
        state_dict: of pytorch-metric-learning (`W` [D, N]) or insightface (`weight` [N, D] of a
            partial-FC head, `kernel` [D, N] of the older ones), alone or in a checkpoint; or the
            bare weight [N, D]; or a list of these, one for each rank, each with its own classes.
        prefix: a part of the names to look under, "head" for "module.head.weight"; None: all.

    Returns:
        {"weight": [N, D]}; the ranks' classes one after another.

    Raises:
        TypeError: something else than mappings, tensors, or a list of them.
        ValueError: no such matrix, or more than one, or ranks whose rows have other dimensions.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str or None, got {type(prefix).__name__}")
    if not isinstance(state_dict, (list, tuple)):
        return {"weight": _weight_of(state_dict, "state_dict", prefix)}
    if not state_dict:
        raise ValueError("state_dict: expected the state of at least one rank, got an empty list")
    parts = [
        _weight_of(part, f"state_dict[{rank}]", prefix) for rank, part in enumerate(state_dict)
    ]
    first = parts[0]
    for rank, part in enumerate(parts):
        if part.shape[1] != first.shape[1] or part.dtype != first.dtype:
            raise ValueError(
                f"state_dict[{rank}]: expected rows of {first.shape[1]} numbers of {first.dtype}, "
                f"as state_dict[0] has, got {part.shape[1]} of {part.dtype}"
            )
    return {"weight": torch.cat([part.to(first.device) for part in parts])}


def _weight_of(state: object, name: str, prefix: str | None) -> Tensor:
    if isinstance(state, Tensor):
        return check_matrix(state, name).detach().contiguous()
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{name}: expected a state_dict, a tensor or a list of them, got {type(state).__name__}"
        )
    every = dict(_entries(state, ""))
    names = [each for each in every if prefix is None or _is_under(each, prefix)]
    matrices = {
        each: every[each]
        for each in names
        if _leaf(each) in ("weight", *TRANSPOSED)
        and every[each].ndim == 2
        and every[each].is_floating_point()
    }
    found = _heads(list(matrices))
    where = "" if prefix is None else f" under the prefix {prefix!r}"
    if len(found) != 1:
        what = _shown(found or names or list(every))
        help_ = "; prefix= chooses one" if len(found) > 1 else ""
        raise ValueError(
            f"{name}: expected one matrix named weight, W or kernel{where}, got the entries "
            f"{what}{help_}"
        )
    weight = check_matrix(matrices[found[0]], f"{name}[{found[0]!r}]").detach()
    return (weight.t() if _leaf(found[0]) in TRANSPOSED else weight).contiguous()


def _entries(state: Mapping[str, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, those of mappings inside too."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{path}{key}.")
        elif isinstance(value, Tensor):
            yield f"{path}{key}", value


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _is_under(name: str, prefix: str) -> bool:
    return f".{prefix.strip('.')}." in f".{name}."


def _heads(names: list[str]) -> list[str]:
    for chosen in (
        [name for name in names if _leaf(name) in TRANSPOSED],
        [name for name in names if _is_under(name, INSIGHTFACE_HEAD)],
    ):
        if chosen:
            return chosen
    return names


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
