"""Recipes: what is written down is what is read back, and what is damaged is refused."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.plan import OPERATIONS, Mosaic, Piece, Program
from shardtool.recipe import Recipe, Rule, Series, Share, filled
from shardtool.recipe_json import from_json, from_runs, runs, to_json
from shardtool.window import Window, row_major
from tests.strategies import Draw, dtypes, names, shapes, views

TWO = ("add", "sub", "mul", "div", "pow")
PLAIN = names().filter(lambda name: "{i}" not in name and "{e}" not in name)
EXPERTS = st.tuples(PLAIN, PLAIN).map("{e}".join)
SLOTTED = st.tuples(PLAIN, PLAIN).map("{i}".join)


@st.composite
def shares(draw: Draw, ranks: tuple[int, ...], sources: st.SearchStrategy[str]) -> Share:
    """What some ranks hold: pieces of any windows inside the target."""
    shape = draw(shapes(dims=3))
    pieces: list[Piece | Series] = []
    for _ in range(draw(st.integers(0, 3))):
        dst = draw(st.one_of(st.just(row_major(shape)), views(shape).map(lambda view: view.window)))
        strides = tuple(draw(st.integers(0, 99)) for _ in dst.shape)
        src = draw(st.one_of(st.just(dst), st.just(Window(draw(st.integers(0, 99)), dst.shape, strides))))
        kind = draw(st.sampled_from(["piece", "piece", "series", "program"]))
        if kind == "program":
            pieces.append(Piece(dst, row_major(dst.shape), draw(programs(sources, dst.shape))))
        elif kind == "series":
            numbers = tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True)))
            room = row_major(shape).bounds[1] - dst.bounds[1]
            step = draw(st.integers(0, max(0, room // len(numbers))))
            pieces.append(Series(Piece(dst, src, draw(EXPERTS)), numbers, step, draw(st.integers(0, 9))))
        else:
            pieces.append(Piece(dst, src, draw(sources)))
    return Share(ranks, shape, tuple(pieces), draw(st.sampled_from([None, 0.0, 1.0, -0.5])))


@st.composite
def programs(draw: Draw, sources: st.SearchStrategy[str], shape: tuple[int, ...], depth: int = 0) -> Program:
    """An operation on mosaics, which may cite programs again, and on numbers; or a constant."""
    op, dtype = draw(st.sampled_from(sorted(OPERATIONS))), draw(dtypes())
    if op == "data":
        return Program(op, (draw(st.text(max_size=3)),), dtype, shape)
    whole = row_major(shape)
    inner = programs(sources, shape, depth + 1) if depth < 2 else sources
    taken = Mosaic(dtype, shape, (Piece(whole, whole, draw(sources | inner)),), draw(st.sampled_from([None, 0.5])))
    number = st.integers(-9, 9) | st.floats(-1, 1)
    fewest, most = {"clamp": (1, 2), "softplus": (0, 2)}.get(op, (1, 1) if op in TWO else (0, 0))
    others = draw(st.lists(number | st.just(Mosaic(dtype, (), (), 1.0)), min_size=fewest, max_size=most))
    return Program(op, (taken, *others), dtype if op == "view" else draw(dtypes()), shape)


@st.composite
def rules(draw: Draw) -> Rule:
    """One target, or one for each of some layers; the ranks divided into one or two groups."""
    index = tuple(draw(st.lists(st.integers(0, 99), unique=True, max_size=5)))
    name = draw(SLOTTED if index else PLAIN)
    groups = draw(st.sampled_from([((0, 1, 2, 3),), ((0,), (1, 2, 3)), ((0, 2), (1, 3))]))
    return Rule(name, draw(dtypes()), tuple(draw(shares(ranks, PLAIN)) for ranks in groups), index)


RECIPES = st.lists(rules(), max_size=4).map(lambda found: Recipe(tuple(found)))


@given(RECIPES)
def test_a_recipe_is_read_back_from_json_as_it_was(recipe: Recipe):
    assert from_json(json.loads(json.dumps(to_json(recipe))), "shardtool.json") == recipe


@given(st.lists(st.integers(0, 30)))
def test_runs_are_the_numbers_and_each_run_goes_as_far_as_it_can(numbers: list[int]):
    made = runs(numbers)
    assert from_runs(made) == tuple(numbers)
    assert all(a[1] != b[0] for a, b in pairwise(made))


def test_a_whole_tensor_is_written_down_as_its_name_alone():
    window = row_major((2, 3))
    share = Share((0,), (2, 3), (Piece(window, window, "a"), Piece(window, window.moved(1), "b")))
    one, other = to_json(Recipe((Rule("t", DType.F32, (share,)),)))[0]["shares"][0]["pieces"]
    assert one == {"of": "a"}
    assert other == {"of": "b", "shape": [2, 3], "to": [0, 3, 1], "from": [1, 3, 1]}


def test_a_rule_makes_one_target_for_each_number_with_the_number_in_every_name():
    window = row_major((2,))
    shares = tuple(Share((rank,), (2,), (Piece(window, window, f"old.{{i}}.w{rank}"),)) for rank in (0, 1))
    recipe = Recipe((Rule("new.{i}.w", DType.F32, shares, (0, 7)), Rule("head", DType.F32, shares[:1])))
    assert [(t.name, t.pieces()[0].source) for t in recipe.tensors(0)] == [
        ("new.0.w", "old.0.w0"),
        ("new.7.w", "old.7.w0"),
        ("head", "old.{i}.w0"),
    ]
    assert [t.name for t in recipe.tensors(1)] == ["new.0.w", "new.7.w"]
    assert list(recipe.tensors(2)) == []
    assert recipe.ranks() == (0, 1)
    assert filled("a.{i}", None) == "a.{i}"


@given(RECIPES)
def test_by_name_and_by_rank_a_recipe_makes_the_same_targets(recipe: Recipe):
    by_name = [(rank, t.name, t.shape, t.fill, t.pieces()) for group in recipe.by_name() for rank, t in group]
    by_rank = [(rank, t.name, t.shape, t.fill, t.pieces()) for rank in recipe.ranks() for t in recipe.tensors(rank)]
    assert sorted(by_name, key=repr) == sorted(by_rank, key=repr)


def test_the_windows_of_each_source_are_those_of_all_ranks():
    first, second = row_major((4,)).narrow(0, 0, 2), row_major((4,)).narrow(0, 2, 2)
    shares = (
        Share((0,), (2,), (Piece(row_major((2,)), first, "w"),)),
        Share((1,), (2,), (Piece(row_major((2,)), second, "w"),)),
    )
    assert Rule("t", DType.F32, shares).sources() == {"w": [first, second]}


def test_a_series_is_one_piece_for_each_number():
    window = row_major((2,))
    series = Series(Piece(window, window.moved(1), "x.{i}.{e}.w"), (3, 5, 4), 2, 10)
    rule = Rule("t.{i}", DType.F32, (Share((0,), (6,), (series,)),), (7,))
    (tensor,) = Recipe((rule,)).tensors(0)
    assert tensor.pieces() == (
        Piece(window, window.moved(1), "x.7.3.w"),
        Piece(window.moved(2), window.moved(11), "x.7.5.w"),
        Piece(window.moved(4), window.moved(21), "x.7.4.w"),
    )
    assert set(rule.sources()) == {"x.{i}.3.w", "x.{i}.4.w", "x.{i}.5.w"}


def test_the_numbers_of_a_layer_stand_inside_programs_too():
    window = row_major((2,))
    inner = Program("exp", (Mosaic(DType.F32, (2,), (Piece(window, window, "a.{i}"),)),), DType.F32, (2,))
    outer = Program("neg", (Mosaic(DType.F32, (2,), (Piece(window, window, inner),)),), DType.F32, (2,))
    rule = Rule("t.{i}", DType.F32, (Share((0,), (2,), (Piece(window, window, outer),)),), (4,))
    (piece,) = next(Recipe((rule,)).tensors(0)).pieces()
    assert isinstance(piece.source, Program)
    assert list(piece.source.sources()) == ["a.4"]
    assert rule.sources() == {}, "a program cannot be read backwards, so nothing is held by it"
    assert list(rule.programs()) == [outer]


def test_programs_inside_each_other_have_a_limit():
    source: Any = "a"
    for _ in range(40):
        source = {"op": "neg", "args": [{"dtype": "F32", "shape": [], "pieces": [{"of": source}]}]}
        source |= {"dtype": "F32", "shape": []}
    deep = [{"name": "t", "dtype": "F32", "shares": [{"ranks": [[0, 1]], "shape": [], "pieces": [{"of": source}]}]}]
    with pytest.raises(FormatError, match="neither a name nor a program"):
        from_json(deep, "shardtool.json")


# What programs may say.


def computed(op: str, args: list[Any], shape: list[int]) -> list[dict[str, Any]]:
    """A recipe of one target that is computed, whole."""
    share = {"ranks": [[0, 1]], "shape": shape, "pieces": [{"of": program(op, args, shape)}]}
    return [{"name": "t", "dtype": "F32", "shares": [share]}]


def program(op: str, args: list[Any], shape: list[int]) -> dict[str, Any]:
    return {"op": op, "args": args, "dtype": "F32", "shape": shape}


def taken(shape: list[int], dtype: str = "F32", of: Any = "a") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "pieces": [{"of": of}]}


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("neg", [taken([4, 3])]),
        ("add", [taken([4, 1]), taken([3])]),
        ("pow", [2, taken([4, 3])]),
        ("clamp", [taken([4, 3]), 0, 1]),
        ("softplus", [taken([4, 3])]),
        ("softplus", [taken([4, 3]), 1.0, 20]),
        ("to", [taken([4, 3], "BF16")]),
        ("view", [taken([4, 3], "I32")]),
        ("data", ["text"]),
    ],
    ids=str,
)
def test_a_program_that_yields_what_it_says_is_read(op: str, args: list[Any]):
    made = computed(op, args, [4, 3])
    assert to_json(from_json(made, "shardtool.json")) == made


@pytest.mark.parametrize(
    ("op", "args", "why"),
    [
        ("add", [taken([20_000, 1]), taken([1, 20_000])], r"\[20000, 1\] and \[1, 20000\] does not yield \[4\]"),
        ("add", [taken([4]), taken([3])], "does not yield"),
        ("neg", [taken([1 << 40])], "does not yield"),
        ("to", [taken([4]), 1], "does not take the 2 arguments"),
        ("clamp", [taken([4])], "does not take the 1 arguments"),
        ("view", [1], "does not take the 1 arguments"),
        ("pow", [2, 3], "does not take the 2 arguments"),
        ("neg", ["text"], "does not take the 1 arguments"),
        ("data", [taken([4])], "does not take the 1 arguments"),
        ("view", [taken([4], "BF16")], "makes BF16 elements F32"),
        ("to", [taken([4], "F4")], "narrower than a byte"),
        ("neg", [taken([4], of=program("neg", [taken([2])], [2]))], "beyond its 2"),
    ],
    ids=str,
)
def test_a_program_that_cannot_yield_what_it_says_is_refused(op: str, args: list[Any], why: str):
    with pytest.raises(FormatError, match=why):
        from_json(computed(op, args, [4]), "shardtool.json")


@pytest.mark.parametrize(("start", "sound"), [(2, True), (3, False), (1 << 40, False)])
def test_a_piece_stays_inside_the_result_of_its_program(start: int, sound: bool):
    made = computed("neg", [taken([4])], [4])
    made[0]["shares"][0]["pieces"][0] |= {"shape": [2], "to": [0, 1], "from": [start, 1]}
    if sound:
        assert to_json(from_json(made, "shardtool.json")) == made
        return
    with pytest.raises(FormatError, match="the result of 'neg' beyond its 4"):
        from_json(made, "shardtool.json")


# What a recipe may ask for.


def layered(layers: int, ranks: int, pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A rule whose ranks hold a share each, of the same sources."""
    shares = [{"ranks": [[rank, rank + 1]], "shape": [2], "pieces": pieces} for rank in range(ranks)]
    return [{"name": "t.{i}", "i": [[0, layers]], "dtype": "F32", "shares": shares}]


