"""The benchmarks run, refuse what they cannot prove, and the page that shows them is the one that they make."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shardtool import safe_open
from tests.builders import random, safetensors

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
MODULES = (
    "measure",
    "contest",
    "contestants",
    "models",
    "experts",
    "load",
    "report",
    "save",
    "verify",
    "device",
    "devicers",
    "all",
)
MIB = 1 << 20


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules beside the scripts, which find each other as scripts do."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    patch.undo()
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def run(script: str, *words: str | Path) -> str:
    """Run a script in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, FOLDER / f"{script}.py", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The scripts.


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("help", ["--runs", "1"]),
        ("headers", ["--tensors", "60", "--runs", "1"]),
        ("plan", ["--tensors", "60", "--runs", "1", "--tp", "2"]),
    ],
)
def test_a_script_prints_a_table(script, words, tmp_path):
    at = [] if script == "help" else ["--dir", str(tmp_path)]
    assert "|---|" in run(script, *words, *at)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_prints_a_row_for_every_operation_and_limit(tmp_path):
    rows = [line for line in run("memory", "--size", "8MiB", "--dir", tmp_path).splitlines() if line[:3] == "| s"]
    assert sum("stream" in line for line in rows) == 6
    assert sum("save" in line for line in rows) == 3


@pytest.mark.slow
def test_what_writes_is_compared_with_a_copy(scripts, tmp_path):
    out = run("save", "--size", "8MiB", "--runs", "1", "--dir", tmp_path, "--json", tmp_path / "out.json")
    (found,) = read(scripts, tmp_path / "out.json")
    assert [row.name for row in found.rows if not row.ours] == ["cp -r", "safetensors, slice, save (tp 4)"]
    assert {row.kind for row in found.rows if row.ours} == {"save", "reshard", "merge"}
    assert all(len(row.walls) == 1 for row in found.rows)
    assert found.table() in out


def test_verify_is_compared_with_a_bare_loop(scripts, tmp_path):
    if is_memory(scripts, tmp_path):
        assert "stay in the page cache" in refused("verify", "--size", "4MiB", "--runs", "1", "--dir", tmp_path)
        return
    run("verify", "--size", "8MiB", "--runs", "1", "--dir", tmp_path, "--json", tmp_path / "out.json")
    warm, cold = read(scripts, tmp_path / "out.json")
    assert (warm.question, cold.question) == ("verify, warm", "verify, cold")
    assert warm.rows[0].name == "bare loop, hashed"
    assert cold.rows[0].name == "bare loop, not hashed"


@pytest.mark.slow
@pytest.mark.parametrize("question", ["warm-owned", "warm-stream", "cold-stream", "many"])
def test_every_loader_that_is_installed_delivers_the_same_tensors(scripts, tmp_path, question):
    words = [question, "--size", "8MiB", "--tensors", "60", "--runs", "1", "--limit", "8MiB", "--dir", str(tmp_path)]
    if question == "cold-stream" and is_memory(scripts, tmp_path):
        assert "stay in the page cache" in refused("load", *words)
        return
    run("load", *words, "--json", tmp_path / "out.json")
    (found,) = read(scripts, tmp_path / "out.json")
    here = scripts.contestants.versions()
    for row in found.rows:
        loader = next(one for one in scripts.load.LOADERS if one.name == row.name)
        assert loader.kind == row.kind
        assert (row.failed == "") == (len(row.walls) == 1), row
        if row.ours or loader.needs in ("", *here):
            assert row.failed == "" or loader.needs, row
    assert {row.kind for row in found.rows} == set(scripts.load.KINDS[question])


SMALL = ["--device", "cpu", "--size", "8MiB", "--tensors", "60", "--runs", "1", "--limit", "8MiB", "--back", "0"]


