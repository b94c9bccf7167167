"""Folders with one sub-folder for each identity: names, their order, and what is ignored."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

# Of the things that are ignored for one reason, so many are named.
_NAMED = 20
# Folders that systems and file servers put beside those of users.
_OF_SYSTEMS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
_OF_SYSTEMS |= {"system volume information", "__pycache__"}
_HIDDEN = "hidden file(s) or folder(s) of the system"


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """Sorts s2 before s10; no two names are equal, so that the order is that of no disk."""
    parts: list[str | int] = re.split(r"(\d+)", path.name)
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


def printable(text: str) -> str:
    """A name as every message, page and list can hold it: what is no text becomes an escape."""
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def any_output() -> None:
    """Names that the output's encoding does not have come out as escapes, and are no error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def leads() -> bool:
    """This is the process that reports: the only one, or the first under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Writes a line above bars of progress, in the process that reports."""
    if leads():
        tqdm.write(printable(message))


def identities(folder: Path) -> list[tuple[Path, list[Path]]]:
    """The sub-folders of a folder, each with its files, both in natural order.

    Links to files that are not there are among the files. All else is named and ignored:
    files beside the sub-folders, folders in them, links to nothing or to another identity's
    folder, hidden files.

    Raises:
        OSError: ``folder`` cannot be listed.
    """
    ignored: defaultdict[str, list[str]] = defaultdict(list)
    entries = sorted(folder.iterdir(), key=natural_order)
    root = folder.resolve()
    homes = {root / each.name for each in entries if not each.is_symlink()}
    people = []
    for path in entries:
        try:
            reason = _no_identity(path, homes)
            if reason is None:
                people.append((path, _images(path, ignored)))
        except OSError as error:
            reason = f"folder(s) that cannot be listed ({error.strerror})"
        if reason is not None:
            ignored[reason].append(path.name)
    _say_ignored(folder, ignored)
    return people


def _no_identity(path: Path, homes: set[Path]) -> str | None:
    """Why an entry of the folder of all identities is none; ``homes`` are those before it."""
    if path.name.startswith(".") or path.name.lower() in _OF_SYSTEMS:
        return _HIDDEN
    if path.is_symlink():
        if not path.exists():
            return "link(s) that lead nowhere"
        if path.resolve() in homes:
            return "link(s) to the folder of another identity"
        homes.add(path.resolve())
    return None if path.is_dir() else "file(s) beside the identities' folders"


def _images(person: Path, ignored: Mapping[str, list[str]]) -> list[Path]:
    files = []
    for path in person.iterdir():
        if path.name.startswith("."):
            reason = _HIDDEN
        elif path.is_dir():
            reason = "folder(s) in an identity's folder, whose images are not read"
        elif path.is_file() or path.is_symlink():
            files.append(path)
            continue
        else:
            reason = "thing(s) that are neither files nor folders"
        ignored[reason].append(f"{person.name}/{path.name}")
    return sorted(files, key=natural_order)


def _say_ignored(folder: Path, ignored: Mapping[str, list[str]]) -> None:
    for reason, names in sorted(ignored.items()):
        shown = ", ".join(sorted(names)[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        say(f"{folder}: ignored {len(names)} {reason}: {shown}{more}")
