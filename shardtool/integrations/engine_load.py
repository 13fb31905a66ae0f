"""A checkpoint into the model of one of an engine's ranks, before the engine changes its tensors for a kernel.

Three ways, of which the first that fits is taken; all ranks that exchange what they read take the same::

    own     the rank's own files hold just what its model holds: straight into its parameters
    cut     ranges of files that were cut otherwise, by the recorded layout or by the table of this engine
    fed     whole tensors to the model's own ``load_weights``: of a Hugging Face checkpoint, and of shards whose
            names no layout at hand has

What fits is known before a byte is read: names, shapes and dtypes are those of the state dict that the engine's
``ShardedStateLoader`` fills. Nothing here needs an engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from shardtool import settings
from shardtool.checked import Checked
from shardtool.checkpoint import Checkpoint, open_checkpoint, with_headers
from shardtool.errors import (
    NotFound,
    PlanError,
    ShardtoolError,
    TensorMismatch,
    UnsupportedModel,
    UnsupportedTransform,
    UsageError,
)
from shardtool.exchange import Exchange, exchange_for, heard
from shardtool.integrations.engine_checks import Entry, Marks, difference, unfilled
from shardtool.integrations.engine_options import Options
from shardtool.ops import source as sources
from shardtool.ops.bring import Slices
from shardtool.ops.layout import Choice
from shardtool.ops.load import exhaust, fill, handed
from shardtool.ops.rank import items
from shardtool.ops.slices import plan, whole
from shardtool.ops.source import Source
from shardtool.ops.together import together
from shardtool.parallel import Parallel
from shardtool.stores.counting import CountingStore
from shardtool.tracing.aliases import of_model
from shardtool.units import show_size

WAYS = {
    "own": "the rank's own files",
    "cut": "ranges of files that were cut otherwise",
    "fed": "whole tensors, cut by the model itself",
}
Progress = Callable[[int, int], None]
Take = Callable[[Any], Any]
"""How a model takes ``(name, tensor)``: it may return the names of what it filled."""
INFERRED = "vllm"
"""The engine whose shards those without a manifest are taken for, where their sizes are others."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine that runs. ``name``: as layouts have it; ``title``: as people do; ``version``: as it says itself.

    ``parts``: how many parts of a version its layouts depend on. ``tells``: whether its models say what they loaded.
    """

    name: str
    title: str
    version: str
    parts: int = 2
    tells: bool = True

    def __str__(self) -> str:
        return f"{self.title} {self.version}"

    def generation(self, version: str) -> str:
        """The part of a version that its layouts depend on, for example ``0.32`` of ``0.32.1``."""
        return ".".join(version.split(".")[: self.parts])

    @property
    def builtin(self) -> Choice:
        """The built-in table of this version."""
        return Choice(f"{self.name}:builtin", self.generation(self.version))


@dataclass(frozen=True, slots=True)
class Rank:
    """One of an engine's ranks: the sizes of its groups, and its number in them."""

    parallel: Parallel
    number: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a load did. ``way``: own, cut or fed; ``why``: what a nearer way did not fit for.

    ``nbytes``: of the model's tensors; ``read``: bytes that this rank read from storage after it had opened it.
    """

    uri: str
    rank: Rank
    way: str
    why: str
    tensors: int
    nbytes: int
    read: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank.number} of {self.rank.parallel}: {self.tensors} tensors ({show_size(self.nbytes)}) of "
            f"{self.uri} in {self.seconds:.2f} s: {WAYS[self.way]}, {show_size(self.read)} read"
        )


def impossible(checkpoint: Checkpoint, rank: Rank, engine: Engine) -> PlanError | None:
    """Why a checkpoint's model cannot be cut for ranks of these sizes, if the layouts at hand tell a reason."""
    choice = engine.builtin if checkpoint.kind == "huggingface" else _first(checkpoint, engine)
    try:
        plan(sources.of(checkpoint), rank.parallel, rank.number, choice)
    except (UnsupportedModel, UnsupportedTransform):  # other layouts may
        return None
    except PlanError as error:
        return error
    except ShardtoolError:
        return None
    return None


def _first(checkpoint: Checkpoint, engine: Engine) -> Choice:
    """The layout that shards are cut by, if it can be: the recorded one where it is the engine's own."""
    made = checkpoint.manifest
    return Choice() if engine.name == (INFERRED if made is None else made.layout.get("engine")) else engine.builtin


