"""The document's chapters in Markdown. Every sentence with a figure in it is made of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from statistics import median

from helixnet.sim.comparison import KV_SHARE
from helixnet.sim.evaluation import like_for_like, ours, predictions, shares
from helixnet.sim.evaluation.calibration import MODELS, Published, PublishedRow
from helixnet.sim.evaluation.cells import Ended
from helixnet.sim.evaluation.like_for_like import HELIX, METHODS, ROUTERS, LikeForLike, LikeRow
from helixnet.sim.evaluation.ours import STEPS, THEIRS, WAYS, Way
from helixnet.sim.paper.run import LIVES_MISSING, MEASURED_S_MAX
from helixnet.sim.side_by_side import Served
from helixnet.sim.tables import digits, table

METHOD_WORDS = {
    "ours": "ours",
    "helix-milp": "Helix",
    "petals": "Petals",
    "swarm": "Swarm",
    "separate": "separate pipelines",
}
ROUTER_WORDS = {
    "iwrr": "IWRR",
    "swarm": "Swarm's",
    "random": "random",
    "shortest_queue": "shortest queue",
    "min_latency": "min latency",
}
OVERLOADED, SHORT = "\\*", "†"
Grid = dict[tuple[str, str], LikeRow]
"""By method and router."""


def problems(ended: Sequence[Ended]) -> str:
    """Which cells gave nothing, and why."""
    lines = [f"* {one.cell.title()}: {one.problem}" for one in ended if one.row is None]
    return "\n".join(["Without a result:\n", *lines, ""]) if lines else ""


# --- what was published ------------------------------------------------------------------------------


def published(ended: Sequence[Ended]) -> str:
    """Published figures and ours."""
    rows = _published(ended)
    if not rows:
        return ""
    cells = [
        (
            title,
            f"{row.published:g}",
            f"{row.ours:.1f}",
            f"{row.ratio - 1:+.1%}",
            f"{row.finished} of {row.launched}",
            row.waited,
        )
        for title, row in rows
    ]
    headings = ("decode tokens/s", "published", "simulated here", "difference", "requests ended", "waits for KV")
    sizes = [abs(row.ratio - 1) for _, row in rows]
    words = f"The difference is {median(sizes):.1%} in the median and {max(sizes):.1%} at most.\n"
    return "\n".join([table(headings, cells), words, _latencies(rows)])


def _latencies(rows: Sequence[tuple[str, PublishedRow]]) -> str:
    def pair(row: PublishedRow, index: int) -> str:
        return f"{row.latency_published[index]:.2f} / {row.latency_ours[index]:.2f}"

    cells = [(title, *(pair(row, index) for index in range(4))) for title, row in rows if row.latency_ours]
    headings = ("published / here, s", "prompt p50", "prompt p95", "decode p50", "decode p95")
    return table(headings, cells) if cells else ""


def _published(ended: Sequence[Ended]) -> list[tuple[str, PublishedRow]]:
    return [
        (one.cell.figure, one.row)
        for one in ended
        if isinstance(one.cell, Published) and isinstance(one.row, PublishedRow)
    ]


# --- like for like -----------------------------------------------------------------------------------


def like_for_likes(ended: Sequence[Ended]) -> str:
    """A table of decode rates for each instance and load; how long answers took with IWRR; what the tables say."""
    parts = [
        "Offline every method fills KV memory to an expected 80 % (the paper's rule); online all get the same "
        "arrivals, at the rate that the paper asked of Helix. Whoever finds no room waits at the coordinator, and "
        "that counts as time to the first token. "
        f"{OVERLOADED} more than {like_for_like.OVERLOADED_SHARE:.0%} of all requests still "
        f"waited at the end: the load is too much for it. {SHORT} {MEASURED_S_MAX / 3600:.0f} hours, the longest "
        "window, are shorter than the lives it was meant for.\n"
    ]
    for (instance, model, rate), grid in grids(ended).items():
        load = f"online, {rate:.0f} tokens/s asked, prompts included" if rate else "offline"
        parts += [f"### {instance}, {MODELS.get(model, model)}, {load}\n", _rates(grid, ended), _saying(grid, rate > 0)]
        parts.append(_details({pair: row for pair, row in grid.items() if pair[1] == "iwrr"}))
    return "\n".join(part for part in parts if part)


def grids(ended: Sequence[Ended]) -> dict[tuple[str, str, float], Grid]:
    """Rows by method and router, by instance, model and what is asked online (0: offline)."""
    found: dict[tuple[str, str, float], Grid] = {}
    for one in ended:
        if isinstance(one.cell, LikeForLike) and isinstance(one.row, LikeRow):
            cell = one.cell
            grid = found.setdefault((cell.instance, cell.model, cell.online_tokens_per_s), {})
            grid[cell.method, cell.router] = one.row
    return found


def all_details(ended: Sequence[Ended]) -> str:
    """Everything about every cell, for a page of its own."""
    parts = ["# Like for like: every cell\n", "See [the evaluation](../evaluation.md) for what was asked.\n"]
    for (instance, model, rate), grid in grids(ended).items():
        parts.append(f"## {instance}, {MODELS.get(model, model)}, {'online' if rate else 'offline'}\n")
        parts.append(_details(grid))
    return "\n".join(parts)


def _rates(grid: Grid, ended: Sequence[Ended]) -> str:
    wanted = {one.cell.lives for one in ended if isinstance(one.cell, LikeForLike)}
    lives = max(wanted) * (1 - LIVES_MISSING)

    def cell(row: LikeRow | None) -> str:
        if row is None:
            return "-"
        return f"{row.decode_tokens_per_s:.1f}{OVERLOADED * row.overloaded}{SHORT * (row.lives < lives)}"

    methods = [method for method in METHODS if any(key[0] == method for key in grid)]
    rows = [(METHOD_WORDS[method], *(cell(grid.get((method, router))) for router in ROUTERS)) for method in methods]
    return table(("decode tokens/s", *(ROUTER_WORDS[router] for router in ROUTERS)), rows)


def _details(grid: Grid) -> str:
    rows = [
        (
            f"{METHOD_WORDS[method]}, {ROUTER_WORDS[router]}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.ttft_s:.1f}",
            f"{row.ttft_p95_s:.1f}",
            f"{row.tpot_s:.3f}",
            f"{row.stages:.1f}",
            f"{row.in_flight:.0f}",
            row.finished,
            row.waiting,
            row.impossible,
            f"{row.window_s:.0f}",
            f"{row.lives:.1f}",
        )
        for (method, router), row in grid.items()
    ]
    headings = (
        *("method, router", "decode tokens/s", "TTFT mean s", "TTFT p95 s", "TPOT s", "stages", "in flight"),
        *("ended", "waiting at the end", "too long", "window s", "lives"),
    )
    return table(headings, rows) if rows else ""


def _saying(grid: Grid, online: bool) -> str:
    """Who is ahead, by how much."""
    words = []
    best = max(grid, key=lambda pair: grid[pair].decode_tokens_per_s)
    words.append(
        f"Most is served by {METHOD_WORDS[best[0]]} with {ROUTER_WORDS[best[1]]} "
        f"({digits(grid[best].decode_tokens_per_s)} tokens/s)."
    )
    mine = grid.get(("ours", "iwrr"))
    others = [(name, grid[name, "iwrr"]) for name in METHODS[1:] if (name, "iwrr") in grid]
    if mine is not None and others:
        ratios = [f"{_ratio(mine, row)} of {METHOD_WORDS[name]}" for name, row in others]
        words.append(f"With IWRR, our placement serves {_and(ratios)}.")
    for method in ("ours", HELIX):
        rows = {router: grid[method, router] for router in ROUTERS if (method, router) in grid}
        rest = [router for router in rows if router != "iwrr"]
        if "iwrr" in rows and rest:
            second = max(rest, key=lambda router: rows[router].decode_tokens_per_s)
            words.append(
                f"On {'our' if method == 'ours' else 'their'} placement IWRR serves "
                f"{_ratio(rows['iwrr'], rows[second])} of the best other router, {ROUTER_WORDS[second]}."
            )
    held = sum(not row.overloaded for row in grid.values())
    if online:
        words.append(f"{held} of {len(grid)} keep up with what is asked.")
    return " ".join(words) + "\n"


def _ratio(one: LikeRow, other: LikeRow) -> str:
    if other.decode_tokens_per_s <= 0:
        return "something where there is nothing"
    return f"{one.decode_tokens_per_s / other.decode_tokens_per_s:.2f} x that"


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


# --- ours --------------------------------------------------------------------------------------------


def ablation(ended: Sequence[Ended]) -> str:
    """Each instance in every way, and what every step brings."""
    parts = [
        "Saturated: in their way KV memory is filled to an expected 80 %, in ours as many requests are always "
        f"in flight as fill {KV_SHARE:.0%} of its room. {_stories()}\n"
    ]
    for instance in ours.INSTANCES:
        rows = ways_of(ended, instance)
        if rows:
            parts += [f"### {instance}, 70B\n", _ways(rows), _steps(rows)]
    return "\n".join(parts)


def ways_of(ended: Sequence[Ended], instance: str) -> dict[str, Served]:
    """Rows of one instance by way, in the order of WAYS."""
    found = {
        one.cell.way: one.row
        for one in ended
        if isinstance(one.cell, Way) and one.cell.instance == instance and isinstance(one.row, Served)
    }
    return {way: found[way] for way in WAYS if way in found}


def _stories() -> str:
    return "Each `+` keeps what stands above it; the rows below leave something out, or all but one thing."


def _ways(rows: dict[str, Served]) -> str:
    first = rows.get(THEIRS)

    def times(row: Served) -> str:
        return f"{row.decode_tokens_per_s / first.decode_tokens_per_s:.2f}" if first is not None else "-"

    cells = [
        (
            WAYS[way],
            f"{row.decode_tokens_per_s:.1f}",
            times(row),
            f"{row.ttft_s:.2f}",
            f"{row.tpot_s:.3f}",
            f"{row.stages:.1f}",
            row.in_flight,
            row.finished,
            row.lost,
            f"{row.seconds:.0f}",
        )
        for way, row in rows.items()
    ]
    headings = (
        "",
        "decode tokens/s",
        "x Helix",
        "TTFT s",
        "TPOT s",
        "stages",
        "in flight",
        "ended",
        "lost",
        "window s",
    )
    return table(headings, cells)


def _steps(rows: dict[str, Served]) -> str:
    """The factors between steps, and what leaving IWRR's shares out costs."""
    words = []
    steps = list(factors(rows))
    if steps:
        named = [f"{name} {factor:.2f} x" for name, factor in steps]
        words.append(f"Decode tokens/s by part: {_and(named)}; together {prod(f for _, f in steps):.2f} x.")
    whole, bare = rows.get(ours.OURS), rows.get(ours.RANDOM)
    if whole is not None and bare is not None and whole.decode_tokens_per_s > 0:
        change = bare.decode_tokens_per_s / whole.decode_tokens_per_s
        words.append(f"Without IWRR's shares ours serves {change:.2f} x of what it serves with them.")
    return " ".join(words) + "\n" if words else ""


