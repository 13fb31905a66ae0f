"""A recipe carried out in the plainest way, on whole tensors in memory, to be compared with an engine's own state.

Nothing of the product's engine takes part: what a recipe says is read here once more.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from shardtool.plan import Mosaic, Piece, Program
from shardtool.recipe import Recipe

Get = Callable[[str], torch.Tensor]


def rank(recipe: Recipe, number: int, get: Get) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a rank. ``get`` reads a source tensor."""
    for tensor in recipe.tensors(number):
        yield tensor.name, mosaic(Mosaic(tensor.dtype, tensor.shape, tensor.pieces(), tensor.fill), get)


def mosaic(wanted: Mosaic, get: Get) -> torch.Tensor:
    """A mosaic as a tensor. Elements that nothing fills are those of ``torch.empty`` made visible: all bits set."""
    dtype = wanted.dtype.torch()
    if wanted.fill is None:
        size = wanted.dtype.nbytes(torch.Size(wanted.shape).numel())
        value = torch.full((size,), 255, dtype=torch.uint8).view(dtype).reshape(wanted.shape)
    else:
        value = torch.full(wanted.shape, wanted.fill, dtype=torch.float64).to(dtype)
    for piece in wanted.pieces:
        place = value.reshape(-1).as_strided(piece.dst.shape, piece.dst.strides, piece.dst.offset)
        place.copy_(_taken(piece, get))
    return value


def _taken(piece: Piece, get: Get) -> torch.Tensor:
    whole = _run(piece.source, get) if isinstance(piece.source, Program) else get(str(piece.source))
    flat = whole.contiguous().reshape(-1)
    assert piece.src.bounds[1] <= flat.numel()
    return flat.as_strided(piece.src.shape, piece.src.strides, piece.src.offset)


def _run(program: Program, get: Get) -> torch.Tensor:
    dtype = program.dtype.torch()
    if program.op == "data":
        raw = bytearray(zlib.decompress(base64.b64decode(str(program.args[0]))))
        return torch.frombuffer(raw, dtype=dtype).reshape(program.shape)
    args = [mosaic(arg, get) if isinstance(arg, Mosaic) else arg for arg in program.args]
    if program.op in ("to", "view"):
        assert isinstance(args[0], torch.Tensor), program.op
        return args[0].to(dtype) if program.op == "to" else args[0].contiguous().view(dtype)
    module = torch.nn.functional if program.op == "softplus" else torch
    value = getattr(module, program.op)(*args)
    assert value.dtype == dtype, program.op
    assert tuple(value.shape) == program.shape, program.op
    return value


def sources(folder: Path) -> Get:
    """The source tensors of a checkpoint of safetensors files."""
    where: dict[str, Path] = {}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    else:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                where.update(dict.fromkeys(file.keys(), path))

    def get(name: str) -> torch.Tensor:
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    return get


def compare(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], loose: frozenset[str] = frozenset()
) -> list[str]:
    """What differs between a rank as it was replayed and as the engine has it.

    ``loose``: names with memory that nothing fills.
    """
    found = [f"{name} is missing" for name in sorted(want.keys() - got.keys())]
    found += [f"{name} is too much" for name in sorted(got.keys() - want.keys())]
    for name in sorted(got.keys() & want.keys()):
        a, b = got[name], want[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"{name} is {a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}")
        elif not torch.equal(_bytes(a), _bytes(b)) and not (name in loose and _alike(a, b)):
            found.append(f"{name} differs in {int((_bytes(a) != _bytes(b)).sum())} bytes")
    return found


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal wherever the second is a number: the truth fills memory with NaN or the largest integer first."""
    known = ~torch.isnan(b.float()) if b.is_floating_point() else b != torch.iinfo(b.dtype).max
    return bool((a[known].float() == b[known].float()).all())


def stored(folder: Path, number: int) -> dict[str, torch.Tensor]:
    """A rank as an engine has saved it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"model-rank-{number}-part-*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found
