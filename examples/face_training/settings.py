"""Recipes with numbers of one's own, and their description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate

from face_demo.errors import DataError

from .recipes import Recipe, Setting


def adapted(
    recipe: Recipe,
    settings: dict[str, Setting],
    epochs: int | Sequence[int] | None,
    rate: float | None,
) -> Recipe:
    """A recipe with numbers of one's own.

    Args:
        settings: by name, of losses, batches, and ``minimums``; they go to all phases that have
            such a setting.
        epochs: of all phases together, in the recipe's proportions, each at least one; or of each.
        rate: that the first phase begins with; the others' change in proportion.

    Raises:
        DataError: the recipe has no such setting, or it is of another kind; too few epochs.
    """
    known = {
        name
        for phase in recipe.phases
        for name in (*phase.loss, *phase.batches, *(["minimums"] if phase.minimums else []))
    }
    unknown = sorted(set(settings) - known)
    if unknown:
        raise DataError(
            f"the recipe has no setting {unknown[0]}; it has {', '.join(sorted(known))}"
        )
    if isinstance(epochs, int) and epochs < len(recipe.phases):
        raise DataError(
            f"the recipe has {len(recipe.phases)} phases; {epochs} epoch(s) are too few"
        )
    shares = _shares(recipe, epochs) if epochs is None or isinstance(epochs, int) else epochs
    first_rate = recipe.phases[0].rate
    phases = []
    for phase, number in zip(recipe.phases, shares, strict=True):
        phases.append(
            replace(
                phase,
                loss=_changed(phase.loss, settings),
                batches=_changed(phase.batches, settings),
                minimums=_changed({"minimums": phase.minimums}, settings)["minimums"]
                if phase.minimums
                else (),
                epochs=number,
                rate=phase.rate if rate is None else phase.rate * rate / first_rate,
            )
        )
    return replace(recipe, phases=tuple(phases))


def _changed(values: dict[str, Setting], settings: dict[str, Setting]) -> dict[str, Setting]:
    return {
        name: _like(value, settings[name], name) if name in settings else value
        for name, value in values.items()
    }


def _like(value: Setting, given: Setting, name: str) -> Setting:
    """A number of the kind that the recipe's own is; a word, as epsilon's, may become a number."""
    if isinstance(value, tuple):
        given = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not given:
            raise DataError(f"--set {name}: expected numbers, got none")
        return tuple(_like(value[0], each, name) for each in given)
    if isinstance(value, str):
        return given
    wanted = int if isinstance(value, int) else (int, float)
    if isinstance(given, bool) or not isinstance(given, wanted):
        kind = "a whole number" if isinstance(value, int) else "a number"
        raise DataError(f"--set {name}: expected {kind}, got {given!r}")
    return type(value)(given)


def _shares(recipe: Recipe, epochs: int | None) -> list[int]:
    wanted = [phase.epochs for phase in recipe.phases]
    if epochs is None:
        return wanted
    return [1 + more for more in _divided(epochs - len(wanted), wanted)]


def _divided(number: int, weights: Sequence[int]) -> list[int]:
    """In proportion to the weights, and whole."""
    total = sum(weights)
    ends = [(2 * number * end + total) // (2 * total) for end in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def resumed_epochs(
    recipe: Recipe, begun: Sequence[int], phase: int, epochs: int | None
) -> list[int]:
    """Epochs of each phase where a run goes on.

    Args:
        recipe: as it is in the table.
        begun: that the phases had.
        phase: that the run was in. Those before keep theirs; what ``epochs`` adds goes to it and to
            those after it, in the recipe's proportions.
        epochs: of all phases together; None: as they were.

    Raises:
        DataError: they would be fewer.
    """
    more = 0 if epochs is None else epochs - sum(begun)
    if more < 0:
        raise DataError(
            f"--epochs was {sum(begun)}, is {epochs}: a run can go on with more, not with fewer"
        )
    added = _divided(more, [each.epochs for each in recipe.phases[phase:]])
    return [*begun[:phase], *(a + b for a, b in zip(begun[phase:], added, strict=True))]


def describe(recipe: Recipe) -> list[dict]:
    """The numbers of the phases, as plain data."""
    return [
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(phase).items()
            if name != "make_loss"
        }
        for phase in recipe.phases
    ]