STEP_WORDS = {ours.RING: "ring decode and our protocol", ours.CHUNKS: "chunked prompts", ours.OURS: "our placement"}


def factors(rows: dict[str, Served]) -> Iterator[tuple[str, float]]:
    """What each step brings over the one before, where both are known."""
    for before, after in pairwise(STEPS):
        if before in rows and after in rows and rows[before].decode_tokens_per_s > 0:
            yield STEP_WORDS[after], rows[after].decode_tokens_per_s / rows[before].decode_tokens_per_s


# --- random clusters ---------------------------------------------------------------------------------


def shares_reached(ended: Sequence[Ended]) -> str:
    """Flow reached, and the peer furthest from its share, by cluster."""
    cells = []
    for seed, row in shares.rows_of(ended):
        deviations = row.deviations()
        worst = max(deviations, key=lambda peer: abs(deviations[peer]))
        cells.append(
            (
                seed,
                row.peers,
                row.limits,
                f"{row.flow:.1f}",
                f"{row.served:.1f}",
                f"{row.served / row.flow:.1%}",
                f"{deviations[worst]:+.1%} ({worst}, planned {row.planned[worst]:.1%} of the work)",
                sum(abs(each) <= shares.WITHIN for each in deviations.values()),
                row.in_flight,
                row.requests,
                row.retries,
            )
        )
    headings = (
        *(
            "cluster",
            "peers with work",
            "what limits",
            "max flow, tokens/s",
            "served",
            "of it",
            "furthest from its share",
        ),
        *(f"peers within {shares.WITHIN:.0%}", "in flight", "requests", "retries"),
    )
    words = (
        "Random clusters with memory to spare and links that carry what is planned over them and no more, so that "
        "compute and links limit what is served, as in the plan. Each plan leaves IWRR choices; small shares are of "
        "few requests.\n"
    )
    return "\n".join([words, table(headings, cells)])


