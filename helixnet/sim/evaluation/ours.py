"""The 70B instances in several ways from theirs to ours, so that each part's share of the difference is seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from helixnet.core.errors import UsageError
from helixnet.planner.artifact import Artifact
from helixnet.planner.problem import Spans
from helixnet.planner.solve import Budget
from helixnet.sim.comparison import Comparison
from helixnet.sim.evaluation.cells import Cell, Data, Ended, Row, Target
from helixnet.sim.side_by_side import Served, Serving

TIMES = 2.0
"""The paper's decode throughput that ours should reach."""
INSTANCES = ("single24", "3cluster24", "cluster42")
MODEL = "llama70b"
LIVES = 3.0
SEARCH = Budget(work=1_000_000, work_max=1_000_000, laying_work=300_000_000, laying_work_per_peer=300_000_000)
"""Of our placement: a minute of one core, where a coordinator takes ten seconds. These machines stay as they are."""
QUICK_INSTANCES = INSTANCES[:1]
THEIRS, RING, CHUNKS, OURS = "theirs", "ring", "chunks", "ours"
RANDOM, PLACED = "without-iwrr", "placement-only"
WAYS = {
    THEIRS: "Helix: their placement in their way",
    RING: "+ our protocol: ring decode, prompts whole",
    CHUNKS: "+ prompts in chunks, decode steps first",
    OURS: "+ our placement (all of ours)",
    RANDOM: "all of ours, but flows in equal shares instead of IWRR's",
    PLACED: "our placement in their way",
}
"""The first four build on each other; each of the others leaves all but one thing out, or one thing."""
STEPS = (THEIRS, RING, CHUNKS, OURS)


class Way(Cell, frozen=True, kw_only=True, tag="ours"):
    """One instance served in one way, saturated."""

    row: ClassVar[type[Row]] = Served
    instance: str
    way: str
    lives: float
    seed: int = 0

    def title(self) -> str:
        """See Cell."""
        return f"ours: {self.instance}, {self.way}"

    def run(self, data: Data) -> Served:
        """See Cell."""
        if self.way not in WAYS:
            raise UsageError(f"There is no way {self.way!r}. There are {', '.join(WAYS)}.")
        artifact = data.artifact()
        one = Comparison(artifact, self.instance, MODEL, self.lives, self.seed)
        if self.way == THEIRS:
            return one.in_their_way(one.stored(), one.stored_flows())
        if self.way in (RING, CHUNKS):
            return one.in_our_way(one.stored(), Serving(chunked=self.way == CHUNKS))
        spans = _our_spans(artifact, self.instance, self.seed)
        if self.way == PLACED:
            return one.in_their_way(spans)
        return one.in_our_way(spans, Serving(weighted=self.way != RANDOM))


def cells(quick: bool) -> tuple[Cell, ...]:
    """Every way on every instance; quick: on one."""
    instances = QUICK_INSTANCES if quick else INSTANCES
    return tuple(Way(instance=instance, way=way, lives=LIVES) for instance in instances for way in WAYS)


def targets(ended: Sequence[Ended]) -> tuple[Target, ...]:
    """TIMES Helix's throughput at no higher mean TTFT and TPOT, nothing lost."""
    rows = {(one.cell.instance, one.cell.way): one.row for one in ended if isinstance(one.cell, Way)}
    found = []
    for instance in dict.fromkeys(instance for instance, _ in rows):
        first, last = rows.get((instance, THEIRS)), rows.get((instance, OURS))
        wanted = f"{instance} 70B: ours at least {TIMES:g} x paper-mode Helix, no higher mean TTFT and TPOT, none lost"
        if not isinstance(first, Served) or not isinstance(last, Served):
            found.append(Target(wanted, "nothing", False))
            continue
        times = last.decode_tokens_per_s / first.decode_tokens_per_s
        words = (
            f"{times:.2f} x, TTFT {last.ttft_s:.2f} s for {first.ttft_s:.2f} s, "
            f"TPOT {last.tpot_s:.3f} s for {first.tpot_s:.3f} s, {last.lost} lost"
        )
        better = times >= TIMES and last.ttft_s <= first.ttft_s and last.tpot_s <= first.tpot_s
        found.append(Target(wanted, words, better and not last.lost))
    return tuple(found)


@lru_cache(maxsize=4)
def _our_spans(artifact: Artifact, instance: str, seed: int) -> Spans:
    """The same for every way that uses it; how long windows are does not matter to it."""
    return Comparison(artifact, instance, MODEL, LIVES, seed).ours(SEARCH)
