"""Checkpoints of examples/train_faces.py: damaged ones, other runs', and what is never saved."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import (
    CHECKPOINT,
    SMALL,
    arguments,
    checkpoint,
    divergence,
    recipes,
    report,
    settings,
    shrink_network,
    train_faces,
    trainer,
    write_faces,
)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch):
    shrink_network(monkeypatch)
    # Pictures take longer than all else.
    monkeypatch.setattr(train_faces, "write_report", lambda folder, *_: folder)
    with torch.random.fork_rng():
        yield


def read(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    saved = read(folder)
    edit(saved)
    torch.save(saved, folder / CHECKPOINT)


def short(data: Path, output: Path, *more: str) -> list[str]:
    """Of a training with ArcFace on a folder of 24 images, in four epochs of three batches."""
    given = ["--data", str(data), "--output", str(output), *SMALL, "--epochs", "4"]
    return [*given, "--hold-out", "0", "--set", "batch_size=8", *more]


def refused(*given: str) -> str:
    with pytest.raises(SystemExit) as caught:
        train_faces.main(list(given))
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def end_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """As if the run was killed once it has saved so many epochs."""
    saves = []

    def save(*given: object) -> None:
        checkpoint.write_checkpoint(*given)
        saves.append(1)
        if len(saves) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "write_checkpoint", save)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("of") / "data", {f"p{i}": 4 for i in range(6)})


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        shrink_network(patch)
        train_faces.main(short(data, folder))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def flip(content: bytes) -> bytes:
    """Changes a bit of the largest tensor."""
    with ZipFile(BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
    place = largest.header_offset + 1000
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="cut"),
        pytest.param(lambda data: data[:-1], id="last byte lost"),
        pytest.param(lambda data: data[: len(data) // 2] + bytes(len(data) // 2), id="zeros"),
        pytest.param(flip, id="a bit"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"no checkpoint", id="text"),
        pytest.param(lambda data: b"\x80\x02c__builtin__\nexec\n.", id="pickle of code"),
    ],
)
def test_a_damaged_file_is_named(data: Path, run: Path, damage: Callable[[bytes], bytes]) -> None:
    path = run / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    message = refused(*short(data, run, "--resume"))
    assert f"{path} is damaged, or no checkpoint" in message


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "state_dict": {}}, [1], torch.ones(3), None])
def test_a_file_of_something_else_is_named(data: Path, run: Path, content: object) -> None:
    torch.save(content, run / CHECKPOINT)
    assert "is no checkpoint of this script" in refused(*short(data, run, "--resume"))


def test_a_folder_in_its_place_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).mkdir()
    message = refused(*short(data, tmp_path, "--resume"))
    assert f"{tmp_path / CHECKPOINT}: Is a directory" in message


@pytest.mark.parametrize("name", checkpoint._KINDS)
def test_every_part_has_to_be_there_and_of_its_kind(name: str, data: Path, run: Path) -> None:
    for other in (None, 3, "a word", {}, [], torch.ones(1)):
        saved = read(run)
        if type(other) is type(saved[name]):
            continue
        torch.save({**saved, name: other}, run / "other.pt")
        if isinstance(other, checkpoint._KINDS[name]):
            continue
        with pytest.raises(checkpoint.DataError, match=f"its '{name}' is a {type(other).__name__}"):
            checkpoint.read_checkpoint(run / "other.pt")
    change(run, lambda saved: saved.pop(name))
    assert f"its {name!r} is missing" in refused(*short(data, run, "--resume"))


def narrow(saved: dict, part: str, name: str) -> None:
    saved[part][name] = saved[part][name][:1]


MISFITS = {
    "network, shape": lambda s: narrow(s, "network", "backbone.output.2.weight"),
    "network, missing": lambda s: s["network"].pop("backbone.output.2.bias"),
    "network, one more": lambda s: s["network"].update({"other": torch.ones(1)}),
    "network, no tensor": lambda s: s["network"].update({"backbone.output.2.bias": "x"}),
    "criterion, shape": lambda s: narrow(s, "criterion", "weight"),
    "criterion, missing": lambda s: s["criterion"].pop("weight"),
    "optimizer, missing": lambda s: s["optimizer"].pop("param_groups"),
    "optimizer, fewer": lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
    "optimizer, shape": lambda s: narrow(s["optimizer"]["state"], 0, "momentum_buffer"),
    "progress, missing": lambda s: s["progress"].pop("loss"),
    "progress, kind": lambda s: s["progress"].update({"epoch": "first"}),
    "recipe, kind": lambda s: s["recipe"][0].update({"loss": 3}),
    "recipe, epochs": lambda s: s["recipe"][0].update({"epochs": "many"}),
    "progress, phase": lambda s: s["progress"].update({"phase": 7}),
    "ranks, none": lambda s: s["ranks"].clear(),
    "ranks, no tensor": lambda s: s["ranks"][0].update({"mirror": 3}),
    "ranks, short": lambda s: s["ranks"][0].update({"mirror": torch.ones(3, dtype=torch.uint8)}),
    "super classes": lambda s: s.update({"super_classes": {"members": 3}}),
    "network, NaN": lambda s: s["network"]["backbone.output.2.bias"].fill_(torch.nan),
    "criterion, NaN": lambda s: s["criterion"]["weight"].fill_(torch.inf),
    "momentum, NaN": lambda s: s["optimizer"]["state"][0]["momentum_buffer"].fill_(torch.nan),
}


@pytest.mark.parametrize("edit", MISFITS.values(), ids=MISFITS)
def test_parts_have_to_fit(data: Path, run: Path, edit: Callable[[dict], object]) -> None:
    change(run, edit)
    assert CHECKPOINT in refused(*short(data, run, "--resume"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--rate", "0.2"], r"--rate was 0.1, is 0.2."),
        (["--seed", "3"], "--seed was 0, is 3."),
        (["--amp", "bfloat16"], "--amp was none, is bfloat16."),
        (["--schedule", "cosine"], "--schedule was step, is cosine."),
        (["--clip-norm", "0"], "--clip-norm was 5, is 0."),
        (["--weight-decay", "0"], "--weight-decay was 0.0005, is 0."),
        (["--embedding-size", "16"], "--embedding-size was 8, is 16."),
        (["--image-size", "32"], "--image-size was 16, is 32."),
        (["--backbone", "iresnet34"], "--backbone was iresnet18, is iresnet34."),
        (["--hold-out", "0.6"], "--hold-out was 0, is 0.6; identities was 6, is 2; images was 24"),
        (["--set", "margin=0.4"], "--set margin was 0.5, is 0.4."),
        (["--set", "batch_size=16"], "--set batch_size was 8, is 16."),
        (["--recipe", "softmax"], "--recipe was arcface, is softmax; --set margin was 0.5, is not"),
        (["--recipe", "clmle"], "phases was 1, is 2"),
        (["--epochs", "3"], "--epochs was 4, is 3: a run can go on with more, not with fewer"),
        (["--seed", "3", "--rate", "0.2"], "--seed was 0, is 3; --rate was 0.1, is 0.2."),
    ],
)
def test_what_differs_is_named_with_both_values(
    data: Path, run: Path, more: list[str], named: str
) -> None:
    before = (run / CHECKPOINT).read_bytes()
    assert named in refused(*short(data, run, "--resume"), *more)
    assert (run / CHECKPOINT).read_bytes() == before


def test_every_option_is_compared_or_free(data: Path, run: Path) -> None:
    """One that is added later is compared, unless it is said to change nothing."""
    for name in read(run)["options"].keys() - checkpoint._FREE:
        copied = shutil.copytree(run, run.parent / name)
        change(copied, lambda saved, name=name: saved["options"].update({name: "another"}))
        message = refused(*short(data, copied, "--resume", "--hold-out", "0"))
        assert f"--{name.replace('_', '-')} was another, is" in message


def test_options_that_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, first, second = (
        write_faces(tmp_path / name, {f"{name}{i}": 4 for i in range(6)}) for name in "dab"
    )
    end_after(monkeypatch, 1)
    given = [*short(data, tmp_path / "run"), "--epochs", "2", "--eval", str(first)]
    given[given.index("--hold-out") : given.index("--hold-out") + 2] = []
    with pytest.raises(SystemExit):
        train_faces.main(given)
    start, networks = given[: given.index("--eval")], []
    for number, more in enumerate(
        [
            ["--eval", str(first)],
            ["--eval", str(first), "--eval", str(second)],
            ["--eval", str(second)],
            [],
            ["--workers", "1"],
            ["--device", "cpu:0"],
        ]
    ):
        output = shutil.copytree(tmp_path / "run", tmp_path / f"{number}")
        train_faces.main([*start, "--resume", *more, "--output", str(output)])
        networks.append(read(output)["network"])
    for network in networks[1:]:
        assert all(torch.equal(network[name], networks[0][name]) for name in network)


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder of images, and the output of a run that ended after an epoch."""
    data = write_faces(tmp_path / "data", {f"p{person}": 4 for person in range(6)})
    with monkeypatch.context() as patch:
        end_after(patch, 1)
        with pytest.raises(SystemExit):
            train_faces.main(short(data, tmp_path / "run"))
    return data, tmp_path / "run"


