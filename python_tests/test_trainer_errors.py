"""What users can get wrong is said in one line, before any training, by each of the examples."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from demo_cases import attributes, demo
from training_cases import (
    CHECKPOINT,
    SMALL,
    backbones,
    evaluation_sets,
    shrink_network,
    train_faces,
    trainer,
    write_faces,
)

from facelt_ext.evaluation import IndexPairs


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch):
    shrink_network(monkeypatch)
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of six identities."""
    return write_faces(tmp_path_factory.mktemp("of") / "data", {f"p{i}": 4 for i in range(6)})


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    monkeypatch.setattr(demo, "compare", step)
    monkeypatch.setattr(attributes, "predictions", step)


def of(data: Path, output: Path, *more: str) -> list[str]:
    given = ["--data", str(data), "--output", str(output), *SMALL, "--epochs", "2"]
    return [*given, "--hold-out", "0", *more]


def end(script: types.ModuleType, given: list[str], capsys: pytest.CaptureFixture) -> tuple:
    """Exit code and what was said of the error, which is one line."""
    with pytest.raises(SystemExit) as caught:
        script.main(given)
    code, said = caught.value.code, capsys.readouterr().err
    if isinstance(code, str):
        code, said = 1, code
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in said
    return code, lines[0]


WRONG_ARGUMENTS = [
    (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
    (["--embedding-size", "-1"], "--embedding-size must be at least 1, got -1"),
    (["--image-size", "0"], "--image-size must be at least 1, got 0"),
    (["--workers", "-1"], "--workers must be at least 0, got -1"),
    *((["--rate", each], "--rate must be .*, got .") for each in ("nan", "inf", "-1", "1e300")),
    (["--rate", "0"], "--rate must be above 0, got 0"),
    *((["--weight-decay", each], "--weight-decay must be .*") for each in ("nan", "inf", "-1")),
    *((["--clip-norm", each], "--clip-norm must be .*") for each in ("nan", "inf", "-1")),
    *((["--hold-out", each], "--hold-out must be in") for each in ("nan", "1", "-0.1")),
    *((["--seed", each], "--seed must be .*") for each in ("-1", str(2**63), str(2**64), "9" * 40)),
    (["--recipe", "magface"], "--recipe: invalid choice: 'magface'"),
    (["--amp", "int8"], "--amp: invalid choice: 'int8'"),
    (["--schedule", "none"], "--schedule: invalid choice: 'none'"),
    (["--eval"], "--eval: expected at least one argument"),
    (["--set"], "--set: expected at least one argument"),
    (["--unknown"], "unrecognized arguments: --unknown"),
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("more", "named"), WRONG_ARGUMENTS)
def test_wrong_arguments_end_with_code_two(
    more: list[str], named: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, line = end(train_faces, of(data, tmp_path / "run", *more), capsys)
    assert code == 2 and re.search(named, line)
    assert not (tmp_path / "run").exists()


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
CLMLE = ["--recipe", "clmle", "--set", "cluster_size=4", "samples_per_cluster=4"]
UNFIT = [
    *(
        pytest.param(["--device", each], f"--device {each}: there is no such device", marks=marks)
        for each, marks in (
            ("cuda", no_cuda),
            ("cuda:0", no_cuda),
            ("cuda:9999", ()),
            ("mps:77", ()),
            ("meta", ()),
            ("gpu", ()),
            ("", ()),
            ("cpu:x", ()),
        )
    ),
    (["--backbone", "resnet"], "--backbone: expected iresnet18"),
    (["--backbone", "torchvision/"], "--backbone: expected iresnet18"),
    (["--image-size", "100"], "--image-size: expected a multiple of 16, got 100"),
    *((["--set", f"batch_size={n}"], f"batch_size: expected at least 1, got {n}") for n in (0, -8)),
    (["--set", "batch_size=1"], "a batch of one image is too small for batch norm"),
    (["--set", "batch_size="], "--set batch_size: expected a whole number, got ''"),
    (["--set", "batch_size=True"], "--set batch_size: expected a whole number, got True"),
    (["--set", "batch_size=8.0"], "--set batch_size: expected a whole number, got 8.0"),
    (["--set", "batch_size=" + "(" * 300], "--set batch_size: expected a whole number, got '("),
    (["--set", "batch_size=[1]+1"], "--set batch_size: expected a whole number"),
    (["--set", "margin=nan"], "--set margin: expected"),
    (["--set", "margin=4"], "--set margin: expected"),
    (["--set", "margin=1e999"], "--set margin: expected"),
    (["--set", "margin={}"], "--set margin: expected a number, got {}"),
    (["--set", "scale=-1"], "--set scale: expected"),
    (["--set", "=3"], "expected NAME=VALUE, got =3"),
    (["--set", "margin"], "expected NAME=VALUE, got margin"),
    (["--recipe", "range", "--set", "classes_per_batch=0"], "--set classes_per_batch: expected"),
    (["--recipe", "range", "--set", "samples_per_class=-1"], "--set samples_per_class: expected"),
    (
        ["--recipe", "range", "--set", "classes_per_batch=1", "samples_per_class=1"],
        "a batch of one image is too small",
    ),
    (["--recipe", "range", "--set", "k=0"], "--set k: expected"),
    (["--recipe", "domain-balancing", "--set", "k=-1"], "--set k: expected"),
    (["--recipe", "domain-balancing", "--set", "epsilon=none"], "--set epsilon: expected"),
    # What the second phase needs is told before the first.
    ([*CLMLE, "between_margin=1e999"], "--set between_margin: expected"),
    ([*CLMLE, "samples_per_cluster=99999999999"], "--set samples_per_cluster: expected"),
    ([*CLMLE, "clusters_per_batch=0"], "--set clusters_per_batch: expected at least 1, got 0"),
    ([*CLMLE, "refresh=0"], "--set refresh: expected at least 1, got 0"),
    (["--recipe", "lmle", "--set", "margins=0.1"], "--set margins: expected"),
    *(
        (
            ["--recipe", "aggregate-disperse", "--epochs", "3", "--set", f"minimums={each}"],
            "minimums",
        )
        for each in ("()", "0", "4,0", "1,4", "4,'a'", "4,None", "[]", "4,2.5")
    ),
    (["--recipe", "clmle", "--epochs", "1"], "the recipe has 2 phases; 1 epoch"),
    (["--data", "NOWHERE"], "NOWHERE is neither"),
    (["--resume"], f"there is no .*{CHECKPOINT} to resume from"),
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("more", "named"), UNFIT)
def test_what_does_not_fit_ends_before_training(
    more: list[str], named: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, line = end(train_faces, of(data, tmp_path / "run", *more), capsys)
    assert code == 1 and line.startswith("error: ")
    assert "--resume" not in more or not (tmp_path / "run").exists()
    assert re.search(named.replace("(", r"\("), line)


@pytest.mark.parametrize("recipe", train_faces.RECIPES)
def test_data_smaller_than_a_batch(recipe: str, tmp_path: Path) -> None:
    data = write_faces(tmp_path / "data", {"a": 5, "b": 3, "c": 2, "d": 1})
    more = ["--set", "minimums=3,1"] if recipe == "aggregate-disperse" else []
    train_faces.main(of(data, tmp_path / "run", "--recipe", recipe, "--epochs", "3", *more))
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert len(saved["progress"]["loss"]) == 3


def places(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "file").write_text("x")
    (folder / "to a file").symlink_to(folder / "file")
    (folder / "dangling").symlink_to(folder / "nothing")
    return {
        "a file": (folder / "file", "a file is there"),
        "below a file": (folder / "file" / "o", "Not a directory"),
        "a link to a file": (folder / "to a file", "a file is there"),
        "a link to nothing": (folder / "dangling", "a file is there"),
        # Even root cannot write there.
        "read-only, new": (Path("/proc/output"), "No such file or directory"),
        "read-only, there": (Path("/proc/self"), "No such file or directory"),
        "a long name": (folder / ("n" * 300), "File name too long"),
    }


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("script", [train_faces, demo, attributes], ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "place",
    ["a file", "below a file", "a link to a file", "a link to nothing", "a long name"]
    + [each for each in ("read-only, new", "read-only, there") if sys.platform == "linux"],
)
def test_places_that_cannot_be_written_to(
    script: types.ModuleType, place: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, reason = places(tmp_path)[place]
    assert end(script, ["--output", str(output)], capsys) == (
        1,
        f"error: --output {output}: {reason}",
    )


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("inside", [".", "runs", "p0/run"])
def test_an_output_among_the_images(
    inside: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = write_faces(tmp_path / "data", {f"p{i}": 2 for i in range(4)})
    before = sorted(other.rglob("*"))
    for given in (of(other, other / inside), of(data, other / inside, "--eval", str(other))):
        code, line = end(train_faces, given, capsys)
        assert code == 1 and f"must not lie in {other}" in line
    assert sorted(other.rglob("*")) == before


def test_an_output_with_spaces_and_signs(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a run, ümlaut = [1] #2"
    train_faces.main(of(data, output, "--set", "batch_size=8"))
    train_faces.main(of(data, output, "--set", "batch_size=8", "--resume"))
    assert (output / "report.html").is_file()


def test_flags_add_up(data: Path, tmp_path: Path) -> None:
    sets = [write_faces(tmp_path / name, {f"{name}{i}": 2 for i in range(4)}) for name in "ab"]
    more = ["--set", "batch_size=8", "--set", "margin=0.25", "scale=8", "--set", "scale=16"]
    more += [part for each in sets for part in ("--eval", str(each))]
    train_faces.main(of(data, tmp_path / "run", *more))
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert saved["recipe"][0]["batches"] == {"batch_size": 8}
    assert saved["recipe"][0]["loss"] == {"margin": 0.25, "scale": 16.0}
    assert set(saved["progress"]["figures"][-1]) == {"a", "b"}
    chosen = demo.parse_arguments(["--methods", "arcface", "--methods", "cosface", "head-only"])
    assert chosen.methods == ["arcface", "cosface", "head-only"]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("script", "more", "code", "named"),
    [
        (demo, ["--seeds", "0"], 2, "--seeds must be at least 1, got 0"),
        (demo, ["--seed", "-1"], 2, "--seed must be at least 0"),
        (demo, ["--seed", str(2**64)], 2, "--seed must be at least 0"),
        (demo, ["--seed", str(2**63 - 2)], 2, "--seed must be at least 0"),
        (demo, ["--device", "cuda:9999"], 1, "--device cuda:9999: there is no such device"),
        (demo, ["--device", "gpu"], 1, "--device gpu: there is no such device"),
        (demo, ["--data", "NOWHERE"], 1, "NOWHERE"),
        (demo, ["--methods", "magface"], 2, "invalid choice: 'magface'"),
        (attributes, ["--seeds", "0"], 2, "--seeds must be at least 1, got 0"),
        (attributes, ["--steps", "none"], 2, "--steps: invalid int value"),
    ],
)
def test_demos(
    script: types.ModuleType,
    more: list[str],
    code: int,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    found, line = end(script, ["--output", str(tmp_path), *more], capsys)
    assert found == code and named in line


def library(monkeypatch: pytest.MonkeyPatch, make: Callable[..., torch.nn.Module] | None) -> None:
    """A torchvision and a timm whose models ``make`` makes; None: they are not installed."""
    for name, function in (
        ("torchvision", None),
        ("torchvision.models", "get_model"),
        ("timm", "create_model"),
    ):
        made = None if make is None else types.ModuleType(name)
        if make is not None and function is not None:
            setattr(made, function, make)
        monkeypatch.setitem(sys.modules, name, made)


class Pooled(torch.nn.Module):
    """Needs images of 32 pixels at least; without batch norm."""

    def __init__(self, size: int, result: Callable[[torch.Tensor], object] = lambda rows: rows):
        super().__init__()
        self.linear, self.result = torch.nn.Linear(3, size), result
        self.calls = 0

    def forward(self, images: torch.Tensor) -> object:
        assert images.shape[-1] >= 32, f"expected 32 pixels, got {images.shape[-1]}"
        self.calls += 1
        return self.result(self.linear(images.mean((2, 3))))


def unknown(name: str, **options: object) -> torch.nn.Module:
    raise ValueError(f"Unknown model {name}")


MODELS = {
    "not installed": (None, 32, "cannot be imported"),
    "unknown": (unknown, 32, "Unknown model some"),
    "image size": (lambda name, **given: Pooled(given["num_classes"]), 16, "expected 32 pixels"),
    "other features": (lambda name, **given: Pooled(7), 32, r"expected features \[2, 8\], got"),
    "auxiliary": (
        lambda name, **given: Pooled(8, lambda rows: (rows, rows)),
        32,
        "expected features, got a tuple",
    ),
}


@pytest.mark.parametrize("name", ["torchvision/some", "timm/some"])
@pytest.mark.parametrize("kind", MODELS)
def test_networks_of_other_libraries(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, size, named = MODELS[kind]
    library(monkeypatch, make)
    with pytest.raises(backbones.DataError, match=f"--backbone {name}.*{named}"):
        backbones.make_backbone(name, 8, size)


def test_without_batch_norm_a_batch_of_one_is_right(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, lambda name, **given: Pooled(given["num_classes"]))
    made = backbones.make_backbone("timm/some", 8, 32)
    assert made.calls == 0
    more = ["--backbone", "timm/some", "--image-size", "32", "--set", "batch_size=1"]
    train_faces.main(of(data, tmp_path / "run", *more))


def pairs(same: list[int], folds: list[int]) -> IndexPairs:
    count = len(same)
    return IndexPairs(
        torch.arange(count),
        torch.arange(count).roll(1),
        torch.tensor(same, dtype=torch.bool),
        torch.tensor(folds),
    )


@pytest.mark.parametrize(
    ("same", "folds", "fit"),
    [
        ([1, 1, 0, 0], [0, 0, 0, 0], True),
        ([1, 1, 0, 0], [3, 3, 3, 3], True),
        ([1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], True),
        ([1, 1, 0, 0], [0, 1, 0, 1], True),
        ([1, 0] * 12, [0] * 24, True),
        ([1, 1, 0, 0], [0, 0, 1, 1], False),
        ([1, 0, 0, 0], [0, 0, 1, 1], False),
        ([1, 0, 0, 0], [0, 0, 0, 0], False),
    ],
)
def test_sets_are_judged_or_refused_before_training(
    same: list[int], folds: list[int], fit: bool, data: Path
) -> None:
    faces = train_faces.load_faces(data, 16)
    given = evaluation_sets.EvaluationSet("some", faces, pairs(same, folds), False, 0)
    network = torch.nn.Sequential(torch.nn.Flatten(), Floats())
    if not fit:
        with pytest.raises(backbones.DataError, match="evaluation set some: "):
            evaluation_sets.judgeable(given)
        return
    found = evaluation_sets.judgeable(given)
    judged = evaluation_sets.judge(network, found, 8, 0)
    assert 0 <= judged.figures["accuracy"] <= 1
    if len(set(folds)) > 1:
        assert torch.equal(found.pairs.folds, given.pairs.folds)


class Floats(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


@pytest.mark.usefixtures("no_training")
def test_a_list_that_cannot_be_judged_ends_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "split,first,second,same\n"
        + "\n".join(
            f"{fold},p{a}/p{a}_0001.png,p{b}/p{b}_0002.png,{int(a == b)}"
            for fold, a, b in [(1, 0, 0), (1, 1, 1), (2, 0, 1), (2, 1, 2)]
        )
    )
    more = ["--eval", f"{path}={data}"]
    code, line = end(train_faces, of(data, tmp_path / "run", *more), capsys)
    assert code == 1 and line.startswith(
        "error: evaluation set pairs: folds: expected pairs of both"
    )


def in_step_five(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    real = trainer.Trainer._step

    def step(self: trainer.Trainer, *given: object) -> torch.Tensor:
        if self.progress.step == 4:
            act()
        return real(self, *given)

    monkeypatch.setattr(trainer.Trainer, "_step", step)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "error: ended by SIGTERM"),
        (signal.SIGINT, 130, "error: interrupted"),
    ],
)
def test_signals_end_a_run(
    number: int,
    code: int,
    said: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    in_step_five(monkeypatch, lambda: os.kill(os.getpid(), number))
    given = of(data, tmp_path / "run", "--set", "batch_size=8")
    # A shell starts what runs in the background with SIGINT ignored.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert end(train_faces, given, capsys) == (code, said)
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["progress"]["epoch"] == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_is_killed_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    workers = []

    def kill() -> None:
        workers.extend(multiprocessing.active_children())
        workers[0].kill()

    in_step_five(monkeypatch, kill)
    more = ["--workers", "2", "--set", "batch_size=8", "--epochs", "50"]
    code, line = end(train_faces, of(data, tmp_path / "run", *more), capsys)
    assert code == 1 and line.endswith("give fewer --workers if memory was short")
    # The error of this process, which goes on, keeps the other one.
    for each in workers:
        each.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_is_left_after_sigterm(data: Path, tmp_path: Path) -> None:
    given = of(data, tmp_path / "run", "--workers", "2", "--set", "batch_size=8")
    run = subprocess.Popen(
        [sys.executable, train_faces.__file__, *given, "--epochs", "10000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "run" / CHECKPOINT).exists():
            assert run.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.terminate()
        assert run.wait(60) == 143
    finally:
        run.kill()
    assert len(children) == 2 and not any(Path(f"/proc/{each}").exists() for each in children)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "error: out of memory: give"),
        (MemoryError(), "error: out of memory: give smaller batches"),
        (RuntimeError("[x] can't allocate memory: you tried 9"), "can't allocate memory: you"),
        (OSError(5, "Input/output error", "some.png"), "error: some.png: Input/output error"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
    ],
)
def test_errors_of_the_machine_are_named(
    error: Exception,
    said: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def step(*_: object) -> None:
        raise error

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    code, line = end(train_faces, of(data, tmp_path / "run"), capsys)
    assert code == 1 and said in line


def test_errors_of_the_scripts_keep_their_traceback(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    with pytest.raises(RuntimeError, match="a mistake"):
        train_faces.main(of(data, tmp_path / "run"))


def test_the_first_process_to_fail_says_so() -> None:
    store = torch.distributed.HashStore()
    assert [train_faces.first_to_fail(store) for _ in range(3)] == [True, False, False]


def test_wrong_arguments_of_all_processes_are_said_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        train_faces.main(of(data, tmp_path / "run", "--rate", "nan"))
    assert caught.value.code == 2 and not capsys.readouterr().err


def test_half_a_torchrun_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="error: RANK is set, but not all that torchrun sets: .*"):
        train_faces.main(of(data, tmp_path / "run"))


def test_two_processes_say_it_once(data: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, train_faces.__file__, *of(data, tmp_path / "run", "--resume")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and done.stderr.count("error: there is no ") == 1
    # The launcher's own report has a traceback, of the launcher.
    assert 'train_faces.py", line' not in done.stderr
