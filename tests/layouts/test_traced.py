"""The built-in tables say what the engines themselves were seen to do (``tests/layouts/traced``)."""

from __future__ import annotations

import pytest

from shardtool.layouts import difference, sglang, vllm
from shardtool.layouts.base import Layout, Outline
from shardtool.layouts.tables import FAMILIES, find
from shardtool.layouts.tables.language import between
from tests.layouts import traced
from tests.layouts.traced import Golden

QUANTIZATION = "quantization_config"
ALL = [(group, name) for group in traced.SETS for name in traced.names(group)]


def built_in(kept: Golden) -> Layout:
    """The table's layout for the engine's version."""
    if kept.layout.engine == "sglang":
        return sglang.for_config(kept.config, kept.layout.engine_version)
    return vllm.for_config(kept.config, ".".join(kept.layout.engine_version.split(".")[:2]))


def test_there_are_some_of_every_engine() -> None:
    assert set(traced.SETS) == {"sglang-0.5.23", "vllm-0.24.0", "vllm-0.27.0", "vllm-0.32.0"}


def test_every_family_of_vllm_was_traced() -> None:
    kept = [traced.read("vllm-0.32.0", name).config for name in traced.names("vllm-0.32.0")]
    assert {find(config, "0.32").name for config in kept} == {
        family.name for family in FAMILIES if between(family.since, "0.32", family.until)
    }


def test_they_are_small() -> None:
    sizes = [path.stat().st_size for path in traced.FOLDER.rglob("*.json")]
    assert max(sizes) < 64 << 10
    assert sum(sizes) < 2 << 20


@pytest.mark.parametrize(("group", "name"), ALL, ids=[f"{group}-{name}" for group, name in ALL])
def test_the_table_says_what_was_traced(group: str, name: str) -> None:
    kept = traced.read(group, name)
    layout = built_in(kept)
    for one in kept.layout.traced:
        found = layout.outline(kept.model, one.parallel)
        seen = Outline(one.recipe, one.dropped, one.copies, one.amendments)
        if QUANTIZATION in found.amendments:  # both name the quantized modules, each in words of its own
            assert QUANTIZATION in seen.amendments
            same = {**found.amendments, QUANTIZATION: seen.amendments[QUANTIZATION]}
            found = Outline(found.recipe, found.dropped, found.copies, same)
        assert difference.outlines(found, seen) == []


def test_every_family_of_sglang_was_traced() -> None:
    held = {traced.read("sglang-0.5.23", name).config["architectures"][0] for name in traced.names("sglang-0.5.23")}
    families = {sglang.for_config({"architectures": [name]}).family.name for name in held}
    assert families == set(sglang.CHANGES)


def test_what_changed_between_two_versions() -> None:
    old, new = (traced.read(f"vllm-{version}", "olmo2").layout for version in ("0.24.0", "0.27.0"))
    said = difference.files(old, new)
    assert said[:2] == [
        "the engine is vllm 0.27.0 instead of vllm 0.24.0",
        "the class of the model is TransformersForCausalLM instead of Olmo2ForCausalLM",
    ]
    assert [sentence.partition(":")[0] for sentence in said[2:]] == [
        f"'model.layers.{{i}}.self_attn.attn._{x}_scale' (i 0-1) is gone" for x in ("k", "prob", "q", "v")
    ]
