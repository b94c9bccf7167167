"""The peak memory of a case beside its inputs and their gradient, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import SHAPES, THREADS, runner

REPEATS = 3


def peak_extra_bytes(shape: str, form: str, device: str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", shape, form, device]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure_cpu(run) -> int:
    """Peak resident memory above what was there before, the least of a few tries."""
    peaks = []
    for _ in range(REPEATS):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        gradient = run()
        peaks.append(status("VmHWM") - before - gradient.nbytes)
        del gradient
    return max(0, min(peaks))


def measure_cuda(run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient = run()
    return torch.cuda.max_memory_allocated() - before - gradient.nbytes


def main(shape_name: str, form: str, device: str) -> None:
    torch.set_num_threads(THREADS)
    (shape,) = [s for s in SHAPES if s.name == shape_name]
    run = runner(shape, form, device)
    run()
    print(measure_cpu(run) if device == "cpu" else measure_cuda(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