def one(of: Any) -> dict[str, Any]:
    return {"of": of, "shape": [1], "to": [0, 1], "from": [0, 1]}


@pytest.mark.parametrize(
    "bomb",
    [
        layered(1_000_000, 1, [one(f"s{k}.{{i}}") for k in range(20)]),
        layered(
            500_000,
            1,
            [one(program("neg", [taken([1], of=f"s{k}.{{i}}")], [1])) for k in range(20)],
        ),
        layered(100_000, 50, [one("s.{i}")]),
        layered(1, 10, [{**one("s.{e}"), "e": [[0, 500_000]], "step": [0, 1]}]),
        layered(1_000, 1, [{**one("s.{i}.{e}"), "e": [[0, 5_000]], "step": [0, 1]}]),
    ],
    ids=["pieces", "programs", "ranks", "series", "series of layers"],
)
def test_a_few_bytes_cannot_ask_for_more_than_a_model_has(bomb: list[dict[str, Any]]):
    assert len(json.dumps(bomb)) < 10_000
    with pytest.raises(FormatError, match="more than 4194304 pieces"):
        from_json(bomb, "shardtool.json")


def test_the_largest_models_are_within_the_limit():
    """DeepSeek-V3's experts with their scales at tp 64, in four stages; Llama 3.1 405B at tp 64."""
    experts = [{**one(f"l.{{i}}.{{e}}.{k}"), "e": [[0, 256]], "step": [0, 0]} for k in range(6)]
    deepseek = [entry for _ in range(4) for entry in layered(15, 64, experts)]
    llama = [entry for _ in range(12) for entry in layered(126, 64, [one("l.{i}.a"), one("l.{i}.b"), one("l.{i}.c")])]
    assert len(from_json([*deepseek, *llama], "shardtool.json").rules) == 16


