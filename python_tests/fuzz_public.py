"""Right calls of all that is public with one or two arguments replaced by odd values.

    python fuzz_public.py SEED COUNT [FIRST [NAME ...]]

Prints `call NUMBER TEXT` before each, so that a crash is known, and `finding TEXT` for what is no
good answer: anything but a return and a TypeError or ValueError that names an argument of the call
before its first colon, as the errors of `_checks` do. A call longer than SECONDS ends the process.
"""

from __future__ import annotations

import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from odd_values import ODD
from public_calls import CALLS, parameters, public
from torch import Tensor

SECONDS = 20
MEMORY = 12 << 30
# Where to write and read is the system's to judge.
FILES = ("path",)
# A check knows the sizes for which no machine has the memory; torch, what this one has.
NO_MEMORY = "can't allocate memory"


def changed_call(name: str, rng: random.Random) -> tuple[str, object, dict[str, object]]:
    """What is called, as text too, and its arguments."""
    torch.manual_seed(rng.randrange(2**31))
    function, arguments = CALLS[name]()
    _, target = public()[name]
    for key, parameter in parameters(target).items():
        if parameter.default is not parameter.empty:
            arguments.setdefault(key, parameter.default)
    told = []
    for key in rng.sample(list(arguments), min(len(arguments), rng.choice((1, 1, 2)))):
        kind = rng.choice(list(ODD))
        arguments[key] = ODD[kind](arguments[key])
        told.append(f"{key}={kind}")
    return f"{name}({', '.join(told)})", function, arguments


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)


def finding(function: object, arguments: dict[str, object]) -> str | None:
    """What was wrong with the answer."""
    try:
        output = function(**arguments)
        losses = [each.sum() for each in tensors(output) if each.requires_grad]
        if losses:
            sum(losses).backward()
    except (TypeError, ValueError) as error:
        named = set(re.findall(r"\w+", str(error).split(":")[0]))
        if not named & {*arguments, *getattr(function, "also", ())}:
            return f"{type(error).__name__} {error}"
    except OSError as error:
        if not set(FILES) & set(arguments):
            return f"{type(error).__name__} {error}"
    except BaseException as error:
        if not (isinstance(error, RuntimeError) and NO_MEMORY in str(error)):
            return f"{type(error).__name__} {error}"
    return None


def main(seed: int, count: int, first: int = 0, names: tuple[str, ...] = tuple(CALLS)) -> None:
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, count):
        # Of its own generator, so that a run can go on after a crash.
        rng = random.Random(f"{seed} {number}")
        text, function, arguments = changed_call(names[number % len(names)], rng)
        print("call", number, text, flush=True)
        # Without a handler: it also ends what does not come back to Python.
        signal.alarm(SECONDS)
        wrong = finding(function, arguments)
        signal.alarm(0)
        if wrong is not None:
            print("finding", text, " ".join(wrong.split())[:200], flush=True)
    print("end", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.chdir(folder)
        tempfile.tempdir = folder
        numbers, names = map(int, sys.argv[1:4]), tuple(sys.argv[4:])
        main(*numbers, **{"names": names} if names else {})
