"""How many ranks share a model, and how: the sizes of the groups, and which layers a pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardtool.errors import PlanError, UsageError

MOST_RANKS = 1024


@dataclass(frozen=True, slots=True)
class Parallel:
    """The sizes of the groups. A rank is ``pp_rank * tp + tp_rank``.

    ``ep``: whole experts on each tensor parallel rank, instead of a slice of every expert. ``partition``: the layers of
    each stage, where they are not divided as engines do by themselves.
    """

    tp: int
    pp: int = 1
    ep: bool = False
    partition: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for flag, size in (("--tp", self.tp), ("--pp", self.pp)):
            if type(size) is not int or not 1 <= size <= MOST_RANKS:
                raise UsageError(f"{flag} {size!r} is not a number of ranks from 1 to {MOST_RANKS}")
        if self.tp * self.pp > MOST_RANKS:
            raise UsageError(f"--tp {self.tp} times --pp {self.pp} is more than {MOST_RANKS} ranks")
        if self.partition is not None and (
            len(self.partition) != self.pp or any(type(n) is not int or n < 0 for n in self.partition)
        ):
            said = ",".join(map(str, self.partition))
            raise UsageError(f"the layer partition {said} does not name a number of layers for each of --pp {self.pp}")

    @property
    def ranks(self) -> range:
        """Every rank."""
        return range(self.tp * self.pp)

    def place(self, rank: int) -> tuple[int, int]:
        """(tp rank, pp rank) of a rank."""
        return rank % self.tp, rank // self.tp

    def stages(self, layers: int) -> tuple[range, ...]:
        """The layers of each stage, as vLLM divides them (``distributed/utils.py``, ``get_pp_indices``).

        Layers that do not divide go to the stages before the last, from the back.
        """
        sizes = [layers // self.pp] * self.pp if self.partition is None else list(self.partition)
        if self.partition is None:
            for i in range(layers % self.pp):
                sizes[-2 - i] += 1
        elif sum(sizes) != layers:
            raise PlanError(f"the layer partition {','.join(map(str, sizes))} is not the {layers} layers of the model")
        found, first = [], 0
        for size in sizes:
            found.append(range(first, first + size))
            first += size
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """As manifests and layout files keep it."""
        partition = {} if self.partition is None else {"partition": list(self.partition)}
        return {"tp": self.tp, "pp": self.pp, "ep": self.ep, **partition}

    def __str__(self) -> str:
        """As people name it: ``tp 4``, ``tp 4 pp 2 with expert parallel``."""
        stages = f" pp {self.pp}" if self.pp > 1 else ""
        by_hand = f" ({','.join(map(str, self.partition))} layers)" if self.partition is not None else ""
        return f"tp {self.tp}{stages}{by_hand}{' with expert parallel' if self.ep else ''}"


def from_json(value: dict[str, Any]) -> Parallel:
    """The sizes that such values say. Raises the built-in errors of wrong shapes."""
    partition = value.get("partition")
    if type(value.get("ep", False)) is not bool or not (partition is None or isinstance(partition, list)):
        raise ValueError(f"{value!r:.200} are not sizes of groups")
    try:
        return Parallel(
            value["tp"], value["pp"], value.get("ep", False), None if partition is None else tuple(partition)
        )
    except UsageError as error:
        raise ValueError(str(error)) from None
