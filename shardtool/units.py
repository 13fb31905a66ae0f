"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

from shardtool.errors import UsageError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)

_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_TIME = re.compile(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([smhdw]?)\s*", re.IGNORECASE)


def parse_size(text: str | int, flag: str) -> int:
    """Bytes of ``5GiB``, ``64MiB``, ``5GB`` or a plain number. Raises ``UsageError`` that names the flag."""
    if type(text) is int:
        return text
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if not found:
        raise UsageError(f"{flag} {text!r} is not a size; write for example 64MiB, 5GiB or a number of bytes")
    unit = _UNITS[(found[2] or "").lower()]
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def show_size(n: float) -> str:
    """A number of bytes with a binary unit: ``3.2 GiB``."""
    if abs(n) < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n /= 1024
        if abs(n) < 1023.95:  # what is shown as 1024.0 is one of the next unit
            return f"{n:.1f} {unit}"
    return f"{n / 1024:.1f} TiB"


def parse_duration(text: str | int | float, flag: str) -> float:
    """Seconds of ``30m``, ``12h``, ``2d`` or a plain number. Raises ``UsageError`` that names the flag."""
    found = _TIME.fullmatch(str(text)) if type(text) in (str, int, float) else None
    if not found:
        raise UsageError(f"{flag} {text!r} is not a time; write for example 30m, 12h, 2d or a number of seconds")
    return float(found[1]) * _TIMES[found[2].lower()]


def show_duration(seconds: float) -> str:
    """A time in the largest unit that it has one of: ``90 s``, ``36 min``, ``5 h``, ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
