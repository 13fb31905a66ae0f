"""What the documents say is true: their commands run, their output is what comes, their links lead somewhere.

Blocks of one document run in order, in one folder that holds a tiny model as ``./llama``, beside a bucket ``demo`` and
a Redis at its usual port::

    ```console    each line after ``$ `` is run; the lines below it must come, in order, numbers and sizes aside
    ```python     is executed; the blocks of one document share their names
    ```text       and any other language is not run; only there may a line start an engine

A command must end with 0, unless ``$ echo $?`` follows; its line is then compared digit by digit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import builders
from tests.servers import S3Server
from tests.servers.redis import RedisServer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LANGUAGES = ("bash", "console", "json", "python", "text")
STATUS = "echo $?"
SECONDS = 240
WIDTH = 120

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "s", "min", "GB/s")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document at which it starts."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command of a console block and the output that is shown below it."""

    text: str
    shown: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in _FENCE.finditer(text)]


def commands(text: str) -> list[Command]:
    """The commands of a console block; one that ends with a backslash goes on in the next line."""
    found: list[tuple[str, list[str]]] = []
    more = False
    for line in text.splitlines():
        if more:
            found[-1] = (found[-1][0] + "\n" + line, [])
        elif line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"a console block starts with a command, not with {line!r}"
            found[-1][1].append(line)
        more = (more or line.startswith("$ ")) and line.endswith("\\")
    return [Command(command, tuple(shown)) for command, shown in found]


def fixed(line: str) -> list[str]:
    """The words of a line that do not depend on the model or the machine, with # for the digits in them."""
    words = (word.strip("(),;:") for word in line.split())
    return [re.sub(r"\d+", "#", word) for word in words if re.search("[A-Za-z]", word) and word not in _UNITS]


def holds(line: str, words: Sequence[str]) -> bool:
    """Whether a line has these words in this order."""
    rest = iter(fixed(line))
    return all(word in rest for word in words)


def missing(shown: Sequence[str], output: str) -> str | None:
    """The first shown line that did not come, if any. ``...`` stands for lines that are left out."""
    lines = iter(output.splitlines())
    for line in shown:
        if line.strip() not in ("", "...") and not any(holds(found, fixed(line)) for found in lines):
            return line
    return None


