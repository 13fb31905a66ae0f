"""The built-in tables: they find their models, name rules that exist, and know the engine's versions."""

from __future__ import annotations

from typing import Any

import pytest

from shardtool.dtypes import DType
from shardtool.errors import UnsupportedModel, UsageError
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Parallel
from shardtool.layouts.tables import ENGINE_VERSION, FAMILIES, VERSIONS, find, known
from shardtool.layouts.tables.language import Family, between
from shardtool.layouts.vocabulary import RULES
from shardtool.mosaic import Logical
from tests import builders
from tests.layouts import classic

NAMES = [f"{family.name}-{family.since or 'first'}" for family in FAMILIES]


KINDS = {**builders.KINDS, **classic.KINDS}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_family_is_found_by_its_architecture(kind: builders.Kind | classic.Kind):
    assert kind.architecture in find({"architectures": [kind.architecture]}).architectures


def test_the_first_known_architecture_counts():
    found = find({"architectures": ["MyOwnModel", "Qwen3ForCausalLM", "LlamaForCausalLM"]})
    assert found.name == "qwen3"


@pytest.mark.parametrize(
    "config", [{}, {"architectures": None}, {"architectures": "LlamaForCausalLM"}, {"architectures": [3]}]
)
def test_a_config_without_architecture_is_refused(config: dict[str, Any]):
    with pytest.raises(UnsupportedModel, match=r"no architecture in config\.json"):
        find(config)


def test_an_unknown_architecture_is_refused_with_all_that_are_known():
    with pytest.raises(UnsupportedModel, match="the architecture MambaForCausalLM is not one") as error:
        find({"architectures": ["MambaForCausalLM"]})
    assert all(name in str(error.value) for name in known())


@pytest.mark.parametrize("version", VERSIONS)
def test_no_architecture_has_two_tables_for_one_version(version: str):
    names = known(version)
    assert len(names) == len(set(names))
    assert {name for family in FAMILIES for name in family.architectures} >= set(names)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_table_uses_rules_that_exist_and_names_no_target_twice_under_one_condition(family: Family):
    assert {row.rule for row in family.rows} <= set(RULES)
    for version in VERSIONS:
        if between(family.since, version, family.until):
            seen = [(row.to, row.when) for row in family.at(version).rows]
            assert len(seen) == len(set(seen))


# Versions.


@pytest.mark.parametrize("version", ["0.9", "0.28", "1.0", "", "new", "0"])
def test_a_version_that_no_table_knows_is_refused_with_those_that_are_known(version: str):
    with pytest.raises(UsageError, match="the built-in tables know the layouts of vllm 0") as error:
        find({"architectures": ["LlamaForCausalLM"]}, version)
    assert ", ".join(VERSIONS) in str(error.value)


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.1", "0.24.0"])
def test_a_version_is_known_by_its_first_two_numbers(version: str):
    layout = vllm.for_config({"architectures": ["LlamaForCausalLM"]}, version)
    assert layout.engine_version == layout.record()["engine_version"] == version


def test_the_newest_version_is_the_one_that_is_meant_where_nothing_is_said():
    assert VERSIONS[-1] == ENGINE_VERSION
    assert find({"architectures": ["LlamaForCausalLM"]}) == find({"architectures": ["LlamaForCausalLM"]}, VERSIONS[-1])


def held(family: str, version: str, **changes: Any) -> set[str]:
    """The names of what a rank holds."""
    made = classic.config(family, **changes)
    sources = {name: Logical(DType.BF16, shape) for name, shape in classic.KINDS[family].shapes(made).items()}
    outline = vllm.for_config(made, version).outline(Model(made, sources, DType.BF16), Parallel(1))
    return {tensor.name for tensor in outline.recipe.tensors(0)}


@pytest.mark.parametrize("version", ["0.24", "0.27", "0.31"])
def test_gpt_neox_kept_its_own_names_before_it_ran_in_the_transformers_backend(version: str):
    made = classic.config("gpt_neox")
    old = set(classic.KINDS["gpt_neox"].shapes(made))
    at = "gpt_neox.layers.{}.attention.attn._{}_scale"
    assert held("gpt_neox", version) == old | {at.format(i, x) for i in (0, 1) for x in ("k", "v", "q", "prob")}
    assert "model.embed_in.weight" in held("gpt_neox", "0.32")


def test_gpt_neox_regrouped_q_k_and_v_before_it_ran_in_the_transformers_backend():
    """So that a rank's rows are those of its heads of q, then k, then v."""
    made = classic.config("gpt_neox")
    sources = {name: Logical(DType.BF16, shape) for name, shape in classic.KINDS["gpt_neox"].shapes(made).items()}
    model = Model(made, sources, DType.BF16)
    pieces = {}
    for version in ("0.31", "0.32"):
        outline = vllm.for_config(made, version).outline(model, Parallel(2))
        (found,) = [t for t in outline.recipe.tensors(1) if t.name.endswith("layers.0.attention.query_key_value.bias")]
        pieces[version] = [(piece.src.offset, piece.src.size) for piece in found.pieces()]
    dim, heads = 4, 6
    assert pieces["0.32"] == [(heads * 3 * dim, heads * 3 * dim)]
    assert pieces["0.31"] == [(heads * 3 * dim + i * dim, heads * dim) for i in range(3)]


@pytest.mark.parametrize("family", ["olmo2", "starcoder2"])
def test_the_transformers_backend_kept_no_scales_at_first(family: str):
    counts = {version: sum("_scale" in name for name in held(family, version)) for version in VERSIONS}
    assert counts == {"0.24": 8, "0.27": 0, "0.31": 8, "0.32": 8}


def test_olmo2_had_no_biases_of_its_own_class():
    biases = {v: sum(name.endswith(".bias") for name in held("olmo2", v, attention_bias=True)) for v in VERSIONS}
    assert biases == {"0.24": 0, "0.27": 4, "0.31": 4, "0.32": 4}


def test_granite_had_no_sinks_at_first():
    made = builders.config("granite", attention_sinks=True)
    rows = {version: {row.to for row in find(made, version).rows} for version in VERSIONS}
    assert [version for version in VERSIONS if "model.layers.{i}.self_attn.sinks" in rows[version]] == ["0.31", "0.32"]


@pytest.mark.parametrize(("version", "looks"), [("0.24", False), ("0.27", False), ("0.31", True), ("0.32", True)])
def test_older_engines_do_not_look_for_a_head_of_a_tied_model(version: str, looks: bool):
    made = builders.config(tie_word_embeddings=True)
    sources = {name: Logical(DType.BF16, shape) for name, shape in builders.shapes(made).items()}
    sources["lm_head.weight"] = sources["model.embed_tokens.weight"]
    outline = vllm.for_config(made, version).outline(Model(made, sources, DType.BF16), Parallel(1))
    assert outline.amendments == ({"tie_word_embeddings": False} if looks else {})
    assert ("lm_head.weight" in outline.dropped) is not looks
