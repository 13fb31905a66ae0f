"""File names of shards: what a pattern may say, and that an engine's glob finds a rank's files and no others."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardtool.errors import PlanError, UsageError
from shardtool.pattern import DEFAULT, DEFAULT_PP, Pattern, check_names, parse

GOOD = [
    DEFAULT,
    "model-rank-{rank:02d}-part-{part}.safetensors",
    "{tp_rank}.safetensors",
    "rank{rank:3}/x{part}.safetensors",
    "a/b/{rank}/{part}.safetensors",
    "{{x}}-{rank}-{part}-{part}.safetensors",
    "{rank}-of-{rank:04d}-{part}.safetensors",
    "m-{rank:12d}-{part}.safetensors",
    "{rank}-{tp_rank}.safetensors",
]

BAD = [
    ("{rank}-{part:02d}.safetensors", "formats {part}"),
    ("{rank}-{part:d}.safetensors", "formats {part}"),
    ("{rank!r}-{part}.safetensors", "conversions"),
    ("{rank:x}.safetensors", "only a width"),
    ("{rank:d}.safetensors", "only a width"),
    ("{rank:<3}.safetensors", "only a width"),
    ("{rank:0}.safetensors", "only a width"),
    ("{rank:+02d}.safetensors", "only a width"),
    ("{rank:{part}}.safetensors", "only a width"),
    ("{}-{part}.safetensors", "has the field {}"),
    ("{0}-{part}.safetensors", "has the field {0}"),
    ("{rank.real}.safetensors", "has the field"),
    ("{rank[0]}.safetensors", "has the field"),
    ("{world_size}-{rank}.safetensors", "has the field {world_size}"),
    ("{rank.safetensors", "is not a pattern"),
    ("rank}.safetensors", "is not a pattern"),
    ("part-{part}.safetensors", "lacks {rank}"),
    ("{rank}-{pp_rank}.safetensors", "has {pp_rank}"),
    ("/abs/{rank}.safetensors", "leaves the output folder"),
    ("../{rank}.safetensors", "leaves the output folder"),
    ("a/./{rank}.safetensors", "leaves the output folder"),
    ("a//{rank}.safetensors", "leaves the output folder"),
    ("a\\{rank}.safetensors", "leaves the output folder"),
    ("a\0{rank}.safetensors", "leaves the output folder"),
    (".shardtool/{rank}.safetensors", "shardtool's own files"),
    ("{rank}.bin", "must end in .safetensors"),
    ("{rank}.safetensors/", "leaves the output folder"),
    ("", "lacks {rank}"),
]


@pytest.mark.parametrize("text", GOOD)
def test_a_pattern_of_vllms_fields_is_taken_as_it_is(text: str):
    made = parse(text, tp=16)
    assert made.text == text
    assert made.key(3, 1) == text.format(rank=3, tp_rank=3, part=1)
    assert made.glob(3) == text.format(rank=3, tp_rank=3, part="*")


@pytest.mark.parametrize(("text", "says"), BAD)
def test_any_other_pattern_is_refused_and_the_message_says_why(text: str, says: str):
    with pytest.raises(UsageError) as caught:
        parse(text, tp=2)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"--pattern {text!r}")


def test_a_single_rank_needs_no_rank_in_its_names_and_several_do():
    assert parse("part-{part}.safetensors", tp=1).glob(0) == "part-*.safetensors"
    with pytest.raises(UsageError, match="--tp 2 needs"):
        parse("part-{part}.safetensors", tp=2)


def test_pipeline_ranks_are_named_where_there_are_some():
    assert parse(DEFAULT_PP, tp=2, pp=2).key(1, 0, 1) == "model-pp-1-tp-1-part-0.safetensors"
    with pytest.raises(UsageError, match=r"lacks \{pp_rank\}"):
        parse(DEFAULT, tp=2, pp=2)


# Names read back.


@pytest.mark.parametrize("text", GOOD)
@given(tp_rank=st.integers(0, 1200), part=st.integers(0, 1200))
def test_a_name_that_a_pattern_made_is_read_back(text: str, tp_rank: int, part: int):
    made = parse(text, tp=2)
    found = made.regex().fullmatch(made.key(tp_rank, part))
    assert found
    assert all(int(value) == (part if name == "part" else tp_rank) for name, value in found.groupdict().items())
    assert set(found.groupdict()) == made.fields


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (DEFAULT, "model-rank-x-part-0.safetensors"),
        (DEFAULT, "model-rank--part-0.safetensors"),
        (DEFAULT, "model-rank-0-part-0Xsafetensors"),
        (DEFAULT, "a/model-rank-0-part-0.safetensors"),
        ("{rank:02d}.safetensors", "1.safetensors"),
        ("m{rank:3d}.safetensors", "m1.safetensors"),
        ("mmm{rank:3d}.safetensors", "mmm1.safetensors"),
        ("{rank:3d}.safetensors", "    1.safetensors"),
        ("{rank}-{rank}.safetensors", "1-2.safetensors"),
        ("a*{rank}.safetensors", "ab1.safetensors"),
    ],
)
def test_a_name_that_the_pattern_does_not_make_is_not_read(text: str, name: str):
    assert parse(text, tp=2).regex().fullmatch(name) is None


# Names that collide, globs that reach too far.


def check(text: str, tp: int = 2, parts: int = 1, taken=(), *, whole_key: bool = False) -> None:
    check_names(parse(text, tp=tp), [(r, 0) for r in range(tp)], parts, taken, whole_key=whole_key)


@pytest.mark.parametrize("text", [DEFAULT, "m{rank:02d}-{part}.safetensors", "r{rank}/{part}.safetensors"])
@pytest.mark.parametrize("whole_key", [False, True])
def test_names_with_a_separator_are_taken_for_many_ranks_and_parts(text: str, whole_key: bool):
    check(text, tp=12, parts=3, taken=["config.json"], whole_key=whole_key)


def test_a_rank_whose_glob_finds_another_ranks_files_is_refused():
    """Rank 1 looks for 1* and finds 11."""
    text = "model-{rank}{part}.safetensors"
    check(text, tp=2)
    with pytest.raises(
        PlanError, match=r"rank 1 with model-1\*\.safetensors, which also matches model-100?.* of rank 10"
    ):
        check(text, tp=12)


def test_a_glob_over_whole_keys_finds_what_ends_alike():
    """An engine that puts a star before the pattern finds rank 10 when it looks for rank 0."""
    check("{rank}.safetensors", tp=12)
    with pytest.raises(PlanError, match=r"rank 0 with 0\.safetensors, which also matches 10\.safetensors of rank 10"):
        check("{rank}.safetensors", tp=12, whole_key=True)


def test_two_parts_need_two_names():
    check("{rank}.safetensors", parts=1)
    with pytest.raises(PlanError, match=r"two files the name 0\.safetensors"):
        check("{rank}.safetensors", parts=2)


def test_a_shard_may_not_have_the_name_of_a_side_file():
    with pytest.raises(PlanError, match=r"side file 1\.safetensors"):
        check("{rank}.safetensors", taken=["1.safetensors"])


def test_a_name_that_an_engine_takes_for_a_glob_is_refused():
    with pytest.raises(PlanError, match=r"misses its own file m\[a\]0\.safetensors"):
        check("m[a]{rank}.safetensors")


LITERALS = st.text(alphabet="a1-_.[*?/", max_size=3)
FIELDS = st.sampled_from(["{rank}", "{rank:02d}", "{tp_rank}", "{part}"])


@given(
    st.lists(st.one_of(LITERALS, FIELDS), max_size=5), st.integers(0, 5), st.sampled_from([2, 12]), st.integers(1, 2)
)
def test_what_is_accepted_is_found_by_glob_on_real_files(
    tmp_path_factory: pytest.TempPathFactory, bits: list[str], at: int, tp: int, parts: int
):
    """Whether accepted or refused: it is what Python's own glob, which engines call, does with real files."""
    try:
        made = parse("".join([*bits[:at], "{rank}", *bits[at:]]) + ".safetensors", tp=tp)
    except UsageError:
        assume(False)
    names = {(rank, part): made.key(rank, part) for rank in range(tp) for part in range(parts)}
    folder = tmp_path_factory.mktemp("files")
    for name in names.values():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sound = len(set(names.values())) == len(names) and all(
        found(folder, made, rank) == {name for (whose, _), name in names.items() if whose == rank} for rank in range(tp)
    )
    try:
        check(made.text, tp, parts)
    except PlanError:
        assert not sound
    else:
        assert sound


def found(folder: Path, made: Pattern, rank: int) -> set[str]:
    """What an engine finds of a rank."""
    return {str(Path(path).relative_to(folder)) for path in glob.glob(str(folder / made.glob(rank)))}
