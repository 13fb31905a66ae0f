"""A checkpoint into the model of one of vLLM's ranks, before the engine changes its tensors for a kernel.

Three ways, of which the first that fits is taken; all ranks that exchange what they read take the same::

    own     the rank's own files hold just what its model holds: straight into its parameters
    cut     ranges of files that were cut otherwise, by the recorded layout or by the table of this vLLM
    fed     whole tensors to the model's own ``load_weights``: of a Hugging Face checkpoint, and of shards whose
            names no layout at hand has

What fits is known before a byte is read: names, shapes and dtypes are those of the state dict that vLLM's
``ShardedStateLoader`` fills. Nothing here needs vLLM.
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
from shardtool.checkpoint import Checkpoint, open_checkpoint, parse_config, with_headers
from shardtool.dtypes import DType
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
from shardtool.integrations.vllm_options import Options
from shardtool.ops import source as sources
from shardtool.ops.bring import Slices
from shardtool.ops.layout import Choice
from shardtool.ops.load import exhaust, fill, handed
from shardtool.ops.rank import items
from shardtool.ops.slices import checked, plan, whole
from shardtool.ops.source import Source
from shardtool.ops.together import together
from shardtool.parallel import Parallel
from shardtool.stores.counting import CountingStore
from shardtool.tracing.aliases import of_model
from shardtool.units import show_size

ENGINE = "vllm"
TIE = "tie_word_embeddings"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "embedding.weight")
HEAD = "lm_head.weight"
WAYS = {
    "own": "the rank's own files",
    "cut": "ranges of files that were cut otherwise",
    "fed": "whole tensors, cut by the model itself",
}
Entry = tuple[str, DType, tuple[int, ...]]
"""Name, dtype and shape."""
Progress = Callable[[int, int], None]


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


def tied(checkpoint: Checkpoint) -> bool | None:
    """Whether a checkpoint has its word embeddings for a head too; None where config.json alone says it.

    An engine that looks for a head in the files of shards finds one in either case.
    """
    if checkpoint.manifest is not None:
        made = checkpoint.manifest
        config = {**parse_config(made.config, f"{checkpoint.uri}: the config in the manifest"), **made.amendments}
        nested = config.get("text_config")
        for place in (config, nested if isinstance(nested, dict) else {}):
            if isinstance(place.get(TIE), bool):
                return bool(place[TIE])
        return None
    if checkpoint.kind == "huggingface":
        return False if any(name.endswith(HEAD) for name in checkpoint.entries()) else None
    names = [checkpoint.entries(rank) for rank in checkpoint.ranks]
    both = any(
        any(name.endswith(HEAD) for name in held) and any(name.endswith(EMBEDDINGS) for name in held) for held in names
    )
    return False if both else None


def impossible(checkpoint: Checkpoint, rank: Rank, engine_version: str) -> PlanError | None:
    """Why a checkpoint's model cannot be cut for ranks of these sizes, if the layouts at hand tell a reason."""
    made = checkpoint.manifest
    ours = made is not None and made.layout.get("engine") == ENGINE
    choice = Choice() if ours or checkpoint.kind == "shards" else Choice("vllm:builtin", _minor(engine_version))
    try:
        plan(sources.of(checkpoint), rank.parallel, rank.number, choice)
    except (UnsupportedModel, UnsupportedTransform):  # other layouts may
        return None
    except PlanError as error:
        return error
    except ShardtoolError:
        return None
    return None


def difference(entries: Iterable[Entry], state: Mapping[str, torch.Tensor]) -> str:
    """What a model lacks of some tensors, and they of it, as a sentence's end; nothing if they are the same."""
    left = dict(state)
    foreign, unlike = [], []
    for name, dtype, shape in entries:
        tensor = left.pop(name, None)
        if tensor is None:
            foreign.append(name)
        elif (dtype.torch(), shape) != (tensor.dtype, tuple(tensor.shape)):
            unlike.append(
                f"{name!r} is {dtype.torch()} {list(shape)} there and {tensor.dtype} {list(tensor.shape)} in the model"
            )
    found = [
        f"{_several(sorted(names))} {what}"
        for names, what in ((list(left), "missing"), (foreign, "foreign to the model"))
        if names
    ]
    if unlike:
        found.append(unlike[0] + (f", and {len(unlike) - 1} more differ" if len(unlike) > 1 else ""))
    return "; ".join(found)


