"""The command line: what each command prints, to whom, and with which code it ends."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shardtool import BudgetTooSmall, NotFound, ShardtoolError, UsageError, __version__
from shardtool.cli import main
from shardtool.cli.program import Program
from tests import builders
from tests.commands import RANK_1, ROOT, Ended, apart, damage, documented, environment, here

COMMANDS = ("bench", "clean", "inspect", "load", "merge", "pull", "reshard", "save", "trace", "verify")


@pytest.fixture(params=[here, apart], ids=["in this process", "in its own process"])
def shardtool(request: pytest.FixtureRequest) -> Callable[..., Ended]:
    """Runs a command line in either way."""
    return request.param


# Starting.


def test_the_version_is_told(shardtool):
    assert shardtool("--version") == Ended(0, f"shardtool {__version__}\n", "")


def test_help_lists_every_command_with_a_whole_sentence():
    ended = here("--help")
    listed = dict(re.findall(r"^  (\w+)  +(.+)$", ended.out.partition("Commands:")[2], re.MULTILINE))
    assert tuple(listed) == COMMANDS
    assert all(text.endswith(".") and not text.endswith("...") for text in listed.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_ends_with_an_example_of_it(name):
    ended = here(name, "--help")
    assert ended.code == 0
    assert ended.out.splitlines()[-1].startswith(f"  Example: shardtool {name} ./llama")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_explains_itself_and_stands_in_the_document(name):
    document = (ROOT / "docs" / "cli.md").read_text()
    section = document.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, parameter.name
            flags = [*parameter.opts, *parameter.secondary_opts]
            assert any(f"`{flag}" in section for flag in flags), f"{flags} of {name} is not in docs/cli.md"


def test_the_defaults_that_help_tells_are_those_of_the_operations():
    from shardtool import budget, pattern
    from shardtool.ops import limits, merge, save, stream
    from shardtool.units import parse_size

    def told(name: str, flag: str) -> str:
        (option,) = (p for p in main.commands[name].params if isinstance(p, click.Option) and flag in p.opts)
        return (option.help or "").partition("[default: ")[2].rstrip("]")

    assert parse_size(told("save", "--max-part-size"), "") == save.PART_SIZE
    assert parse_size(told("merge", "--max-part-size"), "") == merge.FILE_SIZE
    most = told("save", "--memory-limit").removeprefix("half of what is free, ").removesuffix(" at most")
    assert parse_size(most, "") == budget.DEFAULT_MOST
    assert told("save", "--pattern") == told("reshard", "--pattern") == pattern.DEFAULT
    assert told("save", "--concurrency") == str(limits.CONCURRENCY)
    assert told("load", "--concurrency") == f"{stream.LOCAL}, and {stream.CONCURRENCY} for storage that is far away"


def test_without_a_command_help_goes_to_stderr_and_the_code_is_that_of_usage(shardtool):
    ended = shardtool()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Usage: shardtool ")


# The way through.


def test_a_model_is_saved_checked_loaded_resharded_and_merged_back(shardtool, work):
    saved = shardtool("save", "llama", "--tp", "4", "-o", "tp4")
    assert (saved.code, saved.err) == (0, "")
    lines = saved.out.splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [
        [f"model-rank-{rank}-part-0.safetensors", "rank", str(rank)] for rank in range(4)
    ]
    assert re.fullmatch(
        r"tp4: tp 4 shards of llama, [\d.]+ MiB in 4 files, .+ s \([\d.]+ GB/s\), peak memory [\d.]+ [MG]iB", lines[-1]
    )

    verified = shardtool("verify", "tp4", "--against", "llama")
    assert (verified.code, verified.err) == (0, "")
    lines = verified.out.splitlines()
    assert all(line.endswith(": OK") for line in lines[:-1])
    assert "model-rank-3-part-0.safetensors: OK" in lines
    assert lines[-1].startswith("tp4: OK (compared with llama; ")

    loaded = shardtool("load", "tp4")
    assert (loaded.code, loaded.err) == (0, "")
    *ranks, whole, spent = loaded.out.splitlines()
    assert [line.split()[:3] for line in ranks] == [["rank", str(r), "cpu"] for r in range(4)]
    assert ", digests checked, peak memory " in whole
    assert re.fullmatch(
        r"time of \d+ readers: storage \S+ s, digests \S+ s; waited \S+ s for data and \S+ s for the consumer; "
        r"storage was busy \d+% of the time and gave [\d.]+ GB/s then",
        spent,
    )

    assert shardtool("reshard", "tp4", "--tp", "2", "-o", "tp2").code == 0
    assert shardtool("merge", "tp2", "-o", "merged").code == 0
    source, merged = builders.contents(work / "llama"), builders.contents(work / "merged")
    assert builders.whole_tensors(merged) == builders.whole_tensors(source)
    assert merged["config.json"] == source["config.json"]


def test_inspect_tells_what_lies_there(shardtool, shards):
    ended = shardtool("inspect", "tp2")
    assert (ended.code, ended.err) == (0, "")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in ended.out.splitlines())
    assert facts["kind"] == "sharded"
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["tp"] == "2"
    assert RANK_1 in facts
    assert facts["BF16"].endswith("MiB")


def test_inspect_lists_tensors_and_nothing_else(shardtool, shards):
    ended = shardtool("inspect", "tp2", "--tensors", "model.layers.1.*.qkv_proj.weight")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert ended == Ended(
        0,
        f"{name}  rank 0  model-rank-0-part-0.safetensors  BF16  [192, 256]  96.0 KiB\n"
        f"{name}  rank 1  {RANK_1}  BF16  [192, 256]  96.0 KiB\n",
        "",
    )


def test_a_dry_run_tells_the_plan_and_writes_nothing(shardtool, work):
    ended = shardtool("save", "llama", "--tp", "2", "-o", "tp2", "--dry-run", "--memory-limit", "1GiB", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert "tp2: would hold tp 2 shards of llama\n" in ended.out
    assert re.search(r"^memory: [\d.]+ KiB \(\d+ bytes\) at least, 1\.0 GiB at most$", ended.out, re.MULTILINE)
    assert not (work / "tp2").exists()


def test_a_second_run_tells_that_nothing_was_to_be_done(shards):
    assert here("save", "llama", "--tp", "2", "-o", "tp2").out.endswith(
        ": complete already (same headers, samples, flags; shardtool verify --against checks every byte)\n"
    )


def test_ranks_are_written_apart_and_the_last_one_completes_the_checkpoint(work):
    first = here("save", "llama", "--tp", "4", "-o", "tp4", "--ranks", "0,2-3", "--json").json
    assert (first["complete"], [file["rank"] for file in first["files"]]) == (False, [0, 2, 3])
    assert here("verify", "tp4").code == 4
    assert here("save", "llama", "--tp", "4", "-o", "tp4", "--ranks", "1", "--json").json["complete"] is True
    assert here("verify", "tp4").code == 0


def test_flags_of_save_reach_the_files(work):
    flags = ["--pattern", "r{rank}.p{part}.safetensors", "--max-part-size", "500KB", "--dtype", "float16"]
    assert (
        here("save", "llama", "--tp", "2", "-o", "out", *flags, "--memory-limit", "8MiB", "--concurrency", "2").code
        == 0
    )
    found = here("inspect", "out", "--json").json
    assert (found["pattern"], found["dtype"]) == ("r{rank}.p{part}.safetensors", "F16")
    assert {file["key"] for file in found["files"]} > {"r0.p0.safetensors", "r0.p1.safetensors", "r1.p1.safetensors"}


def test_shards_without_a_manifest_are_found_by_their_pattern(shards):
    (shards / "shardtool.json").unlink()
    for rank in range(2):
        (shards / f"model-rank-{rank}-part-0.safetensors").rename(shards / f"r{rank}.p0.safetensors")
    named = ("--pattern", "r{rank}.p{part}.safetensors")
    assert here("inspect", "tp2", *named, "--json").json["kind"] == "shards"
    assert here("verify", "tp2", *named, "--against", "llama", "-q") == Ended(0, "", "")
    assert here("load", "tp2", *named, "--json").json["verified"] is False
    assert here("merge", "tp2", "--source-pattern", named[1], "-o", "merged", "-q").code == 0
    assert here("verify", "merged", "--against", "llama", "-q").code == 0


def test_float32_is_a_dtype_too(work):
    assert "float32" in here("save", "--help").out
    assert here("save", "llama", "--tp", "2", "-o", "out", "--dtype", "float32", "-q") == Ended(0, "", "")
    assert here("inspect", "out", "--json").json["dtype"] == "F32"


def test_a_folder_that_is_called_like_a_file_goes_through_every_command(work):
    assert here("save", "llama", "--tp", "2", "-o", "tp2.safetensors", "-q") == Ended(0, "", "")
    assert here("inspect", "tp2.safetensors", "--json").json["kind"] == "sharded"
    assert here("verify", "tp2.safetensors", "--against", "llama", "-q") == Ended(0, "", "")
    assert here("load", "tp2.safetensors", "-q") == Ended(0, "", "")
    assert here("merge", "tp2.safetensors", "-o", "merged.safetensors", "-q") == Ended(0, "", "")
    assert here("verify", "merged.safetensors", "--against", "llama", "-q") == Ended(0, "", "")


# What is wrong.


def test_inspect_shows_what_is_there_and_ends_with_4_if_files_are_missing(shardtool, shards):
    (shards / RANK_1).unlink()
    ended = shardtool("inspect", "tp2")
    assert (ended.code, ended.err) == (4, "")
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["missing", "1", "file"] in lines
    assert [RANK_1, "missing"] in lines
    assert [line[1:3] for line in lines if line[0].startswith("model-rank-0")] == [["rank", "0"]]
    assert shardtool("inspect", "tp2", "--json").json["missing"] == [RANK_1]
    ended = shardtool("inspect", "tp2", "--tensors", "model.norm.weight")
    assert (ended.code, ended.out.count("\n")) == (4, 1)
    assert ended.err == f"note: {RANK_1} is missing; its tensors are not listed\n"


@pytest.mark.parametrize(
    "words",
    [
        ("save", "llama", "--tp", "2", "-o", "memory://a"),
        ("inspect", "Memory://a"),
        ("verify", "llama", "--against", "memory://a"),
        ("load", "memory://a"),
    ],
)
def test_an_address_that_keeps_nothing_is_refused(work, words):
    ended = here(*words)
    assert (ended.code, ended.out) == (2, "")
    assert re.search(r"'memory://a' keeps nothing between commands; name a folder or a bucket", ended.err, re.I)


def test_damage_is_told_file_by_file_and_ends_with_1(shardtool, shards):
    damage(shards / RANK_1)
    ended = shardtool("verify", "tp2", "--quiet")
    first, last = ended.out.splitlines()
    assert (ended.code, ended.err) == (1, "")
    assert first.startswith(f"{RANK_1}: FAILED (tensor 'model.norm.weight' differs from its digest")
    assert re.fullmatch(r"tp2: FAILED \(structure and digests checked; 1 of \d+ files failed\)", last)


def test_a_difference_is_told_tensor_by_tensor_with_its_values(shards):
    damage(shards / RANK_1)
    ended = here("verify", "tp2", "--against", "llama", "-q")
    assert ended.code == 1
    number = r"-?[\d.e+-]+"
    line = (
        rf"model\.norm\.weight: rank 1, {RANK_1}: 1 of 256 elements differ, first at \[255\]: "
        rf"expected {number}, found {number}, max abs difference {number}"
    )
    assert any(re.fullmatch(line, found) for found in ended.out.splitlines())
    (found,) = here("verify", "tp2", "--against", "llama", "--json").json["differences"]
    assert (found["name"], found["rank"], found["key"]) == ("model.norm.weight", 1, RANK_1)
    assert (found["count"], found["elements"], found["first"], found["shape"]) == (1, 256, [255], [256])
    assert found["expected"] == -found["actual"]
    assert found["max_abs"] == 2 * abs(found["expected"])


def test_a_missing_file_ends_with_4_and_missing_with_damage_with_1(shards):
    (shards / RANK_1).unlink()
    assert here("verify", "tp2", "--quick").code == 4
    damage(shards / "model-rank-0-part-0.safetensors")
    assert here("verify", "tp2").code == 1


def test_a_damaged_input_is_not_converted(shards):
    damage(shards / RANK_1)
    ended = here("reshard", "tp2", "--tp", "4", "-o", "tp4")
    assert ended.code == 1
    assert RANK_1 in ended.err
    assert here("reshard", "tp2", "--tp", "4", "-o", "tp4", "--no-verify").code == 0


CODES = [
    (1, "ChecksumMismatch", ("load", "damaged"), "model.norm.weight"),
    (2, "UsageError", ("save", "llama", "-o", "out"), "Missing option '--tp' (see shardtool save --help)"),
    (2, "UsageError", ("save", "llama", "--tp", "0", "-o", "out"), "'--tp': 0 is not a number from 1 to"),
    (2, "UsageError", ("save", "llama", "--tp", "2", "-o", "out", "--ranks", "1-"), "'1-' is not a list of ranks"),
    (2, "UsageError", ("save", "llama", "--tp", "2", "-o", "out", "--ranks", "2"), "--ranks names rank 2"),
    (2, "UsageError", ("load", "llama", "--concurrency", "0"), "--concurrency 0 is not a number of readers"),
    (2, "UsageError", ("load", "llama", "--device", "tpu"), "--device 'tpu' is not a device"),
    (2, "UsageError", ("load", "llama", "--memory-limit", "lots"), "--memory-limit 'lots' is not a size"),
    (2, "UsageError", ("verify", "tp2", "--quick", "--against", "llama"), "--quick"),
    (2, "UsageError", ("frobnicate",), "No such command 'frobnicate'"),
    (2, "PlanError", ("save", "llama", "--tp", "3", "-o", "out"), "cannot be divided by --tp 3"),
    (2, "PlanError", ("merge", "llama", "-o", "out"), "llama is not sharded"),
    (3, "NotFound", ("inspect", "nowhere"), "nowhere does not exist"),
    (3, "NotFound", ("load", "tp2", "--rank", "2"), "tp2 has no rank 2"),
    (3, "NotFound", ("inspect", "llama", "--tensors", "no.*"), "no tensor that --tensors 'no.*' names"),
    (4, "Incomplete", ("load", "halved"), f"{RANK_1} is missing"),
    (5, "StoreError", ("save", "llama", "--tp", "2", "-o", "x" * 300), "failed: File name too long"),
    (
        6,
        "BudgetTooSmall",
        ("save", "llama", "--tp", "2", "-o", "out", "--memory-limit", "10"),
        "bytes (192.1 KiB) would do",
    ),
]


@pytest.mark.parametrize(
    ("code", "kind", "words", "message"), CODES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_kind_of_error_is_one_line_with_its_exit_code(code, kind, words, message, shards):
    shutil.copytree(shards, "damaged")
    damage(Path("damaged", RANK_1))
    shutil.copytree(shards, "halved")
    Path("halved", RANK_1).unlink()
    ended = here(*words)
    assert (ended.code, ended.out) == (code, "")
    assert re.fullmatch(rf"shardtool: error: .*{re.escape(message)}.*\n", ended.err)
    as_json = here(*words, "--json")
    assert (as_json.code, as_json.err) == (ended.code, ended.err)
    error = as_json.json["error"]
    assert (error.pop("kind"), error.pop("exit_code")) == (kind, code)
    assert f"shardtool: error: {error.pop('message')}\n" == ended.err
    assert error == {} if code != 6 else error["needed"] > 10
    assert not Path("out").exists()


@pytest.mark.parametrize(("code", "words"), [(code, words) for code, _, words, _ in CODES if code in (2, 3, 5, 6)][::4])
def test_a_process_ends_with_the_same_codes_and_no_traceback(code, words, shards):
    ended = apart(*words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (code, "", 1)


def failing(error: BaseException) -> Program:
    """A program whose one command raises."""

    def fail() -> None:
        raise error

    program = Program("shardtool")
    program.command("fail")(click.option("--json", is_flag=True, expose_value=False)(fail))
    return program


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 5, "there is not enough memory: use a lower --memory-limit or --concurrency"),
        (
            OSError(12, "Cannot allocate memory"),
            5,
            "there is not enough memory: use a lower --memory-limit or --concurrency",
        ),
        (OSError(28, "No space left on device", "/here"), 5, "/here: No space left on device"),
        (OSError("odd"), 5, "odd"),
        (OutOfMemoryError("CUDA ..."), 5, "the GPU has not enough memory for the tensors"),
        (ShardtoolError("as it says"), 1, "as it says"),
        (UsageError("two\nlines"), 2, r"two\nlines"),
        (NotFound("\x1b[2J"), 3, r"\x1b[2J"),
        (BudgetTooSmall("more", needed=7), 6, "more"),
    ],
)
def test_what_a_command_raises_on_purpose_or_the_system_refuses_is_one_sentence(error, code, message):
    done = CliRunner().invoke(failing(error), ["fail"])
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"shardtool: error: {message}\n")


def test_a_mistake_of_ours_is_not_hidden():
    done = CliRunner().invoke(failing(RuntimeError("a bug")), ["fail"])
    assert isinstance(done.exception, RuntimeError)


def test_another_platform_is_refused_in_one_sentence():
    code = "import sys; sys.platform = 'sunos5'; from shardtool.cli import main; main(['inspect', 'llama'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("shardtool: error: shardtool runs on Linux and macOS, not on sunos5")


# JSON.

WRITTEN = {
    *("command", "output", "dry_run", "what", "files", "bytes_to_write", "bytes_to_read", "least_memory"),
    *("memory_limit", "written", "kept", "complete", "notes", "details", "seconds", "gb_per_s", "peak_memory"),
    "memory_after_imports",
}


def test_json_of_what_was_written_has_every_field(shardtool, work):
    made = shardtool("save", "llama", "--tp", "2", "-o", "tp2", "--json")
    assert made.err == ""
    found = made.json
    assert set(found) == WRITTEN == documented("save") == documented("merge")
    sizes = [
        {"key": path.name, "rank": rank, "size": path.stat().st_size}
        for rank, path in enumerate(sorted(work.glob("tp2/model-*")))
    ]
    assert found["files"] == sizes
    assert found["written"] == found["bytes_to_write"] == sum(file["size"] for file in sizes)
    assert (found["command"], found["output"], found["complete"], found["kept"]) == ("save", "tp2", True, 0)
    assert found["peak_memory"] >= found["memory_after_imports"] > 1 << 20
    planned = shardtool("reshard", "tp2", "--tp", "4", "-o", "tp4", "--dry-run", "--json").json
    assert set(planned) == WRITTEN
    assert (planned["dry_run"], planned["written"], planned["complete"]) == (True, 0, False)


def test_json_of_the_other_commands_has_the_documented_keys(shardtool, shards):
    loaded = shardtool("load", "tp2", "--json").json
    assert set(loaded) == documented("load")
    assert [rank["rank"] for rank in loaded["ranks"]] == [0, 1]
    assert loaded["bytes"] == sum(rank["bytes"] for rank in loaded["ranks"])
    assert loaded["verified"] is True
    verified = shardtool("verify", "tp2", "--json").json
    assert set(verified) == documented("verify")
    assert (verified["ok"], verified["exit_code"], verified["differences"]) == (True, 0, [])
    assert {"key", "size", "ok", "missing", "why"} == set(verified["files"][0])
    quick = shardtool("verify", "tp2", "--quick", "--json").json["files"][0]
    assert documented("verify", inner="files") == set(quick)
    inspected = shardtool("inspect", "tp2", "--tensors", "*norm*", "--json").json
    assert set(inspected) == documented("inspect")
    assert {"name", "rank", "key", "dtype", "shape", "bytes"} == set(inspected["tensor_list"][0])
    assert set(shardtool("bench", "tp2", "--seconds", "0.1", "--json").json) == documented("bench")


def test_damage_in_json_is_a_report_and_not_an_error(shards):
    damage(shards / RANK_1)
    ended = here("verify", "tp2", "--json")
    assert (ended.code, ended.json["ok"], ended.json["exit_code"]) == (1, False, 1)


# Notes, quiet, names that nobody has checked.


def with_a_dropped_tensor(folder: Path) -> None:
    """Add a tensor that no rank needs."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    config = builders.config()
    builders.put(folder, builders.model(config, builders.tensors(config) | {name: builders.random((2,), "F32")}))


