"""The peak memory of a case beside its inputs and its results, in a process of its own.

On the CPU it is the peak of resident memory in two steps, less what was resident before them and
less the results. Before them the case has run once, so that its code is compiled and the libraries
have what they keep (threads, MKL's buffers), which counts for no form; then everything that was
freed goes back to the system, also what our pool of large outputs keeps for the next step, which
therefore counts. The second step is the warm one: it begins with what the first left in that pool.
Pages count once they are written to. On CUDA it is the same in the caching allocator's count.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.cases import Run, cases_of, ready
from facelt_ext import _C

TRIES, SECONDS = 3, 2.0

# Each process is forked from one that has imported torch and done nothing with it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.memory", "torch._dynamo"])


def peak_extra_bytes(family: str, device: str, shape: str, form: str) -> int:
    return in_own_process(_measure_case, family, device, shape, form)


def in_own_process(function: Callable[..., int], *args: object) -> int:
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as processes:
        return processes.submit(function, *args).result()


def _measure_case(family: str, device: str, shape: str, form: str) -> int:
    (case,) = [c for c in cases_of(family, device) if (c.shape, c.form) == (shape, form)]
    return measure(ready(case, device), device)


def measure(run: Run, device: str) -> int:
    return measure_cpu(run) if device == "cpu" else measure_cuda(run)


def measure_cpu(run: Run) -> int:
    """The least of a few tries."""
    run()
    peaks = []
    end = time.perf_counter() + SECONDS
    while len(peaks) < TRIES and (not peaks or time.perf_counter() < end):
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        run()
        results = run()
        peaks.append(status("VmHWM") - before - sum(result.nbytes for result in results))
        del results
    return max(0, min(peaks))


def give_back_memory() -> None:
    gc.collect()
    empty_pool()
    ctypes.CDLL(None).malloc_trim(0)


def empty_pool() -> None:
    """Asking our pool of large outputs for a size that it does not keep makes it free what it does.

    The 2 MiB that it keeps afterwards were never written to.
    """
    _C.LargeMemory(1)


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure_cuda(run: Run) -> int:
    run()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(result.nbytes for result in results)
