"""Files of ``torch.save`` for tests: real ones, and zips and pickles put together by hand.

::

    saved(table)                torch.save's bytes
    checkpoint(config, held)    a folder as {key: bytes} with pytorch_model.bin, or several and their index
    zipped({"data.pkl": ...})   a zip as torch writes it, with any records
    evil(text)                  a pickle that would call a function if it were loaded by pickle
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from tests.builders import Files, Raw, Tensors

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def tensor(raw: Raw) -> torch.Tensor:
    """The tensor of some raw elements."""
    flat = torch.frombuffer(bytearray(raw.array.tobytes()), dtype=TORCH[raw.dtype])
    return flat.reshape(raw.array.shape)


def saved(table: object, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    out = io.BytesIO()
    torch.save(table, out, **options)
    return out.getvalue()


def checkpoint(config: Mapping[str, Any], held: Tensors, *, files: int = 1, transposed: bool = False) -> Files:
    """A Hugging Face checkpoint of torch files. ``transposed``: matrices lie column by column."""
    tensors = {name: tensor(raw) for name, raw in held.items()}
    if transposed:
        tensors = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in tensors.items()}
    made = {"config.json": json.dumps(config, indent=2).encode(), "tokenizer.json": b'{"version": "1.0"}'}
    if files == 1:
        return {**made, "pytorch_model.bin": saved(tensors)}
    keys = [f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin" for i in range(files)]
    place = {name: keys[i % files] for i, name in enumerate(tensors)}
    for key in keys:
        made[key] = saved({name: t for name, t in tensors.items() if place[name] == key})
    made["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": place}).encode()
    return made


def zipped(records: Mapping[str, bytes], *, folder: str = "archive/", method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these records below one folder."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(folder + name, data)
    return out.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    """The records of a zip, without their folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def evil(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls ``module.name(argument)`` when pickle loads it."""
    text = argument.encode()
    return b"\x80\x02c%s\n%s\n(X%stR." % (module.encode(), name.encode(), len(text).to_bytes(4, "little") + text)
