"""Bytes made wrong: the mutator that both targets use.

Lives here: `mutate`, which changes bytes as networks, firmware and attackers do. Rules: all chance
comes from the `Random` handed in; what is returned has at most `max_bytes`. Must not come in: what
the bytes mean; a caller that knows hands in `tokens`, pieces worth inserting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

__all__ = ["mutate"]

_INTERESTING = (0x00, 0x01, 0x7F, 0x80, 0xBF, 0xC0, 0xC2, 0xED, 0xF4, 0xF5, 0xFE, 0xFF)


def mutate(
    data: bytes,
    draw: random.Random,
    *,
    tokens: Sequence[bytes],
    other: Callable[[], bytes],
    max_bytes: int = 1 << 16,
) -> bytes:
    """Return `data` with one to a few changes.

    Args:
        data: right bytes.
        draw: source of chance.
        tokens: pieces worth inserting.
        other: makes bytes of another input, to splice with.
        max_bytes: of the result.
    """
    made = bytearray(data)
    for _ in range(1 if draw.random() < 0.6 else draw.randint(2, 5)):
        _change(made, draw, tokens, other)
    return bytes(made[:max_bytes])


def _change(  # noqa: C901 - a table of ways
    made: bytearray,
    draw: random.Random,
    tokens: Sequence[bytes],
    other: Callable[[], bytes],
) -> None:
    size = len(made)
    way = draw.randrange(11)
    at = draw.randrange(size + 1)
    if not size or way == 0:  # something that means something
        made[at:at] = draw.choice(tokens)
    elif way == 1:  # a bit
        made[at % size] ^= 1 << draw.randrange(8)
    elif way == 2:  # a byte
        made[at % size] = draw.randrange(256)
    elif way == 3:
        made[at % size] = draw.choice(_INTERESTING)
    elif way == 4:  # off by one
        made[at % size] = (made[at % size] + draw.choice((1, 255))) % 256
    elif way == 5:  # a piece less
        del made[at : at + draw.randint(1, 1 + min(16, size))]
    elif way == 6:  # a piece twice, or many times
        piece = bytes(made[at : at + draw.randint(1, 8)])
        made[at:at] = piece * draw.choice((1, 1, 2, 40))
    elif way == 7:  # the end is missing
        del made[at:]
    elif way == 8:  # random bytes
        made[at:at] = draw.randbytes(draw.randint(1, 8))
    elif way == 9:  # the beginning of one and the end of another
        tail = other()
        made[at:] = tail[draw.randrange(len(tail) + 1) :]
    else:  # a piece replaced
        token = draw.choice(tokens)
        made[at : at + draw.randint(1, 1 + len(token))] = token
