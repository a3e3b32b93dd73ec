"""Tells the person at the terminal what their peer does: a line for each event worth one, and a live last line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from helixnet.core.machine import Event
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import PeerId, Span
from helixnet.daemon.wording import amount, many, percent, printable, rate, short_id, size, span_words

if TYPE_CHECKING:
    from helixnet.core.peer import Peer

REFRESH_S = 1.0
SERVED_LINE_S = 10.0
REPEAT_S = 300.0
"""The same complaint again within this time is counted and not printed: strangers must not flood the terminal."""
COMPLAINTS_MAX = 64
"""Different complaints remembered for that."""
TEXT_CHARS_MAX = 300
THIS_PEER = "this peer"


class Narrator:
    """Called with each event. `snapshot` gives the peer machine, once there is one; both in the same thread.

    Prompts and answers are in no event, so they cannot be told.
    """

    def __init__(
        self, console: Console, snapshot: Callable[[], Peer | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._snapshot = snapshot
        self._clock = clock
        self._live: Live | None = None
        self._loading = ""
        self._measured_share = "measuring this machine"
        self._told_plan: object = None
        self._complained: dict[str, tuple[float, int]] = {}
        self._served_at = clock()
        self._served_tokens = 0

    def __call__(self, event: Event) -> None:
        tell = _STORIES.get(event.kind)
        if tell is not None:
            tell(self, event.data)

    def refresh(self) -> None:
        """Bring the last line up to date, or print what was served lately where there is no live line."""
        peer = self._snapshot()
        if peer is None:
            return
        now = self._clock()
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(self.last_line(peer, now), refresh=True)
        elif now >= self._served_at + SERVED_LINE_S:
            self._tell_served(peer, now)

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def last_line(self, peer: Peer, now: float) -> Text:
        """What this peer holds and serves now, in one line."""
        stage, follower = peer.stage, peer.follower
        if stage.held:
            parts = ["layers " + ", ".join(span_words(span) for span in stage.held) + f" of {stage.manifest.layers}"]
        else:
            parts = [self._loading or ("waiting for a plan" if peer.capability else self._measured_share)]
        if stage.held and self._loading:
            parts.append(self._loading)
        parts.append(rate(sum(observed.tokens_per_s for observed in stage.meter.rates(now))))
        parts.append(many(len(stage.sessions), "session"))
        if stage.held:
            parts.append(f"KV {percent(stage.ledger.free_share)} free")
        if follower.plan is not None:
            state = "active" if follower.active else "being loaded"
            parts.append(f"plan {follower.number.term}.{follower.number.epoch} {state}")
        holder = peer.election.holder
        if holder is not None:
            parts.append("coordinates" if holder == peer.me else f"coordinator {self._who(holder)}")
        return Text("● " + " · ".join(parts), style="cyan", no_wrap=True, overflow="ellipsis")

    # --- lines -------------------------------------------------------------------------------------

    def _say(self, text: str, style: str = "") -> None:
        stamp = time.strftime("%H:%M:%S")
        line = escape(printable(text[:TEXT_CHARS_MAX]))
        told = f"[{style}]{line}[/]" if style else line
        self._console.print(f"[dim]{stamp}[/]  {told}", soft_wrap=True)

    def _complain(self, text: str) -> None:
        now = self._clock()
        since, times = self._complained.get(text, (-REPEAT_S, 0))
        if now < since + REPEAT_S:
            self._complained[text] = (since, times + 1)
            return
        self._complained[text] = (now, 0)
        while len(self._complained) > COMPLAINTS_MAX:
            del self._complained[next(iter(self._complained))]
        self._say(f"{text} ({times} times more since)" if times else text, "yellow")

    def _who(self, peer: object) -> str:
        machine = self._snapshot()
        member = machine.membership.get(PeerId(str(peer))) if machine is not None else None
        if machine is not None and peer == machine.me:
            return THIS_PEER
        return f"{member.record.name} (…{short_id(str(peer))})" if member else f"…{short_id(str(peer))}"

    def _tell_served(self, peer: Peer, now: float) -> None:
        total = peer.stage.meter.total
        served, self._served_tokens = total - self._served_tokens, total
        seconds, self._served_at = now - self._served_at, now
        if served > 0:
            self._say(
                f"served {amount(served)} tokens in {seconds:.0f} s, {many(len(peer.stage.sessions), 'session')} open"
            )

    # --- stories -----------------------------------------------------------------------------------

    def _joined(self, data: dict[str, object]) -> None:
        self._say(f"joined as …{short_id(str(data.get('peer')))}, {data.get('model')}", "bold")
        addresses = data.get("addresses")
        for address in addresses if isinstance(addresses, list | tuple) else ():
            self._say(f"  reachable at {address}")

    def _measured(self, data: dict[str, object]) -> None:
        found = data.get("capability")
        if not isinstance(found, Capability):
            return
        best = max(found.decode, key=lambda point: point.tokens)
        prefill = max(point.tokens / point.seconds for point in found.prefill)
        self._say(
            f"measured {found.device}: {size(found.matmul_flops, 'FLOP/s')}, reads memory at "
            f"{size(found.memory_bandwidth, 'B/s')}; lends {size(found.memory_bytes, 'B')}"
        )
        self._say(
            f"  one layer: {rate(found.decode_tokens_per_s(1))} decoding alone, {rate(best.tokens / best.seconds)} "
            f"{best.tokens} at a time, {rate(prefill)} reading prompts"
        )
        if found.engine:
            instead_of = data.get("instead_of")
            self._say(f"  served by {found.engine}" + (f"; {instead_of}" if instead_of else ""))

    def _measuring(self, data: dict[str, object]) -> None:
        done, total = data.get("done"), data.get("total")
        if isinstance(done, int) and isinstance(total, int) and total > 0:
            self._measured_share = f"measuring this machine: {percent(done / total)}"

    def _coordinator(self, data: dict[str, object]) -> None:
        who = self._who(data.get("coordinator"))
        what = "coordinates the swarm now" if who == THIS_PEER else "is the coordinator"
        self._say(f"{who} {what} (term {data.get('term')})")

    def _followed(self, data: dict[str, object]) -> None:
        plan = (data.get("term"), data.get("epoch"), data.get("span"))
        if plan == self._told_plan:
            return
        self._told_plan = plan
        span = data.get("span")
        wanted = "nothing for this peer to hold" if span == "none" else f"this peer is to hold layers {_layers(span)}"
        self._say(f"plan {plan[0]}.{plan[1]}: {wanted}")

    def _weighed(self, data: dict[str, object]) -> None:
        if data.get("adopt"):
            seconds = data.get("seconds")
            took = f" after {seconds:.1f} s" if isinstance(seconds, float) else ""
            self._say(f"planned{took}: {data.get('why')}")

    def _active(self, data: dict[str, object]) -> None:
        peers = data.get("peers")
        whole = f", served by {many(peers, 'peer')}" if isinstance(peers, int) else ""
        self._say(f"plan {data.get('term')}.{data.get('epoch')} is active{whole}", "green")

    def _loading_span(self, data: dict[str, object]) -> None:
        read, total = data.get("bytes"), data.get("of_bytes")
        if isinstance(read, int) and isinstance(total, int) and total > 0:
            self._loading = f"loading layers {_layers(data.get('span'))}: {percent(read / total)} of {size(total, 'B')}"

    def _loaded(self, data: dict[str, object]) -> None:
        self._loading = ""
        seconds = data.get("seconds")
        if data.get("problem"):
            self._complain(f"layers {_layers(data.get('span'))} could not be loaded: {data.get('problem')}")
        else:
            took = f" in {seconds:.1f} s" if isinstance(seconds, float) else ""
            self._say(f"loaded layers {_layers(data.get('span'))}{took}", "green")

    def _leaving(self, data: dict[str, object]) -> None:
        sessions = data.get("sessions")
        rest = f"; {many(sessions, 'session')} may end first" if isinstance(sessions, int) and sessions else ""
        self._say(f"leaving the swarm{rest} (Ctrl-C again: at once)")

    def _left(self, data: dict[str, object]) -> None:
        tokens = data.get("tokens")
        self._say(f"left; served {amount(tokens) if isinstance(tokens, int) else 'some'} tokens in all. Thank you!")

    def _suspect(self, data: dict[str, object]) -> None:
        self._complain(f"{self._who(data.get('peer'))} does not answer ({data.get('why')})")


def _layers(span: object) -> str:
    """An event's `[0, 10)` in the words of the other lines."""
    found = re.fullmatch(r"\[(\d+), (\d+)\)", str(span))
    return span_words(Span(int(found[1]), int(found[2]))) if found else str(span)


