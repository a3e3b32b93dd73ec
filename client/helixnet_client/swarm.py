"""The client's standing connection to one swarm: follows its view, routes requests, delivers their messages."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import secrets
import time
from collections.abc import Callable

import msgspec

from helixnet.core.errors import DeadlineExceeded, HelixError, NetworkError, RemoteProtocolError, UsageError
from helixnet.core.machine import Effect, Emit, Send
from helixnet.core.machine import Gone as GoneOutcome
from helixnet.core.model import Manifest
from helixnet.core.plan.coordinator import pointer_key
from helixnet.core.route.follow import SwarmView, best_informed
from helixnet.core.route.pipeline import Pipeline
from helixnet.core.route.request import Request, RequestConfig, RequestSpec
from helixnet.core.sampling import Logprobs
from helixnet.core.swarm.records import PeerRecord, coordinator_named, decode_pointer
from helixnet.core.types import PeerId, SessionId
from helixnet.core.wire import messages as wire
from helixnet.net.base import Gone
from helixnet.net.members import read_members
from helixnet_client.tokenizer import Tokenizer
from helixnet_client.transports import Connection

FIND_S = 15.0
"""How long to look for the swarm's members before giving up."""
ANSWER_S = 10.0
PAUSE_S = 0.3
REQUESTS_MAX = 256
OnTokens = Callable[[list[int], list[Logprobs | None]], bool]
"""Gets new token ids, with what was asked of each, and says whether to go on."""


class ActiveRequest:
    """A request's machine and whoever waits for its next token."""

    def __init__(self, request: Request, began_at: float) -> None:
        self.request = request
        self.began_at = began_at
        self.changed = asyncio.Event()