def test_data_in_another_folder(killed: tuple[Path, Path]) -> None:
    data, output = killed
    moved = data.rename(data.with_name("elsewhere"))
    train_faces.main(short(moved, output, "--resume"))
    assert read(output)["progress"]["epoch"] == 4


def move(data: Path) -> None:
    (data / "p0" / "p0_0001.png").rename(data / "p1" / "p0_0001.png")


def move_and_remove(data: Path) -> None:
    move(data)
    (data / "p2" / "p2_0001.png").unlink()
    (data / "p3" / "p3_0001.png").unlink()


def swap(data: Path) -> None:
    one, other = data / "p0" / "p0_0001.png", data / "p1" / "p1_0001.png"
    one.rename(data / "p1" / "p0_0001.png")
    other.rename(data / "p0" / "p1_0001.png")


def rename(data: Path) -> None:
    (data / "p0").rename(data / "p00")


def add(data: Path) -> None:
    shutil.copy(data / "p0" / "p0_0001.png", data / "p0" / "p0_0009.png")


def replace(data: Path) -> None:
    shutil.copy(data / "p1" / "p1_0002.png", data / "p0" / "p0_0001.png")
    with (data / "p0" / "p0_0001.png").open("ab") as file:
        file.write(b"more")


def remove(data: Path) -> None:
    (data / "p0" / "p0_0001.png").unlink()