def _several(names: list[str]) -> str:
    """The first of some names, and how many more there are, before what they are."""
    return f"{names[0]!r} and {len(names) - 1} more are" if len(names) > 1 else f"{names[0]!r} is"


def load(
    model: torch.nn.Module,
    uri: str | os.PathLike[str],
    rank: Rank,
    options: Options | None = None,
    *,
    engine_version: str = "",
    quantized: bool = False,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fill a rank's freshly built model from a checkpoint of any kind. All ranks call it at the same time.

    ``engine_version``: of the vLLM that built the model. ``quantized``: whether it has tensors that its checkpoint need
    not have. ``checkpoint``: the same, where it is open already; it is closed at the end.

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
                version=engine_version,
                quantized=quantized,
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


def _minor(version: str) -> str:
    """``0.32`` of ``0.32.1``: what layouts depend on."""
    return ".".join(version.split(".")[:2])


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
    version: str
    quantized: bool
    progress: Progress | None

    def run(self) -> tuple[str, str]:
        """Take the first way that fits all ranks. -> (way, why no nearer one did)."""
        ways = list(self._ways())
        reasons: list[ShardtoolError] = []
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
        if made is None:
            same = len(self.checkpoint.ranks) == len(self.rank.parallel.ranks)
            same = same and self.checkpoint.stages == self.rank.parallel.pp
            yield ("own", self._owning) if same else ("cut", partial(self._cutting, Choice()))
            return
        ours = made.layout.get("engine") == ENGINE
        same = made.parallel == self.rank.parallel
        if ours:
            yield ("own", self._owning) if same else ("cut", partial(self._cutting, Choice()))
        running, recorded = _minor(self.version), _minor(str(made.layout.get("engine_version")))
        if not ours or running != recorded:
            yield "cut", partial(self._cutting, Choice("vllm:builtin", running))
        yield "fed", self._feeding_whole

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
                f"those of {type(self.model).__name__} in vLLM {self.version}: {said}"
            )

    # Ranges of files that were cut otherwise.

    @cached_property
    def _source(self) -> tuple[Source, Checked | None]:
        return checked(self.checkpoint, verify=self.options.verify)

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

    def _take(self) -> Callable[[Any], Any]:
        """The model's own way to take tensors. Raises ``UsageError`` where it has none."""
        take = getattr(self.model, "load_weights", None)
        if take is None:
            raise UsageError(
                f"{type(self.model).__name__} of vLLM {self.version} takes no whole tensors: save shards for its sizes"
            )
        return take  # type: ignore[no-any-return]

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
        try:
            loaded = self._take()(tensors)
            exhaust(tensors)  # a model may stop early, and other ranks wait for what this one has read
        except (ShardtoolError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = (str(error).strip() or "it does not say why").partition("\n")[0]
            wrong = TensorMismatch(
                f"{what} of vLLM {self.version} does not take the tensors of {self.checkpoint.uri}: "
                f"{type(error).__name__}: {said[:500]}"
            )
            with suppress(BaseException):
                tensors.throw(wrong)  # ends the reading, and tells the other ranks why
            raise wrong from error
        if loaded is not None and not self.quantized and (left := unfilled(self.model, loaded)):
            raise TensorMismatch(
                f"{self.checkpoint.uri} has nothing for {left[0]!r} of {what} in vLLM {self.version}"
                f"{f' and {len(left) - 1} more of its parameters' if len(left) > 1 else ''}"
            )


def unfilled(model: torch.nn.Module, loaded: Iterable[str]) -> list[str]:
    """The parameters of which a model has not said that it loaded them, under any of their names."""
    state: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    filled = {state[name].data_ptr() for name in loaded if name in state}
    names = set(loaded)
    return [
        name
        for name, tensor in model.named_parameters()
        if name not in names and tensor.numel() and not tensor.is_meta and tensor.data_ptr() not in filled
    ]