@pytest.mark.slow
def test_every_way_to_a_device_that_runs_here_delivers_the_same_tensors(scripts, tmp_path):
    words = ["warm", *SMALL, "--readers", "1"]
    out = run("device", *words, "--dir", tmp_path, "--json", tmp_path / "out.json")
    (found,) = read(scripts, tmp_path / "out.json")
    here = scripts.contestants.versions()
    ways = {way.name: way for way in scripts.device.ways([1])}
    assert [row.name for row in found.rows] == list(ways)
    for row in found.rows:
        way = ways[row.name]
        assert (row.failed == "") == (len(row.walls) == 1), row
        if way.cuda:
            assert row.failed == "takes CUDA devices only"
        elif way.needs and way.needs not in here:
            assert row.failed == "not installed"
        else:
            assert row.failed == "" or way.needs, row
    assert found.bar == scripts.device.ceiling(found.rows)[0] > 0
    assert "85% is wanted" in out
    section = json.loads((tmp_path / "out.json").read_text())
    assert section["command"] == f"python benchmarks/device.py {' '.join(words)}"
    assert section["machine"] == scripts.measure.machine(tmp_path)
    page = scripts.report.render({"date": "a day", "machine": {}, "peers": {}, "sections": {"device": section}})
    assert "### Files in the page cache\n" in page
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_each_question_about_a_device_is_answered(scripts, tmp_path):
    words = [*SMALL, "--small-limit", "1MiB", "--only", "load, unchecked", "--dir", str(tmp_path)]
    asked = ["large", "cold", "many"]
    if is_memory(scripts, tmp_path):
        assert "stay in the page cache" in refused("device", "cold", *words)
        asked.remove("cold")
    run("device", *asked, *words, "--json", tmp_path / "out.json")
    found = read(scripts, tmp_path / "out.json")
    assert [one.question for one in found] == [f"device, {question}" for question in asked]
    for one in found:
        assert [row.kind for row in one.rows] == ["ceiling"] * 3 + ["kept"]
        assert all(len(row.walls) == 1 for row in one.rows)
    assert found[0].limit == MIB
    assert found[0].rows[3].extra < 17 * MIB


def test_all_measures_what_it_is_told_to_and_keeps_the_rest(tmp_path):
    at = ["--dir", tmp_path, "--data", tmp_path / "data.json", "--out", tmp_path / "page.md"]
    run("all", "--only", "help", *at)
    run("all", "--only", "headers", *at)
    assert list(json.loads((tmp_path / "data.json").read_text())["sections"]) == ["help", "headers"]
    page = (tmp_path / "page.md").read_text()
    assert "## Start: `python benchmarks/help.py --runs 3`" in page
    assert "`python benchmarks/headers.py --tensors 2000 --runs 1`" in page
    assert str(tmp_path) not in page


def read(scripts: SimpleNamespace, path: Path) -> list[Any]:
    """The contests that a script wrote."""
    return [scripts.contest.Contest.of_json(found) for found in json.loads(path.read_text())["contests"]]


def refused(script: str, *words: str | Path) -> str:
    with pytest.raises(AssertionError) as failed:
        run(script, *words)
    return str(failed.value)


def is_memory(scripts: SimpleNamespace, place: Path) -> bool:
    """Whether files of this folder are in the page cache for good."""
    return scripts.measure.machine(place)["file system"] in ("tmpfs", "ramfs")


def test_the_largest_model_has_as_many_tensors_as_the_published_one(scripts):
    assert sum(1 for _ in scripts.experts.tensors()) == 91_991


# The proof.


def held(*names: str, seed: int = 0) -> dict[str, Any]:
    return {name: random((3, 5), "F32", seed + i) for i, name in enumerate(names)}


def seen(module: ModuleType, tensors: dict[str, Any]) -> dict[str, int]:
    torch = importlib.import_module("torch")
    return dict(module.consume((name, torch.from_numpy(np.array(raw.array))) for name, raw in tensors.items()))


