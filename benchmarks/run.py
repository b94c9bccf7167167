"""Runs the benchmarks, prints a table for each family, writes its figures to benchmarks/results/.

The tables give medians, and how they compare with the floor and with ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import facelt_ext
from benchmarks.cases import FAMILIES, THREADS, cases_of
from benchmarks.memory import peak_extra_bytes

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, help="only this one")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--select", default="", help="only cases whose name holds this")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for family in [options.family] if options.family else FAMILIES:
        rows = measured(family, options.device, options.select)
        if not rows:
            continue
        record = {"machine": machine(options.device), "cases": rows}
        path = options.output / f"{family}-{options.device}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\n{table(rows)}\n\n{record['machine']}\n-> {path}\n")


def measured(family: str, device: str, select: str) -> list[dict]:
    cases = cases_of(family, device, select)
    times = {} if all(case.left_out for case in cases) else timed(family, device, select)
    rows = []
    for case in tqdm(cases, desc="memory", unit="case", leave=False):
        row = {"shape": case.shape, "form": case.form}
        if case.left_out:
            row["left_out"] = case.left_out
        else:
            row |= times[case.shape, case.form]
            row["extra_bytes"] = peak_extra_bytes(family, device, case.shape, case.form)
        rows.append(row)
    return rows


def timed(family: str, device: str, select: str) -> dict[tuple[str, str], dict]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [
            *(sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q"),
            *("--family", family, "--device", device, "--select", select),
            *(f"--benchmark-json={output}", "--benchmark-columns=median,iqr,rounds"),
            "--benchmark-sort=name",
        ]
        subprocess.run(command, check=True)
        benchmarks = json.loads(output.read_text())["benchmarks"]
    return {
        (b["extra_info"]["shape"], b["extra_info"]["form"]): {
            "median_s": b["stats"]["median"],
            "iqr_s": b["stats"]["iqr"],
            "rounds": b["stats"]["rounds"],
        }
        for b in benchmarks
    }


def machine(device: str) -> dict[str, object]:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": THREADS,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "facelt_ext": facelt_ext.__version__,
        "commit": commit,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def table(rows: list[dict]) -> str:
    """Ratios are to the floor, where the family has one, and to the first form, which is ours."""
    times = {(row["shape"], row["form"]): row.get("median_s") for row in rows}
    ours = {row["shape"]: row.get("median_s") for row in reversed(rows)}
    lines = []
    for row in rows:
        shape, form, time = row["shape"], row["form"], row.get("median_s")
        line = [shape, form]
        if time is None:
            line += ["", "", "", row["left_out"]]
        else:
            floor = times.get((shape, "floor"))
            line += [f"{time * 1e3:.3f}", ratio(time, floor), ratio(time, ours[shape])]
            line += [f"{row['extra_bytes'] / 2**20:.1f}"]
        lines.append(line)
    headers = ["shape", "form", "ms", "to floor", "to ours", "extra MiB"]
    return tabulate(
        lines, headers, colalign=("left", "left", *["right"] * 4), disable_numparse=True
    )


def ratio(time: float, base: float | None) -> str:
    return f"{time / base:.2f} x" if base else ""


if __name__ == "__main__":
    main()
