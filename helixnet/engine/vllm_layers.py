"""Layers of a model on vLLM: the only file that knows vLLM, written for one minor version of it.

vLLM serves whole models, split at most among processes that it starts itself. Here one of its workers is told that it
is a middle rank of a pipeline, and is driven batch by batch: its scheduler, its KV manager and its sampler stay out.
What is used is its model code, its loader of weights, its kernels and its paged KV memory.

Several runs of layers may live in one process: what vLLM keeps of a pipeline in a global (`parallel_state._PP`) is set
before each of them is built or run. None of this may be called by two threads at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from helixnet.core.errors import CorruptCheckpoint, ModelError
from helixnet.core.types import SessionId, Span
from helixnet.engine.memory import zeros_when_touched
from helixnet.engine.weights import architecture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helixnet.engine.weights.prepared import PreparedModel

# Read when vLLM is imported, and by what it imports.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ |= {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one whose batches can be driven from outside
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # this machine has other peers and programs
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models import utils as model_utils
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sampling_params import SamplingParams
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

SERIES = "0.32."
"""Its inner interfaces change with every minor version."""
VERSION: str = vllm.__version__
PAGE_TOKENS = 64
"""vLLM's block: what its CPU kernels and those for GPUs all take, and as long as a block that prompts may share."""
ROOM_TOKENS = 512
"""A session's array of token ids grows in steps of this, at least doubling."""
HIDDEN, RESIDUAL = "hidden_states", "residual"
TRIAL_PAGES = 4
"""What it makes for a start: one session of a page, also with a sliding window."""
PROMISED_BYTES = 1 << 40
"""What vLLM is told that there is for KV: it refuses models whose context it thinks does not fit."""
_GREEDY = SamplingParams(temperature=0.0)
"""Asked for and not used: tokens are chosen by our own sampler."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What vLLM makes its buffers for."""

    context_tokens: int
    batch_tokens: int
    sessions: int


@dataclass(slots=True)
class Row:
    """One session's tokens in a batch."""

    session: SessionId
    pages: np.ndarray
    """Ids of its pages, [pages]."""
    position: int
    inputs: torch.Tensor
    """[tokens] token ids for layer 0, [tokens, hidden_size] for any other."""
    residual: torch.Tensor | None = None
    """[tokens, hidden_size] if it is not in `inputs` already."""
    answers: int = 1
    """Of so many of its last tokens the logits are wanted."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.inputs.shape[0])

    @property
    def stop(self) -> int:
        """The position after the last of them."""
        return self.position + self.tokens


@dataclass(slots=True)
class Result:
    """What came of a row: hidden states [tokens, hidden_size], or after the last layer logits [answers, vocab]."""

    hidden: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    """To be added to `hidden`; None if the family's layers hand on one tensor."""
    logits: torch.Tensor | None = None


@dataclass(slots=True)
class _Told:
    """What the runner knows of a session."""

    ids: np.ndarray
    """Its token ids, as far as there is room for; the runner looks into this very array."""
    pages: int


