"""The evaluation as one Markdown document with its pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helixnet.sim.evaluation.cells import Ended, Target
from helixnet.sim.evaluation.chapters import CHAPTERS, all_details, grids, problems
from helixnet.sim.evaluation.sections import SECTIONS
from helixnet.sim.tables import table

Results = Mapping[str, Sequence[Ended]]
"""What ended, by section."""
TITLES = {
    "calibration": "Calibration: the paper's system on the paper's data",
    "published": "Published besides",
    "like-for-like": "Like for like",
    "ours": "Ours, and what each part brings",
    "shares": "What IWRR makes of a plan",
    "predictions": "Predicted and simulated",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the figures come from."""

    command: str
    commit: str
    machine: str
    quick: bool


def targets_of(results: Results) -> dict[str, tuple[Target, ...]]:
    """By section."""
    return {name: SECTIONS[name].targets(ended) for name, ended in results.items()}


def chapter(name: str, ended: Sequence[Ended], pictures: Mapping[str, str] | None = None) -> str:
    """One section; `pictures` are words by path."""
    shown = [f"![{words}]({path})\n" for path, words in (pictures or {}).items()]
    parts = [f"## {TITLES[name]}\n", CHAPTERS[name](ended), *shown, problems(ended)]
    return "\n".join(part for part in parts if part)


def markdown(results: Results, origin: Origin, pictures: Mapping[str, Mapping[str, str]]) -> str:
    """The whole document; `pictures` by section."""
    return "\n".join(
        [
            "# The paper's evaluation, side by side\n",
            _origin(results, origin),
            _summary(results),
            *(chapter(name, ended, pictures.get(name)) for name, ended in results.items()),
        ]
    )


def write(path: Path, results: Results, origin: Origin) -> list[Path]:
    """The document, pictures and details in a folder of its name beside it. Returns what was written."""
    from helixnet.sim.evaluation.pictures import draw  # matplotlib comes with the extra `sim`

    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: draw(name, ended, folder) for name, ended in results.items()}
    linked = {
        name: {f"{folder.name}/{file}": words for file, words in pictures.items()} for name, pictures in drawn.items()
    }
    written = [folder / file for pictures in drawn.values() for file in pictures]
    text = markdown(results, origin, linked)
    alike = results.get("like-for-like", ())
    if grids(alike):
        details = folder / "like-for-like.md"
        details.write_text(all_details(alike), encoding="utf-8")
        written.append(details)
        text += f"\nEvery cell of *like for like* is in [{folder.name}/{details.name}]({folder.name}/{details.name}).\n"
    path.write_text(text, encoding="utf-8")
    return [path, *written]


def _origin(results: Results, origin: Origin) -> str:
    ended = [one for each in results.values() for one in each]
    hours = sum(one.seconds for one in ended) / 3600
    quick = " This was a quick look: fewer cells, shorter windows." if origin.quick else ""
    return (
        "Everything here is simulated: the paper's system (arXiv 2406.01566) as its authors simulated it, and ours by "
        "the very code that serves. This page is written by a script, every figure and sentence of it.\n\n"
        f"```\n{origin.command}\n```\n\n"
        f"Commit {origin.commit}, on {origin.machine}; {len(ended)} simulations, {hours:.1f} hours of one core."
        f"{quick} The words are those of the [glossary](glossary.md).\n"
    )


def _summary(results: Results) -> str:
    rows = [
        (TITLES[name], target.wanted, target.found, "met" if target.met else "**missed**")
        for name, targets in targets_of(results).items()
        for target in targets
    ]
    if not rows:
        return ""
    met = sum(row[3] == "met" for row in rows)
    heading = f"{met} of {len(rows)} targets are met.\n"
    return "\n".join([heading, table(("section", "target", "found", ""), rows)])