# Damage.

SOUND: list[dict[str, Any]] = [
    {
        "name": "t.{i}",
        "i": [[0, 4]],
        "dtype": "BF16",
        "shares": [
            {
                "ranks": [[0, 2]],
                "shape": [2, 3],
                "fill": 0.0,
                "pieces": [
                    {"of": "a.{i}", "shape": [2], "to": [0, 3], "from": [5, 1]},
                    {"of": "b"},
                    {"of": "c.{e}", "e": [[0, 2]], "step": [3, 7], "shape": [3], "to": [0, 1], "from": [0, 1]},
                    {
                        "of": {
                            "op": "add",
                            "args": [{"dtype": "F32", "shape": [2], "fill": 1.0, "pieces": [{"of": "d"}]}, 2],
                            "dtype": "F32",
                            "shape": [2],
                        },
                        "shape": [2],
                        "to": [1, 1],
                        "from": [0, 1],
                    },
                ],
            }
        ],
    }
]


def test_the_recipe_that_the_damage_is_done_to_is_sound():
    assert to_json(from_json(SOUND, "shardtool.json")) == SOUND


DAMAGE: list[tuple[list[Any], Any]] = [
    ([], None),
    ([], 3),
    ([], {"a": 1}),
    ([], ["text"]),
    ([], [None]),
    ([0], {}),
    ([0, "name"], 5),
    ([0, "name"], "without slot"),
    ([0, "i"], []),
    ([0, "i"], [[0]]),
    ([0, "i"], [[4, 0]]),
    ([0, "i"], [[-1, 2]]),
    ([0, "i"], [[0, 1 << 60]]),
    ([0, "i"], [[0, 600_000], [0, 600_000]]),
    ([0, "i"], [["a", "b"]]),
    ([0, "i"], [[0.5, 1.5]]),
    ([0, "i"], 4),
    ([0, "dtype"], "F128"),
    ([0, "dtype"], ["F32"]),
    ([0, "dtype"], None),
    ([0, "shares"], None),
    ([0, "shares"], [5]),
    ([0, "shares", 0, "ranks"], None),
    ([0, "shares", 0, "shape"], [-2, 3]),
    ([0, "shares", 0, "shape"], [2.0, 3]),
    ([0, "shares", 0, "shape"], [True, 3]),
    ([0, "shares", 0, "shape"], "23"),
    ([0, "shares", 0, "shape"], [1 << 70]),
    ([0, "shares", 0, "shape"], [1] * 1000),
    ([0, "shares", 0, "shape"], [1]),
    ([0, "shares", 0, "fill"], "0"),
    ([0, "shares", 0, "fill"], [0]),
    ([0, "shares", 0, "fill"], True),
    ([0, "shares", 0, "fill"], 10**400),
    ([0, "shares", 0, "pieces"], None),
    ([0, "shares", 0, "pieces", 0], "piece"),
    ([0, "shares", 0, "pieces", 0], ["of"]),
    ([0, "shares", 0, "pieces", 0, "of"], 5),
    ([0, "shares", 0, "pieces", 0, "shape"], [2, 2]),
    ([0, "shares", 0, "pieces", 0, "to"], [0]),
    ([0, "shares", 0, "pieces", 0, "to"], [3, 3]),
    ([0, "shares", 0, "pieces", 0, "to"], [0, 6]),
    ([0, "shares", 0, "pieces", 0, "to"], [-1, 3]),
    ([0, "shares", 0, "pieces", 0, "from"], [0, -1]),
    ([0, "shares", 0, "pieces", 0, "from"], None),
    ([0, "shares", 0, "pieces", 2, "of"], "no slot"),
    ([0, "shares", 0, "pieces", 2, "e"], [[0, 3]]),  # the third would leave the target
    ([0, "shares", 0, "pieces", 2, "e"], [[0, 1 << 40]]),
    ([0, "shares", 0, "pieces", 2, "e"], "0"),
    ([0, "shares", 0, "pieces", 2, "step"], [3]),
    ([0, "shares", 0, "pieces", 2, "step"], [-3, 0]),
    ([0, "shares", 0, "pieces", 2, "step"], [1 << 50, 0]),
    ([0, "shares", 0, "pieces", 3, "of", "op"], "system"),
    ([0, "shares", 0, "pieces", 3, "of", "op"], ["add"]),
    ([0, "shares", 0, "pieces", 3, "of", "args"], 5),
    ([0, "shares", 0, "pieces", 3, "of", "args", 1], [2]),
    ([0, "shares", 0, "pieces", 3, "of", "args", 0, "dtype"], "F128"),
    ([0, "shares", 0, "pieces", 3, "of", "args", 0, "shape"], [-1]),
    ([0, "shares", 0, "pieces", 3, "of", "args"], []),
    ([0, "shares", 0, "pieces", 3, "of", "args", 1], "text"),
    ([0, "shares", 0, "pieces", 3, "of", "args", 1], None),
    ([0, "shares", 0, "pieces", 3, "of", "args", 0], 1),  # no tensor is left
    ([0, "shares", 0, "pieces", 3, "of", "args", 0, "shape"], [3]),
    ([0, "shares", 0, "pieces", 3, "of", "args", 0, "dtype"], "F4"),
    ([0, "shares", 0, "pieces", 3, "of", "op"], "to"),
    ([0, "shares", 0, "pieces", 3, "of", "op"], "neg"),
    ([0, "shares", 0, "pieces", 3, "of", "op"], "data"),
    ([0, "shares", 0, "pieces", 3, "of", "shape"], [3]),
    ([0, "shares", 0, "pieces", 3, "from"], [1, 1]),
    ([0, "shares", 0, "pieces", 3, "from"], [0, 2]),
    ([0, "shares", 0, "pieces", 3, "of", "dtype"], None),
    ([0, "shares", 0, "pieces", 3, "of", "shape"], [1 << 60]),
]


