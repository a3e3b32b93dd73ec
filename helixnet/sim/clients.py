"""Clients under virtual time: the real `Request` and `SwarmView` machines, and who knows the right answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from helixnet.core.machine import NEVER, Effect, Emit, Gone, Outcome, Send
from helixnet.core.route.follow import SwarmView, best_informed
from helixnet.core.route.request import Request, RequestConfig, RequestSpec
from helixnet.core.types import PeerId, SessionId
from helixnet.core.wire import messages as wire
from helixnet.sim.compute import absorb, next_token
from helixnet.sim.invariants import broken
from helixnet.sim.swarm import DIRECTORY_S, Swarm
from helixnet.sim.tally import RequestTally, Tally
from helixnet.sim.workload import Ask
from helixnet.sim.world import CLIENT

FOLLOW_S = 1.0
"""A client looks this often whether it should ask somebody else for views."""
PROMPT_VARIETY = 1 << 16
ALIKE_SHARE = 0.8
"""So much of a prompt its topic says."""
Ended = Callable[[RequestTally], None]


class _Running:
    """A request, what it must say next, its tally, and who waits for its end."""

    def __init__(self, number: int, request: Request, tally: RequestTally, ended: Ended) -> None:
        self.number = number
        self.request = request
        self.tally = tally
        self.ended = ended
        self.sessions: list[SessionId] = []
        self.watched_at = NEVER
        """When it is looked at next."""
        self.state = 0
        for token in request.spec.prompt:
            self.state = absorb(self.state, token)


class Client:
    """One client, with any number of requests at once."""

    def __init__(self, number: int, swarm: Swarm, tally: Tally, config: RequestConfig) -> None:
        self.me = PeerId(f"{CLIENT}{number}")
        self.running: dict[int, _Running] = {}
        self._swarm = swarm
        self._engine = swarm.engine
        self._tally = tally
        self._config = config
        self._followed = SwarmView(swarm.engine.rng)
        self._sessions: dict[SessionId, _Running] = {}
        self._asked = 0
        self._number = (0, 0)
        swarm.attach(self.me, self._receive)
        self._engine.after(swarm.engine.rng.uniform(0, FOLLOW_S), self._follow)

    @property
    def sees_active_plan(self) -> bool:
        """Whether it knows of a plan that carries its flow."""
        view = self._followed.view
        return view is not None and view.active and view.plan is not None

    # --- following the swarm -----------------------------------------------------------------------

    def _follow(self) -> None:
        if self._followed.is_stale(self._engine.now):
            self._engine.after(2 * DIRECTORY_S, self._ask_somebody)
        elif (coordinator := self._followed.better_informed()) is not None:
            self._ask_for_views(coordinator)
        elif (renewal := self._followed.renewal(self._engine.now)) is not None and self._followed.asked is not None:
            self._swarm.send(self.me, Send(self._followed.asked, renewal))
        self._engine.after(FOLLOW_S, self._follow)

    def _ask_somebody(self) -> None:
        records = [record for record in self._swarm.members(self.me) if record.peer != self._followed.asked]
        for peer in best_informed(records, self._swarm.coordinator_named(self.me))[:1]:
            self._ask_for_views(peer)

    def _ask_for_views(self, peer: PeerId) -> None:
        self._swarm.send(self.me, Send(peer, self._followed.ask(peer, self._engine.now)))

    def _take_view(self, sender: PeerId, view: wire.View) -> None:
        rerouted = self._followed.take(view, self._engine.now, sender)
        plan = self._followed.view.plan if self._followed.view is not None else None
        number = plan.number if plan is not None else self._number
        if number < self._number:
            broken(f"{self.me} followed plan {self._number} and now {number}")
        self._number = number
        for running in list(self.running.values()) if rerouted else ():
            running.request.plan_changed(self._engine.now)
            self._carry_out(running, running.request.tick(self._engine.now))

    # --- requests ----------------------------------------------------------------------------------

    def ask(self, ask: Ask, ended: Ended) -> None:
        """One more request; `ended` hears of its end."""
        manifest, now = self._swarm.manifest, self._engine.now
        number = self._asked = self._asked + 1
        first = self._engine.rng.randrange(PROMPT_VARIETY)
        alike = int(ALIKE_SHARE * ask.prompt_tokens) if ask.topic is not None else 0
        common = [(ask.topic or 0) + n for n in range(alike)]
        rest = [(first + n) % manifest.vocab_size for n in range(ask.prompt_tokens - alike)]
        spec = RequestSpec(
            manifest_hash=manifest.hash,
            context_tokens=manifest.context_tokens,
            prompt=tuple(common + rest),
            tokens_max=ask.output_tokens,
            # What nobody could use need not be kept: it makes no difference but to how long simulating takes.
            cache_salt="everybody" if alike else None,
        )
        attempts = itertools.count()

        def session_id() -> SessionId:
            return SessionId(f"{self.me}/{number}/{next(attempts)}")

        request = Request(spec, self._followed, session_id, self._config, now)
        running = _Running(number, request, RequestTally(now, ask.prompt_tokens, spec.tokens_limit), ended)
        self.running[number] = running
        self._carry_out(running, request.tick(now))

    def _receive(self, me: PeerId, sender: PeerId, message: wire.Message | Outcome) -> None:
        if isinstance(message, wire.View):
            self._take_view(sender, message)
        elif isinstance(message, Gone):
            self._followed.gone(sender)
            for running in list(self.running.values()):
                self._hear(running, sender, message)
        else:
            concerned = self._sessions.get(getattr(message, "session", SessionId("")))
            if concerned is not None:
                self._hear(concerned, sender, message)

    def _hear(self, running: _Running, sender: PeerId, message: wire.Message | Outcome) -> None:
        request, tally = running.request, running.tally
        before = len(request.tokens)
        effects = request.receive(sender, message, self._engine.now)
        for token in request.tokens[before:]:
            expected = next_token(running.state, self._swarm.manifest.vocab_size)
            if token != expected:
                broken(f"{self.me}: token {tally.tokens} is {token}, but the undisturbed model says {expected}")
            running.state = absorb(running.state, token)
            self._tally.token(tally, self._engine.now)
        self._carry_out(running, effects)

    def _carry_out(self, running: _Running, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                if isinstance(effect.message, wire.Open):
                    running.sessions.append(effect.message.session)
                    self._sessions[effect.message.session] = running
                self._swarm.send(self.me, effect)
            elif isinstance(effect, Emit) and effect.event.kind == "request.retried":
                self._tally.retries += 1
        if running.request.over:
            self._end(running)
            return
        deadline = running.request.deadline()
        if deadline < running.watched_at:
            running.watched_at = deadline
            self._engine.at(deadline, self._look, running, deadline)

    def _look(self, running: _Running, due: float) -> None:
        """A deadline that was seen has come, unless an earlier one took its place."""
        if running.watched_at != due or running.request.over:
            return
        running.watched_at = NEVER
        self._carry_out(running, running.request.tick(self._engine.now))

    def _end(self, running: _Running) -> None:
        if self.running.pop(running.number, None) is None:
            return
        for session in running.sessions:
            del self._sessions[session]
        request, tally = running.request, running.tally
        tally.finish = request.finish
        tally.problem = str(request.error or "")
        tally.attempts = len(request.pipelines)
        tally.stages = len(request.pipelines[-1]) if request.pipelines else 0
        self._tally.requests.append(tally)
        self._tally.lost += request.error is not None
        running.ended(tally)
