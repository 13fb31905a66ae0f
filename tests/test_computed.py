"""Computed tensors: a program's result lies in a store like any other tensor, to the bit what torch computes."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool import computed
from shardtool.computed import Computed, constant
from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError
from shardtool.plan import OPERATIONS, Catalog, Mosaic, Piece, Program, Stored, Tensor, whole
from shardtool.recipe import Recipe, Rule, Share
from shardtool.stores.memory import MemoryStore
from shardtool.testing import StoreContract
from shardtool.window import Window, row_major

VALUES = torch.linspace(0.125, 0.875, 12)
UNARY = sorted(OPERATIONS - {"add", "sub", "mul", "div", "pow", "clamp", "data", "to", "view"})


def held(**tensors: torch.Tensor) -> tuple[MemoryStore, Catalog]:
    """Tensors in a store, one object with 8 bytes before each."""
    store, catalog = MemoryStore(), {}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        store.put(f"{name}.bin", b"8 bytes:" + raw)
        dtype = next(d for d in DType if d.torch_name == str(tensor.dtype).removeprefix("torch."))
        catalog[name] = whole(name, Stored(f"{name}.bin", dtype, tuple(tensor.shape), 8))
    return store, catalog


def of(name: str, dtype: DType, shape: tuple[int, ...]) -> Mosaic:
    window = row_major(shape)
    return Mosaic(dtype, shape, (Piece(window, window, name),))


def run(program: Program, **tensors: torch.Tensor) -> torch.Tensor:
    """What a program yields, read as the engine would."""
    store = Computed(*held(**tensors))
    stored = store.stored(program)
    raw = bytearray(stored.nbytes)
    half = len(raw) // 2
    store.readinto(stored.key, stored.offset, memoryview(raw)[:half])
    store.readinto(stored.key, stored.offset + half, memoryview(raw)[half:])
    return torch.frombuffer(raw, dtype=program.dtype.torch()).reshape(program.shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("op", UNARY)
def test_operations_are_those_of_torch_to_the_bit(op: str):
    function = torch.nn.functional.softplus if op == "softplus" else getattr(torch, op)
    program = Program(op, (of("a", DType.F32, (3, 4)),), DType.F32, (3, 4))
    assert same(run(program, a=VALUES.reshape(3, 4)), function(VALUES.reshape(3, 4)))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "pow"])
def test_operations_take_numbers_and_other_tensors(op: str):
    one, other = of("a", DType.F32, (12,)), of("b", DType.F32, (12,))
    function = getattr(torch, op)
    assert same(run(Program(op, (one, 2.5), DType.F32, (12,)), a=VALUES), function(VALUES, 2.5))
    assert same(run(Program(op, (one, other), DType.F32, (12,)), a=VALUES, b=2 * VALUES), function(VALUES, 2 * VALUES))


def test_a_cast_and_a_chain():
    """Mamba's ``-exp(A_log.float())`` of a slice."""
    log = VALUES.bfloat16().reshape(6, 2)
    window = row_major((6, 2)).narrow(0, 3, 3)
    piece = Piece(row_major((3, 2)), window, "log")
    wide = Program("to", (Mosaic(DType.BF16, (3, 2), (piece,)),), DType.F32, (3, 2))
    inner = Program("exp", (Mosaic(DType.F32, (3, 2), (whole_of(wide),)),), DType.F32, (3, 2))
    outer = Program("neg", (Mosaic(DType.F32, (3, 2), (whole_of(inner),)),), DType.F32, (3, 2))
    assert same(run(outer, log=log), -torch.exp(log[3:].float()))


def whole_of(program: Program) -> Piece:
    window = row_major(program.shape)
    return Piece(window, window, program)


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
def test_a_constant_is_its_bytes(values: list[int]):
    array = np.array(values, "<i8")
    program = constant(array.tobytes(), DType.I64, (len(values),))
    assert run(program).tolist() == values


def test_arguments_are_mosaics_with_strides_casts_and_fills():
    matrix = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    turned = Piece(Window(0, (4, 3), (4, 1)), Window(0, (4, 3), (1, 4)), "m")  # transposed, into a wider target
    program = Program("add", (Mosaic(DType.F32, (4, 4), (turned,), 7.0), 1), DType.F32, (4, 4))
    expected = torch.full((4, 4), 7.0)
    expected[:, :3] = matrix.T.float()
    assert same(run(program, m=matrix), expected + 1)


# What is refused.


def test_a_result_that_is_not_what_the_recipe_says_is_refused():
    with pytest.raises(FormatError, match=r"'exp' yields torch.float32 \[12\], the recipe says F32 \[3, 4\]"):
        run(Program("exp", (of("a", DType.F32, (12,)),), DType.F32, (3, 4)), a=VALUES)
    with pytest.raises(FormatError, match="'exp' of the recipe cannot be done"):
        run(Program("exp", ("text",), DType.F32, (1,)))


def test_a_constant_that_unpacks_to_more_than_it_says_is_refused_early():
    bomb = base64.b64encode(zlib.compress(bytes(50 << 20))).decode()
    with pytest.raises(FormatError, match="a constant of the recipe has 9 bytes instead of 8"):
        run(Program("data", (bomb,), DType.I64, (1,)))
    with pytest.raises(FormatError, match="a constant of the recipe is damaged"):
        run(Program("data", ("no base64!",), DType.I64, (1,)))


