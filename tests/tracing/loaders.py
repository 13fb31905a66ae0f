"""Loaders at random: lists of actions on a pool of tensors, the same on real tensors and on the meta device.

The pool starts with the source tensors and the parameters; every action adds a tensor to it or writes into one. All the
arithmetic is exact or correctly rounded, so that the order and the layout of elements cannot change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Pool = list[torch.Tensor]


@dataclass(frozen=True)
class Loader:
    """Shapes and dtypes of the sources and of the parameters, and what is done with them."""

    sources: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    parameters: tuple[tuple[tuple[int, ...], torch.dtype, float], ...]
    actions: tuple[tuple[Any, ...], ...]

    def run(self, sources: Pool, device: str) -> Pool:
        """The pool after everything was done."""
        pool = [*sources, *(torch.full(shape, value, dtype=d, device=device) for shape, d, value in self.parameters)]
        for action in self.actions:
            act(pool, *action)
        return pool


def act(pool: Pool, what: str, i: int, *args: Any) -> None:
    """One action."""
    one = pool[i]
    match what, *args:
        case "slice", dim, start, stop, step:
            pool.append(one[(slice(None),) * dim + (slice(start, stop, step),)])
        case "transpose", a, b:
            pool.append(one.transpose(a, b))
        case "flatten", start:
            pool.append(one.flatten(start))
        case "split", dim, n:
            pool.append(one.unflatten(dim, (n, -1)))
        case ("clone",):
            pool.append(one.clone())
        case "to", dtype:
            pool.append(one.to(dtype))
        case "cat", j, dim:
            pool.append(torch.cat([one, pool[j]], dim))
        case "stack", j, dim:
            pool.append(torch.stack([one, pool[j]], dim))
        case "repeat", times:
            pool.append(one.repeat(*times))
        case "flip", dim:
            pool.append(one.flip(dim))
        case "roll", shift, dim:
            pool.append(one.roll(shift, dim))
        case "pick", dim, index:
            pool.append(one.index_select(dim, torch.tensor(index)))
        case "index", index:
            pool.append(one[torch.tensor(index)])
        case "pad", before, after, value:
            pool.append(torch.nn.functional.pad(one, (before, after), value=value))
        case ("neg",):
            pool.append(-one)
        case "mul", value:
            pool.append(one * value)
        case "mul_", value:
            one.mul_(value)
        case "add", j:
            pool.append(one + pool[j])
        case "fill", value:
            one.fill_(value)
        case ("zero",):
            one.zero_()
        case "copy", j:
            one.copy_(pool[j])
        case _:
            raise AssertionError(what)


@st.composite
def actions(draw: st.DrawFn, pool: Pool) -> tuple[Any, ...]:
    """An action that this pool allows."""
    i = draw(st.integers(0, len(pool) - 1))
    one = pool[i]
    dim = draw(st.integers(0, one.ndim - 1))
    n = one.shape[dim]
    alike = [j for j, other in enumerate(pool) if other.shape == one.shape]
    kinds = [
        *("slice", "slice", "slice", "copy", "copy", "copy", "copy"),
        *("transpose", "flatten", "split", "clone", "to", "cat", "stack", "repeat", "flip", "roll", "pick", "index"),
        *("pad", "neg", "mul", "mul_", "add", "fill", "zero"),
    ]
    small = one.numel() <= 64
    match draw(st.sampled_from(kinds)):
        case "slice":
            start = draw(st.integers(0, n - 1))
            return "slice", i, dim, start, draw(st.integers(start + 1, n)), draw(st.integers(1, 2))
        case "transpose":
            return "transpose", i, dim, draw(st.integers(0, one.ndim - 1))
        case "flatten":
            return "flatten", i, dim
        case "split":
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            return ("split", i, dim, draw(st.sampled_from(divisors))) if one.ndim < 4 else ("clone", i)
        case "to":
            return "to", i, draw(st.sampled_from(DTYPES))
        case "cat" if small:
            return "cat", i, draw(st.sampled_from(alike)), dim
        case "stack" if small and one.ndim < 4:
            return "stack", i, draw(st.sampled_from(alike)), draw(st.integers(-1, one.ndim))
        case "repeat" if small:
            return "repeat", i, tuple(draw(st.integers(1, 2)) for _ in one.shape)
        case "flip":
            return "flip", i, dim
        case "roll":
            return "roll", i, draw(st.integers(-3, 3)), dim
        case "pick":
            return "pick", i, dim, draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
        case "index":
            return "index", i, draw(st.lists(st.integers(0, one.shape[0] - 1), min_size=1, max_size=5))
        case "pad":
            return "pad", i, draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.sampled_from([0.0, 1.5]))
        case "mul" | "mul_" as kind:
            return kind, i, draw(st.sampled_from([2, 0.5, -3.0]))
        case "add":
            return "add", i, draw(st.sampled_from(alike))
        case "fill":
            return "fill", i, draw(st.sampled_from([0, 1, -2.5]))
        case "copy":
            return "copy", i, draw(st.sampled_from(alike))
        case ("neg" | "zero") as kind:
            return (kind, i)
    return "clone", i


@st.composite
def loaders(draw: st.DrawFn) -> Loader:
    """A loader of a few tensors."""
    shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    dtypes = st.sampled_from(DTYPES)
    sources = tuple(draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3)))
    same = st.one_of(st.sampled_from([shape for shape, _ in sources]), shapes)
    values = st.sampled_from([0.0, 1.0, -0.5])
    parameters = tuple(draw(st.lists(st.tuples(same, dtypes, values), min_size=1, max_size=3)))
    pool = Loader(sources, parameters, ()).run([torch.zeros(shape, dtype=d) for shape, d in sources], "cpu")
    done: list[tuple[Any, ...]] = []
    for _ in range(draw(st.integers(1, 14))):
        action = draw(actions(pool))
        try:
            act(pool, *action)
        except RuntimeError:  # torch does not write into views that meet themselves, nor from a view into itself
            continue
        done.append(action)
    return Loader(sources, parameters, tuple(done))