def spoil_image(data: Path) -> None:
    (data / "p0" / "p0_0001.png").write_bytes(b"rubbish")


def remove_all(data: Path) -> None:
    shutil.rmtree(data / "p0")


@pytest.mark.parametrize(
    "edit", [move, move_and_remove, swap, rename, add, replace, remove, remove_all, spoil_image]
)
def test_other_images_are_refused(
    killed: tuple[Path, Path], edit: Callable[[Path], object]
) -> None:
    data, output = killed
    edit(data)
    message = refused(*short(data, output, "--resume"))
    assert "is of another run: i" in message or "cannot be read any more" in message


def test_a_checkpoint_of_an_older_version(
    data: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    def age(saved: dict) -> None:
        del saved["fingerprint"]
        for name in ("recipe", "hold_out"):
            del saved["options"][name]
        saved["rates"] = {"milestones": {}, "last_epoch": 12}

    change(run, age)
    train_faces.main(short(data, run, "--resume"))
    assert "is of an older version: images may have changed since" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["step", "cosine"])
@pytest.mark.parametrize("after", [2, 4])
def test_more_epochs_extend_a_run(
    data: Path,
    run: Path,
    after: int,
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys,
) -> None:
    given = ["--schedule", schedule]
    output = tmp_path / "extended"
    with monkeypatch.context() as patch:
        end_after(patch, after)
        with pytest.raises(SystemExit):
            train_faces.main(short(data, output, *given))
    capsys.readouterr()
    longer = [*given, "--epochs", "9"]
    train_faces.main([*short(data, output, "--resume"), *longer])
    train_faces.main([*short(data, tmp_path / "whole"), *longer])
    extended, whole = (read(each)["progress"] for each in (output, tmp_path / "whole"))
    assert extended["epoch"] == len(extended["loss"]) == len(extended["figures"]) == 9
    assert extended["rate"][after:] == whole["rate"][after:]
    printed = capsys.readouterr().out
    assert "extended from 4 to 9 epochs" in printed
    assert f"from epoch {after + 1} on with rate {whole['rate'][after]:g}" in printed
    # The number of epochs that the run has now is the one that counts.
    train_faces.main([*short(data, output, "--resume"), *longer])
    assert "--epochs was 9, is 4" in refused(*short(data, output, "--resume"), *given)


