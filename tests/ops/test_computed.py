"""Layouts that compute: shards hold what an engine makes of a tensor, the tensor itself is kept for merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import shardtool
from shardtool.dtypes import DType
from shardtool.layouts import file as files
from shardtool.layouts.file import FileLayout, Traced
from shardtool.mosaic import Logical
from shardtool.ops import save as saving
from shardtool.parallel import Parallel
from shardtool.plan import Mosaic, Piece, Program
from shardtool.recipe import Recipe, Rule, Share
from shardtool.window import Window, row_major
from tests.builders import Raw, config, contents, flipped, model, put, random

LOG = "layers.0.A_log"
PARTLY = "layers.0.w"
SOURCES = {LOG: Logical(DType.F32, (8,)), PARTLY: Logical(DType.BF16, (6, 4))}


def layout() -> FileLayout:
    """Two ranks: ``-exp(A_log)``, four elements each; and the first two rows of six, whole."""
    shares = []
    half = row_major((4,))
    for rank in range(2):
        taken = Mosaic(DType.F32, (4,), (Piece(half, Window(4 * rank, (4,), (1,)), LOG),))
        inner = Program("exp", (taken,), DType.F32, (4,))
        outer = Program("neg", (Mosaic(DType.F32, (4,), (Piece(half, half, inner),)),), DType.F32, (4,))
        shares.append(Share((rank,), (4,), (Piece(half, half, outer),)))
    rows = row_major((2, 4))
    whole = Share((0, 1), (2, 4), (Piece(rows, rows, PARTLY),))
    recipe = Recipe((Rule("layers.0.A", DType.F32, tuple(shares)), Rule(PARTLY, DType.BF16, (whole,))))
    return FileLayout("vllm", "0.32.0", "MambaForCausalLM", DType.BF16, SOURCES, (Traced(Parallel(2), recipe),))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    held: dict[str, Raw] = {name: random(t.shape, t.dtype.name, i) for i, (name, t) in enumerate(SOURCES.items())}
    put(tmp_path / "model", model(config(architectures=["MambaForCausalLM"]), held))
    (tmp_path / "layout.json").write_bytes(files.encode(layout()))
    return tmp_path


def saved(place: Path) -> Path:
    shardtool.save(place / "model", place / "out", tp=2, layout=str(place / "layout.json"))
    return place / "out"


def test_each_rank_holds_what_the_engine_computes(place: Path):
    source = load((place / "model" / "model.safetensors").read_bytes())
    out = saved(place)
    for rank in range(2):
        held = load((out / f"model-rank-{rank}-part-0.safetensors").read_bytes())
        assert torch.equal(held["layers.0.A"], -torch.exp(source[LOG][4 * rank : 4 * rank + 4]))
        assert torch.equal(held[PARTLY], source[PARTLY][:2])


def test_what_was_computed_from_is_kept_however_much_is_dropped(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "KEPT_MOST", 0)
    out = saved(place)
    assert shardtool.verify(out, against=place / "model").ok
    shardtool.merge(out, place / "merged")
    assert shardtool.verify(place / "merged", against=place / "model").ok
    shardtool.reshard(out, place / "again", tp=2)
    first, again = contents(out), contents(place / "again")
    assert {k: v for k, v in first.items() if "rank" in k} == {k: v for k, v in again.items() if "rank" in k}


def test_people_are_told(place: Path):
    notes = shardtool.save(place / "model", place / "x", tp=2, layout=str(place / "layout.json"), dry_run=True).notes
    assert f"{LOG} is dropped: the shards hold what vllm computes of it (kept for merge)" in notes
    assert f"{PARTLY} is dropped: vllm takes only a part of it; check config.json (kept for merge)" in notes


def test_a_source_that_differs_is_found_through_the_program(place: Path):
    out = saved(place)
    path = place / "model" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) - 6 * 4 * 2 - 3))  # the high byte of an element of A_log
    report = shardtool.verify(out, against=place / "model")
    assert not report.ok
    assert {one.name for one in report.differences} == {"layers.0.A", LOG}