class VllmLayers:
    """One run of layers. Build it, `take` its tensors, `finish`; give it pages with `resize`, then `run`."""

    def __init__(self, model: PreparedModel, span: Span, limits: Limits) -> None:
        if not VERSION.startswith(SERIES):
            raise ModelError(f"vLLM {SERIES}x is needed, and {VERSION} is installed")
        self.span = span
        self._manifest = model.manifest
        self._config = _config(model, limits)
        worker = _worker(self._config)
        self._worker, self._runner = worker, worker.model_runner
        self.device: torch.device = worker.device
        with self._building(), self.device:
            self._model = self._runner.model = initialize_model(vllm_config=self._config)
        self._runner.sync_and_gather_intermediate_tensors = self._inputs
        self._inner = self._layer_holder()
        self._drop_ends(span.start == 0, span.stop == self._manifest.layers)
        model_utils._model_to_pp_missing_layer_names.clear()  # kept by address, which may be that of one that has gone
        self._loaded: set[str] = set()
        self._attention: dict[int, Any] = {}
        self._kv: dict[int, torch.Tensor] = {}
        self._told: dict[SessionId, _Told] = {}
        self._ended: set[SessionId] = set()
        """Sessions whose end the runner is to be told of."""
        self._rows: dict[SessionId, Row] = {}
        """Of the batch that runs."""

    # --- weights -----------------------------------------------------------------------------------

    def take(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Some of the checkpoint's tensors, by its own names."""
        with self._building():
            self._loaded |= self._model.load_weights(tensors) or set()

    def finish(self) -> None:
        """All tensors were taken. Raises CorruptCheckpoint if some are missing."""
        if self._manifest.quantization:
            self._count_what_needs_no_tensor()
        missing = {name for name, _ in self._model.named_parameters()} - self._loaded
        if missing:
            raise CorruptCheckpoint(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} among them")
        with self._building():
            process_weights_after_loading(self._model, self._config.model_config, self.device)
            self._make_kv_ready()
        self._model.eval()

    def _count_what_needs_no_tensor(self) -> None:
        """As loaded: parameters that checkpoints may leave out, each of vLLM's ways to quantize having its own."""
        with contextlib.suppress(ValueError):  # what is missing then is for the caller to name
            DefaultModelLoader(self._config.load_config).track_weights_loading(self._model, self._loaded, True)

    def keep(self, span: Span) -> None:
        """Forget the layers outside `span`, and with them their KV and what only they needed."""
        for layer in self.span.layers():
            if layer not in span.layers():
                self._inner.layers[layer] = PPMissingLayer()
                self._attention.pop(layer).kv_cache = torch.tensor([])
                self._kv.pop(layer, None)
        self._drop_ends(span.start == 0, span.stop == self._manifest.layers)
        self.span = span

    # --- KV ----------------------------------------------------------------------------------------

    def resize(self, pages: int, moved: np.ndarray) -> None:
        """Have so many pages; the contents of those numbered `moved` become the first of them, in this order."""
        where = torch.from_numpy(moved).to(self.device)
        for layer, attention in self._attention.items():
            new, old = _pages_like(attention.kv_cache, pages), self._kv.pop(layer, None)
            if old is not None:
                new[: moved.size] = old.index_select(0, where)
            del old
            self._kv[layer] = new
            attention.bind_kv_cache(new)
        for session in list(self._told):
            self.forget(session)  # its pages have other numbers now

    def fill(self, pages: np.ndarray, value: int) -> None:
        """Have nothing but this in these pages."""
        where = torch.from_numpy(np.ascontiguousarray(pages).reshape(-1)).to(self.device)
        for kv in self._kv.values():
            kv.index_fill_(0, where, value)

    def forget(self, session: SessionId) -> None:
        """A session ended; unknown ones are ignored."""
        if self._told.pop(session, None) is not None:
            self._ended.add(session)

    # --- batches -----------------------------------------------------------------------------------

    def run(self, segment: Span, rows: Sequence[Row]) -> list[Result]:
        """Run rows of different sessions, `batch_tokens` together at most, through a part of the layers."""
        self._rows = {row.session: row for row in rows}
        self._inner.start_layer, self._inner.end_layer = segment.start, segment.stop
        with _rank().of(segment, self._manifest.layers):
            made = self._runner.execute_model(self._scheduled(rows), IntermediateTensors({}))
        order: list[SessionId] = list(self._runner.input_batch.req_ids)
        if made is None:
            state, self._runner.execute_model_state = self._runner.execute_model_state, None
            logits = dict(zip(order, self._logits(state, order), strict=True))
            return [Result(logits=logits[row.session]) for row in rows]
        counts = [self._rows[one].tokens for one in order]
        parts = {name: dict(zip(order, made[name].split(counts), strict=True)) for name in self._keys}
        none: dict[SessionId, torch.Tensor] = {}
        return [Result(parts[HIDDEN][one.session], parts.get(RESIDUAL, none).get(one.session)) for one in rows]

    def _logits(self, state: Any, order: list[SessionId]) -> Sequence[torch.Tensor]:
        """Of each session's last tokens [answers, vocab]. The runner has made them of the very last ones."""
        rows = [self._rows[one] for one in order]
        if all(row.answers == 1 for row in rows):
            return list(state.logits.split(1))
        stops = np.cumsum([row.tokens for row in rows])
        wanted = [np.arange(stop - row.answers, stop) for row, stop in zip(rows, stops, strict=True)]
        where = torch.from_numpy(np.concatenate(wanted)).to(self.device)
        logits: torch.Tensor = self._model.compute_logits(state.hidden_states[where])
        return logits.split([row.answers for row in rows])

    def _scheduled(self, rows: Sequence[Row]) -> SchedulerOutput:
        """The batch in the words of vLLM's scheduler: to it, every session is a prompt that is still being run."""
        new: list[NewRequestData] = []
        known: list[Row] = []
        pages: list[tuple[list[int]] | None] = []
        for row in rows:
            told = self._told.get(row.session)
            if told is None or row.stop > len(told.ids):
                told = self._introduce(row, told)
                new.append(_new_request(row, told.ids))
            else:
                known.append(row)
                pages.append((row.pages[told.pages :].tolist(),) if len(row.pages) > told.pages else None)
                told.pages = len(row.pages)
            if row.inputs.dim() == 1:
                self._write(row, told)
        ended, self._ended = self._ended, set()
        cached = CachedRequestData(
            req_ids=[row.session for row in known],
            resumed_req_ids=set(),
            new_token_ids=[[] for _ in known],
            all_token_ids={},
            new_block_ids=pages,
            num_computed_tokens=[row.position for row in known],
            num_output_tokens=[0] * len(known),
        )
        return SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={row.session: row.tokens for row in rows},
            total_num_scheduled_tokens=sum([row.tokens for row in rows]),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=ended,
            free_encoder_mm_hashes=[],
        )

    def _introduce(self, row: Row, before: _Told | None) -> _Told:
        """The session is new to the runner, or has outgrown what it was told of it: then it ends, and begins anew."""
        size = max(ROOM_TOKENS, 2 * len(before.ids) if before is not None else 0, row.stop)
        size = min(size, self._config.model_config.max_model_len)
        told = self._told[row.session] = _Told(np.zeros(size, dtype=np.int32), len(row.pages))
        if before is not None:
            told.ids[: len(before.ids)] = before.ids
            self._ended.add(row.session)
        return told

    def _write(self, row: Row, told: _Told) -> None:
        """Token ids go where the runner looks for them: into its copy, too, if it has one."""
        ids = row.inputs.cpu().numpy()
        told.ids[row.position : row.stop] = ids
        index = self._runner.input_batch.req_id_to_index.get(row.session)
        if index is not None:
            self._runner.input_batch.token_ids_cpu[index, row.position : row.stop] = ids

    def _inputs(self, *_: object) -> IntermediateTensors:
        """What the layers are given, in the order that the runner has chosen (it is asked for once that is known).

        Layers add `residual` to `hidden_states` before they do anything else, so it is zero where one tensor came that
        holds both. They change both in place.
        """
        rows = [self._rows[one] for one in self._runner.input_batch.req_ids]
        given = {HIDDEN: torch.cat([row.inputs for row in rows])}
        if RESIDUAL in self._keys:
            residuals = [torch.zeros_like(row.inputs) if row.residual is None else row.residual for row in rows]
            given[RESIDUAL] = torch.cat(residuals)
        return IntermediateTensors(given)

    # --- vLLM's insides ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _building(self) -> Iterator[None]:
        """While modules are made and loaded, they ask globals which layers there are, and of which numbers."""
        layers = self._manifest.layers
        parts = [self.span.start, len(self.span), layers - self.span.stop] if len(self.span) < layers else [layers]
        os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, parts))
        try:
            with (
                _rank().of(self.span, layers, len(parts)),
                set_default_torch_dtype(self._config.model_config.dtype),
                set_current_vllm_config(self._config),
            ):
                yield
        finally:
            del os.environ["VLLM_PP_LAYER_PARTITION"]

    def _layer_holder(self) -> Any:
        """The module that has the layers and says from which to which it runs."""
        make = getattr(self._model, "make_empty_intermediate_tensors", None)
        holder = next((one for one in self._model.modules() if hasattr(one, "start_layer")), None)
        if make is None or holder is None:
            raise ModelError(f"vLLM cannot split {self._manifest.architecture} among peers; try --engine torch")
        self._keys = tuple(make(batch_size=1, dtype=self._runner.dtype, device=self.device).tensors)
        if HIDDEN not in self._keys or not set(self._keys) <= {HIDDEN, RESIDUAL}:
            carried = ", ".join(self._keys)
            raise ModelError(f"layers of {self._manifest.architecture} hand on {carried} in vLLM; try --engine torch")
        return holder

    def _make_kv_ready(self) -> None:
        """Have vLLM choose its kernels and their KV layout, with a few pages; ours take their place."""
        specs = self._runner.get_kv_cache_spec()
        layouts = [self._worker.get_supported_kv_cache_layouts()]
        self._worker.set_kv_cache_layout(resolve_kv_cache_layout(self._config, layouts, list(specs.values())).name)
        model, context = self._config.model_config, self._config.model_config.max_model_len
        model.max_model_len = PAGE_TOKENS  # so few pages are not enough for one session with all of its context
        (found,) = get_kv_cache_configs(self._config, [specs], [PROMISED_BYTES])
        model.max_model_len = context
        if len(found.kv_cache_groups) != 1 or any(spec.block_size != PAGE_TOKENS for spec in specs.values()):
            raise ModelError(f"vLLM has no one KV layout for {self._manifest.architecture}; try --engine torch")
        self._runner.initialize_kv_cache(found)
        self._runner.kv_caches.clear()
        context = self._config.compilation_config.static_forward_context
        for name in specs:
            layer = architecture.layer_of(name)
            assert layer is not None, f"{name} is in a layer"
            self._attention[layer] = context[name]

    def _drop_ends(self, is_first: bool, is_last: bool) -> None:
        """Modules beside the layers that no layer that is left needs."""
        tied = getattr(self._config.model_config.hf_text_config, "tie_word_embeddings", False)
        for owner in {self._model, self._inner}:
            for name, module in list(owner.named_children()):
                if module is self._inner or name == "layers":
                    continue
                embeds = "embed" in name
                needed = is_first or (is_last and tied) if embeds else is_last
                if not needed and any(True for _ in module.parameters()):
                    setattr(owner, name, PPMissingLayer())


