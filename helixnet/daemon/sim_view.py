"""What a person reads of a simulation in a terminal."""

from __future__ import annotations

from helixnet.daemon.wording import amount, many, percent, rate, seconds, size
from helixnet.sim.report import Report, Spread

LABEL_CHARS = 11


def lines(report: Report, wall_s: float) -> list[str]:
    """The whole of it, a line each."""
    head = (
        f"{report.name} · {report.model} on {many(report.machines, 'machine')} · {report.offered} for "
        f"{seconds(report.seconds)} · seed {report.seed}"
    )
    said = {
        "served": _served(report),
        "latency": _latency(report),
        "limited by": report.limited_by,
        "predicted": _predicted(report),
        "KV memory": f"{percent(report.kv)} reserved on average, {percent(report.kv_max)} at most",
        "changes": f"{many(report.plans, 'new plan')}, {many(report.coordinators, 'new coordinator')}, "
        f"{amount(report.retries)} retries; control traffic {size(report.control_bytes_per_s, 'B/s')} of a peer",
        "requests": f"{amount(report.asked)} asked, {amount(report.lost)} lost; {report.tokens_wrong} answers wrong",
        "simulated": f"{amount(report.events)} events in {seconds(wall_s)} "
        f"({amount(report.events / max(wall_s, 1e-9))}/s), digest {report.digest}",
    }
    return [head, *(f"{label:<{LABEL_CHARS}}{words}" for label, words in said.items())]


def sweep_line(report: Report) -> str:
    """One load of several."""
    ttft = f"first token p95 {seconds(report.ttft.p95)}" if report.ttft else "no first token"
    return (
        f"{report.offered}: {rate(report.tokens_per_s)}, goodput {amount(report.goodput_per_s)} requests/s "
        f"({percent(report.good)}), {ttft}; limited by {report.limited_by}"
    )


def _served(report: Report) -> str:
    limits = report.limits
    return (
        f"{rate(report.tokens_per_s)} decoded, {rate(report.prompt_tokens_per_s)} of prompts; goodput "
        f"{amount(report.goodput_per_s)} requests/s ({percent(report.good)} with the first token in "
        f"{seconds(limits.ttft_s)} and {seconds(limits.tpot_s)} for each further)"
    )


def _latency(report: Report) -> str:
    def words(name: str, spread: Spread | None) -> str:
        if spread is None:
            return f"{name} -"
        return f"{name} {seconds(spread.p50)} (p95 {seconds(spread.p95)}, p99 {seconds(spread.p99)})"

    return " · ".join((words("TTFT", report.ttft), words("TPOT", report.tpot), words("ITL", report.itl)))


def _predicted(report: Report) -> str:
    told = report.prediction
    if told is None:
        return f"nothing: no plan was active. {report.problem}".rstrip()
    share = report.tokens_per_s / told.tokens_per_s if told.tokens_per_s > 0 else 0.0
    return (
        f"{rate(told.tokens_per_s)} when saturated ({percent(share)} of it simulated); alone TTFT "
        f"{seconds(told.ttft_s)}, TPOT {seconds(told.tpot_s)}; bottleneck: {told.bottleneck}"
    )
