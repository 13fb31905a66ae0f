"""What a checkpoint, a model that an engine built, and the sizes of its ranks have to say of each other.

::

    tied            whether a checkpoint has its embedding for a head too
    difference      what a model lacks of some tensors, and they of it
    unfilled        the parameters that a model has not said that it loaded
    Marks           ... that it has left as they were, where it does not say
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from shardtool.checkpoint import Checkpoint, parse_config
from shardtool.dtypes import DType

TIE = "tie_word_embeddings"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "embedding.weight")
HEAD = "lm_head.weight"
Entry = tuple[str, DType, tuple[int, ...]]
"""Name, dtype and shape."""
_MARKS = {
    torch.bfloat16: (torch.int16, -0x55),
    torch.float16: (torch.int16, -0x55),
    torch.float32: (torch.int32, -0x545555),
}
"""The bits of a NaN that no arithmetic makes, as an integer."""


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


class Marks:
    """Marks in a model's parameters, made before it takes tensors and looked for afterwards.

    The first number of every row of a parameter of floats becomes a NaN of certain bits, which no weight is: so a part
    of a parameter is seen, such as one of several projections or experts, and little is kept.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._kept: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            word, mark = _MARKS.get(parameter.dtype, (None, 0))
            if word is None or parameter.is_meta or not parameter.numel():
                continue
            tensor = parameter.data
            firsts = (tensor.select(-1, 0) if tensor.dim() > 1 else tensor).view(word)
            self._kept[name] = (tensor.data_ptr(), firsts, firsts.clone())
            firsts.fill_(mark)

    def left(self) -> list[str]:
        """The parameters of which a part was not filled. What the model had there before is put back."""
        found = []
        for name, parameter in self._model.named_parameters():
            place, firsts, before = self._kept.pop(name, (0, None, None))
            if firsts is None or before is None or parameter.data_ptr() != place:  # of another memory now
                continue
            untouched = firsts == _MARKS[parameter.dtype][1]
            if untouched.any():
                firsts.copy_(torch.where(untouched, before, firsts))
                found.append(name)
        return found