def test_what_is_too_large_to_be_computed_is_refused_before_anything_is_read():
    huge = Program("exp", (of("a", DType.F32, (1 << 28,)),), DType.F32, (1 << 28,))
    with pytest.raises(PlanError, match="'exp' yields 1073741824 bytes; at most 268435456 can be computed"):
        Computed(MemoryStore(), {}).stored(huge)


def test_what_a_program_takes_is_bounded_too_at_any_depth():
    empty = Mosaic(DType.F32, (1 << 40,), (), 0.0)
    inner = Program("neg", (empty,), DType.F32, (1,))
    for program in (inner, Program("exp", (Mosaic(DType.F32, (1,), (whole_of(inner),)),), DType.F32, (1,))):
        with pytest.raises(PlanError, match="'neg' takes 4398046511104 bytes; at most 268435456 can be computed"):
            Computed(MemoryStore(), {}).stored(program)
        recipe = Recipe((Rule("t", DType.F32, (Share((0,), (1,), (whole_of(program),)),)),))
        with pytest.raises(PlanError, match=r"^tensor 't': the operation 'neg' takes"):
            computed.over(MemoryStore(), {}, recipe)


COLUMN = Mosaic(DType.F32, (20_000, 1), (), 0.0)
ROW = Mosaic(DType.F32, (1, 20_000), (), 0.0)


@pytest.mark.parametrize(
    "program",
    [
        Program("add", (COLUMN, ROW), DType.F32, (4,)),
        Program("add", (of("a", DType.F32, (12,)), Mosaic(DType.F32, (5,), (), 0.0)), DType.F32, (12,)),
        Program("to", (of("a", DType.F32, (12,)), 1), DType.F32, (12,)),
        Program("view", (1,), DType.F32, (12,)),
        Program("view", (of("a", DType.F32, (3,)),), DType.I64, (12,)),
        Program("pow", (2, 3), DType.F32, (12,)),
        Program("add", (of("a", DType.F32, (12,)), 10**400), DType.F32, (12,)),
        Program("neg", (Mosaic(DType.I8, (12,), (), 1e300),), DType.I8, (12,)),
        Program("sigmoid", (Mosaic(DType.U16, (12,), (), 1.0),), DType.U16, (12,)),
    ],
    ids=lambda program: program.op,
)
def test_whatever_a_program_says_is_done_or_refused_in_one_sentence_that_names_the_tensor(program: Program):
    store = Computed(*held(a=VALUES))
    stored = store.stored(program, "model.t")
    with pytest.raises((FormatError, PlanError), match=r"^tensor 'model\.t': the operation '[a-z]+' "):
        store.readinto(stored.key, 0, memoryview(bytearray(stored.nbytes)))


def test_a_program_inside_another_is_not_read_beyond_its_result():
    inner = Program("neg", (of("a", DType.F32, (12,)),), DType.F32, (12,))
    beyond = Piece(row_major((4,)), row_major((4,), 100), inner)
    outer = Program("exp", (Mosaic(DType.F32, (4,), (beyond,)),), DType.F32, (4,))
    with pytest.raises(
        PlanError, match="a computed tensor takes elements of the result of 'neg' that are beyond its 12"
    ):
        run(outer, a=VALUES)


def test_a_source_that_a_program_takes_and_that_is_not_there_is_told():
    with pytest.raises(PlanError, match=r"^a computed tensor is made of 'b', which the source does not have"):
        run(Program("neg", (of("b", DType.F32, (12,)),), DType.F32, (12,)), a=VALUES)


def test_a_program_may_take_pieces_of_nothing():
    nothing = Piece(row_major((0,)), row_major((0,)), "a")
    program = Program("neg", (Mosaic(DType.F32, (2,), (nothing,), 1.0),), DType.F32, (2,))
    assert run(program, a=VALUES).tolist() == [-1, -1]


# As part of a plan.


def test_a_recipe_that_computes_nothing_leaves_the_store_alone():
    store, catalog = held(a=VALUES)
    window = row_major((12,))
    recipe = Recipe((Rule("t", DType.F32, (Share((0,), (12,), (Piece(window, window, "a"),)),)),))
    same_store, resolve, cost = computed.over(store, catalog, recipe)
    assert (same_store, cost) == (store, 0)
    assert resolve(next(iter(recipe.tensors(0))))[0].source == catalog["a"].stored


def test_pieces_of_programs_are_resolved_to_where_their_results_lie_and_cost_memory():
    store, catalog = held(a=VALUES)
    program = Program("neg", (of("a", DType.F32, (12,)),), DType.F32, (12,))
    recipe = Recipe((Rule("t", DType.F32, (Share((0,), (12,), (whole_of(program),)),)),))
    over, resolve, cost = computed.over(store, catalog, recipe)
    (piece,) = resolve(next(iter(recipe.tensors(0))))
    assert isinstance(piece.source, Stored)
    data = bytearray(48)
    over.readinto(piece.source.key, 0, memoryview(data))
    assert same(torch.frombuffer(data, dtype=torch.float32), -VALUES)
    assert cost >= 3 * 48


def test_without_an_executor_a_program_is_refused():
    from shardtool.mosaic import resolve

    program = constant(b"", DType.F32, (0,))
    target = Tensor("t", DType.F32, (0,), lambda: (whole_of(program),))
    with pytest.raises(PlanError, match=r"tensor 't' is computed \(data\), which is not done here"):
        resolve(target, {})


class TestTheStoreUnderneath(StoreContract):
    """What is not computed is the inner store's."""

    @pytest.fixture
    def store(self):
        with MemoryStore() as inner:
            yield Computed(inner, {})