def test_notes_go_to_stderr_and_quiet_leaves_them_out(tmp_path, monkeypatch):
    with_a_dropped_tensor(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    loud = here("save", "old", "--tp", "2", "-o", "a")
    assert loud.err.startswith("note: model.layers.0.self_attn.rotary_emb.inv_freq is dropped: ")
    assert "note" not in loud.out
    assert here("save", "old", "--tp", "2", "-o", "b", "--quiet") == Ended(0, "", "")
    quiet = here("save", "old", "--tp", "2", "-o", "c", "--quiet", "--json")
    assert quiet.err == ""
    assert len(quiet.json["notes"]) == 1


@pytest.mark.parametrize(
    "words",
    [("verify", "tp2"), ("load", "tp2"), ("reshard", "tp2", "--tp", "1", "-o", "tp1"), ("merge", "tp2", "-o", "m")],
)
def test_quiet_says_nothing_when_all_is_well(shards, words, monkeypatch):
    assert here(*words, "-q") == Ended(0, "", "")
    monkeypatch.setenv("SHARDTOOL_QUIET", "1")
    assert here(*words) == Ended(0, "", "")
    assert here(*words, "--no-quiet").out != ""


def test_names_cannot_command_the_terminal(shardtool, tmp_path):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(builders.safetensors({"a\x1b[31m\nb": builders.random((1,), "F32")}))
    assert shardtool("inspect", path, "--tensors", "*").out.startswith("a\\x1b[31m\\nb  ")


# The environment.


def test_a_flag_wins_over_our_variable_and_ours_over_the_twin(work, monkeypatch):
    plan = ("save", "llama", "--tp", "2", "-o", "tp2", "--dry-run", "--json")
    default = here(*plan).json["memory_limit"]
    monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "3000000")
    assert here(*plan).json["memory_limit"] == 3_000_000 != default
    monkeypatch.setenv("SHARDTOOL_MEMORY_LIMIT", "4MiB")
    assert here(*plan).json["memory_limit"] == 4 << 20
    assert here(*plan, "--memory-limit", "5MiB").json["memory_limit"] == 5 << 20