def predicted(ended: Sequence[Ended]) -> str:
    """Predicted and simulated, by cluster, with the errors."""
    rows = predictions.rows_of(ended)

    def pair(said: float, seen: float) -> str:
        return f"{digits(said)} / {digits(seen)}"

    cells = [
        (
            seed,
            row.peers,
            row.bottleneck,
            pair(*row.tokens_per_s),
            pair(*row.ttft_s),
            pair(*row.tpot_s),
            *(f"{error:+.1%}" for error in row.errors()),
        )
        for seed, row in rows
    ]
    summary = []
    for kind, name in enumerate(predictions.KINDS):
        errors = [row.errors()[kind] for _, row in rows]
        if errors:
            within = sum(abs(error) <= predictions.WITHIN for error in errors)
            sizes = (f"{median(errors):+.1%}", f"{median(map(abs, errors)):.1%}", f"{max(errors, key=abs):+.1%}")
            summary.append((name, *sizes, f"{within} of {len(errors)}"))
    short = ("error", "median", "median of its size", "worst", f"within {predictions.WITHIN:.0%}")
    headings = (
        *("cluster", "peers", "what limits, as planned", "tokens/s predicted / simulated", "TTFT s", "TPOT s"),
        *(f"error of {name}" for name in predictions.KINDS),
    )
    words = (
        "The error is simulated over predicted, less one. Throughput is saturated, TTFT and TPOT of requests alone.\n"
    )
    return "\n".join([words, table(short, summary) if summary else "", table(headings, cells)])


CHAPTERS: dict[str, Callable[[Sequence[Ended]], str]] = {
    "calibration": published,
    "published": published,
    "like-for-like": like_for_likes,
    "ours": ablation,
    "shares": shares_reached,
    "predictions": predicted,
}
"""By section."""
