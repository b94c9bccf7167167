"""NearestClusterClassifier beside k nearest samples: accuracy, agreement, time and memory.

    python -m benchmarks.nearest_clusters

Unit features around groups within classes; some are fitted, others are classified. Each form runs
in a process of its own. k-means, which training has made, does not count.
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
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import THREADS
from benchmarks.memory import in_own_process, status
from benchmarks.run import RESULTS, machine
from facelt_ext.classification import NearestClusterClassifier
from facelt_ext.clusters import ClusterIndex

# Samples to fit, classes, dimensions.
SHAPES = [(80_000, 2, 64), (80_000, 400, 64), (80_000, 400, 512)]
QUERIES, CLUSTER_SIZE, NEIGHBORS = 1_000, 200, 20
SPREAD = 1.6  # of the samples around their group's mean
BASELINE = "20 samples, scikit-learn brute"

# Gives the function that classifies.
Fit = Callable[[Tensor, Tensor, int], Callable[[Tensor], np.ndarray]]


def data(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """QUERIES samples more than are to be fitted."""
    count, classes, dimensions = shape
    generator = torch.Generator().manual_seed(0)
    groups = count // CLUSTER_SIZE // classes
    means = torch.randn(classes * groups, dimensions, generator=generator)
    own = torch.randint(classes * groups, (count + QUERIES,), generator=generator)
    noise = torch.randn(count + QUERIES, dimensions, generator=generator)
    return torch.nn.functional.normalize(means[own] + SPREAD * noise), own // groups


def ours(search: str) -> Fit:
    def fit(x: Tensor, labels: Tensor, size: int) -> Callable[[Tensor], np.ndarray]:
        clusters = ClusterIndex(labels, cluster_size=size)
        clusters.refresh(x)
        classifier = NearestClusterClassifier(NEIGHBORS, search=search).fit(clusters)
        return lambda queries: classifier.predict(queries).numpy()

    return fit


def scikit_learn(algorithm: str) -> Fit:
    def fit(x: Tensor, labels: Tensor, _: int) -> Callable[[Tensor], np.ndarray]:
        from sklearn.neighbors import KNeighborsClassifier

        classifier = KNeighborsClassifier(NEIGHBORS, algorithm=algorithm, n_jobs=THREADS)
        classifier.fit(x.numpy(), labels.numpy())
        return lambda queries: classifier.predict(queries.numpy())

    return fit


def faiss(x: Tensor, labels: Tensor, _: int) -> Callable[[Tensor], np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x.numpy())

    def predict(queries: Tensor) -> np.ndarray:
        nearest = torch.from_numpy(index.search(queries.numpy(), NEIGHBORS)[1])
        return labels[nearest].mode(1).values.numpy()

    return predict


FORMS: dict[str, Fit] = {
    "20 clusters, products": ours("products"),
    "20 clusters, KDTree": ours("kdtree"),
    "20 clusters, faiss": ours("faiss"),
    BASELINE: scikit_learn("brute"),
    "20 samples, scikit-learn KD-tree": scikit_learn("kd_tree"),
    "20 samples, faiss": faiss,
}


def measured(shape: tuple[int, int, int], form: str) -> dict[str, object]:
    torch.set_num_threads(THREADS)
    x, labels = data(shape)
    predict = FORMS[form](x[:-QUERIES], labels[:-QUERIES], CLUSTER_SIZE)
    queries = x[-QUERIES:].clone()
    predict(queries[:10])  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    begin = time.perf_counter()
    predicted = predict(queries)
    seconds = time.perf_counter() - begin
    return {
        "seconds_per_query": seconds / QUERIES,
        "accuracy": float((predicted == labels[-QUERIES:].numpy()).mean()),
        "extra_bytes": max(0, status("VmHWM") - before),
        "predicted": predicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with tqdm(total=len(SHAPES) * len(FORMS), unit="form") as progress:
        for shape in SHAPES:
            found = {}
            for form in FORMS:
                found[form] = in_own_process(measured, shape, form)
                progress.update()
            baseline = found[BASELINE]["predicted"]
            for form, row in found.items():
                agreement = float((row.pop("predicted") == baseline).mean())
                name = f"{shape[0]:,}x{shape[2]}, {shape[1]:,} classes"
                rows.append({"shape": name, "form": form, **row, "agreement": agreement})
    record = {"machine": machine("cpu"), "queries": QUERIES, "cases": rows}
    path = options.output / "nearest_clusters-cpu.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{table(rows)}\n\n-> {path}")


def table(rows: list[dict]) -> str:
    lines = [
        [
            row["shape"],
            row["form"],
            f"{row['seconds_per_query'] * 1e6:,.1f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['agreement']:.1f}",
            f"{row['extra_bytes'] / 2**20:.1f}",
        ]
        for row in rows
    ]
    headers = ["fitted", "form", "us a query", "accuracy %", "agreement %", "extra MiB"]
    return tabulate(
        lines, headers, colalign=("left", "left", *["right"] * 4), disable_numparse=True
    )


if __name__ == "__main__":
    main()