def test_the_consumer_and_the_independent_reader_agree_whatever_the_order(scripts, tmp_path):
    tensors = held("a", "b", "c") | {"empty": random((0, 4), "F32")}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(tensors))
    found = scripts.load.independent((path,))
    assert found == {"digest": found["digest"], "bytes": 180, "tensors": 4, "largest": 60}
    assert seen(scripts.contestants, tensors) == found
    assert seen(scripts.contestants, dict(reversed(tensors.items()))) == found


def test_other_bytes_and_swapped_names_are_other_tensors(scripts):
    tensors = held("a", "b")
    whole = seen(scripts.contestants, tensors)
    assert seen(scripts.contestants, held("a", "b", seed=9))["digest"] != whole["digest"]
    assert seen(scripts.contestants, {"a": tensors["b"], "b": tensors["a"]})["digest"] != whole["digest"]
    data = scripts.load.Data(Path(), (), whole, Path())
    scripts.load.check("peer", {**whole, "wall": 1.0}, data)
    for key in whole:
        with pytest.raises(SystemExit, match="peer delivered other tensors"):
            scripts.load.check("peer", {**whole, key: whole[key] + 1}, data)


def test_files_can_be_brought_into_the_page_cache_and_out_of_it(scripts, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB + 5))
    scripts.measure.warm(tmp_path)
    assert scripts.measure.cached([path]) == 1.0
    if not is_memory(scripts, tmp_path):
        scripts.measure.cold(tmp_path)
        assert scripts.measure.cached([path]) < 0.01


# Devices.


def test_what_lies_on_a_device_is_proven_like_what_a_consumer_reads(scripts, tmp_path):
    torch = importlib.import_module("torch")
    raw = held("a", "b") | {"empty": random((0, 4), "F32"), "large": random((5 << 20,), "F32")}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(raw))
    tensors = {name: torch.from_numpy(np.array(one.array)) for name, one in raw.items()}
    here = torch.device("cpu")
    assert scripts.devicers.proven(tensors, here) == scripts.load.independent((path,))
    tensors["large"][-1] += 1
    assert scripts.devicers.proven(tensors, here)["digest"] != scripts.load.independent((path,))["digest"]
    with pytest.raises(SystemExit, match="a lies on cpu and not on meta"):
        scripts.devicers.proven(tensors, torch.device("meta"))
    with pytest.raises(SystemExit, match="a is not contiguous"):
        scripts.devicers.proven({"a": tensors["a"].T}, here)


def test_what_is_registered_is_counted_and_what_is_refused_is_not(scripts):
    runtime = SimpleNamespace(cudaHostRegister=lambda at, n, flags: int(at == 9), cudaHostUnregister=lambda at: 0)
    pinned = scripts.devicers.Pinned(importlib.import_module("torch").device("cpu"))
    pinned.watch(runtime)
    assert [runtime.cudaHostRegister(at, n, 0) for at, n in ((1, 100), (2, 20), (9, 1000))] == [0, 0, 1]
    runtime.cudaHostUnregister(1)
    runtime.cudaHostRegister(3, 50, 0)
    assert pinned.most() == 120


def test_the_ceiling_is_the_slower_of_copies_and_the_faster_loop(scripts):
    device, row = scripts.device, scripts.contest.Row

    def rows(copies: float, few: float, several: float) -> list[Any]:
        walls = {device.COPIES: copies, device.FEW: few, device.SEVERAL: several}
        return [row(name, device.CEILING, 0, [wall] if wall else [], [1.0]) for name, wall in walls.items()]

    assert device.ceiling(rows(1.0, 3.0, 2.0)) == (2.0, device.SEVERAL)
    assert device.ceiling(rows(4.0, 3.0, 2.0)) == (4.0, device.COPIES)
    assert device.ceiling(rows(1.0, 3.0, 0)) == (3.0, device.FEW)
    assert device.ceiling(rows(0, 3.0, 2.0)) == device.ceiling(rows(1.0, 0, 0)) == (0.0, "")
    found = contest(scripts, shardtool_load=("kept", 4.0, 1.0))
    found.rows[0].pinned, found.rows[0].taken = 128 * MIB, 200 * MIB
    found.bar, found.bar_name, found.wanted = 3.0, "a loop", device.WANTED
    assert list(found.verdicts()) == ["shardtool load: 75% of the rate of a loop; 85% is wanted"]
    assert "| 75% |  |  | 128 | 200 |" in found.table()


