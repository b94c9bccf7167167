"""Which images can be decoded; what a scan has found is kept for the next start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from face_demo.errors import DataError
from face_demo.files import write_text
from face_demo.folders import leads, printable, say
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from .sources import UNREADABLE, Images, Stamp, decode, why

_FORMAT = 2


def readable(images: Images, size: int, cache: Path, threads: int) -> tuple[Tensor, list[str]]:
    """The numbers of the images that can be decoded, and the names of those that cannot.

    What was found is kept in ``cache``. At the next start those images are decoded that could not
    be then, are new, or have another size or time of change. Under torchrun the other processes
    take over what the first one found, so that all train on the same images.

    Raises:
        DataError: ``cache`` cannot be written.
    """
    kept = _read(cache)
    keys = [_key(images.stamp(number)) for number in range(len(images))]
    unknown = [
        number
        for number, key in enumerate(keys)
        if key is None or (kept.get(key) != "" and (leads() or key not in kept))
    ]

    def problem(number: int) -> str:
        try:
            decode(images.data(number), size)
        except UNREADABLE as error:
            return printable(why(error))
        return ""

    problems = [kept.get(key, "") for key in keys]
    for number, found in zip(unknown, _each(problem, unknown, threads), strict=True):
        problems[number] = found
    wrong = [number for number, found in enumerate(problems) if found]
    for number in wrong:
        say(f"cannot read {images.name(number)}: {problems[number]}")
    found = {key: each for key, each in zip(keys, problems, strict=True) if key is not None}
    if leads() and found != kept:
        _write(cache, found)
    good = torch.tensor([not each for each in problems], dtype=torch.bool)
    return good.nonzero()[:, 0], [printable(images.name(number)) for number in wrong]


def _each(problem: Callable[[int], str], numbers: Sequence[int], threads: int) -> list[str]:
    return thread_map(
        problem,
        numbers,
        max_workers=threads,
        chunksize=64,
        desc="checking images",
        unit="image",
        leave=False,
        disable=not numbers,
    )


def _key(stamp: Stamp) -> str | None:
    """None for what is gone, of which nothing is kept."""
    if stamp.size < 0:
        return None
    text = f"{stamp.name}\0{stamp.size}\0{stamp.version}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def _read(cache: Path) -> dict[str, str]:
    """What is wrong with each image, "" for nothing, by key; empty where the file is damaged."""
    try:
        content = read_json(cache)
        right = content["format"] == _FORMAT
        good, bad = content["readable"], content["unreadable"]
        if not right or not all(isinstance(each, str) for each in (*good, *bad, *bad.values())):
            raise ValueError
        return dict.fromkeys(good, "") | bad
    except FileNotFoundError:
        return {}
    except Exception:
        say(f"{cache} is damaged or of another version; all images are checked anew")
        return {}


def _write(cache: Path, problems: Mapping[str, str]) -> None:
    content = {
        "format": _FORMAT,
        "readable": [key for key, problem in problems.items() if not problem],
        "unreadable": {key: problem for key, problem in problems.items() if problem},
    }
    write_json(cache, content)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    """Writes or replaces a file and makes its folder.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: {error.strerror}") from error
    write_text(path, json.dumps(content))
