"""Runs the benchmarks, prints one table and writes the figures to benchmarks/results/.

The table gives medians of forward + backward, and for each form how many times ours is faster.
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
from benchmarks.cases import THREADS
from benchmarks.memory import peak_extra_bytes

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--select", default="", help="only cases whose name holds this")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    rows = timed(options.device, options.select)
    for row in tqdm(rows, desc="memory", unit="case", leave=False):
        row["extra_bytes"] = peak_extra_bytes(row["shape"], row["form"], options.device)
    record = {"machine": machine(options.device), "cases": rows}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"range_loss-{options.device}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(table(rows))
    print(f"\n{record['machine']}\n-> {path}")


def timed(device: str, select: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [
            *(sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q"),
            *("--device", device, "-k", select, f"--benchmark-json={output}"),
            *("--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"),
        ]
        subprocess.run(command, check=True)
        benchmarks = json.loads(output.read_text())["benchmarks"]
    return [
        {
            **b["extra_info"],
            "median_s": b["stats"]["median"],
            "iqr_s": b["stats"]["iqr"],
            "rounds": b["stats"]["rounds"],
        }
        for b in benchmarks
    ]


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
    ours = {row["shape"]: row["median_s"] for row in rows if row["form"] == "ours"}
    lines = [
        [
            row["shape"],
            row["form"],
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['median_s'] / ours[row['shape']]:.1f} x" if row["shape"] in ours else "",
            f"{row['extra_bytes'] / 2**20:.1f}",
        ]
        for row in rows
    ]
    headers = ["shape", "form", "ms", "to ours", "extra MiB"]
    return tabulate(lines, headers, colalign=("left", "left", "right", "right", "right"))


if __name__ == "__main__":
    main()