def run(command: str, status: int, environ: dict[str, str]) -> tuple[int, str]:
    """Run one command after one that ended with ``status``."""
    done = subprocess.run(
        ["bash", "-c", f"(exit {status}); {command}"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def run_console(text: str, environ: dict[str, str]) -> None:
    """Run a console block in the current folder and compare what comes with what is shown."""
    listed = commands(text)
    status = 0
    for command, following in zip(listed, [*listed[1:], Command("", ())], strict=True):
        if command.text == STATUS:
            assert command.shown == (str(status),), f"the exit code shown is {command.shown}, it was {status}"
            status = 0
            continue
        status, output = run(command.text, status, environ)
        assert status == 0 or following.text == STATUS, f"$ {command.text}\nended with {status}:\n{output}"
        line = missing(command.shown, output)
        assert line is None, f"$ {command.text}\nshould print\n{line}\nbut printed\n{output}"


@pytest.fixture
def environ(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What a reader's shell has: this tree as ``shardtool``, a model, a server with the empty bucket ``demo``."""
    folder, tools = tmp_path / "work", tmp_path / "bin"
    config = builders.config("llama")
    side = {
        "generation_config.json": b"{}",
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "tokenizer.json": tokenizer(config["vocab_size"]),
    }
    builders.put(folder / "llama", builders.model(config, builders.tensors(config), files=2, side=side))
    tools.mkdir()
    for name, words in {"shardtool": "-m shardtool", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tools / name).chmod(0o755)
    for name in ("examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    for variable, value in s3_server.environ.items():
        monkeypatch.setenv(variable, value)
    client = s3_server.client
    if "demo" not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket="demo")
    yield os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="demo"):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket="demo", Key=found["Key"])


def tokenizer(size: int) -> bytes:
    """One that knows ``Hello`` and some numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"Hello": 0} | {str(i): i for i in range(1, size)}, unk_token="Hello"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made.to_str().encode()


def at_server(text: str, redis: RedisServer) -> str:
    """A block with the port of the Redis server that listens, where documents have Redis' usual one."""
    return text.replace("localhost:6379", f"127.0.0.1:{redis.port}")


def relative(path: Path) -> str:
    """How a document is called in the list of tests."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # DCP says so of one process
def test_every_block_of_a_document_runs(path: Path, environ: dict[str, str], redis_server: RedisServer) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(path.read_text()):
        if block.language == "console":
            run_console(at_server(block.text, redis_server), environ)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(path), "exec"), names)


@pytest.mark.parametrize("path", LINKED, ids=relative)
def test_every_link_inside_the_project_resolves(path: Path) -> None:
    assert broken_links(path.read_text(), path) == []


def slug(heading: str) -> str:
    """The anchor of a heading, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def anchors(text: str) -> list[str]:
    """The anchors of a document."""
    return [slug(heading) for heading in _HEADING.findall(_FENCE.sub("", text))]


def broken_links(text: str, path: Path) -> list[str]:
    """The links of a document that lead to no file or to no heading of it."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_a_block_says_its_language_and_engines_stand_in_text_only(path: Path) -> None:
    text = path.read_text()
    assert text.count("```") == 2 * len(blocks(text)), "a fence is not closed, or is indented"
    for block in blocks(text):
        assert block.language in LANGUAGES, f"line {block.line}: the language {block.language!r}"
        if block.language != "text":
            assert "vllm serve" not in block.text, f"line {block.line}"


def test_the_tree_in_the_readme_names_every_file_once() -> None:
    (tree,) = [
        block.text for block in blocks((ROOT / "README.md").read_text()) if block.text.startswith("shardtool/\n")
    ]
    folders: list[str] = []
    named = []
    for line in tree.splitlines():
        found = re.match(r"((?:[│ ] {3}|[├└]── )*)([\w.]+/?)( |$)", line)
        assert found, line
        del folders[len(found[1]) // 4 :]
        if found[2].endswith("/"):
            folders.append(found[2])
        else:
            named.append("".join([*folders, found[2]]))
    real = [
        path
        for path in (ROOT / "shardtool").rglob("*.py")
        if re.search("^(def |class |FAMILIES|RULES)", path.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == sorted(relative(path) for path in real)


@pytest.mark.parametrize("folder", ["docs", "examples", "scripts"])
def test_the_readme_names_every_document_example_and_script(folder: str) -> None:
    text = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / folder).iterdir()):
        if path.is_file() and path.name != "README.md":
            assert f"{folder}/{path.name}" in text, path.name


@pytest.mark.parametrize("path", LINKED, ids=relative)
def test_lines_of_text_are_not_too_long(path: Path) -> None:
    assert too_long(path.read_text()) == []


def too_long(text: str) -> list[str]:
    """The lines of more than 120 characters that are neither of a table nor of a block nor one word, such as a link."""
    lines = _FENCE.sub("", text).splitlines()
    return [line for line in lines if len(line) > WIDTH and line[:1] != "|" and " " in line[2:].strip()]


def test_the_commands_document_names_every_variable_of_the_settings() -> None:
    names = re.findall(r'"(SHARDTOOL_\w+)"', (ROOT / "shardtool" / "settings.py").read_text())
    document = (ROOT / "docs" / "cli.md").read_text()
    assert len(names) > 10
    rows = re.findall(r"^\| `--[^|]+\| `(SHARDTOOL_\w+)`", document, re.MULTILINE)
    assert sorted(rows) == sorted(set(names))


# The checks themselves.


def test_a_line_that_is_too_long_is_found() -> None:
    line = "word " * 30
    assert too_long(f"short\n\n{line}\n") == [line]
    assert too_long(f"|{line}|\n\n```console\n$ {line}\n```\n[a]({'x' * 130})\n") == []


def test_commands_are_told_from_their_output() -> None:
    text = "$ first\nshown\n$ second \\\n    more\n$ echo $?\n1\n"
    assert commands(text) == [
        Command("first", ("shown",)),
        Command("second \\\n    more", ()),
        Command(STATUS, ("1",)),
    ]


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        ("rank 0  589.4 MiB  1.61 GB/s", "rank 3  12 B  0.01 GB/s"),
        ("model-rank-0-part-0.safetensors: OK", "model-rank-1-part-0.safetensors: OK"),
        ("...", ""),
    ],
)
def test_numbers_and_sizes_may_differ(shown: str, output: str) -> None:
    assert missing([shown], output) is None


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        (["a: OK"], "a: FAILED"),
        (["digests checked"], "checked digests"),
        (["first", "second"], "second\nfirst"),
        (["model-rank-0.safetensors"], "model-part-0.safetensors"),
    ],
)
def test_other_words_and_another_order_are_found(shown: list[str], output: str) -> None:
    assert missing(shown, output) is not None


def test_a_command_that_fails_is_found() -> None:
    with pytest.raises(AssertionError, match="ended with 3"):
        run_console("$ exit 3\n$ true\n", dict(os.environ))


def test_a_command_may_fail_where_its_code_is_shown() -> None:
    run_console("$ exit 3\n$ echo $?\n3\n", dict(os.environ))
    with pytest.raises(AssertionError, match="it was 3"):
        run_console("$ exit 3\n$ echo $?\n1\n", dict(os.environ))


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# One thing\n\n[good](#one-thing) [file](a.md#one-thing) [web](https://example.org)\n")
    assert broken_links(path.read_text(), path) == []
    path.write_text("# One thing\n\n[bad](#two) [gone](b.md)\n")
    assert broken_links(path.read_text(), path) == ["#two", "b.md"]