@pytest.mark.parametrize(("path", "value"), DAMAGE, ids=lambda value: str(value)[:30])
def test_a_damaged_recipe_is_refused_by_the_name_of_its_file(path: list[Any], value: Any):
    if not path:
        damaged = value
    else:
        damaged = place = copy.deepcopy(SOUND)
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    with pytest.raises(FormatError, match=r"^shardtool\.json: the recipe is damaged"):
        from_json(damaged, "shardtool.json")


@pytest.mark.parametrize(
    "path",
    [
        (0, "name"),
        (0, "i"),
        (0, "dtype"),
        (0, "shares"),
        (0, "shares", 0, "ranks"),
        (0, "shares", 0, "shape"),
        (0, "shares", 0, "pieces"),
        (0, "shares", 0, "pieces", 0, "of"),
        (0, "shares", 0, "pieces", 0, "to"),
        (0, "shares", 0, "pieces", 0, "from"),
    ],
    ids=str,
)
def test_a_recipe_that_lacks_something_is_refused(path: tuple[Any, ...]):
    damaged = place = copy.deepcopy(SOUND)
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    with pytest.raises(FormatError, match=r"^shardtool\.json"):
        from_json(damaged, "shardtool.json")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "i", "dtype", "shares", "ranks", "shape", "pieces", "of"]), inner)
    ),
    max_leaves=12,
)
PLACES = [path for path, _ in DAMAGE if path]


@given(st.sampled_from(PLACES), JSON)
def test_whatever_stands_anywhere_the_recipe_is_read_or_refused(path: list[Any], value: Any):
    damaged: Any = copy.deepcopy(SOUND)
    place = damaged
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    try:
        recipe = from_json(damaged, "shardtool.json")
    except FormatError:
        return
    for rank in recipe.ranks()[:3]:
        for tensor in recipe.tensors(rank):
            assert all(piece.dst.bounds[1] <= tensor.size or not piece.dst.size for piece in tensor.pieces())
