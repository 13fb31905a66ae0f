"""What is compiled from a tape makes, from real bytes, what the same code makes of real tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings

from shardtool.dtypes import DType
from shardtool.plan import Mosaic, Program
from shardtool.tracing.compile import Compiled, Compiler
from shardtool.tracing.contents import Contents
from shardtool.tracing.tape import META, Literals, Log, Refused, Tape
from shardtool.window import row_major
from tests.engine import replay
from tests.tracing.loaders import Loader, loaders

Code = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Distinct small numbers."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float32) + 100 * seed) / 8 - 7).to(dtype).reshape(shape)


def traced(code: Code, sources: dict[str, torch.Tensor]) -> Compiled:
    """What a loader that returns a tensor makes of these sources, as a layout."""
    log = Log()
    tape = Tape(log, Contents(log).value)
    empty = {}
    for name, tensor in sources.items():
        empty[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
        log.source(name, empty[name])
    with torch.no_grad(), META, tape, Literals(tape):
        out = code(empty)
    return Compiler(log).target("out", log.ref(out))


def check(code: Code, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Mosaic:
    """The code on real sources a, b, ... and its trace replayed are equal. Gives what was compiled."""
    sources = {name: values(shape, dtype, i) for i, (name, shape) in enumerate(zip("abc", shapes, strict=False))}
    compiled = traced(code, sources)
    want = code({name: tensor.clone() for name, tensor in sources.items()})
    assert not compiled.uninitialised
    assert not replay.compare({"out": replay.mosaic(compiled.mosaic, sources.__getitem__)}, {"out": want})
    return compiled.mosaic


# The law


@settings(max_examples=300, deadline=None)
@given(loaders())
def test_every_tensor_of_a_random_loader_is_what_the_loader_makes_of_real_tensors(loader: Loader) -> None:
    sources = {f"s{i}": values(shape, dtype, i) for i, (shape, dtype) in enumerate(loader.sources)}
    want = loader.run([tensor.clone() for tensor in sources.values()], "cpu")
    log = Log()
    tape = Tape(log, Contents(log).value)
    empty = []
    for name, tensor in sources.items():
        empty.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=META))
        log.source(name, empty[-1])
    with META, tape, Literals(tape):
        got = loader.run(empty, "meta")
    compiler = Compiler(log)
    refused: list[str] = []
    for i, (meta, real) in enumerate(zip(got, want, strict=True)):
        try:
            compiled = compiler.target(f"t{i}", log.ref(meta))
        except Refused as error:
            event("refused")
            refused.append(str(error))
            continue
        assert not compiled.uninitialised
        assert not replay.compare({"": replay.mosaic(compiled.mosaic, sources.__getitem__)}, {"": real})
    assert all("more than 16 operations" in why or "do not fit together" in why for why in refused)


# What loaders do, one by one


def test_a_slice_of_a_source_is_one_piece() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(3, 4)
        parameter.copy_(s["a"].narrow(0, 3, 3))
        return parameter

    mosaic = check(code, (6, 4))
    assert [piece.source for piece in mosaic.pieces] == ["a"]
    assert mosaic.pieces[0].dst == row_major((3, 4))
    assert mosaic.fill is None


def test_a_cast_is_a_piece_with_another_dtype() -> None:
    mosaic = check(lambda s: s["a"].to(torch.bfloat16), (5,))
    assert mosaic.dtype is DType.BF16
    assert mosaic.pieces[0].source == "a"


def test_a_cast_over_a_wider_type_is_the_direct_one() -> None:
    mosaic = check(lambda s: s["a"].float().to(torch.float16), (5,), dtype=torch.bfloat16)
    assert mosaic.pieces[0].source == "a"


def test_a_cast_over_a_narrower_type_keeps_what_it_loses() -> None:
    mosaic = check(lambda s: (s["a"] * 1).to(torch.bfloat16).float(), (5,))
    assert isinstance(mosaic.pieces[0].source, Program)
    assert isinstance(check(lambda s: s["a"].to(torch.bfloat16).float(), (40,)).pieces[0].source, Program)


def test_whole_numbers_become_floats_by_a_program() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        return s["a"].to(torch.float32)

    program = check(code, (4,), dtype=torch.int32).pieces[0].source
    assert isinstance(program, Program)
    assert program.op == "to"


def test_the_bits_of_a_tensor_as_another_type_are_no_cast() -> None:
    sources = {"a": values((4,), torch.bfloat16, 0)}
    compiled = traced(lambda s: s["a"].view(torch.int16), sources)
    got = replay.mosaic(compiled.mosaic, sources.__getitem__)
    assert torch.equal(got, sources["a"].view(torch.int16))


def test_padding_is_the_fill() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(6, 2)
        parameter[:4].copy_(s["a"])
        parameter[4:].fill_(0)
        return parameter

    mosaic = check(code, (4, 2))
    assert len(mosaic.pieces) == 1
    assert mosaic.fill == 0


def test_a_constant_is_a_fill_or_data() -> None:
    assert check(lambda s: torch.ones(3)).fill == 1
    assert check(lambda s: torch.tensor([2.5, 2.5])).fill == 2.5
    mosaic = check(lambda s: torch.arange(4, dtype=torch.int64) * 3)
    assert [piece.source.op for piece in mosaic.pieces if isinstance(piece.source, Program)] == ["data"]


def test_values_that_json_has_no_number_for_are_data() -> None:
    assert check(lambda s: torch.full((3,), float("-inf"))).fill is None
    assert check(lambda s: torch.full((3,), -0.0)).fill is None


def test_two_constants_are_a_fill_and_one_repeated_element() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.zeros(1000)
        parameter[:10].fill_(3)
        return parameter

    mosaic = check(code)
    assert mosaic.fill == 0
    (piece,) = mosaic.pieces
    assert isinstance(piece.source, Program)
    assert piece.source.shape == (1,)


def test_the_last_writer_wins() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(4, 4)
        parameter.copy_(s["a"])
        parameter[1:3, 1:3].copy_(s["b"])
        parameter[2].zero_()
        return parameter

    check(code, (4, 4), (2, 2))


def test_a_buffer_that_is_used_again_is_read_as_it_was() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        buffer, parameter = torch.empty(3), torch.empty(2, 3)
        for i, name in enumerate("ab"):
            buffer.copy_(s[name])
            parameter[i].copy_(buffer)
        return parameter

    assert [piece.source for piece in check(code, (3,), (3,)).pieces] == ["a", "b"]


def test_stacked_experts_are_a_piece_each() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(2, 4, 3)
        for e, name in enumerate("ab"):
            parameter[e, :2].copy_(s[name][:2])
            parameter[e].narrow(0, 2, 2).copy_(s[name][2:])
        return parameter

    assert len(check(code, (4, 3), (4, 3)).pieces) == 4


def test_computed_tensors_are_programs() -> None:
    mosaic = check(lambda s: -torch.exp(s["a"].float()), (4,), dtype=torch.bfloat16)
    program = mosaic.pieces[0].source
    assert isinstance(program, Program)
    assert program.op == "neg"
    assert list(program.sources()) == ["a"]


def test_operations_in_place_keep_the_dtype_of_their_tensor() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.zeros(4, dtype=torch.bfloat16)
        parameter.copy_(s["a"])
        return parameter.add_(s["b"])

    check(code, (4,), (4,))


def test_memory_that_nothing_writes_is_counted() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(5)
        parameter[:3].copy_(s["a"])
        return parameter

    compiled = traced(code, {"a": torch.ones(3)})
    assert compiled.uninitialised == 2
    assert compiled.mosaic.fill == 0


def test_random_numbers_are_no_content() -> None:
    assert traced(lambda s: torch.empty(4).normal_(), {}).uninitialised == 4


# Values that code reads


def test_code_reads_the_values_of_constants() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        slopes = torch.pow(2.0, -torch.arange(1, 5, dtype=torch.float32))
        assert slopes.tolist() == [0.5, 0.25, 0.125, 0.0625]
        assert slopes[1].item() == 0.25
        assert slopes.cpu().numpy()[2] == 0.125
        assert torch.equal(slopes, slopes.clone())
        assert (slopes > 0.2).nonzero().shape == (2, 1)
        return slopes

    check(code)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.cpu().numpy(),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: torch.equal(tensor, torch.ones(3)),
        lambda tensor: (tensor * 2).sum().item(),
    ],
)
def test_code_that_reads_the_values_of_a_source_is_refused_by_the_sources_name(
    read: Callable[[torch.Tensor], object],
) -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        read(s["a"])
        return s["a"]

    with pytest.raises(Refused, match="'a'"):
        traced(code, {"a": torch.ones(3)})


def test_a_copy_to_the_cpu_that_nobody_reads_is_a_copy() -> None:
    assert check(lambda s: s["a"].cpu()[1:], (4,)).pieces[0].source == "a"


def test_parameters_that_ask_for_another_device_are_traced_like_the_rest() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(4, device="cpu")
        parameter.copy_(s["a"])
        return parameter

    assert check(code, (4,)).pieces[0].source == "a"


def test_tensors_that_a_loader_invents_on_the_cpu_are_constants() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        parameter = torch.empty(2, 3)
        parameter[0].copy_(torch.from_numpy(np.zeros(3)))
        parameter[1].copy_(s["a"] + torch.from_numpy(np.ones(3, dtype="f4")))
        return parameter

    check(code, (3,))


# What cannot be said


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (lambda s: s["a"].cumsum(0), "'cumsum'"),
        (lambda s: torch.add(s["a"], s["a"], alpha=2), "alpha"),
        (lambda s: s["a"].sort()[0], "'sort'"),
        (lambda s: s["a"].view(torch.uint8), "elements of"),
        (lambda s: torch.empty(4) + s["a"], "nothing has written"),
        (lambda s: s["a"].to(torch.complex128), "complex128"),
    ],
)
def test_what_layouts_cannot_say_is_refused_with_the_operation_and_the_target(code: Code, said: str) -> None:
    with pytest.raises(Refused, match="'out'.*" + said):
        traced(code, {"a": torch.ones(4)})


def test_a_program_has_no_more_than_so_many_operations_inside_each_other() -> None:
    def code(s: dict[str, torch.Tensor]) -> torch.Tensor:
        value = s["a"]
        for _ in range(17):
            value = -value
        return value

    with pytest.raises(Refused, match="more than 16 operations"):
        traced(code, {"a": torch.ones(4)})


def test_a_constant_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardtool.tracing.compile.MOST_CONSTANT", 8)
    with pytest.raises(Refused, match="constant of 16 bytes"):
        traced(lambda s: torch.arange(4, dtype=torch.float32), {})
