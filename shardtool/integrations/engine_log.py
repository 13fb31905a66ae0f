"""What a loader tells its user: a line for what is refused, what was done, and the progress on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardtool.errors import ShardtoolError
from shardtool.integrations.engine_load import Report


@contextmanager
def refusals(logger: logging.Logger) -> Iterator[None]:
    """What shardtool refuses is a line of its own in the log, beside the trace that the engine writes."""
    try:
        yield
    except ShardtoolError as error:
        logger.error("shardtool: %s", error)
        raise


def said(logger: logging.Logger, report: Report) -> None:
    """What a load did, and why no nearer way was taken where that costs."""
    logger.info("shardtool: %s", report)
    if report.way == "fed" and report.why:
        logger.warning("shardtool: every rank takes whole tensors because %s", report.why)


@contextmanager
def progress(*, first: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Progress on the first rank's terminal, where the engine shows its own."""
    if not first:
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="shardtool", unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