def test_a_bad_variable_is_an_error_that_names_it(shards, monkeypatch):
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "all")
    assert here("verify", "tp2") == Ended(
        2, "", "shardtool: error: RUNAI_STREAMER_CONCURRENCY 'all' is not a whole number\n"
    )


@pytest.mark.parametrize("layout", ["vllm", "vllm:builtin", "sglang", "transformers"])
def test_the_variable_of_an_engines_python_is_for_layouts_that_ask_an_engine(work, monkeypatch, layout):
    save = ("save", "llama", "--tp", "2", "-o", "tp2", "--layout", layout)
    monkeypatch.setenv("SHARDTOOL_ENGINE_PYTHON", "/nowhere/python")
    assert here(*save).code == 0
    assert here("reshard", "tp2", "--tp", "1", "-o", "tp1", "--dry-run").code == 0
    traced = here("save", "llama", "--tp", "2", "-o", "tp2", "--layout", "vllm:traced")
    assert (traced.code, traced.err) == (
        2,
        "shardtool: error: --engine-python '/nowhere/python': there is no such program\n",
    )
    said = here(*save, "--engine-python", "/nowhere/python", "--dry-run")
    assert (said.code, "--engine-python means nothing" in said.err) == ((0, False) if layout == "vllm" else (2, True))


