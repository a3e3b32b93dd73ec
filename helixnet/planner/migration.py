"""From the spans held to the spans planned: what it costs, and an order that leaves no layer uncovered meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helixnet.core.model import Manifest
from helixnet.core.plan.adoption import AdoptionConfig, new_layers
from helixnet.core.types import Span
from helixnet.planner.problem import FRAME_BYTES_PER_TOKEN, LINK_SHARE, Problem, SpanOrNone, Spans, Workload

ORDERS_MAX = 20_000
"""Orders begun before the search for one is given up; all of them for a dozen peers that must drop first."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What loading weights takes."""

    layer_bytes: int
    """Weights of one layer."""
    flow_bytes: float
    """Bytes/s of a link for each token/s that is planned over it."""
    read_bytes_per_s: float = AdoptionConfig().load_bytes_per_s
    """The most that a peer reads, wherever the weights come from."""

    @classmethod
    def of(cls, manifest: Manifest, workload: Workload | None = None) -> Loading:
        """As `from_snapshot` plans the links of such a model and workload."""
        ratio = (workload or Workload()).prefill_ratio
        token_bytes = manifest.activation_bytes + FRAME_BYTES_PER_TOKEN
        return cls(manifest.layer_bytes, token_bytes * (1 + ratio) / LINK_SHARE)


@dataclass(frozen=True, slots=True)
class Migration:
    """What a change of spans costs. Whether that pays is for `core/plan/adoption.py` to say."""

    bytes: int
    """Weights that peers load, the ends' included."""
    seconds: float
    """Until the slowest peer has loaded; peers load at the same time."""


def migration(problem: Problem, held: Spans, spans: Spans, loading: Loading) -> Migration:
    """The cost of the change from `held` to `spans`.

    A layer comes from the holder with the widest link, or from the peer's own copy of the model if nobody holds it;
    a layer over a link that carries nothing too.
    """
    total, slowest = 0, 0.0
    for index, (have, span) in enumerate(zip(held, spans, strict=True)):
        if span is None:
            continue
        seconds = 0.0
        for layer in new_layers(() if have is None else (have,), span):
            size = loading.layer_bytes
            size += problem.first_bytes if layer == 0 else 0
            size += problem.last_bytes if layer == problem.layers - 1 else 0
            total += size
            seconds += size / _rate(problem, held, index, layer, loading)
        slowest = max(slowest, seconds)
    return Migration(total, slowest)


@dataclass(frozen=True, slots=True)
class Step:
    """One peer loads what is new in its span, or drops what is no longer in it."""

    index: int
    load: bool


def steps(problem: Problem, held: Spans, spans: Spans) -> tuple[Step, ...] | None:
    """An order of loading and dropping in which no layer that `held` covers is ever uncovered.

    Who has room for both the old and the new loads first, and drops when everyone has loaded. Who has not drops what
    must go, then loads, before the next does. None if there is no such order (or none was found in ORDERS_MAX).
    """
    beside: list[int] = []
    tight: list[int] = []
    for index, (have, span) in enumerate(zip(held, spans, strict=True)):
        if have != span:
            (beside if have is None or span is None or _fits_both(problem, index, have, span) else tight).append(index)
    counts = [0] * problem.layers
    for index, have in enumerate(held):
        _count(counts, have, 1)
        span = spans[index]
        if index in beside and span is not None:
            for layer in new_layers(() if have is None else (have,), span):
                counts[layer] += 1
    order = _one_by_one(counts, held, spans, tight)
    if order is None or not _all_kept(counts, spans):
        return None
    loads = tuple(Step(index, True) for index in beside if spans[index] is not None)
    turns = tuple(Step(index, load) for index in order for load in (False, True))
    return loads + turns + tuple(Step(index, False) for index in beside if held[index] is not None)


def _rate(problem: Problem, held: Spans, index: int, layer: int, loading: Loading) -> float:
    """Bytes/s at which peer `index` gets a layer."""
    links = [
        float(problem.link_tokens_per_s[source, index]) * loading.flow_bytes
        for source, span in enumerate(held)
        if span is not None and source != index and layer in span.layers()
    ]
    widest = max(links, default=0.0)
    return min(widest, loading.read_bytes_per_s) if widest > 0 else loading.read_bytes_per_s


def _fits_both(problem: Problem, index: int, have: Span, span: Span) -> bool:
    layers = len(have) + len(new_layers((have,), span))
    first, last = min(have.start, span.start) == 0, max(have.stop, span.stop) == problem.layers
    return layers <= problem.room(index, first, last)


def _one_by_one(counts: Sequence[int], held: Spans, spans: Spans, tight: Sequence[int]) -> list[int] | None:
    """In which order these peers may switch, each dropping first, when so many hold each layer."""
    dead: set[frozenset[int]] = set()
    order: list[int] = []
    tries = 0

    def go_on(counts: Sequence[int]) -> bool:
        nonlocal tries
        done = frozenset(order)
        tries += 1
        if len(order) == len(tight):
            return True
        if done in dead or tries > ORDERS_MAX:
            return False
        for index in tight:
            have, span = held[index], spans[index]
            assert have is not None and span is not None, "who holds nothing has room beside it"
            gone, come = new_layers((span,), have), new_layers((have,), span)
            if index in done or any(counts[layer] < 2 for layer in gone):
                continue
            after = list(counts)
            for layer in gone:
                after[layer] -= 1
            for layer in come:
                after[layer] += 1
            order.append(index)
            if go_on(after):
                return True
            order.pop()
        dead.add(done)
        return False

    return order if go_on(counts) else None


def _all_kept(counts: Sequence[int], spans: Spans) -> bool:
    """Whether every layer that somebody holds is still held at the end."""
    after = [0] * len(counts)
    for span in spans:
        _count(after, span, 1)
    return all(end or not begin for begin, end in zip(counts, after, strict=True))


def _count(counts: list[int], span: SpanOrNone, by: int) -> None:
    for layer in span.layers() if span is not None else ():
        counts[layer] += by
