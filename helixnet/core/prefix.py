"""Whether prompts begin alike, as chains of hashes: one for each block of tokens, over all that came before it, too.

Whoever has the hash of a block has the hash of everything up to its end, so that two prompts share as many blocks as
their chains have in common. The salt says among whom: chains of different salts have nothing in common.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64
"""Few enough that most of what is shared is found, many enough that long prompts have short chains."""
HASH_BYTES = 16
SALT_CHARS_MAX = 128

Chain = tuple[bytes, ...]
"""The hash of everything up to the end of the first, second, ... block."""


def chain_of(salt: str, tokens: Sequence[int], known: Chain = ()) -> Chain:
    """The chain of the whole blocks of `tokens`, of which `known` are the first."""
    last = known[-1] if known else blake2b(salt.encode(), digest_size=HASH_BYTES).digest()
    chain = list(known)
    for end in range(BLOCK_TOKENS * (len(known) + 1), len(tokens) + 1, BLOCK_TOKENS):
        block = array("I", tokens[end - BLOCK_TOKENS : end]).tobytes()
        last = blake2b(block, key=last, digest_size=HASH_BYTES).digest()
        chain.append(last)
    return tuple(chain)


def blocks_before(tokens: int) -> int:
    """Of a prompt of so many tokens, how many blocks may be taken from elsewhere: its last token must be run."""
    return (tokens - 1) // BLOCK_TOKENS
