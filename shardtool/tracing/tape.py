"""The tape: everything that an engine's code does to memory on the meta device, as one log.

A meta tensor has a storage, an offset, a shape and strides but no bytes. The code of a loader runs on such tensors as
it would on real ones; its slices, transposes and chunks are views, so every write says exactly which elements it
fills, and with what. A write is::

    copy      the elements of another view: copy_, clone, a change of dtype
    fill      one value
    data      a tensor that exists: a literal of the code, or one that it made on the CPU
    unknown   random numbers: what is there differs from run to run
    ...       any other operation by its name, with its arguments

Values that the code reads while it runs (``item``, ``tolist``, a copy to the CPU) are asked of ``value``, which finds
them in the log. Nothing else is computed here: a checkpoint of 90,000 tensors is that many copies for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from shardtool.errors import UnsupportedModel

META = torch.device("meta")


class Refused(UnsupportedModel):
    """The engine does something to a tensor that a layout cannot say."""


class DependsOnSource(Refused):
    """A value was asked for that only the checkpoint's bytes can give."""

    def __init__(self, source: str) -> None:
        super().__init__(f"the engine reads values of the source tensor {source!r}, which tracing does not have")
        self.source = source


class Ref(NamedTuple):
    """A view: which elements of which storage, counted in elements of ``dtype``."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Write(NamedTuple):
    """One entry of the log: ``out`` was written at ``time``. The tensors among the arguments are ``Ref``, or real."""

    time: int
    out: Ref
    op: str
    args: tuple[Any, ...] = ()
    call: tuple[Any, dict[str, Any], int] | None = None  # the operation itself, its keywords, which of its results


class Log:
    """All writes by storage, in order, and the storages that are source tensors."""

    def __init__(self) -> None:
        self.time = 0
        self.writes: dict[int, list[Write]] = {}
        self.sources: dict[int, tuple[str, torch.dtype]] = {}
        self.sizes: dict[int, int] = {}  # bytes of each storage
        self._alive: dict[int, torch.UntypedStorage] = {}  # a storage that is freed could lend its address to another

    def ref(self, tensor: torch.Tensor) -> Ref:
        """The view that a meta tensor is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage
            self.sizes[key] = storage.nbytes()
        return Ref(key, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def real(self, tensor: torch.Tensor) -> Ref:
        """The view that a tensor with values is: its storage becomes one that holds them."""
        ref = self.ref(tensor)
        if ref.storage not in self.writes:
            values = torch.empty(0, dtype=tensor.dtype).set_(self._alive[ref.storage])
            self.write(Ref(ref.storage, 0, tuple(values.shape), values.stride(), values.dtype), "data", (values,))
        return ref

    def source(self, name: str, tensor: torch.Tensor) -> None:
        """Declare a fresh contiguous meta tensor to be the source tensor ``name``."""
        self.sources[self.ref(tensor).storage] = name, tensor.dtype

    def write(
        self,
        out: Ref,
        op: str,
        args: tuple[Any, ...] = (),
        call: tuple[Any, dict[str, Any], int] | None = None,
    ) -> None:
        """Add an entry."""
        self.time += 1
        self.writes.setdefault(out.storage, []).append(Write(self.time, out, op, args, call))


_EMPTY = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros", "zero_"})
_ONES = frozenset({"ones", "ones_like", "new_ones"})
_COPIES = frozenset({"copy_", "clone", "_to_copy", "lift_fresh_copy"})
_READS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"})
_ALIASES = frozenset({"_unsafe_view", "_reshape_alias", "lift_fresh"})  # views whose schema does not say so
# What stands where in the arguments of a fill: fill_(self, value), full(size, value), new_full(self, size, value).
_VALUE_AT = {"fill_": 1, "full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}


def _kind(op: Any) -> tuple[str, str]:
    """(kind, name) of an operation."""
    name = op._schema.name.rpartition("::")[2]
    if name == "set_":  # from now on the tensor looks at another storage
        return "view", name
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    if name in _READS:
        return "read", name
    if not writes and (name in _ALIASES or any(r.alias_info is not None for r in op._schema.returns)):
        return "view", name
    if torch.Tag.nondeterministic_seeded in op.tags:
        return "unknown", name
    if name in _EMPTY:
        return "empty", name
    if name in _ZEROS or name in _ONES or name in _VALUE_AT:
        return "fill", name
    return ("copy" if name in _COPIES else "other"), name


class Tape(TorchDispatchMode):
    """Records into ``log``. ``value`` gives the real content of a view, as the log now says it.

    It raises ``DependsOnSource`` where a source tensor takes part.
    """

    def __init__(self, log: Log, value: Callable[[Ref], torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log
        self._value = value
        self._kinds: dict[Any, tuple[str, str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper against it costs as much as the rest

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation and record what it wrote."""
        kwargs = kwargs or {}
        found = self._kinds.get(op)
        if found is None:
            found = self._kinds[op] = _kind(op)
        kind, name = found
        if kind in ("view", "empty"):
            return op(*args, **kwargs)
        if name == "copy_" and (args[0].is_meta or args[1].is_meta):
            return self._copy(args[0], args[1])
        if not (kwargs.get("device") == META or any(map(_is_meta, _tensors(args, kwargs)))):
            return op(*args, **kwargs)
        if kind == "copy":
            return self._fresh_copy(op, args, kwargs)
        if kind == "read":
            return self._read(op, args, kwargs)
        out = op(*self._on_meta(name, args), **kwargs)
        for i, written in enumerate(self._written(op, args, kwargs, out)):
            if kind == "fill":
                self._fill(written, name, args)
            elif kind == "unknown":
                self._log.write(written, "unknown")
            elif kind == "other":
                self._log.write(written, name, self._kept(args), (op, self._kept(kwargs), i))
        return out

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """``copy_``: the one operation that there are very many of."""
        log = self._log
        if not target.is_meta:
            real = self.real(source)
            with _disable_current_modes():
                return target.copy_(real)
        if target.shape != source.shape:
            source.expand(target.shape)  # raises as the copy would
        if source.is_meta:
            log.write(log.ref(target), "copy", (log.ref(source),))
        else:
            log.write(log.ref(target), "data", (source.detach().clone(),))
        return target

    def _fresh_copy(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``clone`` and ``to``. A copy to the CPU of what only the checkpoint knows stays on the meta device."""
        source, device = args[0], kwargs.get("device")
        if device is not None and torch.device(device).type != "meta" and _is_meta(source):
            try:
                real = self.real(source)
            except DependsOnSource:
                kwargs = {**kwargs, "device": META, "non_blocking": False}
            else:
                with _disable_current_modes():
                    made: torch.Tensor = op(real, *args[1:], **kwargs)
                    return made
        kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
        out: torch.Tensor = op(*args, **kwargs)
        if _is_meta(source):
            self._log.write(self._log.ref(out), "copy", (self._log.ref(source),))
        else:
            self._log.write(self._log.ref(out), "data", (source.detach().clone(),))
        return out

    def _read(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation whose result needs values now."""
        with _disable_current_modes():
            real_args, real_kwargs = tree_map(
                lambda x: self.real(x) if isinstance(x, torch.Tensor) else x, (args, kwargs)
            )
            out = op(*real_args, **real_kwargs)
            if not any(isinstance(x, torch.Tensor) for x in tree_leaves(out)):
                return out
            return tree_map(lambda x: self._twin(x) if isinstance(x, torch.Tensor) else x, out)

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its values. Raises ``DependsOnSource``."""
        if not _is_meta(tensor):
            return tensor
        with _disable_current_modes():
            return self._value(self._log.ref(tensor))

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A meta tensor whose content is this real one."""
        twin = torch.empty_like(tensor, device=META)
        self._log.write(self._log.ref(twin), "data", (tensor,))
        return twin

    def _fill(self, out: Ref, name: str, args: tuple[Any, ...]) -> None:
        value = 0 if name in _ZEROS else 1 if name in _ONES else args[_VALUE_AT[name]]
        if not isinstance(value, torch.Tensor):
            self._log.write(out, "fill", (value,))
        elif _is_meta(value):
            self._log.write(out, "copy", (self._log.ref(value),))
        else:
            self._log.write(out, "data", (value.detach().clone(),))

    def _on_meta(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with real tensors made meta, since an operation does not take both."""
        real = any(not _is_meta(x) for x in _tensors(args))
        if name.startswith("index") or not real:
            return args

        def meta(value: Any) -> Any:
            twin = isinstance(value, torch.Tensor) and not _is_meta(value) and value.ndim
            return torch.empty_like(value, device=META) if twin else value

        moved: tuple[Any, ...] = tree_map(meta, args)
        return moved

    def _kept(self, values: Any) -> Any:
        """Arguments as the log keeps them."""
        return tree_map(
            lambda x: x if not isinstance(x, torch.Tensor) else self._log.ref(x) if _is_meta(x) else x.detach().clone(),
            values,
        )

    def _written(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Ref]:
        """The views that an operation has written: arguments that it changes, or else its fresh results."""
        changed: list[torch.Tensor] = []
        for i, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                changed += [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
        if changed:
            return [self._log.ref(x) for x in changed if _is_meta(x)]
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and _is_meta(x)]
        return [self._log.ref(x) for x in results]


class Literals(TorchFunctionMode):
    """What the code of a constructor does before an operation sees it.

    Literals, ``torch.tensor(1.0)``, would lose their value on the meta device: they are made on the CPU and moved, and
    the move is recorded with them. New tensors that ask for another device go to the meta device like the rest. Values
    that leave torch some other way than through an operation (``numpy``) are asked of the tape.
    """

    _MADE = (torch.tensor, torch.as_tensor, torch.asarray)
    _NEW = frozenset(
        {torch.empty, torch.empty_like, torch.empty_strided, torch.full, torch.full_like, torch.ones, torch.ones_like}
        | {torch.zeros, torch.zeros_like, torch.arange, torch.eye, torch.linspace, torch.rand, torch.randn}
    )
    _LEAVE = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if func in self._MADE and not (args and isinstance(args[0], torch.Tensor)):
            device = kwargs.get("device")
            if device is None or torch.device(device).type == "meta":
                return func(*args, **{**kwargs, "device": "cpu"}).to(META)
        if func in self._NEW and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": META, "pin_memory": False})
        if func in self._LEAVE:
            return func(self._tape.real(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _is_meta(value: object) -> bool:
    return getattr(value, "is_meta", False) is True


def _tensors(*values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments; most operations have them at the top."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())
