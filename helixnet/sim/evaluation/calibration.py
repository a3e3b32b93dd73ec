"""The authors' own runs again: what they published of their simulator against what paper mode gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from helixnet.core.errors import UsageError
from helixnet.sim.evaluation.cells import Cell, Data, Ended, Row, Target
from helixnet.sim.paper.published import CALIBRATION, FURTHER, SEED, Figure, setups
from helixnet.sim.paper.run import simulate

WITHIN = 0.15
"""Of each published throughput."""
MODELS = {"llama30b": "30B", "llama70b": "70B"}
FIGURES = {figure.title: figure for figure in (*(each for pair in CALIBRATION for each in pair), *FURTHER)}


class PublishedRow(Row, frozen=True, kw_only=True):
    """A published figure and ours; latencies are prompt p50, p95, decode p50, p95 in s, where they were published."""

    published: float
    """Decode tokens/s, like `ours`."""
    ours: float
    latency_published: tuple[float, ...]
    latency_ours: tuple[float, ...]
    finished: int
    launched: int
    waited: int
    """Times that a machine left a prompt out of a batch for want of KV room."""
    events: int

    @property
    def ratio(self) -> float:
        """Ours to theirs."""
        return self.ours / self.published


class Published(Cell, frozen=True, kw_only=True, tag="published"):
    """One figure, in the authors' windows and under their own load."""

    row: ClassVar[type[Row]] = PublishedRow
    figure: str
    """Its title."""

    def title(self) -> str:
        """See Cell."""
        return f"published: {self.figure}"

    def run(self, data: Data) -> PublishedRow:
        """See Cell."""
        if self.figure not in FIGURES:
            raise UsageError(f"Nothing was published as {self.figure!r}.")
        figure = FIGURES[self.figure]
        outcomes = [simulate(setup, SEED) for setup in setups(data.artifact(), figure)]
        said, seen = figure.latency, tuple[float, ...]()
        if said is not None and len(outcomes) == 1:
            prompt, decode = outcomes[0].prompt_s, outcomes[0].decode_s
            seen = prompt.at(50), prompt.at(95), decode.at(50), decode.at(95)
        return PublishedRow(
            published=figure.decode_tokens_per_s,
            ours=sum(outcome.decode_tokens_per_s for outcome in outcomes),
            latency_published=(said.prompt_p50, said.prompt_p95, said.decode_p50, said.decode_p95)
            if said is not None and seen
            else (),
            latency_ours=seen,
            finished=sum(outcome.finished for outcome in outcomes),
            launched=sum(outcome.launched for outcome in outcomes),
            waited=sum(outcome.waited for outcome in outcomes),
            events=sum(outcome.events for outcome in outcomes),
        )


def cells(quick: bool) -> tuple[Cell, ...]:
    """What has to be met; these runs are short."""
    return tuple(Published(figure=figure.title) for pair in CALIBRATION for figure in pair)


def further_cells(quick: bool) -> tuple[Cell, ...]:
    """What else was published."""
    return () if quick else tuple(Published(figure=figure.title) for figure in FURTHER)


def targets(ended: Sequence[Ended]) -> tuple[Target, ...]:
    """Each figure within WITHIN, and Helix ahead of Swarm."""
    rows = {one.cell.figure: one.row for one in ended if isinstance(one.cell, Published)}
    found = []
    for pair in CALIBRATION:
        helix, swarm = (rows.get(figure.title) for figure in pair)
        found += [_near(figure, row) for figure, row in zip(pair, (helix, swarm), strict=True)]
        if isinstance(helix, PublishedRow) and isinstance(swarm, PublishedRow):
            words = f"{helix.ours:.1f} and {swarm.ours:.1f} tokens/s"
            where = f"{pair[0].instance} {MODELS[pair[0].model]}"
            found.append(Target(f"{where}: Helix ahead of Swarm", words, helix.ours > swarm.ours))
    return tuple(found)


def _near(figure: Figure, row: Row | None) -> Target:
    wanted = f"{figure.title}: within {WITHIN:.0%} of the published {figure.decode_tokens_per_s:g} tokens/s"
    if not isinstance(row, PublishedRow):
        return Target(wanted, "nothing", False)
    return Target(wanted, f"{row.ours:.1f} ({row.ratio - 1:+.1%})", abs(row.ratio - 1) <= WITHIN)