def load(
    model: torch.nn.Module,
    uri: str | os.PathLike[str],
    rank: Rank,
    options: Options | None = None,
    *,
    engine: Engine,
    quantized: bool = False,
    apart: str = "",
    take: Take | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fill a rank's freshly built model from a checkpoint of any kind. All ranks call it at the same time.

    ``engine``: that which built the model. ``quantized``: whether it has tensors that its checkpoint need not have.
    ``apart``: why no layout says what this rank holds, if so: it takes whole tensors, or its own files as they are
    where nothing is recorded. ``take``: instead of the model's ``load_weights``. ``checkpoint``: the same, where it is
    open already; it is closed at the end.

    Raises ``TensorMismatch`` that names what is missing or foreign, and what ``shardtool.stream`` raises.
    """
    options = options or Options()
    began = time.perf_counter()
    state = of_model({name: one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)})
    device = _device(state)
    exchange = exchange_for(uri, options.distributed, scope=settings.distributed_scope(), device=device)
    with heard(exchange):
        opened = open_checkpoint(uri, shard_pattern=options.pattern) if checkpoint is None else checkpoint
        with CountingStore(opened.store) as store:
            work = _Load(
                model=model,
                state=state,
                rank=rank,
                options=options,
                checkpoint=replace(opened, store=store),
                exchange=exchange,
                device=device,
                engine=engine,
                quantized=quantized,
                apart=apart,
                take=take,
                progress=progress,
            )
            way, why = work.run()
    return Report(
        uri=opened.uri,
        rank=rank,
        way=way,
        why=why,
        tensors=len(state),
        nbytes=sum(tensor.nbytes for tensor in state.values()),
        read=store.bytes_read,
        seconds=time.perf_counter() - began,
    )


def _device(state: Mapping[str, torch.Tensor]) -> str:
    """Where tensors are brought to: the model's own device, if shardtool reads to it."""
    found = {str(tensor.device) for tensor in state.values()}
    return found.pop() if len(found) == 1 and next(iter(found)).startswith("cuda") else "cpu"


Do = Callable[[], None]


@dataclass(frozen=True)
class _Load:
    """A load under way."""

    model: torch.nn.Module
    state: Mapping[str, torch.Tensor]
    rank: Rank
    options: Options
    checkpoint: Checkpoint
    exchange: Exchange | None
    device: str
    engine: Engine
    quantized: bool
    apart: str
    take: Take | None
    progress: Progress | None

    def run(self) -> tuple[str, str]:
        """Take the first way that fits all ranks. -> (way, why no nearer one did)."""
        ways = list(self._ways())
        reasons: list[ShardtoolError] = [UsageError(self._apart)] if self._apart else []
        chosen, do = len(ways), None
        for number, (_, prepare) in enumerate(ways):
            do = self._fits(prepare, reasons)
            if do is not None:
                chosen = number
                break
        if self.exchange is not None:
            farthest = max(map(int, self.exchange.told(str(chosen))))
            if chosen < farthest < len(ways):  # another rank's tensors do not fit so
                chosen, do = farthest, self._fits(ways[farthest][1], reasons)
        if do is None:
            raise reasons[0]
        try:
            do()
        except TensorMismatch as error:
            if reasons and ways[chosen][0] == "fed":  # the last resort: what differs was known before
                raise reasons[0] from error
            raise
        return ways[chosen][0], str(reasons[0]) if reasons else ""

    @staticmethod
    def _fits(prepare: Callable[[], Do], reasons: list[ShardtoolError]) -> Do | None:
        """What is to be done, or None and the reason."""
        try:
            return prepare()
        except (UsageError, TensorMismatch) as error:  # PlanError is a UsageError
            reasons.append(error)
            return None

    def _ways(self) -> Iterator[tuple[str, Callable[[], Do]]]:
        """The ways that are open to this kind of checkpoint, the nearest first."""
        made = self.checkpoint.manifest
        if self.checkpoint.kind == "huggingface":
            yield "fed", self._feeding_all
            return
        first, builtin = _first(self.checkpoint, self.engine), self.engine.builtin
        if not self._apart:
            near = first == Choice() or made is None  # cut by this engine, whichever version
            yield ("own", self._owning) if near and self._same else ("cut", partial(self._cutting, first))
            recorded = "" if made is None else str(made.layout.get("engine_version"))
            if made is not None and near and self.engine.generation(recorded) != builtin.engine_version:
                yield "cut", partial(self._cutting, builtin)
        if made is not None:
            yield "fed", self._feeding_whole

    @cached_property
    def _same(self) -> bool:
        """Whether shards are for ranks of these sizes."""
        made = self.checkpoint.manifest
        if made is not None:
            return made.parallel == self.rank.parallel
        ranks, stages = len(self.checkpoint.ranks), self.checkpoint.stages
        return (ranks, stages) == (len(self.rank.parallel.ranks), self.rank.parallel.pp)

    @cached_property
    def _apart(self) -> str:
        """Why no layout says what this rank holds of shards, if so. A rank's own that nobody recorded it may try."""
        own = self.checkpoint.manifest is None and self._same
        return "" if own or self.checkpoint.kind == "huggingface" else self.apart

    # The rank's own files.

    def _owning(self) -> Do:
        made, number = self.checkpoint.manifest, self.rank.number
        if made is not None:
            self._check((tensor.name, tensor.dtype, tensor.shape) for tensor in made.recipe.tensors(number))
        opened = with_headers(self.checkpoint, [number])
        found = items(opened, number, verify=self.options.verify)
        if made is None:
            self._check((item.name, item.entry.dtype, item.entry.shape) for item in found)

        def do() -> None:
            if self.exchange is not None:
                self.exchange.close()
            fill(
                opened,
                found,
                self.state,
                memory_limit=self.options.memory_limit,
                concurrency=self.options.concurrency,
                progress=self.progress,
            )

        return do

    def _check(self, entries: Iterable[Entry]) -> None:
        """Refuse tensors that are not just those of the model."""
        if holes := [name for name, tensor in self.state.items() if tensor.is_meta]:
            raise TensorMismatch(f"the engine makes {holes[0]!r} itself from whole tensors")
        if said := difference(entries, self.state):
            made = self.checkpoint.manifest
            by = f", made for {made.layout.get('engine')} {made.layout.get('engine_version')}" if made else ""
            raise TensorMismatch(
                f"{self.checkpoint.uri}{by}: the tensors of rank {self.rank.number} of {self.rank.parallel} are not "
                f"those of {type(self.model).__name__} in {self.engine}: {said}"
            )

    # Ranges of files that were cut otherwise.

    @cached_property
    def _source(self) -> tuple[Source, Checked | None]:
        return sources.checked(self.checkpoint, verify=self.options.verify)

    def _cutting(self, choice: Choice) -> Do:
        source, watch = self._source
        found = replace(plan(source, self.rank.parallel, self.rank.number, choice), checked=watch)
        self._check(found.entries())
        return partial(self._bring, found)

    def _bring(self, found: Slices) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors(found):
                self.state[name].copy_(tensor)
                del tensor

    def _tensors(self, found: Slices) -> Iterator[tuple[str, torch.Tensor]]:
        """What is brought to this rank, read by itself or together with others."""
        exchange = self.exchange
        if exchange is not None:
            numbers = exchange.told(str(self.rank.number))
            if len(set(numbers)) < len(numbers):  # data parallel replicas: each reads its own
                exchange.close()
                exchange = None
        take = found.tensors if exchange is None else partial(together, found, exchange)
        return take(
            device=self.device,
            memory_limit=self.options.memory_limit,
            concurrency=self.options.concurrency,
            progress=self.progress,
        )

    # Whole tensors.

    def _take(self) -> Take:
        """The model's own way to take tensors. Raises ``UsageError`` where it has none."""
        take = self.take or getattr(self.model, "load_weights", None)
        if take is None:
            raise UsageError(
                f"{type(self.model).__name__} of {self.engine} takes no whole tensors: save shards for its sizes"
            )
        return take

    def _feeding_whole(self) -> Do:
        self._take()
        source, watch = self._source
        found = replace(whole(source, self.rank.parallel, self.rank.number), checked=watch)
        return lambda: self._feed(self._tensors(found))

    def _feeding_all(self) -> Do:
        if others := tuple(getattr(self.model, "secondary_weights", ())):
            where = getattr(others[0], "model_or_path", others[0])
            raise UsageError(
                f"{type(self.model).__name__} takes weights of {where!r:.100} besides, which the load format shardtool "
                f"does not; use --load-format auto"
            )
        self._take()
        found = items(self.checkpoint, None, verify=self.options.verify)
        if not found:
            raise NotFound(f"{self.checkpoint.uri} has no tensors")

        def do() -> None:
            self._feed(
                handed(
                    self.checkpoint,
                    found,
                    self.device,
                    memory_limit=self.options.memory_limit,
                    concurrency=self.options.concurrency,
                    exchange=self.exchange,
                    progress=self.progress,
                )
            )

        return do

    def _feed(self, tensors: Any) -> None:
        """Let the model take tensors in its own way, and see that it has got all of its own."""
        what = type(self.model).__name__
        marks = None if self.quantized or self.engine.tells else Marks(self.model)
        try:
            loaded = self._take()(tensors)
            exhaust(tensors)  # a model may stop early, and other ranks wait for what this one has read
        except (ShardtoolError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = (str(error).strip() or "it does not say why").partition("\n")[0]
            wrong = TensorMismatch(
                f"{what} of {self.engine} does not take the tensors of {self.checkpoint.uri}: "
                f"{type(error).__name__}: {said[:500]}"
            )
            with suppress(BaseException):
                tensors.throw(wrong)  # ends the reading, and tells the other ranks why
            raise wrong from error
        left: list[str] = []
        if marks is not None:
            left = marks.left()
        elif loaded is not None and not self.quantized:
            left = unfilled(self.model, loaded)
        if left:
            raise TensorMismatch(
                f"{self.checkpoint.uri} has nothing for {left[0]!r} of {what} in {self.engine}"
                f"{f' and {len(left) - 1} more of its parameters' if len(left) > 1 else ''}"
            )
