"""What changed between two layouts, in sentences: said for what differs, silent about what only looks different."""

from __future__ import annotations

from dataclasses import replace

from shardtool.dtypes import DType
from shardtool.layouts import difference, vllm
from shardtool.layouts.base import Parallel
from shardtool.layouts.file import FileLayout, Traced
from shardtool.mosaic import Logical
from shardtool.plan import Mosaic, Piece, Program
from shardtool.recipe import Recipe, Rule, Share
from shardtool.window import Window, row_major
from tests.layouts import variants

WHOLE = row_major((4, 6))
LAYER = "layers.{i}."


def piece(of: str = "w", first: int = 0, rows: int = 4) -> Piece:
    """Some rows of a source of four rows and six columns, in their own places."""
    window = WHOLE.narrow(0, first, rows)
    return Piece(window, window, of)


def rule(
    name: str, *pieces: Piece, index: tuple[int, ...] = (), fill: float | None = None, dtype: DType = DType.BF16
) -> Rule:
    """One target that both of two ranks hold."""
    return Rule(name, dtype, (Share((0, 1), (4, 6), pieces, fill),), index)


def said(old: Rule | tuple[Rule, ...], new: Rule | tuple[Rule, ...]) -> list[str]:
    """What changed between two recipes of such rules."""
    before, after = (Recipe(rules if isinstance(rules, tuple) else (rules,)) for rules in (old, new))
    return difference.recipes(before, after)


def test_a_layout_is_not_different_from_itself() -> None:
    for name in ("llama-tied", "qwen3_moe", "gpt2"):
        model = variants.model(name)
        outline = vllm.for_config(model.config).outline(model, Parallel(2))
        assert difference.outlines(outline, outline) == []


def test_the_same_elements_in_other_pieces_are_no_change() -> None:
    assert said(rule("t", piece()), rule("t", piece(rows=1), piece(first=1, rows=3))) == []
    columns = tuple(Piece(w, w, "w") for w in (WHOLE.narrow(1, 0, 2), WHOLE.narrow(1, 2, 4)))
    assert said(rule("t", piece()), rule("t", *columns)) == []


def test_other_layers_in_one_rule_are_no_change() -> None:
    one = rule(LAYER + "w", piece(LAYER + "w"), index=(0, 1, 2))
    assert said(one, (replace(one, index=(0,)), replace(one, index=(1, 2)))) == []


def test_other_elements_of_the_same_source() -> None:
    swapped = tuple(Piece(WHOLE.narrow(0, i, 1), WHOLE.narrow(0, 3 - i, 1), "w") for i in range(4))
    assert said(rule("t", piece()), rule("t", *swapped)) == ["'t' takes other elements of 'w'"]
    assert said(rule("t", piece()), rule("t", piece(rows=3), fill=0.0)) == ["'t' takes other elements of 'w'"]


def test_other_sources() -> None:
    assert said(rule("t", piece("a")), rule("t", piece("b"))) == ["'t' is made of 'b' instead of 'a'"]


def test_another_shape_dtype_and_fill() -> None:
    flat = Rule("t", DType.BF16, (Share((0, 1), (24,), (Piece(row_major((24,)), row_major((24,)), "w"),)),))
    assert said(rule("t", piece()), flat) == ["'t' has the shape [24] instead of [4, 6]"]
    assert said(rule("t", piece()), rule("t", piece(), dtype=DType.F32)) == ["'t' is F32 instead of BF16"]
    assert said(rule("t", fill=1.0), rule("t", fill=0.5)) == ["'t' is filled with 0.5 instead of 1"]


def test_what_changed_on_some_ranks_names_them() -> None:
    shares = rule("t", piece()).shares
    split = Rule("t", DType.BF16, (Share((0,), (4, 6), (piece(),)), Share((1,), (4, 6), (piece("other"),))))
    assert said(Rule("t", DType.BF16, shares), split) == ["'t' is made of 'other' instead of 'w', on rank 1"]
    alone = Rule("t", DType.BF16, (Share((0,), (4, 6), (piece(),)),))
    assert said(rule("t", piece()), alone) == ["'t' is no longer held by rank 1"]


def test_a_program_instead_of_a_copy() -> None:
    window = row_major((4, 6))
    doubled = Program("mul", (Mosaic(DType.BF16, (4, 6), (piece(),)), 2.0), DType.BF16, (4, 6))
    assert said(rule("t", piece()), rule("t", Piece(window, window, doubled))) == [
        "'t' is made of the mul of 'w' instead of 'w'"
    ]