Story = Callable[[Narrator, dict[str, object]], None]


def _complaint(template: str) -> Story:
    """A complaint with the event's own words in it."""

    def tell(narrator: Narrator, data: dict[str, object]) -> None:
        who = narrator._who(data["peer"]) if "peer" in data else ""
        narrator._complain(template.format(who=who, why=data.get("why") or "no reason given"))

    return tell


_STORIES: dict[str, Story] = {
    "peer.joined": Narrator._joined,
    "peer.measuring": Narrator._measuring,
    "peer.measured": Narrator._measured,
    "peer.leaving": Narrator._leaving,
    "peer.left": Narrator._left,
    "peer.broke_protocol": _complaint("{who} broke the protocol: {why}"),
    "member.suspect": Narrator._suspect,
    "coordinator.changed": Narrator._coordinator,
    "plan.followed": Narrator._followed,
    "plan.weighed": Narrator._weighed,
    "plan.active": Narrator._active,
    "plan.impossible": _complaint("no plan yet: {why}"),
    "plan.refused": _complaint("{who} cannot follow the plan: {why}"),
    "plan.expired": _complaint("the plan was given up: some peers were not ready in time"),
    "plan.solve_lost": _complaint("the planner did not answer in time; it is asked again"),
    "span.loading": Narrator._loading_span,
    "span.loaded": Narrator._loaded,
    "session.idle": _complaint("a session was released: nothing was heard of it for a while"),
    "engine.failed": _complaint("the engine failed: {why}"),
    "engine.refused": _complaint("the engine refused a session: {why}"),
    "directory.unreachable": _complaint("the directory did not answer: {why}"),
    "directory.refused": _complaint("the directory did not take our record; it is tried again"),
    "record.refused": _complaint("a peer's record was refused: {why}"),
}
