"""Training with each recipe, and going on after a run was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_cases import check_page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import (
    CHECKPOINT,
    SETTINGS,
    DataError,
    arguments,
    recipes,
    scans,
    settings,
    shrink_network,
    train_faces,
    trainer,
    write_faces,
)

SCRIPT = Path(train_faces.__file__)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch):
    shrink_network(monkeypatch)
    with torch.random.fork_rng():
        yield


class Killed(BaseException):
    pass


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def same(first: object, second: object) -> bool:
    """Equal to the last bit, but for times."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = set(first) - {"seconds_per_step"}
        return keys == set(second) - {"seconds_per_step"} and all(
            same(first[key], second[key]) for key in keys
        )
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        *((recipe, []) for recipe in SETTINGS),
        ("cosface", ["--amp", "float16", "--schedule", "cosine"]),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    recipe: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_faces.main(arguments(recipe, whole, *more))
    expected = checkpoint(whole)
    losses = expected["progress"]["loss"]
    assert len(losses) == 4 * len(recipes.RECIPES[recipe].phases)
    assert all(torch.tensor(losses).isfinite()) and losses[0] != losses[1]

    # Each run dies in its seventh step, in the middle of an epoch of one phase or another; but the
    # first of Aggregate-and-Disperse in its third, in the first phase, of one step an epoch.
    step, steps, deaths = trainer.Trainer._step, [], 0

    def mortal(self, *given):
        steps.append(self.progress.step)
        if len(steps) == (3 if recipe == "aggregate-disperse" and not deaths else 7):
            raise Killed
        return step(self, *given)

    monkeypatch.setattr(trainer.Trainer, "_step", mortal)
    while True:
        steps.clear()
        try:
            train_faces.main(arguments(recipe, killed, *more, *(["--resume"] if deaths else [])))
            break
        except Killed:
            deaths += 1
    assert deaths >= len(recipes.RECIPES[recipe].phases)
    assert same(checkpoint(killed), expected)


def test_what_a_run_leaves_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_faces.main(arguments("cosface", tmp_path, "--amp", "bfloat16", "--schedule", "cosine"))
    progress = checkpoint(tmp_path)["progress"]
    assert progress["rate"][0] == 0.1 and progress["rate"][2] == pytest.approx(0.05)
    check_page(tmp_path / "report.html")
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "98 images of 25 identities" in page and "margin 0.35" in page
    for figure, value in progress["figures"][-1]["unseen"].items():
        assert f"| {figure} | {100 * value:.2f} |" in page
    for picture in ("loss.png", "roc.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = [each.value for each in events.Scalars("train/epoch loss")]
    assert shown == pytest.approx(progress["loss"])
    assert len(events.Scalars("unseen/accuracy")) == 4
    printed = capsys.readouterr()
    assert "4 epochs of 3 batches\n12 steps are few" in printed.out
    assert "epoch 4: loss" in printed.out and str(tmp_path / "report.html") in printed.out


def test_workers_change_nothing(tmp_path: Path) -> None:
    train_faces.main(arguments("range", tmp_path / "none"))
    train_faces.main(arguments("range", tmp_path / "two", "--workers", "2"))
    first, second = (checkpoint(tmp_path / name) for name in ("none", "two"))
    assert same(first["network"], second["network"])


def test_gradients_are_clipped_and_decay_weighs(tmp_path: Path) -> None:
    losses = {}
    for name, more in {
        "as it is": [],
        "clipped": ["--clip-norm", "1e-6"],
        "decayed": ["--weight-decay", "1"],
    }.items():
        train_faces.main(arguments("softmax", tmp_path / name, *more))
        losses[name] = checkpoint(tmp_path / name)["progress"]["loss"][-1]
    assert losses["clipped"] > losses["as it is"] and losses["decayed"] != losses["as it is"]


def test_folder_with_unreadable_images(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_faces(
        tmp_path / "faces", {f"p{person}": 3 + person % 4 for person in range(1, 13)}
    )
    (folder / "p3" / "broken.jpg").write_bytes(b"no image")
    (folder / "p3" / ".hidden").write_bytes(b"ignored")
    options = arguments("arcface", tmp_path / "run", "--data", str(folder))
    train_faces.main(options)
    printed = capsys.readouterr()
    assert "1 unreadable image(s) left out" in printed.out
    assert "cannot read" in printed.out + printed.err and "broken.jpg" in printed.out + printed.err
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    # Of 12 identities four are held out, which folds need.
    check_page(tmp_path / "run" / "report.html")
    assert "of 8 identities" in page and "| held out |" in page and "broken.jpg" in page
    # A run that goes on looks at what could not be read, and not at all images again.
    opened = []
    plain = scans.decode
    monkeypatch.setattr(scans, "decode", lambda *given: opened.append(given) or plain(*given))
    train_faces.main([*options, "--resume"])
    assert len(opened) == 1 and "broken.jpg" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "EMPTY"], "the folder .*nobody is empty"),
        (["--data", "NOTHING"], "is neither a folder nor a .rec file"),
        (["--data", "FEW"], "3 identities are too few to hold 4 out"),
        (["--set", "margins=1"], "has no setting margins; it has batch_size, margin, scale"),
        (["--set", "margin"], "expected NAME=VALUE, got margin"),
        (["--set", "batch_size=2.5"], "--set batch_size: expected a whole number, got 2.5"),
        (["--set", "scale=wide"], "--set scale: expected a number, got 'wide'"),
        (["--resume"], "there is no .*checkpoint.pt to resume from"),
        (["--eval", "NOTHING"], "is neither a folder nor a .rec file"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, more: list[str], message: str) -> None:
    write_faces(tmp_path / "EMPTY", {"one": 2, "two": 2})
    (tmp_path / "EMPTY" / "nobody").mkdir()
    write_faces(tmp_path / "FEW", {"one": 2, "two": 2, "three": 2})
    given = [str(tmp_path / each) if each.isupper() else each for each in more]
    options = arguments("arcface", tmp_path / "run")
    options = options[: options.index("--set")] if "--set" in given else options
    with pytest.raises(SystemExit, match=message):
        train_faces.main([*options, *given])


