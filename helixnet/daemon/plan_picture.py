"""A plan as one HTML file: layers across, peers down, spans as bars, flows as ribbons. No scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from helixnet.daemon.plan_report import Change, EdgeLine, PlanReport
from helixnet.daemon.plan_style import STYLE
from helixnet.daemon.plan_view import catalogue_note, device_words, difference
from helixnet.daemon.wording import amount, many, percent, rate, seconds, size, span_words
from helixnet.planner.cluster_file import CLIENTS

WIDTH = 1180
LEFT, RIGHT = 300, 1080
"""Where layer 0 begins and the last layer ends."""
ROW, BAR = 34, 20
"""Heights of a peer's row and of its bar."""
HEAD = 30
"""Height of a region's heading."""
TOP = 34
CLIENT_GAP = 46
"""From the layers to the clients at either side."""
HUES = 8
"""Colours of regions; more regions share them."""
TICKS = 10
RIBBON_MIN = 1.2
LABEL_MIN = 34
"""A bar narrower than this has its layers beside it."""


def page(report: PlanReport, change: Change | None) -> str:
    """The whole document."""
    facts = [
        (amount(report.tokens_per_s), "tokens/s when busy (predicted)"),
        (seconds(report.ttft_s), f"to the first token of a {report.prompt_tokens}-token prompt"),
        (seconds(report.tpot_s), "for each further token"),
        (percent(report.share_of_bound), f"of the proven bound ({rate(report.bound)} of flow)"),
    ]
    tiles = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in facts)
    title = f"{report.model} on {many(len(report.peers), 'peer')}"
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"/><style>{STYLE}</style></head><body><main>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">A plan of HelixNet, objective {escape(report.objective)}, {report.layers} layers.</p>',
        f'<div class="tiles">{tiles}</div>',
        f'<p class="limit"><b>Bottleneck:</b> {escape(report.bottleneck)}</p>',
        _change(report, change),
        f'<div class="picture">{_Drawing(report).svg()}</div>',
        _legend(report),
        _peer_table(report),
        _edge_table(report),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def drawing(report: PlanReport) -> str:
    """Only the drawing, as an SVG file of its own."""
    opening, rest = _Drawing(report).svg().split(">", 1)
    place = 'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, DejaVu Sans, sans-serif"'
    return f"{opening} {place}><style>{STYLE}</style>{rest}"


