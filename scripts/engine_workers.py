"""Engines to compare, each in a process of its own: a command a line on stdin, an answer a line on stdout.

All run SmolLM2-135M in bf16, greedily, on the same token ids; on as many threads as they are told.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import checkout

DTYPE = "bfloat16"
MEMORY_BYTES = 3_000_000_000
CONTEXT_MAX = 4608
BATCH_MAX = 32


class Worker(Protocol):
    """Any number of requests at once, in step."""

    def begin(self, batch: int, context: int) -> None:
        """Have so many requests, each with a prompt of so many tokens that has run."""

    def step(self) -> None:
        """One token for each of them."""

    def end(self) -> None:
        """Forget them."""

    def prefill(self, tokens: int) -> None:
        """Run a prompt of so many tokens, up to its first answer."""


def prompt(tokens: int, number: int) -> list[int]:
    """Token ids that differ from request to request from the first on: nothing of them is shared."""
    return [1000 + (7919 * number + 31 * n) % 40_000 for n in range(tokens)]


def an_engine(threads: int = 1) -> Any:
    """TorchEngine; nothing is loaded yet."""
    from helixnet.engine.torch_engine import TorchEngine
    from helixnet.engine.weights.catalog import prepare

    return TorchEngine(prepare(None, dtype=DTYPE), device="cpu", memory_bytes=MEMORY_BYTES, threads=threads)


class Stages:
    """Engines of ours, each with its part of the layers, in one process: what one puts out the next takes as bytes."""

    def __init__(self, engines: list[Any]) -> None:
        self.stages = engines
        self._rows: dict[Any, tuple[int, int]] = {}
        """Position and token of each session's next step."""
        self._count = 0

    def begin(self, batch: int, context: int) -> None:
        for _ in range(batch):
            self._open(context)

    def _open(self, context: int) -> None:
        from helixnet.core.types import SessionId

        self._count += 1
        session = SessionId(f"s{self._count}")
        for engine in self.stages:
            engine.open(session, engine.held()[0], context + 512)
        token = self._run([(session, 0, prompt(context, self._count))])[0]
        self._rows[session] = (context, token)

    def _run(self, rows: list[tuple[Any, int, list[int]]]) -> list[int]:
        from helixnet.core.sampling import Sampling
        from helixnet.core.stage.work import Work

        came: list[Any] = [None] * len(rows)
        for engine in self.stages:
            span = engine.held()[0]
            sample = Sampling() if span.stop == engine.manifest.layers else None
            batch = [
                Work(
                    session=session,
                    layers=span,
                    position=position,
                    token_ids=tuple(ids) if done is None else None,
                    activation=None if done is None else done.activation,
                    sample=sample,
                )
                for (session, position, ids), done in zip(rows, came, strict=True)
            ]
            came = engine.run(batch)
            if failed := next((done.error for done in came if done.error), None):
                raise SystemExit(f"the engine failed: {failed}")
        return [done.token_id for done in came]

    def step(self) -> None:
        rows = [(session, position, [token]) for session, (position, token) in self._rows.items()]
        for (session, position, _), token in zip(rows, self._run(rows), strict=True):
            self._rows[session] = (position + 1, token)

    def end(self) -> None:
        for session in self._rows:
            for engine in self.stages:
                engine.release(session)
        self._rows.clear()

    def prefill(self, tokens: int) -> None:
        self._open(tokens)
        self.end()


class Ours(Stages):
    """TorchEngine, all layers."""

    def __init__(self, _: Path, threads: int) -> None:
        from helixnet.core.types import Span

        engine = an_engine(threads)
        engine.load(Span(0, engine.manifest.layers))
        super().__init__([engine])


class OnVllm(Stages):
    """VllmEngine, three stages in this process."""

    def __init__(self, _: Path, threads: int) -> None:
        set_for_vllm(threads)
        from helixnet.core.types import Span
        from helixnet.engine.vllm_engine import VllmEngine
        from helixnet.engine.weights.catalog import prepare

        model = prepare(None, dtype=DTYPE)
        third = model.manifest.layers // 3
        engines = []
        for number in range(3):
            engine = VllmEngine(model, device="cpu", memory_bytes=MEMORY_BYTES // 3, batch_tokens=CONTEXT_MAX)
            engine.load(Span(number * third, (number + 1) * third if number < 2 else model.manifest.layers))
            engines.append(engine)
        super().__init__(engines)


class Transformers:
    """The library's own model, sdpa attention and dynamic cache."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model.eval()
        self._count = 0
        self._cache: Any = None
        self._tokens: Any = None

    def _forward(self, ids: Any, cache: Any) -> Any:
        with self._torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True)

    def begin(self, batch: int, context: int) -> None:
        from transformers import DynamicCache

        ids = [prompt(context, self._count + n) for n in range(batch)]
        self._count += batch
        self._cache = DynamicCache()
        self._tokens = self._forward(self._torch.tensor(ids), self._cache)

    def step(self) -> None:
        self._tokens = self._forward(self._tokens, self._cache)

    def end(self) -> None:
        self._cache = self._tokens = None

    def prefill(self, tokens: int) -> None:
        self.begin(1, tokens)
        self.end()


class Vllm:
    """vLLM's own LLM, eager, in this process."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        set_for_vllm(threads)
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            model=str(checkpoint),
            dtype=DTYPE,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=CONTEXT_MAX,
            max_num_seqs=BATCH_MAX,
            max_num_batched_tokens=CONTEXT_MAX,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2 << 30,
        )
        self._engine = self._llm.llm_engine
        self._count = 0

    def _add(self, context: int, tokens: int) -> None:
        self._count += 1
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt(context, self._count)}, params)

    def begin(self, batch: int, context: int) -> None:
        self._running = batch
        for _ in range(batch):
            self._add(context, 500)
        seen: set[str] = set()
        while len(seen) < batch:
            seen |= {out.request_id for out in self._engine.step() if out.outputs[0].token_ids}

    def step(self) -> None:
        self._engine.step()

    def end(self) -> None:
        self._engine.abort_request([str(self._count - n) for n in range(self._running)])
        self._engine.step()

    def prefill(self, tokens: int) -> None:
        self._add(tokens, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def set_for_vllm(threads: int) -> None:
    """So many threads, in this process, and no more said than must be; before vLLM is imported."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


WORKERS: dict[str, type[Any]] = {"torch": Ours, "transformers": Transformers, "vllm": Vllm, "stages": OnVllm}
WITH_VLLM = ("vllm", "stages")


def serve(name: str, checkpoint: Path, threads: int) -> int:
    """Obey until stdin ends: `[method, *arguments]` in, seconds out."""
    checkout.use_packages()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    began = time.perf_counter()
    worker = WORKERS[name](checkpoint, threads)
    print(json.dumps(time.perf_counter() - began), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        began = time.perf_counter()
        getattr(worker, method)(*arguments)
        print(json.dumps(time.perf_counter() - began), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
