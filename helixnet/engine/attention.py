"""Attention over a ragged batch: every transformers family calls this in place of its own.

Rows of a batch are ordered decode steps first, then prefill chunks. Per layer, K and V of the new tokens
are written to the session's pages, then each row attends to its own session only. transformers hands us
what is special about a family as keyword arguments: `scaling`, `sliding_window`, `softcap`, `s_aux` (sinks).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.core.types import Span
from helixnet.engine.kv import KvPool
from helixnet.engine.page_table import SessionKv
from helixnet.engine.products import widened

ATTENTION_NAME = "helixnet"
QUERIES_AT_ONCE = 128
"""A prompt's tokens that attend together on a CPU: those before them need not look at the keys of those after them."""
PAST_MIN, PIECE_MIN = 128, 64
"""So many tokens before so many of a prompt are attended to by themselves, on a CPU: nothing of them needs a mask. For
fewer, a second call takes longer than a mask."""
SLOW_COUNTS = {torch.float32: (3,), torch.bfloat16: (1, 3), torch.float16: (1, 3)}
"""So many queries are better padded with one more: torch's kernel multiplies them one by one."""

_running = threading.local()


@dataclass(frozen=True, slots=True)
class Rule:
    """What a family asks of attention in one layer."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class Mask:
    """Where tokens may look: `seen` is True there."""

    def __init__(self, seen: torch.Tensor) -> None:
        self.seen = seen
        self._added: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def added(self, times: int, dtype: torch.dtype) -> torch.Tensor:
        """The same as numbers to add to scores, its tokens so many times over. torch would make them in every layer."""
        if (times, dtype) not in self._added:
            added = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
            added.masked_fill_(~self.seen, -torch.inf)
            self._added[times, dtype] = added.repeat(times, 1) if times > 1 else added
        return self._added[times, dtype]


@dataclass(slots=True)
class Row:
    """One session's tokens in a batch."""

    kv: SessionKv
    position: int
    tokens: int

    @property
    def length(self) -> int:
        """Tokens in KV once this row is written."""
        return self.position + self.tokens