def test_memory_that_the_machine_lacks_meanwhile_is_counted(scripts):
    seen = [(1.0, 90), (2.0, 100), (3.0, 70), (4.0, 80), (5.0, 10)]
    assert scripts.device.taken(seen, 2.5, 4.5) == 30
    assert scripts.device.taken(seen, 0.5, 0.7) == 0
    assert scripts.device.taken([(1.0, 90), (2.0, 95)], 1.5, 2.5) == 0
    assert scripts.device.available() > MIB


def test_a_child_that_fails_or_hangs_is_told(scripts, monkeypatch):
    def child(text: str) -> Any:
        return scripts.device.Child([sys.executable, "-c", text], dict(os.environ))

    good = child("print('noise'); print('ready', flush=True); input(); print('more'); print('{\"wall\": 1}')")
    good.ready()
    assert good.run() == {"wall": 1}
    bad = child("raise SystemExit('no such device')")
    bad.ready()
    with pytest.raises(scripts.measure.Failed, match="no such device"):
        bad.run()
    monkeypatch.setattr(scripts.device, "LONGEST", 1)
    slow = child("import time; print('ready', flush=True); time.sleep(100)")
    slow.ready()
    with pytest.raises(scripts.measure.Failed, match="took more than 1 s"):
        slow.run()


