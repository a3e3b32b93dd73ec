"""Numbers and names as a person reads them; the same words in every command."""

from __future__ import annotations

import unicodedata

from helixnet.core.types import Span

SHORT_ID_CHARS = 6
_PREFIXES = ("", "k", "M", "G", "T", "P")


def short_id(peer: str) -> str:
    """The end of a peer id: its beginning is the same for all."""
    return peer[-SHORT_ID_CHARS:]


def printable(text: str) -> str:
    """`text` without control characters: names and answers come from strangers, and a terminal obeys escapes."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs"))


def size(value: float, unit: str) -> str:
    """`425 MB`, `1.3 GFLOP/s`: three digits and a decimal prefix. Bytes are written KB and not kB."""
    number = float(value)
    prefix = 0
    while number >= 999.5 and prefix < len(_PREFIXES) - 1:
        number, prefix = number / 1000, prefix + 1
    letter = _PREFIXES[prefix].upper() if unit.startswith("B") else _PREFIXES[prefix]
    return f"{_three_digits(number)} {letter}{unit}"


def rate(tokens_per_s: float) -> str:
    """`12.5 tokens/s`, `1 500 tokens/s`."""
    return f"{amount(tokens_per_s)} tokens/s"


def amount(value: float) -> str:
    """A number with as many digits as are worth reading, thousands apart."""
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else _three_digits(value)


def _three_digits(number: float) -> str:
    if number >= 100 or number == int(number):
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}".rstrip("0").rstrip(".")


def seconds(value: float) -> str:
    """`0.3 ms`, `12 ms`, `1.4 s`, `3 min`."""
    if value < 0.9995:
        return f"{_three_digits(value * 1000)} ms"
    return f"{_three_digits(value)} s" if value < 120 else f"{value / 60:.0f} min"


def percent(share: float) -> str:
    """A share of 1 as whole percents."""
    return f"{100 * share:.0f} %"


def many(count: int, noun: str) -> str:
    """`1 peer`, `3 peers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def span_words(span: Span) -> str:
    """The layers as people count them, both ends included: `0-9`."""
    return f"{span.start}-{span.stop - 1}" if len(span) > 1 else f"{span.start}"
