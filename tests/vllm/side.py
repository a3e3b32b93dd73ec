"""vLLM's own `LLM` writes down what it does, and our layers do it again. In a process of its own: both set globals.

Reads one line of JSON, [[checkpoint, prepared folder, [[0, 2, 4], ...]], ...] (where stages begin and end), and prints
a line of JSON for each: what `LLM` said, and for each split the largest difference between its logits and those of the
stages; 0.0 is bitwise equality. The first split is also run with the sum of both of vLLM's tensors handed on.
`refused` is what `LLM` said of a checkpoint that it does not take on this machine.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}

from helixnet.engine.vllm_layers import Limits, Row, VllmLayers  # sets what vLLM reads when it is imported

import numpy as np  # isort: skip
import torch  # isort: skip
from vllm import LLM, SamplingParams  # isort: skip

from helixnet.core.types import SessionId, Span
from helixnet.engine.vllm_engine import VllmEngine
from helixnet.engine.weights.prepared import read_prepared

PROMPTS = ([5, 17, 99, 3, 42, 64, 7, 7, 120, 11, 23, 56, 31], [9, 8, 7], [*range(3, 100)])
NEW = 8
CONTEXT = 256
BATCH_TOKENS = 64
"""Fewer than the longest prompt has: it comes in pieces."""
MEMORY = 64 << 20


class Told:
    """What `LLM` ran: the tokens of each request in each step, and the logits that came of it."""

    def __init__(self, llm: Any) -> None:
        self.steps: list[dict[str, list[int]]] = []
        self.logits: list[dict[str, torch.Tensor]] = []
        core = llm.llm_engine.engine_core.engine_core
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._execute = self._runner.execute_model
        self._runner.execute_model = self._watched

    def _watched(self, scheduled: Any, *rest: Any) -> Any:
        made = self._execute(scheduled, *rest)
        if scheduled.total_num_scheduled_tokens:
            batch = self._runner.input_batch
            step = {}
            for index, request in enumerate(batch.req_ids):
                start = int(batch.num_computed_tokens_cpu[index])
                stop = start + scheduled.num_scheduled_tokens[request]
                step[request] = batch.token_ids_cpu[index, start:stop].tolist()
            self.steps.append(step)
            logits = self._runner.execute_model_state.logits
            self.logits.append({request: logits[n].clone() for n, request in enumerate(batch.req_ids)})
        return made


def whole(checkpoint: str) -> tuple[Told, list[list[int]]]:
    """Greedy answers of vLLM's own engine."""
    llm = LLM(
        model=checkpoint,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=CONTEXT,
        max_num_seqs=8,
        max_num_batched_tokens=BATCH_TOKENS,
        enable_prefix_caching=False,
        async_scheduling=False,
        kv_cache_memory_bytes=MEMORY,
    )
    told = Told(llm)
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": one} for one in PROMPTS], params, use_tqdm=False)
    return told, [list(answer.outputs[0].token_ids) for answer in answers]


def again(prepared: str, cuts: list[int], told: Told, exact: bool) -> float:
    """The largest difference of any logit when the same steps are run in stages.

    These hand on both of vLLM's tensors if it is to be exact, and otherwise their sum.
    """
    stages = [_stage(prepared, span) for span in starmap(Span, pairwise(cuts))]
    requests = sorted({request for step in told.steps for request in step})
    pages = {request: np.arange(4) + 1 + 4 * n for n, request in enumerate(requests)}
    position = dict.fromkeys(requests, 0)
    worst = 0.0
    for step, expected in zip(told.steps, told.logits, strict=True):
        inputs: dict[str, tuple[Any, Any]] = {request: (torch.tensor(ids), None) for request, ids in step.items()}
        for stage in stages:
            rows = [Row(SessionId(one), pages[one], position[one], *inputs[one]) for one in step]
            with torch.inference_mode():
                results = stage.run(stage.span, rows)
            inputs = {one: _handed_on(result, exact) for one, result in zip(step, results, strict=True)}
        for request, result in zip(step, results, strict=True):
            assert result.logits is not None, "the last stage puts out logits"
            worst = max(worst, float((result.logits.float() - expected[request].float()).abs().max()))
            position[request] += len(step[request])
    return worst


def _stage(prepared: str, span: Span) -> VllmLayers:
    model = read_prepared(Path(prepared))
    stage = VllmLayers(model, span, Limits(context_tokens=CONTEXT, batch_tokens=BATCH_TOKENS, sessions=8))
    for tensors in VllmEngine(model, device="cpu", memory_bytes=MEMORY)._read(span):
        stage.take(tensors)
    stage.finish()
    stage.resize(40, np.zeros(0, dtype=np.int64))
    return stage


def _handed_on(result: Any, exact: bool) -> tuple[Any, Any]:
    if exact or result.residual is None:
        return result.hidden, result.residual
    return result.hidden + result.residual, None


def main() -> None:
    """Compare, and say so."""
    for checkpoint, prepared, splits in json.loads(sys.stdin.readline()):
        try:
            told, tokens = whole(checkpoint)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            print(json.dumps({"refused": str(error)}), flush=True)
            continue
        exact = [again(prepared, cuts, told, exact=True) for cuts in splits]
        summed = again(prepared, splits[0], told, exact=False)
        print(json.dumps({"tokens": tokens, "steps": len(told.steps), "exact": exact, "summed": summed}), flush=True)


if __name__ == "__main__":
    main()
