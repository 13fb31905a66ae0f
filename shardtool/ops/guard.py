"""The input of a conversion, whose digests are checked: on the way, or before where that is not possible.

On the way every byte is read once. It takes memory for the chunks of which only a part is wanted at a time, and cannot
be where something has to be removed from the output first: damage would be found too late for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardtool.checked import Checked
from shardtool.checkpoint import open_checkpoint
from shardtool.ops import source as sources
from shardtool.ops.job import Means
from shardtool.ops.limits import Reading, readers
from shardtool.ops.source import Source
from shardtool.ops.verify import check_input
from shardtool.stores import Address

FEWEST = 4
"""Threads that must be able to read with what checking leaves of the memory, or it is done before."""


@dataclass(slots=True)
class Guard:
    """How an input is checked. ``watch``: the store of ``source`` that checks what is read; None if nothing does."""

    source: Source
    watch: Checked | None
    before: bool = False

    def expect(self, how: Reading, concurrency: int | None) -> bool:
        """Whether the memory is enough for checking on the way; if not it will be done before."""
        if self.watch is None or self.before:
            return True
        if how.held and how.threads >= min(FEWEST, readers(concurrency)):
            return True
        self.first()
        return False

    def first(self) -> None:
        """Check before anything is written, and not on the way."""
        self.before = True
        if self.watch is not None:
            self.watch.rest()

    def check(self, means: Means) -> None:
        """What has to be checked before anything is written. Raises ``ChecksumMismatch`` or ``Incomplete``."""
        if self.watch is not None:
            check_input(replace(self.source, store=self.watch.inner), means, digests=self.before)

    def finish(self, how: Reading) -> None:
        """Check what the conversion did not need, such as another rank's copy of a tensor that all of them have."""
        if self.watch is not None and not self.before:
            self.watch.finish(how.threads)


def guarded(uri: Address, shard_pattern: str | None, *, verify: bool) -> Guard:
    """Open what is to be converted. Without ``verify`` nothing is checked but what opening it does."""
    checkpoint = open_checkpoint(uri, shard_pattern=shard_pattern)
    with checkpoint.store.closed_on_failure():
        source, watch = sources.checked(checkpoint, verify=verify)
        return Guard(source, watch)
