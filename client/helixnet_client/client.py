"""The asynchronous client."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from helixnet.core.errors import UsageError
from helixnet.core.route.request import Request, RequestConfig, RequestSpec
from helixnet.core.sampling import Logprobs
from helixnet.core.wire.messages import View
from helixnet_client.local import addresses_to_join
from helixnet_client.swarm import Swarm
from helixnet_client.tokenizer import Detokenizer, Tokenizer
from helixnet_client.transports import Connection, Transport, libp2p
from helixnet_client.types import Completion, Message, Options, Piece, Timings, Usage, options_from


class AsyncClient:
    """Asks one swarm. Use it as an async context manager, from one event loop.

    Args:
        join: addresses to join by; none means the swarm that `helixnet up` runs here.
        network: the network's name; `main` unless the local swarm says otherwise.
        model: needed only if the network serves several.
        config: how patient requests are.
        transport: how to connect; libp2p through hivemind's daemon by default.

    Every asking method takes the keyword arguments of `helixnet_client.types.Options`: `max_tokens`,
    `temperature`, `top_k`, `top_p`, `seed`, `stop` and more. All raise subclasses of `HelixError`.
    """

    def __init__(
        self,
        join: Sequence[str] = (),
        *,
        network: str | None = None,
        model: str | None = None,
        config: RequestConfig | None = None,
        transport: Transport = libp2p,
    ) -> None:
        self._join = (join,) if isinstance(join, str) else tuple(join)
        self._network = network
        self._model = model
        self._config = config or RequestConfig()
        self._transport = transport
        self._swarm: Swarm | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect. Raises UsageError, BootstrapUnreachable or NetworkError, each with what to do next."""
        join, network = addresses_to_join(self._join, self._network)
        connection: Connection = await self._transport(join)
        swarm = Swarm(connection, network, self._model, self._config)
        await swarm.open()
        self._swarm = swarm

    async def close(self) -> None:
        """Cancel what runs and disconnect."""
        swarm, self._swarm = self._swarm, None
        if swarm is not None:
            await swarm.close()

    @property
    def swarm(self) -> Swarm:
        """The open connection."""
        if self._swarm is None:
            raise UsageError("The client is not open: use `async with AsyncClient(...) as client`.")
        return self._swarm

    async def status(self) -> View:
        """The swarm as its coordinator sees it now: members, capabilities, links, plan, flows."""
        return await self.swarm.fresh_view()

    async def views(self, patience_s: float = 30.0) -> AsyncIterator[View]:
        """The swarm now, and again at every change; ends with DeadlineExceeded when nobody tells for `patience_s`."""
        yield await self.status()
        while True:
            yield await self.swarm.next_view(patience_s)

    async def generate(self, prompt: str | Sequence[int], **options: object) -> Completion:
        """Continue a bare prompt (text or token ids)."""
        return await self.stream(prompt, **options).finished()

    async def chat(self, messages: Sequence[Message], **options: object) -> Completion:
        """Answer a conversation."""
        return await self.stream_chat(messages, **options).finished()

    def stream(self, prompt: str | Sequence[int], **options: object) -> AsyncStream:
        """Continue a bare prompt, piece by piece."""
        return AsyncStream(self.swarm, prompt, None, options_from(options))

    def stream_chat(self, messages: Sequence[Message], **options: object) -> AsyncStream:
        """Answer a conversation, piece by piece."""
        return AsyncStream(self.swarm, None, messages, options_from(options))


class AsyncStream:
    """An answer as it comes: iterate for pieces; `completion` is set after the last one.

    Leaving the loop early does not stop the swarm by itself: call `cancel`, or use `async with`.
    """

    def __init__(
        self, swarm: Swarm, prompt: str | Sequence[int] | None, messages: Sequence[Message] | None, options: Options
    ) -> None:
        self.completion: Completion | None = None
        self._swarm = swarm
        self._prompt = prompt
        self._messages = messages
        self._options = options
        self._sampling = options.sampling(secrets.randbits(63))
        # Bounded by the answer itself: at most a piece for each of max_tokens, the rest, and the end.
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue(options.max_tokens + 2)
        self._task: asyncio.Task[None] | None = None
        self._began = time.perf_counter()
        self._first_at: float | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        if self._task is None:
            self._began = time.perf_counter()
            self._task = asyncio.create_task(self._run())
        piece = await self._pieces.get()
        if piece is None:
            self._ended = True
            await self._task
            raise StopAsyncIteration
        return piece

    async def finished(self) -> Completion:
        """Wait for the end."""
        async for _ in self:
            pass
        assert self.completion is not None, "a stream that ended without an error is complete"
        return self.completion

    async def cancel(self) -> None:
        """Stop; the swarm frees everything it held for this answer."""
        self._ended = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            tokenizer = await self._swarm.tokenizer()
            spec = self._spec(tokenizer)
            detokenizer = Detokenizer(tokenizer, self._options.stop)
            request = await self._swarm.run(spec, lambda ids, logprobs: self._take(ids, logprobs, spec, detokenizer))
            self._put(Piece(detokenizer.finish(), ()))
            self.completion = self._complete(spec, request, detokenizer)
        finally:
            self._pieces.put_nowait(None)

    def _spec(self, tokenizer: Tokenizer) -> RequestSpec:
        view = self._swarm.view
        assert view is not None, "the swarm is open"
        if self._messages is not None:
            prompt = tokenizer.conversation(self._messages)
        elif isinstance(self._prompt, str):
            prompt = tokenizer.prompt(self._prompt)
        else:
            prompt = tuple(self._prompt or ())
        return RequestSpec(
            manifest_hash=view.manifest_hash,
            context_tokens=view.context_tokens,
            prompt=prompt,
            tokens_max=self._options.max_tokens,
            sampling=self._options.sampling(self._sampling.seed, tokenizer.words(self._options.bad_words)),
            stop_ids=tuple(dict.fromkeys((*tokenizer.stop_ids, *self._options.stop_ids))),
            cache_salt=self._options.cache_salt,
            yields=self._options.background,
            packing=self._options.packing,
            drafts=self._options.drafts,
        )

    def _take(
        self, ids: list[int], logprobs: list[Logprobs | None], spec: RequestSpec, detokenizer: Detokenizer
    ) -> bool:
        if self._first_at is None:
            self._first_at = time.perf_counter()
        for token_id, chances in zip(ids, logprobs, strict=True):
            text = "" if token_id in spec.stop_ids else detokenizer.push(token_id)
            self._put(Piece(text, (token_id,), (chances,) if chances is not None else ()))
        return not detokenizer.stopped

    def _put(self, piece: Piece) -> None:
        if piece.text or piece.token_ids:
            self._pieces.put_nowait(piece)

    def _complete(self, spec: RequestSpec, request: Request, detokenizer: Detokenizer) -> Completion:
        ended = time.perf_counter()
        first_at = self._first_at or ended
        count = len(request.tokens)
        return Completion(
            text=detokenizer.text,
            token_ids=tuple(request.tokens),
            logprobs=tuple(chances for chances in request.logprobs if chances is not None),
            finish="stop" if detokenizer.stopped else request.finish,
            usage=Usage(len(spec.prompt), count, request.cached),
            timings=Timings(first_at - self._began, (ended - first_at) / max(1, count - 1), ended - self._began),
            seed=spec.sampling.seed,
            retries=len(request.pipelines) - 1,
            stages=tuple((s.peer, s.layers.start, s.layers.stop) for s in request.pipelines[-1]),
        )