@dataclass(slots=True)
class Step:
    """One pass of rows through the layers `layers`; made once, used by every one of them."""

    pool: KvPool
    layers: Span
    rows: Sequence[Row]
    gather_pages: int
    """Decode rows with so many pages at most attend together, their pages gathered; longer ones one by one."""
    slots: torch.Tensor = field(init=False)
    """[layers, tokens]: where each token's K and V go."""
    decoding: int = field(init=False)
    """How many of the leading rows are single tokens."""
    tables: list[np.ndarray] = field(init=False)
    """Per row, pages `[layers, pages so far]`."""
    masks: dict[Any, Mask] = field(init=False, default_factory=dict)
    rules: dict[int, Rule] = field(init=False, default_factory=dict)
    """What the layers that ran in this step asked of attention."""
    groups: list[tuple[int, torch.Tensor]] = field(init=False)
    """Decode rows that attend together, by their first: [layers, rows, pages] page ids, padded (masked) with the row's
    own first page, never another's. Rows of a group are at most twice as long as one another."""

    def __post_init__(self) -> None:
        self.decoding = next((i for i, row in enumerate(self.rows) if row.tokens > 1), len(self.rows))
        self.tables = []
        slots = []
        for row in self.rows:
            first = self.layers.start - row.kv.layers.start
            table = row.kv.pages[first : first + len(self.layers), : -(-row.length // PAGE_TOKENS)]
            self.tables.append(table)
            if row.tokens == 1:
                slots.append(table[:, -1:] * PAGE_TOKENS + row.position % PAGE_TOKENS)
            else:
                where = np.arange(row.position, row.length)
                slots.append(table[:, where // PAGE_TOKENS] * PAGE_TOKENS + where % PAGE_TOKENS)
        device = self.pool.k.device
        self.slots = torch.from_numpy(np.concatenate(slots, axis=1)).to(device)
        self.groups = []
        short = takewhile(lambda table: table.shape[1] <= self.gather_pages, self.tables[: self.decoding])
        first = 0
        for _, group in groupby(short, lambda table: length_class(table.shape[1])):
            tables = list(group)
            if len(tables) > 1:
                self.groups.append((first, torch.from_numpy(_padded(tables)).to(device)))
            first += len(tables)

    def __enter__(self) -> Step:
        _running.step = self
        return self

    def __exit__(self, *_: object) -> None:
        _running.step = None


def length_class(count: int) -> int:
    """The same for counts of which none is more than twice another; rows of a step come in this order."""
    return count.bit_length()


def _padded(tables: list[np.ndarray]) -> np.ndarray:
    """Tables [layers, pages] as one [layers, rows, pages], each padded with its first page."""
    pages = max(table.shape[1] for table in tables)
    padded = np.empty((len(tables[0]), len(tables), pages), dtype=np.int64)
    for i, table in enumerate(tables):
        padded[:, i] = table[:, :1]
        padded[:, i, : table.shape[1]] = table
    return padded


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **family: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output `[1, tokens, heads, head_dim]` of the running step in `module`'s layer.

    query `[1, heads, tokens, head_dim]`, key and value `[1, kv_heads, tokens, head_dim]`, rotated already.
    """
    step: Step = _running.step
    rule = Rule(
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        family.get("sliding_window"),
        family.get("softcap"),
        family.get("s_aux"),
    )
    step.rules[module.layer_idx] = rule
    output = attend_rows(step, module.layer_idx, query, key[0].transpose(0, 1), value[0].transpose(0, 1), rule)
    return output.transpose(1, 2), None


def running_step() -> Step:
    """The step whose `with` block this thread is in."""
    step: Step = _running.step
    return step


def attend_rows(
    step: Step, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Store key and value `[tokens, kv_heads, head_dim]`, then let `query` `[1, heads, tokens, head_dim]` attend."""
    index = layer - step.layers.start
    slots = step.slots[index]
    kept, given = step.pool.k.dtype, query.dtype
    if given != kept:
        key, value = key.to(kept), value.to(kept)
    step.pool.k_slots.index_copy_(0, slots, key)
    step.pool.v_slots.index_copy_(0, slots, value)
    seen = _attend_all(step, index, query.to(widened(query.device, kept)), rule)
    return seen if seen.dtype == given else seen.to(given)


def _attend_all(step: Step, index: int, query: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Every row to its own session."""
    if len(step.rows) == 1:
        return _attend_row(step, index, 0, query, rule)
    outputs = []
    groups = dict(step.groups)
    row = start = 0
    while row < len(step.rows):
        gathered = groups.get(row)
        if gathered is not None:
            stop = start + gathered.shape[1]  # these are single tokens
            outputs.append(_attend_group(step, row, gathered[index], query[:, :, start:stop], rule))
            row += gathered.shape[1]
        else:
            stop = start + step.rows[row].tokens
            outputs.append(_attend_row(step, index, row, query[:, :, start:stop], rule))
            row += 1
        start = stop
    return torch.cat(outputs, dim=2)


def _attend_row(step: Step, layer: int, index: int, query: torch.Tensor, rule: Rule) -> torch.Tensor:
    """One session's tokens: `[1, heads, tokens, head_dim]`."""
    row, table, pool = step.rows[index], step.tables[index][layer], step.pool
    # A row's oldest token looks back `window` tokens; nothing before that is read at all.
    begin = 0 if rule.window is None else max(0, row.position + 1 - rule.window)
    if row.kv.consecutive:
        base = int(table[0]) * PAGE_TOKENS
        keys = pool.k_slots[base + begin : base + row.length]
        values = pool.v_slots[base + begin : base + row.length]
    else:
        pages = torch.from_numpy(table).to(pool.k.device)
        keys = pool.k.index_select(0, pages).flatten(0, 1)[begin : row.length]
        values = pool.v.index_select(0, pages).flatten(0, 1)[begin : row.length]
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    at_once = QUERIES_AT_ONCE if query.device.type == "cpu" else row.tokens
    if row.tokens <= at_once:
        return _attend_piece(step, index, query, keys, values, 0, rule)
    outputs = [
        _attend_piece(step, index, query[:, :, first : first + at_once], keys, values, first, rule)
        for first in range(0, row.tokens, at_once)
    ]
    return torch.cat(outputs, dim=2)


def _attend_piece(
    step: Step, index: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, rule: Rule
) -> torch.Tensor:
    """A row's tokens from its `first` on; `keys` and `values` are those of all its tokens, or of its window."""
    row = step.rows[index]
    last = first + query.shape[2]
    seen = keys.shape[2] - (row.tokens - last)
    keys, values = keys[:, :, :seen], values[:, :, :seen]
    past = seen - query.shape[2]
    sees_all = rule.window is None or rule.window >= row.length
    if query.shape[2] >= PIECE_MIN and past >= PAST_MIN and sees_all and _is_plain(rule, query):
        own = _row_mask(step, index, first, last, query.shape[2], None)
        assert own is not None, "several tokens have a mask"
        return _scores_with_past(query, keys, values, past, own, rule)
    return _scores(query, keys, values, _row_mask(step, index, first, last, seen, rule.window), rule)


def _attend_group(step: Step, first: int, table: torch.Tensor, query: torch.Tensor, rule: Rule) -> torch.Tensor:
    """A group of decode rows, from `first` on, with pages [rows, pages]: query `[1, heads, rows, head_dim]`, as is the
    result.
    """
    rows, pages = table.shape
    flat = table.reshape(-1)
    keys = step.pool.k.index_select(0, flat).view(rows, pages * PAGE_TOKENS, *step.pool.k.shape[2:]).transpose(1, 2)
    values = step.pool.v.index_select(0, flat).view(rows, pages * PAGE_TOKENS, *step.pool.v.shape[2:]).transpose(1, 2)
    mask = _group_mask(step, first, rows, pages * PAGE_TOKENS, rule.window)
    return _scores(query.transpose(0, 2), keys, values, mask, rule).transpose(0, 2)


def _is_plain(rule: Rule, query: torch.Tensor) -> bool:
    """Whether torch's kernel for CPUs can do it."""
    return rule.softcap is None and rule.sinks is None and query.device.type == "cpu"


def _scores_with_past(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, past: int, mask: Mask, rule: Rule
) -> torch.Tensor:
    """As `_scores`, where all tokens may look at the first `past` keys: with these and with the others one by one, and
    both put together by the weights that they have in all (as in FlashAttention, arXiv 2205.14135, section 3.1).
    """
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batch, _, tokens, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, dim)
    added = mask.added(grouped.shape[2] // tokens, query.dtype)
    before, weight = attend(grouped, keys[:, :, :past], values[:, :, :past], scale=rule.scaling)
    here, weight_here = attend(grouped, keys[:, :, past:], values[:, :, past:], attn_mask=added, scale=rule.scaling)
    share = torch.sigmoid(weight_here - weight).unsqueeze(-1)
    return torch.lerp(before.float(), here.float(), share).to(query.dtype).reshape(query.shape)


def _scores(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask | None, rule: Rule
) -> torch.Tensor:
    """softmax(q k / ...) v, grouped query heads."""
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    if _is_plain(rule, query):
        # The heads that share keys as so many more queries of one: keys are read once for all of them. One or three
        # queries take up to twice as long as two or four.
        batch, heads, tokens, dim = query.shape
        grouped = query.reshape(batch, keys.shape[1], -1, dim)
        count = grouped.shape[2]
        if tokens == 1 and count in SLOW_COUNTS[query.dtype]:
            grouped = F.pad(grouped, (0, 0, 0, 1))
        added = mask.added(count // tokens if tokens > 1 else 1, query.dtype) if mask is not None else None
        mixed = F.scaled_dot_product_attention(grouped, keys, values, added, scale=rule.scaling)
        return mixed[:, :, :count].reshape(query.shape)
    seen = mask.seen if mask is not None else None
    if rule.softcap is None and rule.sinks is None:
        return F.scaled_dot_product_attention(query, keys, values, seen, scale=rule.scaling, enable_gqa=True)
    batch, heads, tokens, dim = query.shape
    groups = heads // keys.shape[1]
    grouped = query.reshape(batch, keys.shape[1], groups * tokens, dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).view(batch, heads, tokens, -1) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if rule.sinks is not None:
        # A sink is one more score per head that takes weight and gives no value.
        sinks = rule.sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    mixed = torch.matmul(weights.to(values.dtype).view(batch, keys.shape[1], groups * tokens, -1), values)
    return mixed.view(batch, heads, tokens, dim)


def _row_mask(step: Step, index: int, first: int, last: int, keys: int, window: int | None) -> Mask | None:
    """[tokens, keys] of the tokens `[first, last)` of a row and so many keys up to the last of them, causal and
    windowed; None where a single token sees all its keys.
    """
    row = step.rows[index]
    if row.tokens == 1:
        return None
    key = index, first, keys, window
    if key not in step.masks:
        start, stop = row.position + first, row.position + last
        seen = _causal(torch.arange(start, stop), torch.arange(stop - keys, stop), window)
        step.masks[key] = Mask(seen.to(step.pool.k.device))
    return step.masks[key]


def _group_mask(step: Step, first: int, rows: int, keys: int, window: int | None) -> Mask:
    """[rows, 1, 1, keys] of a group of decode rows."""
    if ("group", first, window) not in step.masks:
        last = torch.tensor([row.position for row in step.rows[first : first + rows]])
        seen = _causal(last, torch.arange(keys), window).view(rows, 1, 1, keys)
        step.masks["group", first, window] = Mask(seen.to(step.pool.k.device))
    return step.masks["group", first, window]


def _causal(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where the token at `queries[i]` may look at `keys[j]`: itself and what came before, `window` in all."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
