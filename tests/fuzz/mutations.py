"""Changes that files meet on their way, and those of someone who means harm: of bytes, of text, of plain data."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from typing import Any

NUMBERS = (
    *(0, -1, 1, 2, 3, 127, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**6, 10**12, 10**30),
    *(0.5, -0.0, 1e-45, 1e38, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "\0",
        "\n",
        "..",
        "../../etc/passwd",
        "/dev/zero",
        "a" * 300,
        "a" * 70_000,
        "\ud800",
        "\u202e",
        "𐀀",
    ),
    *("%s%n", "{x}", "${x}", "NaN", "true", "null", "-1", "9" * 5000, "__class__", "torch.float32", "float8_e4m3fn"),
)
_DEEP = "deep:{}:deep"
"""Stands for lists inside each other until the document is written."""
MARKS = (*"[]{}(),:;=\"'\\|&*!%@`#?<>~-+_./\t\r\n\0 ", "\ufeff", "- ", ": ", "<<: ", "*a", "&a ", "!!int ")


def value(random: random.Random) -> Any:
    """A plain value that nobody expects."""
    makers = (
        lambda: random.choice(NUMBERS),
        lambda: random.choice(TEXTS),
        lambda: random.choice((None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"a": {}}})),
        lambda: [random.choice(NUMBERS)] * random.choice((1, 3, 5000)),
        lambda: {str(n): n for n in range(random.choice((1, 3, 5000)))},
        lambda: _DEEP.format(random.choice((5, 29, 99, 101, 3000, 100_000))),
    )
    return random.choice(makers)()


def plain(form: Any, random: random.Random) -> Any:
    """A copy of plain data with one to three entries replaced, left out, added or swapped."""
    changed = copy.deepcopy(form)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return value(random)
        holder, key = random.choice(places)
        match random.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random.choice(TEXTS)] = value(random)
            case 2:
                holder[key] = random.choice([other[place] for other, place in places])
                changed = copy.deepcopy(changed) if _is_tree(changed) else value(random)
            case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = random.choice((-1, 2, 10, 1000, 10**9)) * holder[key]
            case _:
                holder[key] = value(random)
    return changed


def _places(form: Any) -> Any:
    for key in list(form) if isinstance(form, dict) else range(len(form)) if isinstance(form, list) else ():
        yield form, key
        yield from _places(form[key])


def _is_tree(form: Any) -> bool:
    try:
        json.dumps(form)
    except ValueError:
        return False
    return True


def document(form: Any, random: random.Random) -> bytes:
    """A JSON document of changed plain data, sometimes with its bytes changed too."""
    data = dumps(plain(form, random))
    match random.randrange(8):
        case 0:
            return bytes_(data, random)
        case 1:
            return text(data.decode(errors="replace"), random).encode("utf-8", "surrogatepass")
        case 2:
            return random.choice((b"\xef\xbb\xbf", b"\0", b"[" * 5000, b'{"a": 1, ')) + data
        case 3 if data.startswith(b"{"):
            first = data[1:].split(b",")[0].rstrip(b"}")
            return b"{" + first + b"," + data[1:] if first else data
        case _:
            return data


def dumps(form: Any) -> bytes:
    """JSON as Python writes it, however odd."""
    return re.sub(rb'"deep:(\d+):deep"', lambda m: b"[" * int(m[1]) + b"]" * int(m[1]), json.dumps(form).encode())


def text(seed: str, random: random.Random) -> str:
    """A text with a few pieces cut, doubled, replaced or put in."""
    for _ in range(random.choice((1, 1, 2, 4))):
        first, last = sorted(random.choices(range(len(seed) + 1), k=2))
        last = min(last, first + random.choice((0, 1, 3, 20, 400)))
        seed = seed[:first] + _filler(seed[first:last], random) + seed[last:]
    return seed


def _filler(piece: str, random: random.Random) -> str:
    match random.randrange(6):
        case 0:
            return random.choice(MARKS)
        case 1:
            return random.choice(TEXTS)
        case 2:
            return random.choice(MARKS) * random.choice((2, 50, 3000, 60_000))
        case 3:
            return str(random.choice(NUMBERS))
        case 4:
            return piece * random.choice((2, 5, 500))
        case _:
            return ""


def bytes_(seed: bytes, random: random.Random) -> bytes:
    """Bytes with a few flipped, cut out, put in, or a number written over them."""
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(len(data) + 1)
        match random.randrange(6):
            case 0:
                del data[place:]
            case 1:
                del data[place : place + random.choice((1, 4, 8, 100))]
            case 2:
                data[place:place] = random.randbytes(random.choice((1, 4, 8, 100)))
            case 3:
                number = struct.pack("<Q", random.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)))
                data[place : place + 8] = number
            case 4:
                data[place:place] = data[place : place + random.choice((1, 8, 64))]
            case _ if place < len(data):
                data[place] ^= 1 << random.randrange(8)
    return bytes(data)