class _Drawing:
    """The picture's coordinates: peers in the order of the report, regions one below the other."""

    def __init__(self, report: PlanReport) -> None:
        self.report = report
        self.y: dict[str, float] = {}
        """The middle of each peer's row."""
        self.headings: list[tuple[str, float]] = []
        self.hues: dict[str, int] = {}
        at = float(TOP)
        for peer in report.peers:
            if peer.region not in self.hues:
                self.hues[peer.region] = len(self.hues) % HUES
                self.headings.append((peer.region, at + HEAD - 10))
                at += HEAD
            self.y[peer.name] = at + ROW / 2
            at += ROW
        self.height = at + 14
        self.middle = (TOP + at) / 2
        self.unit = (BAR - 2) / report.flow if report.flow > 0 else 0.0
        """Pixels of ribbon for each token/s: the whole flow is as thick as a bar."""

    def svg(self) -> str:
        """The drawing."""
        words = f"Peers and the layers they hold; {rate(self.report.flow)} flow from left to right."
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" role="img" aria-label="{escape(words, quote=True)}">'
            f"{self._axis()}{self._regions()}{self._tracks()}{self._ribbons()}{self._bars()}{self._clients()}</svg>"
        )

    def x(self, layer: int) -> float:
        """Where a layer begins."""
        return LEFT + (RIGHT - LEFT) * layer / self.report.layers

    def _axis(self) -> str:
        step = max(1, round(self.report.layers / TICKS))
        layers = list(range(0, self.report.layers, step))
        if self.report.layers - layers[-1] < step / 2 and len(layers) > 1:
            layers.pop()
        layers.append(self.report.layers)
        marks = [f'<text class="small" x="{LEFT - 10}" y="20" text-anchor="end">layer</text>']
        for layer in layers:
            x = self.x(layer)
            marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{self.height - 14:.1f}"/>')
            marks.append(f'<text class="small" x="{x:.1f}" y="20" text-anchor="middle">{layer}</text>')
        return "".join(marks)

    def _regions(self) -> str:
        return "".join(
            f'<text class="region" x="14" y="{y:.1f}">{escape(region)}</text>'
            f'<line class="rule" x1="14" x2="{RIGHT}" y1="{y + 6:.1f}" y2="{y + 6:.1f}"/>'
            for region, y in self.headings
        )

    def _tracks(self) -> str:
        rows = []
        for peer in self.report.peers:
            y = self.y[peer.name]
            rows.append(
                f'<text class="name" x="26" y="{y - 1:.1f}">{escape(peer.name)}</text>'
                f'<text class="small" x="26" y="{y + 11:.1f}">{escape(device_words(peer))}, '
                f"{size(peer.memory_bytes, 'B')}</text>"
                f'<rect class="track" x="{LEFT}" y="{y - BAR / 2:.1f}" width="{RIGHT - LEFT}" height="{BAR}" rx="4"/>'
            )
        return "".join(rows)

    def _bars(self) -> str:
        return "".join(self._bar(index) for index, peer in enumerate(self.report.peers) if peer.span is not None)

    def _bar(self, index: int) -> str:
        peer = self.report.peers[index]
        assert peer.span is not None, "only peers with spans have bars"
        x, width = self.x(peer.span.start), self.x(peer.span.stop) - self.x(peer.span.start)
        y, layers = self.y[peer.name], span_words(peer.span)
        hint = (
            f"{peer.name} ({peer.device}, rates: {peer.rates}) holds layers {layers}, "
            f"passes {rate(peer.tokens_per_s)}, busy {percent(peer.busy)}"
        )
        inside = width >= LABEL_MIN
        label = f"{layers} · {percent(peer.busy)}" if width >= 2.6 * LABEL_MIN else layers
        place = f'x="{x + width / 2:.1f}" text-anchor="middle"' if inside else f'x="{x - 5:.1f}" text-anchor="end"'
        shape = f'x="{x:.1f}" y="{y - BAR / 2:.1f}" height="{BAR}" rx="4"'
        return (
            f'<g class="hue{self.hues[peer.region]}"><title>{escape(hint)}</title>'
            f'<rect class="bar" {shape} width="{width:.1f}"/>'
            f'<rect class="busy" {shape} width="{max(0.0, width * peer.busy):.1f}"/>'
            + (f'<rect class="limits" {shape} width="{width:.1f}"/>' if peer.limits else "")
            + f'<text class="{"inside" if inside else "small"}" {place} y="{y + 4:.1f}">{label}</text></g>'
        )

    def _clients(self) -> str:
        tall = max(BAR, self.report.flow * self.unit + 2)
        marks = []
        for x, anchor in ((LEFT - CLIENT_GAP, "end"), (RIGHT + CLIENT_GAP, "start")):
            left = x - 8 if anchor == "end" else x
            marks.append(
                f'<rect class="client" x="{left:.1f}" y="{self.middle - tall / 2:.1f}" width="8" height="{tall:.1f}" '
                'rx="2"/>'
                f'<text class="small" x="{left + 4:.1f}" y="{self.middle - tall / 2 - 6:.1f}" text-anchor="middle">'
                "clients</text>"
            )
        return "".join(marks)

    def _ribbons(self) -> str:
        """Each flow leaves its source where that ends and enters its target at the same layer."""
        leaving: dict[str, float] = {}
        entering: dict[str, float] = {}
        out = {edge.source + edge.target: 0.0 for edge in self.report.edges}
        into = dict(out)
        for edge in sorted(self.report.edges, key=lambda edge: self._row(edge.target)):
            out[edge.source + edge.target] = leaving.get(edge.source, 0.0)
            leaving[edge.source] = leaving.get(edge.source, 0.0) + edge.tokens_per_s * self.unit
        for edge in sorted(self.report.edges, key=lambda edge: self._row(edge.source)):
            into[edge.source + edge.target] = entering.get(edge.target, 0.0)
            entering[edge.target] = entering.get(edge.target, 0.0) + edge.tokens_per_s * self.unit
        drawn = []
        for edge in self.report.edges:
            key, thick = edge.source + edge.target, edge.tokens_per_s * self.unit
            start = self._row(edge.source) + out[key] - leaving[edge.source] / 2 + thick / 2
            end = self._row(edge.target) + into[key] - entering[edge.target] / 2 + thick / 2
            drawn.append(self._ribbon(edge, start, end))
        return "".join(drawn)

    def _row(self, name: str) -> float:
        return self.middle if name == CLIENTS else self.y[name]

    def _ribbon(self, edge: EdgeLine, start: float, end: float) -> str:
        x = self.x(edge.stop)
        leave = LEFT - CLIENT_GAP if edge.source == CLIENTS else x
        enter = RIGHT + CLIENT_GAP if edge.target == CLIENTS else x
        bulge = 22 if CLIENTS in (edge.source, edge.target) else 26 + abs(end - start) / 9
        thick = max(RIBBON_MIN, edge.tokens_per_s * self.unit)
        hue = "client" if edge.source == CLIENTS else f"hue{self.hues[self._region(edge.source)]}"
        used = f", {percent(edge.share)} of what is planned for the link" if edge.share is not None else ""
        hint = f"{edge.source} → {edge.target} at layer {edge.stop}: {rate(edge.tokens_per_s)}{used}"
        bend = f"C{leave + bulge:.1f},{start:.1f} {enter - bulge:.1f},{end:.1f}"
        return (
            f'<path class="ribbon {hue}{" limiting" if edge.limits else ""}" '
            f'd="M{leave:.1f},{start:.1f} {bend} {enter:.1f},{end:.1f}" stroke-width="{thick:.1f}">'
            f"<title>{escape(hint)}</title></path>"
        )

    def _region(self, name: str) -> str:
        return next(peer.region for peer in self.report.peers if peer.name == name)