@pytest.mark.parametrize("recipe", ["clmle", "aggregate-disperse"])
def test_phases_that_are_over_keep_their_epochs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(recipe, tmp_path)
    phases = len(recipes.RECIPES[recipe].phases)
    given[given.index("--epochs") + 1] = str(phases)
    train_faces.main(given)
    given[given.index("--epochs") + 1] = str(phases + 2)
    monkeypatch.setattr(train_faces, "write_report", report.write_report)
    train_faces.main([*given, "--resume"])
    saved = read(tmp_path)
    assert [phase["epochs"] for phase in saved["recipe"]] == [*[1] * (phases - 1), 3]
    assert len(saved["progress"]["loss"]) == phases + 2
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| {phases} | 3 |" in page and "| 1 | 1 |" in page


def test_epochs_are_added_in_the_recipes_proportions() -> None:
    recipe = recipes.RECIPES["aggregate-disperse"]
    assert settings.resumed_epochs(recipe, [15, 40, 60], 0, 230) == [30, 80, 120]
    assert settings.resumed_epochs(recipe, [1, 1, 1], 1, 13) == [1, 5, 7]
    assert settings.resumed_epochs(recipe, [1, 1, 1], 2, 13) == [1, 1, 11]
    assert settings.resumed_epochs(recipe, [1, 2, 3], 1, None) == [1, 2, 3]


def test_a_finished_run_writes_its_report_again(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_faces, "write_report", report.write_report)
    before = (run / CHECKPOINT).read_bytes()
    for path in run.glob("*.[mhp]*"):
        if path.name != CHECKPOINT:
            path.unlink()
    # Without --epochs the run's own count.
    given = short(data, run, "--resume")
    position = given.index("--epochs")
    train_faces.main(given[:position] + given[position + 2 :])
    assert (run / CHECKPOINT).read_bytes() == before
    assert {"report.html", "report.md", "loss.png"} <= {p.name for p in run.iterdir()}


def poison(
    monkeypatch: pytest.MonkeyPatch, steps: range, edit: Callable[[trainer.Trainer], None] | None
) -> None:
    """In these steps, counted from 1, the loss is NaN; or ``edit`` is called after them."""
    real = trainer.Trainer._step

    def step(self: trainer.Trainer, run: object, images: torch.Tensor, labels: torch.Tensor):
        now = self.progress.step + 1 in steps
        if now and edit is None:
            forward = run.trainee.forward
            run.trainee.forward = lambda *given: forward(*given) * torch.nan
            try:
                return real(self, run, images, labels)
            finally:
                run.trainee.forward = forward
        loss = real(self, run, images, labels)
        if now:
            edit(self)
        return loss

    monkeypatch.setattr(trainer.Trainer, "_step", step)


def spoil(name: str, value: float) -> Callable[[trainer.Trainer], None]:
    def edit(self: trainer.Trainer) -> None:
        whole = {**self.network.state_dict(), **self.criterion.state_dict()}
        whole[name].view(-1)[0] = value

    return edit


# There are three batches in an epoch: step 4 is the first of the second.
POISONS = {
    "loss": (range(4, 5), None, "step 4: the loss is nan"),
    "loss, last step": (range(6, 7), None, "step 6: the loss is nan"),
    "weight": (range(6, 7), spoil("backbone.output.2.bias", torch.nan), "backbone.output.2.bias"),
    "buffer": (range(6, 7), spoil("backbone.output.3.running_mean", -torch.inf), "running_mean"),
    "head": (range(6, 7), spoil("weight", torch.inf), "loss.weight"),
}


