"""The synchronous client: the asynchronous one on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from helixnet.core.wire.messages import View
from helixnet_client.client import AsyncClient, AsyncStream
from helixnet_client.types import Completion, Message, Piece

T = TypeVar("T")


class Client:
    """Like `AsyncClient` (same arguments), for code without an event loop. Safe to use from several threads."""

    def __init__(self, join: Sequence[str] = (), **arguments: Any) -> None:
        self._client = AsyncClient(join, **arguments)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="helixnet-client", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.open())
        except BaseException:
            self._end_thread()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and disconnect. Closing twice does nothing."""
        if self._loop.is_running():
            self._wait(self._client.close())
            self._end_thread()

    def status(self) -> View:
        """The swarm as its coordinator sees it now."""
        return self._wait(self._client.status())

    def generate(self, prompt: str | Sequence[int], **options: object) -> Completion:
        """Continue a bare prompt (text or token ids)."""
        return self._wait(self._client.generate(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: object) -> Completion:
        """Answer a conversation."""
        return self._wait(self._client.chat(messages, **options))

    def stream(self, prompt: str | Sequence[int], **options: object) -> Stream:
        """Continue a bare prompt, piece by piece."""
        return Stream(self, self._wait(_made(lambda: self._client.stream(prompt, **options))))

    def stream_chat(self, messages: Sequence[Message], **options: object) -> Stream:
        """Answer a conversation, piece by piece."""
        return Stream(self, self._wait(_made(lambda: self._client.stream_chat(messages, **options))))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread must also end the work in ours
            raise

    def _end_thread(self) -> None:
        # Libraries leave timers behind; asyncio.run would end them, and complains of those it finds at its end.
        self._wait(_cancel_the_rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        if not self._loop.is_running():
            self._loop.close()


class Stream:
    """An answer as it comes: iterate for pieces; `completion` is set after the last one."""

    def __init__(self, client: Client, stream: AsyncStream) -> None:
        self._client = client
        self._stream = stream

    def __iter__(self) -> Iterator[Piece]:
        try:
            while (piece := self._client._wait(_next(self._stream))) is not None:
                yield piece
        finally:
            self.cancel()

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once it has ended."""
        return self._stream.completion

    def cancel(self) -> None:
        """Stop; the swarm frees everything it held for this answer."""
        self._client._wait(self._stream.cancel())


async def _cancel_the_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


async def _next(stream: AsyncStream) -> Piece | None:
    return await anext(stream, None)


async def _made(make: Any) -> AsyncStream:
    made: AsyncStream = make()
    return made