class _Rank:
    """Stands for the pipeline's group of processes: of that, models only ask which part of the layers is theirs."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.is_first_rank = self.is_last_rank = True
        self.rank_in_group, self.world_size = 0, 1

    @contextlib.contextmanager
    def of(self, segment: Span, layers: int, ranks: int = 1) -> Iterator[None]:
        """Have a part of so many layers; of three ranks, be the middle one."""
        self.is_first_rank, self.is_last_rank = segment.start == 0, segment.stop == layers
        self.rank_in_group, self.world_size = ranks // 2, ranks
        try:
            yield
        finally:
            self.is_first_rank = self.is_last_rank = True
            self.rank_in_group, self.world_size = 0, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def _rank() -> _Rank:
    group = parallel_state._PP
    if not isinstance(group, _Rank):
        group = parallel_state._PP = _Rank(group)
    return group


def _new_request(row: Row, ids: np.ndarray) -> NewRequestData:
    return NewRequestData(
        req_id=row.session,
        prompt_token_ids=ids,
        mm_features=[],
        sampling_params=_GREEDY,
        pooling_params=None,
        block_ids=(row.pages.tolist(),),
        num_computed_tokens=row.position,
        lora_request=None,
    )


def _pages_like(kv: torch.Tensor, pages: int) -> torch.Tensor:
    """So many pages of KV, laid out as those of `kv` [pages, ...] are."""
    if kv.stride(0) != max(kv.stride()):
        raise ModelError("this vLLM kernel has KV that is not laid out page by page; try --engine torch")
    flat = zeros_when_touched(pages * kv.stride(0), kv.dtype, kv.device)
    return flat.as_strided((pages, *kv.shape[1:]), kv.stride())


def _worker(config: VllmConfig) -> Any:
    """A worker of vLLM that is alone in the world."""
    wrapper = WorkerWrapperBase(rpc_rank=0)
    meeting = f"file://{_folder()}/meeting"
    wrapper.init_worker(
        [
            {
                "vllm_config": config,
                "local_rank": 0,
                "rank": 0,
                "distributed_init_method": meeting,
                "is_driver_worker": True,
            }
        ]
    )
    wrapper.init_device()
    return wrapper.worker


def _config(model: PreparedModel, limits: Limits) -> VllmConfig:
    manifest = model.manifest
    folder = _folder() / manifest.hash[:16]
    folder.mkdir(exist_ok=True)
    config = {**model.config, "architectures": [manifest.architecture], "dtype": manifest.dtype}
    (folder / "config.json").write_text(json.dumps(config))
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=manifest.dtype,
        max_model_len=limits.context_tokens,
        max_num_seqs=limits.sessions,
        max_num_batched_tokens=limits.batch_tokens,
        block_size=PAGE_TOKENS,
        num_gpu_blocks_override=TRIAL_PAGES,
        kv_cache_memory_bytes=PROMISED_BYTES,
        gpu_memory_utilization=0.05,  # asked for before anything is loaded; memory is counted by whoever owns this
        enforce_eager=True,  # compiled code does not look which layers it is to begin and end with
        enable_prefix_caching=False,
        disable_hybrid_kv_cache_manager=True,
        async_scheduling=False,
    ).create_engine_config()


@cache
def _folder() -> Path:
    """Where vLLM finds its config; gone when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="helixnet-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