def _change(report: PlanReport, change: Change | None) -> str:
    if change is None:
        return ""
    return f'<p class="change">{"<br/>".join(escape(line) for line in difference(report, change))}</p>'


def _legend(report: PlanReport) -> str:
    notes = [
        '<span class="key"><i class="hue0 sample"></i> a bar: the layers a peer holds; strong: how busy it is</span>',
        '<span class="key"><i class="hue0 ribbonkey"></i> a ribbon: tokens handed to the next peer at that layer, '
        "as thick as they are many; it has the colour of the region that sends</span>",
        '<span class="key"><i class="limitkey"></i> red: what limits the plan</span>',
    ]
    if report.from_catalogue:
        notes.append(f'<span class="key">{escape(catalogue_note(report))}</span>')
    return f'<p class="legend">{"".join(notes)}</p>'


def _peer_table(report: PlanReport) -> str:
    rows = []
    for peer in report.peers:
        cells = [peer.region, peer.name, device_words(peer), peer.rates, size(peer.memory_bytes, "B")]
        cells += [span_words(peer.span) if peer.span else "-", amount(peer.tokens_per_s), percent(peer.busy)]
        rows.append((cells, peer.limits))
    return _table("Peers", ("region", "peer", "device", "rates", "memory", "layers", "tokens/s", "busy"), 4, rows)


def _edge_table(report: PlanReport) -> str:
    rows = []
    for edge in report.edges:
        share = percent(edge.share) if edge.share is not None else ""
        rows.append(([edge.source, edge.target, str(edge.stop), amount(edge.tokens_per_s), share], edge.limits))
    return _table("Flows", ("from", "to", "at layer", "tokens/s", "of the link"), 2, rows)


def _table(title: str, headings: tuple[str, ...], words: int, rows: list[tuple[list[str], bool]]) -> str:
    """A table whose first `words` columns are words, the others numbers; what limits is red."""
    hot = ' class="hot"'

    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if n < words else ' class="number"' for n in range(len(cells))]
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    body = "".join(f"<tr{hot if limits else ''}>{line(cells, 'td')}</tr>" for cells, limits in rows)
    return f"<h2>{title}</h2><table><thead><tr>{line(headings, 'th')}</tr></thead><tbody>{body}</tbody></table>"
