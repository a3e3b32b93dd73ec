"""Shapes of well-known public models, so that a cluster file can name one."""

from __future__ import annotations

from dataclasses import dataclass

from helixnet.core.model import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with gated feed-forward layers and grouped-query attention, as in its public config.json."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    context_tokens: int

    def layer_bytes(self, dtype: str) -> int:
        """Weights of one layer: four attention and three feed-forward matrices, two norms."""
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return (attention + 3 * self.hidden_size * self.feed_forward + 2 * self.hidden_size) * DTYPE_BYTES[dtype]

    def end_bytes(self, dtype: str) -> int:
        """The embedding, and as much again the head."""
        return self.vocab_size * self.hidden_size * DTYPE_BYTES[dtype]


SHAPES: dict[str, ModelShape] = {
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49_152, 8192),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192, 128_256, 131_072),
    "llama-3.2-3b": ModelShape(28, 3072, 24, 8, 128, 8192, 128_256, 131_072),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14_336, 128_256, 131_072),
    "llama-3.1-70b": ModelShape(80, 8192, 64, 8, 128, 28_672, 128_256, 131_072),
    "llama-3.1-405b": ModelShape(126, 16_384, 128, 8, 128, 53_248, 128_256, 131_072),
    "llama-2-70b": ModelShape(80, 8192, 64, 8, 128, 28_672, 32_000, 4096),
    "llama-30b": ModelShape(60, 6656, 52, 52, 128, 17_920, 32_000, 2048),
    "mistral-7b": ModelShape(32, 4096, 32, 8, 128, 14_336, 32_768, 32_768),
    "qwen2.5-7b": ModelShape(28, 3584, 28, 4, 128, 18_944, 152_064, 32_768),
    "qwen2.5-32b": ModelShape(64, 5120, 40, 8, 128, 27_648, 152_064, 32_768),
    "qwen2.5-72b": ModelShape(80, 8192, 64, 8, 128, 29_568, 152_064, 32_768),
    "qwen3-8b": ModelShape(36, 4096, 32, 8, 128, 12_288, 151_936, 40_960),
    "qwen3-32b": ModelShape(64, 5120, 64, 8, 128, 25_600, 151_936, 40_960),
}
