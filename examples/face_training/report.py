"""The page that a training leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from face_demo.files import save, write_text
from face_demo.page import literal, write_html
from matplotlib.figure import Figure

from facelt_ext import evaluation

from .checkpoint import CHECKPOINT
from .evaluation_sets import Judgement
from .images import Faces
from .options import Options, Progress
from .recipes import Recipe
from .settings import describe


def write_report(
    folder: Path,
    title: str,
    source: str,
    faces: Faces,
    skipped: Sequence[str],
    recipe: Recipe,
    options: Options,
    progress: Progress,
    judged: Mapping[str, Judgement],
) -> Path:
    """Writes report.md, report.html and pictures into ``folder``; returns the page to open."""
    _plot_loss(recipe, progress, folder / "loss.png")
    pictures = ["![loss and learning rate](loss.png)"]
    if judged:
        axes = evaluation.plot_roc({name: each.roc for name, each in judged.items()})
        save(axes.figure, folder / "roc.png")
        pictures.append("![ROC](roc.png)")
    counts = faces.counts()
    page = f"""\
# {title} on {literal(source)}

{recipe.source}

{len(faces)} images of {len(faces.names)} identities, {int(counts.min())} to {int(counts.max())} of
each (median {int(counts.median())}). {len(skipped)} image(s) could not be read and were left out.
The network and all else are in `{CHECKPOINT}`; curves over the steps are in TensorBoard's files.

{_figures(judged)}

{chr(10).join(pictures)}

{_phases(recipe, progress)}

| setting | value |
|---|---|
{chr(10).join(f"| {name} | {literal(str(value))} |" for name, value in vars(options).items())}
"""
    names = "".join(f"- {literal(name)}\n" for name in skipped[:100])
    if skipped:
        page += f"\nUnreadable images{' (the first 100)' if len(skipped) > 100 else ''}:\n\n{names}"
    path = folder / "report.md"
    write_text(path, page)
    return write_html(path)


def _figures(judged: Mapping[str, Judgement]) -> str:
    if not judged:
        return "Nothing was evaluated."
    names = list(dict.fromkeys(name for each in judged.values() for name in each.figures))
    lines = [
        f"| in per cent | {' | '.join(map(literal, judged))} |",
        f"|---|{'---:|' * len(judged)}",
    ]
    for name in names:
        values = [each.figures.get(name) for each in judged.values()]
        shown = ["–" if value is None else f"{100 * value:.2f}" for value in values]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines.append(
        "\nAccuracy, equal error rate, AUC and the ROC curve are of the folds' pairs. Of sets of "
        "identities TAR is over all pairs, rank-1 and DIR are means over ten random galleries."
    )
    return "\n".join(lines)


def _phases(recipe: Recipe, progress: Progress) -> str:
    lines = [
        "| phase | epochs | loss, first to last | ms a step | settings |",
        "|---|---|---|---|---|",
    ]
    first = 0
    for number, (phase, described) in enumerate(
        zip(recipe.phases, describe(recipe), strict=True), 1
    ):
        last = first + phase.epochs
        losses, seconds = progress.loss[first:last], progress.seconds_per_step[first:last]
        settings = {"rate": phase.rate, **described["batches"], **described["loss"]}
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        lines.append(
            f"| {number} | {phase.epochs} | {losses[0]:.4f} to {losses[-1]:.4f} "
            f"| {1e3 * min(seconds):.0f} | {shown} |"
        )
        first = last
    return "\n".join(lines)


def _plot_loss(recipe: Recipe, progress: Progress, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    loss, rate = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    first = 0
    for number, phase in enumerate(recipe.phases, 1):
        last = first + phase.epochs
        epochs = range(first + 1, last + 1)
        loss.plot(
            epochs, progress.loss[first:last], marker="o", markersize=3, label=f"phase {number}"
        )
        rate.plot(epochs, progress.rate[first:last], marker="o", markersize=3)
        first = last
    loss.set(ylabel="mean loss")
    rate.set(ylabel="learning rate", yscale="log", xlabel="epoch")
    if len(recipe.phases) > 1:
        loss.legend(fontsize="small")
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    save(figure, path)