class Swarm:
    """One client's side of one swarm. Open it, run requests, close it."""

    def __init__(self, connection: Connection, network: str, model: str | None, config: RequestConfig) -> None:
        self.host = connection.host
        self.directory = connection.directory
        self.network = network
        self._connection = connection
        self.followed = SwarmView(random.Random(secrets.randbits(64)))
        self._model = model
        self._config = config
        self._requests: dict[SessionId, ActiveRequest] = {}
        self._active: set[ActiveRequest] = set()
        self._next_view: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next_whole: asyncio.Future[wire.View] = asyncio.get_running_loop().create_future()
        self._parts: dict[str, asyncio.Future[bytes]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._tokenizer: Tokenizer | None = None

    @property
    def view(self) -> wire.View | None:
        """The newest view of the swarm; None before the first."""
        return self.followed.view

    # --- opening and closing -----------------------------------------------------------------------

    async def open(self) -> None:
        """Find the members and get a first view.

        Raises:
            NetworkError: no member was found or answered in time.
            UsageError: the network serves other models than the one asked for.
        """
        self._tasks = [asyncio.create_task(self._inbox()), asyncio.create_task(self._follow())]
        try:
            async with asyncio.timeout(FIND_S):
                while self.view is None:
                    await self._ask_somebody()
        except TimeoutError:
            await self.close()
            raise NetworkError(
                f"No peer of the network {self.network!r} was found within {FIND_S:.0f} s. Is one running? Start one "
                "with `helixnet peer` (or `helixnet up`), or check --network and --join."
            ) from None
        except HelixError:
            await self.close()
            raise

    async def close(self) -> None:
        """Cancel what runs and leave."""
        for active in list(self._active):
            self._carry_out(active, active.request.cancel())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.close()

    async def fresh_view(self) -> wire.View:
        """The swarm as the coordinator (or another peer) sees it now, with everybody's whole record.

        Raises:
            NetworkError: nobody answered in time.
        """
        if self.followed.asked is not None:
            self.host.post(self.followed.asked, wire.GetView(whole=True))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.shield(self._next_whole)
        except TimeoutError:
            raise DeadlineExceeded("No peer of the swarm answered in time.") from None

    async def next_view(self, patience_s: float) -> wire.View:
        """The next view that comes; of members it has what routing takes.

        Raises:
            DeadlineExceeded: none came in time.
        """
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.shield(self._next_view)
        except TimeoutError:
            raise DeadlineExceeded("No peer of the swarm answered in time.") from None
        assert self.view is not None, "a view was just announced"
        return self.view

    # --- following the swarm -----------------------------------------------------------------------

    async def _follow(self) -> None:
        """Ask somebody else when the peer that sends us views falls silent, and the coordinator once there is one."""
        while True:
            await asyncio.sleep(1.0)
            if self.view is not None and self.followed.is_stale(time.monotonic()):
                await self._ask_somebody(avoid=self.followed.asked)
            elif (coordinator := self.followed.better_informed()) is not None:
                await self._ask(coordinator)
            elif (renewal := self.followed.renewal(time.monotonic())) is not None and self.followed.asked is not None:
                self.host.post(self.followed.asked, renewal)

    async def _ask_somebody(self, avoid: PeerId | None = None) -> None:
        records = self._of_our_model([r for r in await self._members() if r.peer != avoid])
        if not records:
            await asyncio.sleep(PAUSE_S)
            return
        for record in records:
            self.host.learn(record.peer, record.addresses)
        # The pointer may name one that is gone, so the next best is asked after it.
        named = await self._coordinator_named(records[0].manifest_hash)
        for peer in best_informed(records, named):
            if await self._ask(peer):
                break
        coordinator = self.followed.better_informed()
        if coordinator is not None and coordinator != avoid:
            await self._ask(coordinator)

    async def _ask(self, peer: PeerId) -> bool:
        """Ask one peer for its view from now on; whether it answered."""
        self.host.post(peer, self.followed.ask(peer, time.monotonic()))
        try:
            await self.next_view(ANSWER_S / 3)
        except DeadlineExceeded:
            return False
        return True

    async def _coordinator_named(self, manifest_hash: str) -> PeerId | None:
        """Who coordinates, by the newest pointer in the directory."""
        try:
            async with asyncio.timeout(ANSWER_S):
                entries = await self.directory.read(pointer_key(self.network, manifest_hash))
        except (TimeoutError, NetworkError):
            return None
        pointers = []
        for owner, value in sorted(entries.items()):
            with contextlib.suppress(RemoteProtocolError):
                pointers.append(decode_pointer(owner, value))
        return coordinator_named(pointers)

    async def _members(self) -> list[PeerRecord]:
        """The network's members; none while the directory cannot be reached, which must not end `_follow`."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await read_members(self.directory, self.network)
        except (TimeoutError, NetworkError):
            return []

    def _of_our_model(self, records: list[PeerRecord]) -> list[PeerRecord]:
        if self.view is not None:
            return [record for record in records if record.manifest_hash == self.view.manifest_hash]
        names = sorted({record.model for record in records})
        wanted = [r for r in records if self._model in (None, r.model) or r.manifest_hash.startswith(str(self._model))]
        if records and not wanted:
            raise UsageError(f"The network {self.network!r} serves {', '.join(names)}, not {self._model}.")
        if len({record.manifest_hash for record in wanted}) > 1:
            raise UsageError(f"The network {self.network!r} serves several models; choose one: {', '.join(names)}.")
        return wanted

    # --- messages ----------------------------------------------------------------------------------

    async def _inbox(self) -> None:
        while True:
            item = await self.host.receive()
            if isinstance(item, Gone):
                self._gone(item)
            elif isinstance(item.message, wire.View):
                self._take_view(item.sender, item.message)
            elif isinstance(item.message, wire.ModelPart):
                waiting = self._parts.pop(item.message.part, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(bytes(item.body))
            else:
                active = self._requests.get(getattr(item.message, "session", SessionId("")))
                if active is not None:
                    now = time.monotonic()
                    self._carry_out(active, active.request.receive(item.sender, item.message, now))

    def _gone(self, item: Gone) -> None:
        now = time.monotonic()
        for active in list(self._active):
            self._carry_out(active, active.request.receive(item.peer, GoneOutcome(item.reason), now))
        self.followed.gone(item.peer)

    def _take_view(self, sender: PeerId, view: wire.View) -> None:
        if not self.followed.is_ours(view):
            return
        now = time.monotonic()
        rerouted = self.followed.take(view, now, sender)
        if not view.serial:
            self._next_whole.set_result(view)
            self._next_whole = asyncio.get_running_loop().create_future()
        self._next_view.set_result(None)
        self._next_view = asyncio.get_running_loop().create_future()
        for row in view.members:
            self.host.learn(row.record.peer, row.record.addresses)
        if rerouted:
            for active in list(self._active):
                active.request.plan_changed(now)
                self._carry_out(active, active.request.tick(now))

    # --- requests ----------------------------------------------------------------------------------

    async def run(self, spec: RequestSpec, on_tokens: OnTokens) -> Request:
        """Run one request to its end.

        Raises:
            HelixError: the request failed, in a sentence.
        """
        if len(self._active) >= REQUESTS_MAX:
            raise UsageError(f"This client already runs {REQUESTS_MAX} requests; wait for one to end.")
        now = time.monotonic()
        request = Request(spec, self.followed, _new_session_id, self._config, now)
        active = ActiveRequest(request, now)
        self._active.add(active)
        try:
            self._carry_out(active, request.tick(now))
            seen = 0
            while True:
                new, logprobs, seen = request.tokens[seen:], request.logprobs[seen:], len(request.tokens)
                if new and not on_tokens(new, logprobs):
                    self._carry_out(active, request.cancel())
                if request.over:
                    break
                await self._wait_for(active)
            if request.error is not None:
                raise request.error
            return request
        finally:
            self._carry_out(active, request.cancel())
            self._active.discard(active)
            self._requests = {s: a for s, a in self._requests.items() if a is not active}

    async def _wait_for(self, active: ActiveRequest) -> None:
        active.changed.clear()
        patience_s = max(0.001, active.request.deadline() - time.monotonic())
        try:
            async with asyncio.timeout(patience_s):
                await active.changed.wait()
        except TimeoutError:
            self._carry_out(active, active.request.tick(time.monotonic()))

    def _carry_out(self, active: ActiveRequest, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                if isinstance(effect.message, wire.Open):
                    self._requests[effect.message.session] = active
                self.host.post(effect.to, effect.message, effect.body, effect.lane)
            else:
                assert isinstance(effect, Emit), "a request only sends and tells"
        active.changed.set()

    def pipelines(self) -> list[Pipeline]:
        """The pipelines of the requests that run now, oldest request first."""
        running = sorted(self._active, key=lambda active: active.began_at)
        return [active.request.pipelines[-1] for active in running if active.request.pipelines]

    # --- the model's files -------------------------------------------------------------------------

    async def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, fetched from a peer once and checked against the manifest."""
        if self._tokenizer is None:
            parts = {part: await self._part(part) for part in wire.MODEL_PARTS}
            self._check(parts)
            self._tokenizer = Tokenizer(parts["tokenizer"], parts["chat"])
        return self._tokenizer

    async def _part(self, part: str) -> bytes:
        assert self.view is not None, "the swarm is open"
        for row in self.view.members:
            if row.state != "active":
                continue
            waiting = self._parts.setdefault(part, asyncio.get_running_loop().create_future())
            self.host.post(row.record.peer, wire.GetModelPart(part=part))
            try:
                async with asyncio.timeout(ANSWER_S):
                    return await asyncio.shield(waiting)
            except TimeoutError:
                continue
        raise NetworkError(f"No peer of the swarm sent the model's {part} file.")

    def _check(self, parts: dict[str, bytes]) -> None:
        assert self.view is not None, "the swarm is open"
        try:
            manifest = msgspec.json.decode(parts["manifest"], type=Manifest)
        except (msgspec.DecodeError, ValueError) as error:
            raise RemoteProtocolError(f"The swarm's manifest is malformed: {error}") from None
        if manifest.hash != self.view.manifest_hash:
            raise RemoteProtocolError("A peer sent a manifest that is not this model's.")
        # A GGUF carries its tokenizer inside; what peers hand out is converted, and differs between versions.
        converted = manifest.source_format == "gguf"
        if not converted and manifest.tokenizer_sha256 != hashlib.sha256(parts["tokenizer"]).hexdigest():
            raise RemoteProtocolError("A peer sent a tokenizer that is not this model's.")


def _new_session_id() -> SessionId:
    return SessionId(secrets.token_urlsafe(12))
