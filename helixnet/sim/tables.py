"""Reports as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from helixnet.sim.report import ControlUse, PeerUse, Report, Spread

PEER_ROWS_MAX = 40
LINE_ROWS_MAX = 10
MARK_ROWS_MAX = 40
SWEEP_HEADINGS = (
    *("load", "decode tokens/s", "goodput requests/s", "within limits", "TTFT p50 s", "TTFT p95 s"),
    *("TPOT p50 ms", "TPOT p95 ms", "lost", "limited by"),
)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; columns whose first entry begins with a digit are numbers."""
    cells = [[_cell(value) for value in row] for row in rows]
    first = cells[0] if cells else [""] * len(headings)
    rules = ["---:" if value[:1].isdigit() else "---" for value in first]
    lines = [[_cell(heading) for heading in headings], rules, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def digits(value: float) -> str:
    """Three of them, thousands apart."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}".replace(",", " ")
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.9995 or value == 0 else f"{value:.3g}"


def share(value: float) -> str:
    """In percent."""
    return f"{100 * value:.0f} %"


def markdown(report: Report, command: str = "", pictures: Sequence[str] = ()) -> str:
    """The whole report; `command` brings it back, `pictures` are files beside it."""
    parts = [
        f"# {report.name}\n",
        f"{report.model} ({report.layers} layers) on {report.machines} machines, {report.offered} for "
        f"{digits(report.seconds)} simulated seconds, seed {report.seed}. Counted are the last "
        f"{digits(report.counted_s)} of them.\n",
        f"```\n{command}\n```\n" if command else "",
        table(("served", ""), _served(report)),
        "## Latency\n",
        table(
            ("", "requests or gaps", "mean", "p50", "p90", "p95", "p99"),
            [
                _spread("TTFT, s", report.ttft, 1.0),
                _spread("TPOT, ms", report.tpot, 1000.0),
                _spread("ITL, ms", report.itl, 1000.0),
            ],
        ),
        _prediction(report),
        "## What went on\n",
        table(("over the whole run", ""), _changes(report)),
        *([f"- {why}" for why in report.losses] + [""] if report.losses else []),
        *(f"![{picture.rpartition('.')[0]}]({picture})\n" for picture in pictures),
        _control(report),
        _peers(report),
        "## Lines\n",
        table(
            ("line", "busy", "MB/s", "longest wait s"),
            [
                (line.line, share(line.busy), digits(line.bytes_per_s / 1e6), digits(line.waited_s_max))
                for line in report.lines[:LINE_ROWS_MAX]
            ],
        ),
        _marks(report),
    ]
    return "\n".join(part for part in parts if part)


def sweep_markdown(reports: Sequence[Report], command: str = "", pictures: Sequence[str] = ()) -> str:
    """Several loads of one swarm, a row each."""
    rows = []
    for report in reports:
        ttft, tpot = report.ttft, report.tpot
        rows.append(
            (
                report.offered,
                digits(report.tokens_per_s),
                digits(report.goodput_per_s),
                share(report.good),
                digits(ttft.p50) if ttft else "-",
                digits(ttft.p95) if ttft else "-",
                digits(1000 * tpot.p50) if tpot else "-",
                digits(1000 * tpot.p95) if tpot else "-",
                report.lost,
                report.limited_by,
            )
        )
    first, limits = reports[0], reports[0].limits
    parts = [
        f"# {first.name} under {len(reports)} loads\n",
        f"{first.model} on {first.machines} machines. Within limits: TTFT {digits(limits.ttft_s)} s, TPOT "
        f"{digits(1000 * limits.tpot_s)} ms.\n",
        f"```\n{command}\n```\n" if command else "",
        table(SWEEP_HEADINGS, rows),
        *(f"![{picture.rpartition('.')[0]}]({picture})\n" for picture in pictures),
    ]
    return "\n".join(part for part in parts if part)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _served(report: Report) -> list[tuple[str, str]]:
    limits = f"TTFT {digits(report.limits.ttft_s)} s, TPOT {digits(1000 * report.limits.tpot_s)} ms"
    return [
        ("decode tokens/s", digits(report.tokens_per_s)),
        ("prompt tokens/s", digits(report.prompt_tokens_per_s)),
        (f"goodput, requests/s within {limits}", f"{digits(report.goodput_per_s)} ({share(report.good)} of requests)"),
        ("limited by", report.limited_by),
        ("KV pages reserved, mean and most", f"{share(report.kv)}, {share(report.kv_max)}"),
        ("control traffic of a peer, KB/s", digits(report.control_bytes_per_s / 1e3)),
    ]


def _spread(name: str, spread: Spread | None, scale: float) -> tuple[str, ...]:
    if spread is None:
        return (name, "0", *["-"] * 5)
    values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99)
    return (name, str(spread.count), *(digits(scale * value) for value in values))


def _prediction(report: Report) -> str:
    said = report.prediction
    if said is None:
        return f"No plan was active. {report.problem}\n"
    rows = [
        ("decode tokens/s (predicted: saturated)", said.tokens_per_s, report.tokens_per_s),
        ("TTFT s (predicted: alone; simulated: median)", said.ttft_s, report.ttft.p50 if report.ttft else 0.0),
        ("TPOT s (predicted: alone; simulated: median)", said.tpot_s, report.tpot.p50 if report.tpot else 0.0),
    ]
    cells = [(what, digits(told), digits(seen), digits(seen / told) if told else "-") for what, told, seen in rows]
    words = table(("the last plan", "predicted", "simulated", "simulated / predicted"), cells)
    return f"## Prediction\n\n{words}\nThe planner's bottleneck: {said.bottleneck}.\n"


def _changes(report: Report) -> list[tuple[str, object]]:
    return [
        ("requests asked", report.asked),
        ("requests ended", report.ended),
        ("requests lost", report.lost),
        ("tokens repeated, reordered or wrong", report.tokens_wrong),
        ("retries on another pipeline", report.retries),
        ("plans that became active", report.plans),
        ("changes of the coordinator", report.coordinators),
        ("events", report.events),
        ("digest", report.digest),
    ]


def _control(report: Report) -> str:
    """By kind: what an average peer sends, and what goes out of and into the coordinator."""
    count = sum(peer.present_s for peer in report.peers) / report.counted_s if report.peers else 1.0
    rates = [(use.bytes_per_s / count, *_at_coordinator(use)) for use in report.control]
    rows = [(use.kind, *(digits(rate / 1e3) for rate in row)) for use, row in zip(report.control, rates, strict=True)]
    headings = ("control traffic, KB/s", "sent by a peer", "sent by the coordinator", "received by the coordinator")
    return f"## Control traffic\n\n{table(headings, rows)}"


def _at_coordinator(use: ControlUse) -> tuple[float, float]:
    return (use.coordinator_sent_per_s, use.coordinator_received_per_s)


def _peers(report: Report) -> str:
    busiest = sorted(report.peers, key=lambda peer: (-peer.load, peer.peer))[:PEER_ROWS_MAX]
    rest = len(report.peers) - len(busiest)
    rows = [_peer(peer) for peer in busiest]
    more = f"\nand {rest} more that were less loaded.\n" if rest else ""
    headings = ("peer", "device", "layers", "load", "busy", "KV mean", "KV most", "control KB/s", "there s")
    return f"## Peers\n\n{table(headings, rows)}{more}"


def _peer(peer: PeerUse) -> tuple[str, ...]:
    layers = f"{peer.span.start}-{peer.span.stop - 1}" if peer.span else "-"
    loads = (share(peer.load), share(peer.busy), share(peer.kv), share(peer.kv_max))
    return (peer.peer, peer.device, layers, *loads, digits(peer.control_bytes_per_s / 1e3), digits(peer.present_s))


def _marks(report: Report) -> str:
    rows = [(digits(mark.at_s), mark.what) for mark in report.marks[:MARK_ROWS_MAX]]
    rest = len(report.marks) - len(rows)
    more = f"\nand {rest} more.\n" if rest else ""
    return f"## Events\n\n{table(('s from the load', 'what'), rows)}{more}"
