"""All that is public answers odd arguments by a result or by an error that names one of them.

FACELT_FUZZ=COUNT makes so many calls, FACELT_FUZZ_SEED=SEED others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_public import finding
from odd_values import Wrapper
from public_calls import CALLS, NO_CALLS, made, parameters, public

CHILD = Path(__file__).with_name("fuzz_public.py")
SEED = int(os.environ.get("FACELT_FUZZ_SEED", 0))
COUNT = int(os.environ.get("FACELT_FUZZ", 3 * len(CALLS)))


def test_all_that_is_public_has_a_call():
    names = set(public())
    assert names - set(CALLS) - set(NO_CALLS) == set(), "add a right call to calls_of_*.py"
    assert set(CALLS) | set(NO_CALLS) == names, "not public any more"
    assert not set(CALLS) & set(NO_CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_right_calls_are_right(name):
    function, arguments = made(name)
    assert set(arguments) <= set(parameters(public()[name][1]))
    function(**arguments)


def fuzzed(seed: int, count: int, script: Path = CHILD) -> list[str]:
    """Findings of as many processes as it takes to come to the end."""
    found, first = [], 0
    while True:
        command = [sys.executable, "-W", "ignore", script, seed, count, first]
        child = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        lines = child.stdout.splitlines()
        found += [line for line in lines if line.startswith("finding")]
        if lines and lines[-1] == "end":
            return found
        calls = [line.split(" ", 2) for line in lines if line.startswith("call")]
        assert calls and child.returncode < 0, child.stderr
        number, text = calls[-1][1:]
        how = "never ends" if child.returncode == -signal.SIGALRM else f"dies ({child.returncode})"
        found.append(f"finding {text} {how}")
        first = int(number) + 1


def test_odd_arguments():
    found = fuzzed(SEED, COUNT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (lambda x: x, None),
        (lambda x: fail(TypeError("x: expected a number, got str")), None),
        (lambda x: fail(ValueError("x[0]: expected a number")), None),
        (lambda x: fail(TypeError("must be a number, not x")), None),
        (lambda x: fail(TypeError("must be a number")), "TypeError must be a number"),
        (lambda x: fail(ValueError("expected: x")), "ValueError expected: x"),
        (lambda x: fail(RuntimeError("x: wrong")), "RuntimeError x: wrong"),
        (lambda x: fail(MemoryError("x: too large")), "MemoryError x: too large"),
        (lambda x: BrokenBackward.apply(torch.ones(1, requires_grad=True)), "IndexError backward"),
    ],
)
def test_what_is_a_finding(answer, wrong):
    said = finding(answer, {"x": Wrapper(torch.ones(2))})
    assert said is None if wrong is None else said.startswith(wrong)


def fail(error: Exception) -> None:
    raise error


class BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise IndexError("backward")


def test_crashes_and_what_never_ends_are_findings(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys\n"
        "kinds = {0: signal.SIGSEGV, 2: signal.SIGALRM}\n"
        "for number in range(int(sys.argv[3]), int(sys.argv[2])):\n"
        "    print('call', number, f'f(x={number})', flush=True)\n"
        "    if number in kinds:\n"
        "        os.kill(os.getpid(), kinds[number])\n"
        "print('finding f(x=3) said nothing')\n"
        "print('end')\n"
    )
    assert fuzzed(0, 4, script) == [
        "finding f(x=0) dies (-11)",
        "finding f(x=2) never ends",
        "finding f(x=3) said nothing",
    ]