def test_a_new_name_for_the_same_is_a_renaming() -> None:
    old = rule("model." + LAYER + "experts.w2", piece(LAYER + "w"), index=(0, 1, 2, 5))
    new = replace(old, name="model." + LAYER + "experts.routed.w2")
    assert said(old, new) == [
        "'model.layers.{i}.experts.w2' (i 0-2, 5) is now called 'model.layers.{i}.experts.routed.w2'"
    ]


def test_constants_are_told_apart_by_the_ends_of_their_names() -> None:
    names = ("k_scale", "v_scale")
    old = tuple(rule(f"{LAYER}attention.{name}", index=(0, 1), fill=1.0) for name in names)
    new = tuple(rule(f"{LAYER}attn.{name}", index=(0, 1), fill=1.0) for name in names)
    assert said(old, new) == [
        "'layers.{i}.attention.k_scale' (i 0-1) is now called 'layers.{i}.attn.k_scale'",
        "'layers.{i}.attention.v_scale' (i 0-1) is now called 'layers.{i}.attn.v_scale'",
    ]


def test_what_is_renamed_and_cut_otherwise_is_gone_and_new() -> None:
    assert said(rule("old", piece()), rule("new", piece(rows=2), fill=0.0)) == [
        "'old' is gone: BF16 [4, 6] of 'w'",
        "'new' is new: BF16 [4, 6] of 'w'",
    ]


def test_layouts_of_two_engine_versions() -> None:
    """OLMo 2 of vLLM 0.27 has no scales; 0.32's are four constants in each layer."""
    model = variants.model("olmo2")
    old, new = (vllm.for_config(model.config, version).outline(model, Parallel(2)) for version in ("0.27", "0.32"))
    assert difference.outlines(old, new) == [
        f"'model.layers.{{i}}.self_attn.attn._{x}_scale' (i 0-1) is new: F32 [] of 1" for x in ("k", "prob", "q", "v")
    ]
    assert [sentence.replace("gone", "new") for sentence in difference.outlines(new, old)] == difference.outlines(
        old, new
    )


def layout(version: str, *traced: Traced, tensors: dict[str, Logical] | None = None) -> FileLayout:
    """A layout file of one tensor."""
    held = {"w": Logical(DType.BF16, (4, 6))} if tensors is None else tensors
    return FileLayout("vllm", version, "Some", DType.BF16, held, traced)


def test_files_say_once_what_is_true_at_all_sizes() -> None:
    one = Recipe((rule("t", piece()),))
    other = Recipe((rule("u", piece()),))
    dropped = {"layers.0.g_idx": "x", "layers.1.g_idx": "x"}
    old = layout("0.27.0", *(Traced(Parallel(tp), one) for tp in (1, 2, 4)))
    new = layout(
        "0.32.0",
        Traced(Parallel(2), other, dropped, amendments={"tie_word_embeddings": False}),
        Traced(Parallel(4), other, uninitialised={"t": 7}),
    )
    assert difference.files(old, new) == [
        "the engine is vllm 0.32.0 instead of vllm 0.27.0",
        "'t' is now called 'u'",
        "at tp 2: the source tensor 'layers.{i}.g_idx' (i 0-1) is dropped now",
        "at tp 2: the setting 'tie_word_embeddings' of config.json is made now False",
        "at tp 4: elements of 't' are left as memory happens to be now: 7",
        "only the old layout is for tp 1",
    ]


def test_reasons_are_words_and_no_change() -> None:
    old = layout("0.32.0", Traced(Parallel(1), Recipe(()), {"w": "vLLM 0.31 does not load it"}))
    new = layout("0.32.0", Traced(Parallel(1), Recipe(()), {"w": "vLLM 0.32 does not load it"}))
    assert difference.files(old, new) == []


def test_files_of_different_checkpoints() -> None:
    other = layout("0.32.0", tensors={"w": Logical(DType.F32, (4, 6)), "x": Logical(DType.BF16, (1,))})
    assert difference.files(layout("0.32.0"), other) == [
        "they are of different checkpoints: 2 source tensors differ, first 'w'"
    ]


def test_windows_that_broadcast_are_compared_too() -> None:
    still = Piece(row_major((4, 6)), Window(0, (4, 6), (0, 1)), "w")
    moved = Piece(row_major((4, 6)), Window(6, (4, 6), (0, 1)), "w")
    assert said(rule("t", still), rule("t", still)) == []
    assert said(rule("t", still), rule("t", moved)) == ["'t' takes other elements of 'w'"]
