"""The checkpoint: writing, reading, and whether it is of this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from face_demo.errors import DataError
from face_demo.files import replacing
from torch import Tensor

from .options import Progress

CHECKPOINT = "checkpoint.pt"
# Options that may differ when a run goes on.
_FREE = {"workers"}
# Differences that a message tells.
_SHOWN = 8
# Options that checkpoints of older versions do not hold.
_NEWER = {"--recipe", "--hold-out"}
_KINDS = {
    "options": dict,
    "recipe": list,
    "images": int,
    "names": list,
    "progress": dict,
    "network": dict,
    "criterion": dict,
    "optimizer": dict,
    "scaler": dict,
    "super_classes": (dict, type(None)),
    "ranks": list,
}


def write_checkpoint(path: Path, content: Mapping[str, object]) -> None:
    """Replaces the checkpoint at once: a run that ends meanwhile keeps the one before.

    Raises:
        DataError: it cannot be written.
    """
    try:
        with replacing(path) as beside:
            try:
                torch.save(content, beside)
            except RuntimeError:
                # torch.save does not tell why it could not write. Writing on does.
                with beside.open("ab") as file:
                    file.write(bytes(1 << 20))
                raise
    except DataError as error:
        kept = "; the one before is whole: mend this, and --resume goes on from it"
        raise DataError(f"{error}{kept if path.exists() else ''}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, of whatever run.

    Raises:
        DataError: it cannot be read, is damaged, or something else.
    """
    try:
        # torch.load does not look at the checksums.
        with ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise BadZipFile(f"the checksum of {record} is another")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except Exception as error:  # What a damaged file brings about is of any kind.
        raise DataError(
            f"{path} is damaged, or no checkpoint: put a copy back, or give another --output"
        ) from error
    if (wrong := _wrong_part(saved)) is not None:
        raise DataError(f"{path} is no checkpoint of this script: {wrong}")
    return saved


def _wrong_part(saved: object) -> str | None:
    if not isinstance(saved, dict):
        return f"it holds a {type(saved).__name__}"
    for name, kind in _KINDS.items():
        if name not in saved:
            return f"its {name!r} is missing"
        if not isinstance(saved[name], kind):
            return f"its {name!r} is a {type(saved[name]).__name__}"
    progress, fresh = saved["progress"], vars(Progress())
    if any(type(progress.get(name)) is not type(value) for name, value in fresh.items()):
        return "its 'progress' is another kind"
    if not all(
        isinstance(each, dict) and isinstance(each.get("epochs"), int) for each in saved["recipe"]
    ):
        return "its 'recipe' has no epochs"
    if saved["progress"]["phase"] not in range(len(saved["recipe"])):
        return "its 'progress' is of another recipe"
    ranks = saved["ranks"]
    if not ranks or not all(isinstance(each, dict) and "mirror" in each for each in ranks):
        return "its 'ranks' are missing"
    return None


def check_same_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Options that change nothing may differ, and the number of epochs.

    Args:
        now: what a checkpoint of this run would hold.

    Raises:
        DataError: it is of another run; the message says what differs.
    """
    try:
        before, after = _facts(saved), _facts(now)
    except Exception as error:  # What a file may hold is of any kind.
        raise DataError(f"{path} is no checkpoint of this script") from error
    for name in _NEWER - set(before):
        del after[name]
    found = [
        f"{name} was {_shown(before, name)}, is {_shown(after, name)}"
        for name in before | after
        if before.get(name) != after.get(name)
    ]
    if not found and saved.get("fingerprint", now["fingerprint"]) != now["fingerprint"]:
        found = ["images were replaced or moved to other identities, or changed in size"]
    if found:
        raise DataError(
            f"{path} is of another run: {'; '.join(found[:_SHOWN])}"
            f"{' ...' if len(found) > _SHOWN else ''}. Give the same as then, or another --output"
        )


def _shown(facts: Mapping[str, object], name: str) -> str:
    value = facts.get(name, "not there")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(content: Mapping[str, Any]) -> dict[str, object]:
    """What has to be the same, by the names that a user knows."""
    facts: dict[str, object] = {}
    for name, value in content["options"].items():
        if name not in _FREE:
            facts[f"--{name.replace('_', '-')}"] = value
    facts["phases"] = len(content["recipe"])
    for name, values in _settings(content["recipe"]).items():
        same = all(value == values[0] for value in values)
        facts[name] = values[0] if same else values
    facts["identities"] = len(content["names"])
    facts["images"] = content["images"]
    facts |= {f"identity {number}": name for number, name in enumerate(content["names"])}
    facts["processes"] = len(content["ranks"])
    return facts


def _settings(recipe: list[dict]) -> dict[str, list]:
    """The values of each setting in the phases that have it, but for the epochs."""
    values: dict[str, list] = {}
    for phase in recipe:
        own = {"--rate": phase.get("rate")}
        if phase.get("minimums"):
            own["--set minimums"] = phase["minimums"]
        for part in ("batches", "loss"):
            own |= {f"--set {name}": value for name, value in phase.get(part, {}).items()}
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    return values


def restore(path: Path, saved: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Loads the state of each part, by its name in the checkpoint.

    Raises:
        DataError: a state does not fit.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
            if isinstance(part, torch.optim.Optimizer):
                _check_shapes(part)
        except Exception as error:  # What a file may hold is of any kind.
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{path} is damaged: its {name!r} do not fit: {reason}") from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer takes buffers of any shape."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{name}: expected shape {list(parameter.shape)}, got {list(value.shape)}"
                )