def test_a_layout_to_compare_with_is_named_by_its_flag(work):
    ended = here("trace", "llama", "--tp", "2", "--compare", "old")
    assert ended == Ended(2, "", "shardtool: error: --compare 'old' is not a layout file (*.json)\n")


def test_a_process_of_torchrun_loads_its_own_rank(shards, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert [rank["rank"] for rank in here("load", "tp2", "--json").json["ranks"]] == [1]
    assert [rank["rank"] for rank in here("load", "tp2", "--rank", "0", "--json").json["ranks"]] == [0]


@pytest.mark.parametrize("source", ["tp2", "llama"])
def test_a_rank_of_another_size_is_loaded(shards, source):
    assert here("save", "llama", "--tp", "4", "-o", "tp4", "--quiet").code == 0
    wanted = here("load", "tp4", "--rank", "3", "--json").json
    done = here("load", source, "--tp", "4", "--rank", "3", "--json")
    assert done.code == 0
    found = done.json
    assert [(one["rank"], one["tensors"], one["bytes"]) for one in found["ranks"]] == [
        (one["rank"], one["tensors"], one["bytes"]) for one in wanted["ranks"]
    ]
    assert "cut for tp 4" in found["notes"][0]


def test_a_rank_that_there_is_not_at_that_size_is_refused(shards):
    done = here("load", "tp2", "--tp", "4", "--rank", "4")
    assert (done.code, done.err) == (3, "shardtool: error: tp 4 has no rank 4; it has ranks 0 to 3\n")
