"""What ``--model-loader-extra-config`` may say to the load format ``shardtool``, and what the environment says else.

::

    {"uri": "s3://bucket/llama-tp4", "concurrency": 16, "memory_limit": 5368709120, "pattern": "...",
     "distributed": true, "verify": true}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardtool import settings
from shardtool.errors import UsageError

FLAG = "--model-loader-extra-config"


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is loaded. What is None or left out is as in ``shardtool.stream``.

    ``uri``: where the weights lie, if not where the model does. ``memory_limit``: bytes; -1 is no limit, 0 the least.
    """

    uri: str | None = None
    concurrency: int | None = None
    memory_limit: int | str | None = None
    pattern: str | None = None
    distributed: bool | str = "auto"
    verify: bool = True


def options(extra: object) -> Options:
    """The options of an extra config. Raises ``UsageError`` for keys that there are not, and for bad values.

    ``SHARDTOOL_MEMORY_LIMIT``, ``SHARDTOOL_CONCURRENCY`` and ``SHARDTOOL_DISTRIBUTED``, or their twins of Run:ai, say
    what the config does not.
    """
    if extra is None:
        extra = {}
    if not isinstance(extra, Mapping):
        raise UsageError(f"{FLAG} {extra!r:.60} is not a JSON object; write for example '{{\"concurrency\": 16}}'")
    known = ", ".join(sorted(_READ))
    for key in extra:
        if key not in _READ:
            raise UsageError(f"{FLAG} has the key {key!r:.60}, which the load format shardtool does not know: {known}")
    given = {key: _READ[key](value, key) for key, value in extra.items()}
    given.setdefault("memory_limit", settings.memory_limit(None))
    given.setdefault("concurrency", settings.concurrency(None))
    said = settings.distributed(None)
    given.setdefault("distributed", "auto" if said is None else said)
    return Options(**given)


def _bad(key: str, value: object, wanted: str) -> UsageError:
    return UsageError(f'{FLAG}: "{key}" is {value!r:.60}, which is not {wanted}')


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _bad(key, value, "a text")
    return value


def _truth(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(key, value, "true or false")
    return value


def _readers(value: object, key: str) -> int:
    if type(value) is not int or not 1 <= value <= settings.MOST_READERS:
        raise _bad(key, value, f"a number of readers from 1 to {settings.MOST_READERS}")
    return value


def _limit(value: object, key: str) -> int | None:
    """Bytes as Run:ai takes them, or a text such as ``5GiB``."""
    if type(value) is int and -1 <= value < 1 << 62:
        return value
    if isinstance(value, str) and value.strip():
        try:
            return settings.memory_limit(value)
        except UsageError:
            pass
    raise _bad(key, value, "a number of bytes or a size such as 5GiB; -1 is no limit and 0 the least")


def _distributed(value: object, key: str) -> bool | str:
    if value == "auto" or isinstance(value, bool):
        return value
    raise _bad(key, value, 'true, false or "auto"')


_READ: Mapping[str, Callable[[object, str], Any]] = {
    "concurrency": _readers,
    "distributed": _distributed,
    "memory_limit": _limit,
    "pattern": _text,
    "uri": _text,
    "verify": _truth,
}
