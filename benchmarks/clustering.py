"""k-means of class means beside scikit-learn's and faiss's: time, inertia and memory.

    python -m benchmarks.clustering

Each form runs once, in a process of its own, for the same number of Lloyd's steps. scikit-learn
draws greedy k-means++ seeds, faiss random ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cases import THREADS
from benchmarks.memory import in_own_process, status
from benchmarks.run import RESULTS, machine
from facelt_ext.clustering import kmeans

ITERATIONS = 10
# Points, dimensions, clusters: the second is the paper's, with features of 512 dimensions.
SHAPES = [(5_000, 128, 700), (53_132, 512, 7_200)]


def points(shape: tuple[int, int, int]) -> np.ndarray:
    """Unit means of as many groups as there are clusters, and classes spread around them."""
    count, dimensions, clusters = shape
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(clusters, dimensions, generator=generator)
    own = torch.randint(clusters, (count,), generator=generator)
    noise = torch.randn(count, dimensions, generator=generator)
    return torch.nn.functional.normalize(means[own] + 0.7 * noise).numpy()


def ours(x: np.ndarray, k: int) -> np.ndarray:
    found = kmeans(torch.from_numpy(x), k, max_iterations=ITERATIONS, tolerance=0.0)
    return found.centroids.numpy()


def scikit_learn(x: np.ndarray, k: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=1, max_iter=ITERATIONS, tol=0, random_state=0).fit(x).cluster_centers_


def faiss(x: np.ndarray, k: int) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    found = faiss.Kmeans(x.shape[1], k, niter=ITERATIONS, seed=0, max_points_per_centroid=len(x))
    found.train(x)
    return found.centroids


FORMS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "ours": ours,
    "scikit-learn": scikit_learn,
    "faiss": faiss,
}


def measured(shape: tuple[int, int, int], form: str) -> dict[str, float]:
    torch.set_num_threads(THREADS)
    x = points(shape)
    FORMS[form](x[:500].copy(), 20)  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    begin = time.perf_counter()
    centroids = FORMS[form](x, shape[2])
    seconds = time.perf_counter() - begin
    extra = status("VmHWM") - before - centroids.nbytes
    return {"seconds": seconds, "inertia": inertia(x, centroids), "extra_bytes": max(0, extra)}


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    """Of the points assigned to the nearest of the final centroids, the same for all forms."""
    total = 0.0
    rows = torch.from_numpy(np.ascontiguousarray(centroids))
    for part in torch.from_numpy(x).split(1000):
        nearest = torch.cdist(part, rows).argmin(1)
        total += (part.double() - rows[nearest].double()).square().sum().item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape, form in tqdm([(shape, form) for shape in SHAPES for form in FORMS], unit="form"):
        name = f"{shape[0]:,}x{shape[1]} in {shape[2]:,}"
        rows.append({"shape": name, "form": form, **in_own_process(measured, shape, form)})
    record = {"machine": machine("cpu"), "iterations": ITERATIONS, "cases": rows}
    path = options.output / "clustering-cpu.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        [r["shape"], r["form"], r["seconds"], r["inertia"], r["extra_bytes"] / 2**20] for r in rows
    ]
    headers = ["shape", "form", "s", "inertia", "extra MiB"]
    print(f"\n{tabulate(lines, headers, floatfmt=('', '', '.2f', ',.1f', '.1f'))}\n\n-> {path}")


if __name__ == "__main__":
    main()
