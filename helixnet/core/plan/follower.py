"""Every peer's side of a plan: load what is new before dropping what is old, say when ready, drain."""

from __future__ import annotations

import msgspec

from helixnet.core.machine import NEVER, Dropped, Effect, Emit, Event, Loaded, Send
from helixnet.core.plan.plan import Plan, PlanNumber
from helixnet.core.stage.stage import StageMachine
from helixnet.core.types import PeerId, Span
from helixnet.core.wire import messages as wire


class FollowerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a change of spans."""

    drain_s: float = 30.0
    """Sessions on layers that must go have this long to end; then their clients go on elsewhere."""


class Follower:
    """Follows the highest plan it was offered by a coordinator. Stale plans are refused by their number."""

    def __init__(self, me: PeerId, stage: StageMachine, config: FollowerConfig) -> None:
        self.me = me
        self.plan: Plan | None = None
        self.active = False
        self.ready = False
        self.problem = ""
        self._stage = stage
        self._config = config
        self._busy = False
        """The engine is loading or dropping for us."""
        self._drain_by: float | None = None

    @property
    def number(self) -> PlanNumber:
        """The number of the plan followed; (0, 0) before the first."""
        return self.plan.number if self.plan else PlanNumber(0, 0)

    @property
    def whole_plan(self) -> Plan | None:
        """The plan followed, if all of it is known here."""
        return self.plan if self.plan is not None and self.plan.whole else None

    @property
    def target(self) -> Span | None:
        """The span the plan gives us."""
        return self.plan.span_of(self.me) if self.plan else None

    def offered(self, sender: PeerId, plan: Plan, now: float) -> list[Effect]:
        """A plan came. One with the number we follow is answered again; a lower one is ignored."""
        manifest = self._stage.manifest
        if sender != plan.coordinator or plan.manifest_hash != manifest.hash or plan.layers != manifest.layers:
            return []
        if plan.number < self.number:
            return []
        if plan.number > self.number:
            self.plan, self.active, self.ready, self.problem = plan, False, False, ""
            self._drain_by = None
        elif plan.whole:
            self.plan = plan
        return self._advance(now)

    def activated(self, message: wire.PlanActive, now: float) -> list[Effect]:
        """The plan carries its flow: what it does not need may go."""
        if (message.term, message.epoch) != self.number or self.active:
            return []
        self.active = True
        return self._advance(now)

    def loaded(self, outcome: Loaded, now: float) -> list[Effect]:
        """The engine has loaded, or could not."""
        self._busy = False
        self.problem = outcome.problem
        self._set_held(outcome.held)
        return self._advance(now)

    def dropped(self, outcome: Dropped, now: float) -> list[Effect]:
        """The engine has dropped layers."""
        self._busy = False
        self._set_held(outcome.held)
        return self._advance(now)

    def deadline(self) -> float:
        """When draining must end."""
        return self._drain_by if self._drain_by is not None else NEVER

    def tick(self, now: float) -> list[Effect]:
        """Ends a drain that took too long."""
        return self._advance(now) if self._drain_by is not None else []

    def _advance(self, now: float) -> list[Effect]:
        """Take the next step towards the plan: load, report, drain, drop."""
        if self.plan is None or self._busy:
            return []
        target, stage = self.target, self._stage
        effects: list[Effect] = []
        if target is not None and not any(span.holds(target) for span in stage.held) and not self.problem:
            spare = any(not target.holds(span) for span in stage.held)
            if spare and not self._fits_beside(target):
                return self._make_room(target, now)
            self._busy = True
            return stage.load(target)
        if not self.ready:
            self.ready = True
            effects.append(self._report())
        if self.active and any(target is None or not target.holds(span) for span in stage.held):
            effects += self._make_room(target, now)
        return effects

    def _make_room(self, keep: Span | None, now: float) -> list[Effect]:
        """Serve only what stays; once no session uses the rest (or patience ends), drop it."""
        stage = self._stage
        effects: list[Effect] = []
        if self._drain_by is None:
            self._drain_by = now + self._config.drain_s
            stage.set_held(stage.held, _within(stage.held, keep))
        if stage.uses_outside(keep):
            if now < self._drain_by:
                return []
            effects += stage.break_outside(keep, "the span moved away")
        self._drain_by, self._busy = None, True
        return [*effects, *stage.drop(keep)]

    def settled(self, now: float) -> list[Effect]:
        """A session ended: a drain that waited for it may go on."""
        return self._advance(now) if self._drain_by is not None and not self._stage.uses_outside(self.target) else []

    def _fits_beside(self, target: Span) -> bool:
        """Whether the new layers fit beside what is held now, KV in use included."""
        manifest, stage = self._stage.manifest, self._stage
        layers = {layer for span in (*stage.held, target) for layer in span.layers()}
        ends = (manifest.embedding_bytes if 0 in layers else 0) + (
            manifest.head_bytes if manifest.layers - 1 in layers else 0
        )
        used = stage.ledger.used * stage.ledger.page_bytes(len(layers))
        return len(layers) * manifest.layer_bytes + ends + used <= stage.memory_bytes

    def _set_held(self, held: tuple[Span, ...]) -> None:
        served = _within(held, self.target) if self.active else held
        self._stage.set_held(held, served)

    def _report(self) -> Effect:
        assert self.plan is not None, "only a plan can be reported on"
        ready = wire.PlanReady(term=self.plan.term, epoch=self.plan.epoch, problem=self.problem)
        return Send(self.plan.coordinator, ready)

    def seen(self) -> Effect:
        """What this peer's plan is, as an event."""
        span = self.target
        data: dict[str, object] = {"term": self.number.term, "epoch": self.number.epoch, "span": str(span or "none")}
        return Emit(Event("plan.followed", data))


def _within(held: tuple[Span, ...], keep: Span | None) -> tuple[Span, ...]:
    """The parts of `held` that lie in `keep`."""
    if keep is None:
        return ()
    return tuple(Span(max(span.start, keep.start), min(span.stop, keep.stop)) for span in held if span.overlaps(keep))