def test_recipe_that_needs_a_tail(tmp_path: Path) -> None:
    options = arguments("aggregate-disperse", tmp_path)
    options[options.index("minimums=5,2,1")] = "minimums=1"
    with pytest.raises(SystemExit, match="found 25 and 0; choose other limits"):
        train_faces.main(options)
    options[options.index("minimums=1")] = "minimums=1,5"
    with pytest.raises(SystemExit, match="error: --set minimums: expected"):
        train_faces.main(options)


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    train_faces.main(arguments("cosface", tmp_path))
    with pytest.raises(SystemExit, match="is there already: give --resume"):
        train_faces.main(arguments("cosface", tmp_path))
    with pytest.raises(SystemExit, match=r"--rate was 0\.1, is 0\.2\. Give"):
        train_faces.main([*arguments("cosface", tmp_path, "--resume"), "--rate", "0.2"])
    with pytest.raises(SystemExit, match=r"--seed was 0, is 3\. Give"):
        train_faces.main([*arguments("cosface", tmp_path, "--resume"), "--seed", "3"])


def test_numbers_of_ones_own() -> None:
    recipe = recipes.RECIPES["aggregate-disperse"]
    changed = settings.adapted(recipe, {"batch_size": 8, "minimums": (5, 1)}, epochs=26, rate=0.01)
    assert [phase.epochs for phase in changed.phases] == [4, 9, 13]
    assert [phase.rate for phase in changed.phases] == pytest.approx([0.01, 0.01, 0.002])
    assert all(phase.batches == {"batch_size": 8} for phase in changed.phases)
    assert all(phase.minimums == (5, 1) for phase in changed.phases)
    with pytest.raises(DataError, match="3 phases; 2 epoch"):
        settings.adapted(recipe, {}, epochs=2, rate=None)
    assert settings.adapted(recipe, {}, None, None) == recipe


def test_help_shows_every_recipe(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_faces.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in recipes.RECIPES)
    assert "60 epochs, rate 0.02: batch_size=256, minimums=[10, 4, 1]" in shown


@pytest.mark.parametrize("recipe", ["arcface", "clmle"])
def test_two_processes(recipe: str, tmp_path: Path) -> None:
    # The network of the script itself is the whole iresnet18: this is the slow test here.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]

    def start(folder: Path, *more: str) -> subprocess.CompletedProcess:
        command = [*launch, str(SCRIPT), *arguments(recipe, folder, *more)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    whole = start(tmp_path / "run")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("report.html") == 1
    saved = checkpoint(tmp_path / "run")
    assert len(saved["ranks"]) == 2 and len(saved["progress"]["loss"]) > 1
    assert not torch.equal(*(each["mirror"] for each in saved["ranks"]))
    again = start(tmp_path / "run", "--resume")
    assert again.returncode == 0, again.stderr
    assert same(checkpoint(tmp_path / "run"), saved)