def test_a_checkpoint_for_devices_holds_numbers_and_no_block_twice(scripts, tmp_path):
    config = scripts.models.of_size(40 * MIB)
    total = scripts.device.write(tmp_path / "hf", config, 2)
    shapes = scripts.models.shapes(config)
    blocks: list[bytes] = []
    names: dict[str, tuple[int, ...]] = {}
    for path in sorted((tmp_path / "hf").glob("*.safetensors")):
        data = path.read_bytes()
        blocks += [data[start : start + MIB] for start in range(MIB, len(data) - MIB, MIB)]
        with safe_open(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                names[name] = tuple(file.get_tensor(name).shape)
                assert bool(file.get_tensor(name).isfinite().all())
    assert names == shapes
    assert total == sum(2 * int(np.prod(shape)) for shape in shapes.values())
    assert len(set(blocks)) == len(blocks) >= 30


def test_without_a_gpu_it_has_to_be_said_that_none_is_wanted(scripts, monkeypatch):
    monkeypatch.setattr(scripts.device.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        scripts.device.device_of(None)
    with pytest.raises(SystemExit, match="neither cuda nor cpu"):
        scripts.device.device_of("meta")
    assert [scripts.device.device_of(word) for word in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda:0", "cuda:3"]


# Contests.


def contest(scripts: SimpleNamespace, **rows: tuple[str, float, float]) -> Any:
    """A contest of rows: their kind, wall and CPU seconds."""
    made = [scripts.contest.Row(name.replace("_", " "), kind, MIB, [w], [c]) for name, (kind, w, c) in rows.items()]
    return scripts.contest.Contest("warm-owned", 2.0, 1, 0, 64 * MIB, made)


def test_every_peer_that_is_ahead_is_listed_with_its_numbers(scripts):
    found = contest(
        scripts,
        shardtool=("owned", 1.0, 0.5),
        faster=("owned", 0.8, 0.6),
        thriftier=("owned", 1.0, 0.4),
        behind=("owned", 1.1, 0.6),
        maps=("mapping", 0.1, 0.6),
        streams=("stream", 0.1, 0.1),
    )
    assert list(found.losses()) == [
        ("warm-owned", "faster", "shardtool", "0.80 to 1.00 (1.25 times)", "", ""),
        ("warm-owned", "thriftier", "shardtool", "", "0.200 to 0.250 (1.25 times)", ""),
        ("warm-owned", "maps (mapping)", "shardtool", "0.10 to 1.00 (10.00 times)", "", ""),
    ]
    assert list(found.verdicts()) == [
        "shardtool: 1.25 times the wall of the fastest (faster), 1.25 times the CPU of the thriftiest (thriftier)"
    ]


def test_a_peer_that_takes_less_memory_beside_its_tensors_is_ahead_too(scripts):
    found = contest(scripts, shardtool=("owned", 1.0, 0.5), less=("owned", 2.0, 0.6), alike=("owned", 2.0, 0.6))
    ours, less, alike = found.rows
    ours.over, less.over, less.held, alike.over = 41 * MIB, 60 * MIB, 50 * MIB, 40 * MIB
    assert list(found.losses()) == [("warm-owned", "less", "shardtool", "", "", "10 to 40")]
    less.over = 0  # was not measured
    assert list(found.losses()) == []


def test_memory_that_a_limit_does_not_bind_is_not_compared_with_it(scripts):
    found = contest(scripts, shardtool=("save", 1.0, 0.5), script=("save", 2.0, 0.6))
    found.limited = True
    found.rows[0].over, found.rows[1].over = 60 * MIB, 500 * MIB
    assert "| 60 | -4 |" in found.table()
    assert "| 500 |  |" in found.table()
    found.rows[0].over = 40 * MIB
    assert "| 40 | does not bind |" in found.table()


def test_verify_is_measured_against_the_slower_of_the_disk_and_the_hash(scripts):
    def row(name: str, wall: float) -> Any:
        return scripts.contest.Row(name, "verify", 0, [wall], [1.0])

    verify = scripts.verify
    warm, disk = [row(verify.LOOP, 1.0)], row(verify.DISK, 3.0)
    assert verify.bar(warm, []) == (1.0, "hashing alone (the bare loop from the page cache)")
    assert verify.bar([row(verify.LOOP, 2.0), disk], warm) == (3.0, "the disk alone")
    assert verify.bar([row(verify.LOOP, 2.0), row(verify.DISK, 0.5)], warm)[0] == 1.0
    found = contest(scripts, shardtool_verify=("verify", 4.0, 1.0))
    found.bar, found.bar_name = 3.0, "the disk alone"
    assert list(found.verdicts()) == ["shardtool verify: 75% of the rate of the disk alone; 90% is wanted"]


def test_children_have_none_of_the_callers_settings(scripts, monkeypatch):
    for name in ("RUNAI_STREAMER_CONCURRENCY", "SHARDTOOL_CONCURRENCY", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("FASTSAFETENSORS_X", "3")
    monkeypatch.setenv("KEPT", "3")
    made = scripts.measure.environ(RUNAI_STREAMER_CONCURRENCY="16")
    assert made["KEPT"] == "3"
    assert {name for name in made if name.startswith(scripts.measure.SETTINGS)} == {"RUNAI_STREAMER_CONCURRENCY"}


def test_a_copy_does_not_share_what_it_copies(scripts, tmp_path):
    words = scripts.save.copying(tmp_path)
    assert words in (["cp", "-r"], ["cp", "-r", "--reflink=never"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").write_text("a")
    scripts.measure.command(*words, tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"


def test_a_contest_survives_json_and_shows_who_failed(scripts):
    found = contest(scripts, shardtool=("owned", 1.0, 0.5), peer=("owned", 2.0, 1.0))
    found.rows[1].failed = "not installed"
    again = scripts.contest.Contest.of_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert "| peer | owned | not installed |" in found.table()
    assert list(found.losses()) == []


def test_contestants_take_turns_in_another_order_each_round(scripts):
    order: list[str] = []
    row, sample = scripts.contest.Row, scripts.contest.Sample

    def entry(name: str) -> Any:
        def turn() -> Any:
            order.append(name)
            return sample(1.0, 1.0)

        return row(name, "owned"), turn

    def rounds() -> list[str]:
        order.clear()
        rows = scripts.contest.take_turns([entry(name) for name in "abcde"], 5, lambda _row: None)
        assert [(one.name, len(one.walls)) for one in rows] == [(name, 5) for name in "abcde"]
        return ["".join(order[i : i + 5]) for i in range(0, 25, 5)]

    first = rounds()
    assert all(sorted(one) == list("abcde") for one in first)
    assert len(set(first)) == 5
    behind = {one[one.index("b") - 1] for one in first if one[0] != "b"}
    assert len(behind) > 1, "nobody always runs behind the same one"
    assert rounds() == first


def test_a_peer_that_fails_is_out_and_ours_must_not_fail(scripts):
    def fails() -> Any:
        raise scripts.measure.Failed("first line\nno GPU here")

    row = scripts.contest.Row
    (peer,) = scripts.contest.take_turns([(row("peer", "owned"), fails)], 2, lambda _row: None)
    assert (peer.failed, peer.walls) == ("failed: no GPU here", [])
    with pytest.raises(scripts.measure.Failed):
        scripts.contest.take_turns([(row("shardtool load", "owned"), fails)], 1, lambda _row: None)


def test_turns_end_behind_the_round_in_which_it_is_enough(scripts):
    row, sample = scripts.contest.Row, scripts.contest.Sample
    entries = [(row(name, "owned"), lambda: sample(1.0, 1.0)) for name in "ab"]
    said = iter([False, True])
    rows = scripts.contest.take_turns(entries, 5, lambda _row: None, lambda: next(said))
    assert [len(one.walls) for one in rows] == [2, 2]


# The page.


def test_what_was_measured_on_another_machine_is_shown_with_it_and_kept(scripts, tmp_path):
    data: dict[str, Any] = {"date": "a day", "machine": {"cores": "2"}, "peers": {}, "sections": {}}
    assert "## To a GPU\n\nNo GPU was at hand" in scripts.report.render(data)
    made = contest(scripts, shardtool=("kept", 1.0, 0.5))
    made.question = "device, warm"
    section = {
        "command": "python benchmarks/device.py",
        "full": True,
        "date": "another day",
        "machine": {"GPU": "a large one"},
        "peers": {"instanttensor": "1"},
        "contests": [made.to_json()],
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "device.json").write_text(json.dumps(section))
    run("report", "--data", tmp_path / "data.json", "--out", tmp_path / "page.md", "--device", tmp_path / "device.json")
    page = (tmp_path / "page.md").read_text()
    assert "No GPU" not in page
    assert "Measured on another day, on a machine of its own." in page
    assert "| GPU | a large one |\n| instanttensor | 1 |" in page
    args = SimpleNamespace(dir=tmp_path, data=tmp_path / "data.json", only=None, peers_python=None)
    assert scripts.all.begun(args)["sections"] == {"device": section}


def test_the_page_is_what_the_generator_makes_of_the_data(scripts):
    data = json.loads(scripts.report.DATA.read_text())
    assert scripts.report.PAGE.read_text() == scripts.report.render(data)


def test_a_loss_that_the_data_holds_is_on_the_page(scripts):
    lost = contest(scripts, shardtool=("owned", 1.0, 0.5), peer=("owned", 0.5, 0.6))
    data: dict[str, Any] = {"date": "a day", "machine": {"cores": "2"}, "peers": {}, "sections": {}}
    assert "Nowhere" in scripts.report.render(data)
    data["sections"] = {"load": {"command": "python benchmarks/load.py", "full": True, "contests": [lost.to_json()]}}
    page = scripts.report.render(data)
    assert "small size" not in page
    assert "| warm-owned | peer | shardtool | 0.50 to 1.00 (2.00 times) |  |  |" in page
    assert "Nowhere" not in page
    data["sections"]["load"]["full"] = False
    assert "at a small size" in scripts.report.render(data)