@pytest.mark.parametrize(
    ("amp", "evaluated"), [("none", True), *((amp, False) for amp in trainer.AMP_TYPES)]
)
@pytest.mark.parametrize("kind", POISONS)
def test_what_is_not_finite_is_not_saved(
    data: Path,
    kind: str,
    amp: str,
    evaluated: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, edit, named = POISONS[kind]
    if amp == "float16" and edit is None:
        steps, named = range(4, 7), "step 6: no loss of the epoch is finite"
    poison(monkeypatch, steps, edit)
    more = ["--eval", str(data)] if evaluated else []
    message = refused(*short(data, tmp_path, "--amp", amp, *more))
    assert named in message and "--rate" in message
    saved = read(tmp_path)
    assert saved["progress"]["step"] == 3 and len(saved["progress"]["loss"]) == 1
    for part in ("network", "criterion"):
        assert all(value.isfinite().all() for value in saved[part].values())
    # What was written until then can be read.
    assert "train/epoch loss" in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]


def test_features_that_are_not_finite_stop_the_run_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(6, 7), spoil("backbone.output.3.running_var", 0.0))
    poison(monkeypatch, range(6, 7), spoil("backbone.output.3.weight", 3e38))
    message = refused(*short(data, tmp_path, "--eval", str(data)))
    assert "evaluation set data: " in message and "finite" in message
    assert read(tmp_path)["progress"]["epoch"] == 1


def test_single_steps_that_float16_skips_are_normal(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(5, 6), None)
    train_faces.main(short(data, tmp_path, "--amp", "float16"))
    saved = read(tmp_path)
    assert saved["progress"]["epoch"] == 4
    assert all(torch.tensor(saved["progress"]["loss"]).isfinite())
    assert all(value.isfinite().all() for value in saved["network"].values())


def test_float16_that_skips_every_step_stops() -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    losses = torch.tensor([1.0, torch.nan, 2.0])
    divergence.check_losses(losses, 1, scaler)
    assert divergence.mean_loss(losses, 3) == 1.5
    scaler.update(2.0**-30)
    with pytest.raises(divergence.DataError, match="step 3: the gradients have not been finite"):
        divergence.check_losses(torch.ones(3), 1, scaler)


class Limited:
    """Files cannot become larger than so many bytes, as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_checkpoint_without_room(
    data: Path, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []

    def save(*given: object) -> None:
        saves.append(1)
        if len(saves) != 2:
            return checkpoint.write_checkpoint(*given)
        with Limited(size):
            return checkpoint.write_checkpoint(*given)

    monkeypatch.setattr(trainer, "write_checkpoint", save)
    message = refused(*short(data, tmp_path / "run"))
    path = tmp_path / "run" / CHECKPOINT
    assert f"{path}: File too large; the one before is whole" in message
    assert read(path.parent)["progress"]["epoch"] == 1
    assert not list(path.parent.glob("*.new"))
    train_faces.main(short(data, tmp_path / "run", "--resume"))
    assert read(path.parent)["progress"]["epoch"] == 4


@pytest.mark.parametrize("name", ["report.md", "report.html", "loss.png"])
def test_a_report_without_room(
    data: Path, name: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_faces, "write_report", report.write_report)
    before = (run / name).read_bytes()
    for each in ("save", "write_text"):
        real = getattr(report, each)

        def limited(*given: object, real: Callable = real) -> None:
            path = next(each for each in given if isinstance(each, Path))
            if path.name != name:
                return real(*given)
            with Limited(100):
                return real(*given)

        monkeypatch.setattr(report, each, limited)
        monkeypatch.setitem(report.write_html.__globals__, each, limited)
    message = refused(*short(data, run, "--resume"))
    assert message == f"error: {run / name}: File too large"
    assert (run / name).read_bytes() == before and not list(run.glob("*.new"))


def test_curves_without_room(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flushes, threads = trainer.Curves.flush, [], []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def flush(self: trainer.Curves) -> None:
        flushes.append(1)
        if len(flushes) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        real(self)

    monkeypatch.setattr(trainer.Curves, "flush", flush)
    monkeypatch.setattr(threading, "excepthook", threads.append)
    hook = threading.excepthook
    try:
        message = refused(*short(data, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message == f"error: {tmp_path}, TensorBoard's file: File too large"
    assert read(tmp_path)["progress"]["epoch"] == 1
    # The writer's thread says nothing of its own.
    assert not threads and threading.excepthook is hook
