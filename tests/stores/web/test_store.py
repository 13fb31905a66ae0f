"""HttpStore reads what a real web server serves, with and without its listing, and says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shardtool
from shardtool import stores
from shardtool.errors import AccessDenied, FormatError, NotFound, StoreError, Unavailable, UsageError
from shardtool.stores import open_store
from shardtool.stores.base import Object
from shardtool.stores.web import autoindex
from shardtool.stores.web.store import HttpStore
from shardtool.stores.wire.http import Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again
from shardtool.testing import ReadOnlyContract
from tests import builders
from tests.servers import Proxy, Weather
from tests.servers.web import Scripted, Visit, Web, reply

Fill = Callable[[str, bytes], None]


@pytest.fixture
def folder(web: Web) -> Iterator[Path]:
    """A folder that nginx serves."""
    made = web.root / uuid.uuid4().hex
    made.mkdir()
    yield made
    shutil.rmtree(made)


class Served(ReadOnlyContract):
    """What holds for files of a folder that nginx serves."""

    server = ""

    @pytest.fixture
    def store(self, web: Web, folder: Path) -> Iterator[HttpStore]:
        (folder / "models" / "llama-2").mkdir(parents=True)
        (folder / "models" / "llama").mkdir(parents=True)
        (folder / "models" / "llama-2" / "a").write_bytes(b"not ours")
        with HttpStore(f"{getattr(web, self.server)}/{folder.name}/models/llama/") as store:
            yield store

    @pytest.fixture
    def fill(self, folder: Path) -> Fill:
        def put(key: str, data: bytes) -> None:
            path = folder / "models" / "llama" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        return put


class TestListedInJson(Served):
    """By a server that lists with sizes."""

    server = "json"


class TestListedOnAPage(Served):
    """By a server that lists links."""

    server = "page"


@pytest.fixture
def store(web: Web, folder: Path) -> Iterator[HttpStore]:
    """The folder, whose files the server does not list."""
    with quick(f"{web.bare}/{folder.name}") as store:
        yield store


def quick(uri: str, **options: object) -> HttpStore:
    """A store that waits next to nothing between its tries."""
    return HttpStore(uri, again=Again(attempts=3, backoff=0.001), **options)  # type: ignore[arg-type]


# Addresses


@pytest.mark.parametrize(
    "uri", ["http://", "https:///folder", "ftp://host/a", "http://host:x/a", "http://[::1/a", "https://host/a#b"]
)
def test_an_address_that_names_no_files_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="no address of files on a web server"):
        HttpStore(uri)


@pytest.mark.parametrize("kind", ["http", "https"])
def test_both_schemes_are_opened(web: Web, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").write_bytes(b"hello")
    monkeypatch.setenv("SSL_CERT_FILE", str(web.authority))
    with open_store(f"{web.tls if kind == 'https' else web.json}/{folder.name}") as store:
        assert store.get("a", limit=5) == b"hello"
        assert [thing.key for thing in store.list()] == ["a"]


def test_a_name_that_is_quoted_already_stays_so(web: Web, folder: Path) -> None:
    (folder / "a b").mkdir()
    (folder / "a b" / "c%d").write_bytes(b"hello")
    for name in ("a b", "a%20b"):
        with quick(f"{web.json}/{folder.name}/{name}/") as store:
            assert [thing.key for thing in store.list()] == ["c%d"]
            assert store.get("c%d", limit=5) == b"hello"


# Secrets


def test_a_password_is_asked_for_and_never_shown(web: Web, folder: Path) -> None:
    (folder / "a").write_bytes(b"hello")
    address = web.password.replace("http://", "http://user:secret@")
    with quick(f"{address}/{folder.name}") as store:
        assert store.get("a", limit=5) == b"hello"
        assert [thing.key for thing in store.list()] == ["a"]
        assert store.uri == f"{web.password}/{folder.name}"
        with pytest.raises(NotFound) as caught:
            store.stat("b")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("who", ["", "user:wrong@"])
def test_a_wrong_password_is_denied_and_never_shown(web: Web, folder: Path, who: str) -> None:
    (folder / "a").write_bytes(b"hello")
    with quick(f"{web.password.replace('http://', f'http://{who}')}/{folder.name}") as store:
        for ask in (lambda: store.stat("a"), lambda: list(store.list()), lambda: store.get("a", limit=5)):
            with pytest.raises(AccessDenied, match=r"is denied \(the server says 401\)") as caught:
                ask()
            assert "wrong" not in str(caught.value)


def test_a_signature_is_sent_with_each_request_and_never_shown() -> None:
    with Scripted(reply(403)) as server, quick(f"{server.url}/folder?sig=a%2Fb&x=y") as store:
        assert store.uri == store.place() == f"{server.url}/folder"
        for ask in (lambda: store.stat("k"), lambda: list(store.list()), lambda: store.get("k", limit=5)):
            with pytest.raises(AccessDenied, match="signed address is not too old") as caught:
                ask()
            assert "sig" not in str(caught.value).replace("signed", "")
    assert {visit.line.split("?")[1] for visit in server.visits} == {"sig=a%2Fb&x=y HTTP/1.1"}


def test_an_address_that_is_signed_for_reading_alone() -> None:
    """HEAD is another request than GET, and denied."""

    def say(visit: Visit) -> None:
        if visit.line.startswith("HEAD"):
            visit.say(reply(403))
        else:
            first, last = visit.headers["range"].removeprefix("bytes=").split("-")
            data = b"hello"[int(first) : int(last) + 1]
            visit.say(reply(206, data, Content_Range=f"bytes {first}-{last}/5", ETag='"1"'))

    with Scripted(say) as server, quick(f"{server.url}?sig=1") as store:
        assert store.stat("a") == Object("a", 5)
        assert store.get("a", limit=5) == b"hello"


# What is there


def test_without_a_listing_the_manifest_says_what_there_is(store: HttpStore, folder: Path, tmp_path: Path) -> None:
    config = builders.config(num_hidden_layers=1, vocab_size=64)
    builders.put(tmp_path / "hf", builders.model(config, builders.tensors(config)))
    shardtool.save(tmp_path / "hf", folder, tp=2)
    (folder / "unknown").write_bytes(b"nobody says its name")
    assert {thing.key: thing.size for thing in store.list()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "unknown" and path.is_file()
    }


@pytest.mark.parametrize("files", [1, 3])
def test_without_a_manifest_the_index_says_it(store: HttpStore, folder: Path, files: int) -> None:
    """And what usually lies beside the weights is found, and the code that the config names."""
    config = builders.config(num_hidden_layers=1, vocab_size=64)
    made = builders.model(config, builders.tensors(config), files=files)
    made |= {"tokenizer.json": b"{}", "modeling_mine.py": b"pass", "tokens.py": b"pass"}
    made["config.json"] = json.dumps({**config, "auto_map": {"AutoModel": "modeling_mine.Mine"}}).encode()
    made["tokenizer_config.json"] = b'{"auto_map": {"AutoTokenizer": ["tokens.Slow", null, "other/repo--tokens.Fast"]}}'
    builders.put(folder, made)
    assert {thing.key: thing.size for thing in store.list()} == {key: len(data) for key, data in made.items()}
    assert [thing.key for thing in store.list("tok")] == ["tokenizer.json", "tokenizer_config.json", "tokens.py"]


@pytest.mark.parametrize("content", [b"[]", b"<html>nothing here</html>", b"[" * 100_000, b'{"weight_map": [1]}', b""])
def test_an_index_that_is_none_names_no_files(store: HttpStore, folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert [thing.key for thing in store.list()] == ["model.safetensors.index.json"]


def test_an_index_cannot_name_files_elsewhere(store: HttpStore, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"x")
    index = {"weight_map": {"a": "../secret", "b": "/secret", "c": "x/../../secret", "d": 5}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [thing.key for thing in store.list()] == ["model.safetensors.index.json"]


def test_nothing_is_there(store: HttpStore) -> None:
    assert list(store.list()) == []
    assert not store.exists("a")


PAGES = {
    "nginx": b"<html><head><title>Index of /a/</title></head><body><h1>Index of /a/</h1><hr><pre><a href='../'>../</a>"
    b"<a href='b%20c'>b c</a> 20-Nov-2026 5\n<a href='d/'>d/</a></pre>",
    "apache": b"<title>Index of /a</title><table><a href='?C=N;O=D'>Name</a><a href='/'>Parent Directory</a>"
    b"<a href='b%20c'>b c</a><a href='d/'>d/</a>",
    "python": b"<title>Directory listing for /a/</title><ul><li><a href='b%20c'>b c</a><li><a href='d/'>d/</a></ul>",
    "evil": b"<title>Index of /</title><a href='b%20c'>x</a><a href='d/'>d</a><a href='../../etc/passwd'>x</a>"
    b"<a href='..%2f..%2fetc'>x</a><a href='%2e%2e'>x</a><a href='http://evil/a'>x</a><a href='javascript:a'>x</a>"
    b"<a href='a%5Cb'>x</a><a href='e%00'>x</a><a href=''>x</a><a>x</a><a href='//evil/x'>x</a>",
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_pages_that_servers_make_of_a_folder(page: bytes) -> None:
    entries = autoindex.parse(page, "text/html; charset=utf-8")
    assert entries is not None
    assert {entry.name: entry.folder for entry in entries} == {"b c": False, "d": True}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'[{"name": "b c", "type": "file", "size": 5}, {"name": "d", "type": "directory"}]', "application/json"),
        (
            b'[{"name": "b c", "size": 5, "is_dir": false}, {"name": "d/", "size": 9, "is_dir": true}]',
            "application/json",
        ),
        (b'[{"name": "b c", "size": 5}, {"name": "d", "type": "directory"}, {"name": "../e"}]', "application/json; x"),
    ],
)
def test_listings_in_json_tell_sizes(body: bytes, kind: str) -> None:
    entries = autoindex.parse(body, kind)
    assert entries is not None
    assert {entry.name: (entry.folder, entry.size) for entry in entries if not entry.folder} == {"b c": (False, 5)}
    assert {entry.name for entry in entries if entry.folder} == {"d"}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<title>My models</title><a href='b'>b</a>", "text/html"),
        (b"Index of", "text/plain"),
        (b"{}", "application/json"),
        (b"[1]", "application/json"),
        (b'[{"name": 1}]', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"\xff\xfe", "text/html"),
        (b"", ""),
    ],
)
def test_other_pages_are_no_listing(body: bytes, kind: str) -> None:
    assert autoindex.parse(body, kind) is None


@pytest.mark.parametrize("part", [b"<a ", b"<!--", b"<![", b'<a href="', b"<a href=", b"<title>", b"<a href='b' "])
def test_a_page_of_any_kind_is_read_in_time(part: bytes) -> None:
    """Python's own parser takes 20 seconds for 40 kB, or fails."""
    began = time.thread_time()  # whatever else the machine does meanwhile
    autoindex.parse(b"<title>Index of /</title>" + part * 200_000, "text/html")
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("link", ["//[", "&#" + "9" * 5000 + ";", "http://other/b", "a" * 5000])
def test_links_that_make_no_sense_are_left_out(link: str) -> None:
    page = f'<title>\nIndex of /</title><a href="{link}">x</a><A class="y" HREF = \'b&amp;c\'>b</a><a href=d/>d</a>'
    entries = autoindex.parse(page.encode(), "text/html")
    assert entries is not None
    assert {entry.name: entry.folder for entry in entries} == {"b&c": False, "d": True}


def test_folders_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose every folder has two more in it, and no file."""
    monkeypatch.setattr("shardtool.stores.web.store._MOST_FOLDERS", 50)
    body = b'[{"name": "d", "type": "directory"}, {"name": "e", "type": "directory"}]'
    with (
        Scripted(reply(200, body, Content_Type="application/json")) as server,
        quick(server.url) as store,
        pytest.raises(FormatError, match="50 folders"),
    ):
        list(store.list())
    assert len(server.visits) <= 50


@pytest.mark.parametrize("size", ["\xb2", "9" * 5000])
def test_a_size_that_is_no_number_is_an_error(size: str) -> None:
    head, some = reply(200, Content_Length=size), reply(206, b"a", Content_Range=f"bytes 0-0/{size}")
    with (
        Scripted(head, some) as server,
        quick(server.url) as store,
        pytest.raises(StoreError, match="does not say how large it is"),
    ):
        store.stat("a")


def test_a_folder_that_holds_itself_comes_to_an_end() -> None:
    """A server that answers every address with a listing of one folder."""
    body = b'[{"name": "d", "type": "directory"}, {"name": "f", "type": "file", "size": 1}]'
    with Scripted(reply(200, body, Content_Type="application/json")) as server, quick(server.url) as store:
        assert len(list(store.list())) == 17


# What goes wrong


def test_a_file_that_is_replaced_is_noticed(store: HttpStore, folder: Path) -> None:
    path = folder / "a"
    path.write_bytes(b"first")
    assert store.get("a", limit=5) == b"first"
    path.write_bytes(b"other")
    os.utime(path, (1, 1))
    with pytest.raises(StoreError, match="a was replaced while it was read"):
        store.readinto("a", 0, memoryview(bytearray(5)))
    assert store.get("a", limit=5) == b"other"  # which asks anew what is there


def test_a_server_without_etags_tells_by_the_time_of_change() -> None:
    def say(visit: Visit) -> None:
        when = f"Fri, 20 Nov 2026 08:00:0{int(len(server.visits) > 3)} GMT"
        if visit.line.startswith("HEAD"):
            visit.say(reply(200, Content_Length=4, Last_Modified=when))
        else:
            visit.say(reply(206, b"ab", Content_Range="bytes 0-1/4", Last_Modified=when))

    with Scripted(say) as server, quick(server.url) as store:
        assert store.stat("a").size == 4
        store.readinto("a", 0, memoryview(bytearray(2)))
        store.readinto("a", 0, memoryview(bytearray(2)))
        with pytest.raises(StoreError, match="was replaced"):
            store.readinto("a", 0, memoryview(bytearray(2)))


def test_a_server_that_ignores_ranges_is_refused_with_the_reason() -> None:
    """Python's own server is one. Whole small files can be read from it all the same."""
    with Scripted(reply(200, b"hello world")) as server, quick(server.url) as store:
        assert store.get("a", limit=20) == b"hello world"
        with pytest.raises(StoreError, match="ignores which bytes are asked for: copy the files to a folder first"):
            store.readinto("a", 5, memoryview(bytearray(2)))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_is_away_for_a_moment(status: int) -> None:
    with Scripted(reply(status), reply(status), reply(200, Content_Length=5)) as server, quick(server.url) as store:
        assert store.stat("a").size == 5
    with Scripted(reply(status)) as server, quick(server.url) as store:
        for ask in (lambda: store.stat("a"), lambda: list(store.list())):
            with pytest.raises(Unavailable, match=f"the server says {status}"):
                ask()
        assert len(server.visits) == 6


def test_an_answer_that_makes_no_sense_is_told() -> None:
    with Scripted(reply(418)) as server, quick(server.url) as store, pytest.raises(StoreError, match="says 418"):
        store.stat("a")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    with (
        Scripted(b"HTTP/1.1 200 OK\r\n\r\n", chunked) as server,
        quick(server.url) as store,
        pytest.raises(StoreError, match="does not say how large it is"),
    ):
        store.stat("a")


# Whole operations


def test_every_command_reads_from_a_web_server(web: Web, folder: Path, tmp_path: Path) -> None:
    config = builders.config(num_hidden_layers=2, vocab_size=64)
    source = builders.put(folder / "hf", builders.model(config, builders.tensors(config), files=2))
    for server in (web.json, web.page, web.bare):
        out = tmp_path / server.rpartition(":")[2]
        address = f"{server}/{folder.name}/hf?signature=secret"
        assert shardtool.save(address, out, tp=2).complete
        assert shardtool.verify(out, against=source).exit_code == 0
        assert "secret" not in (out / "shardtool.json").read_text()
        builders.put(folder / "shards", builders.contents(out))
        shards = f"{server}/{folder.name}/shards"
        assert shardtool.verify(shards, against=f"{server}/{folder.name}/hf").exit_code == 0
        assert shardtool.load(shards, rank=1).keys() == shardtool.load(out, rank=1).keys()
        assert shardtool.merge(shards, out / "merged").complete
        assert shardtool.reshard(shards, out / "tp4", tp=4).complete
        shutil.rmtree(folder / "shards")


def test_nothing_is_written_to_a_web_server(web: Web, folder: Path) -> None:
    config = builders.config(num_hidden_layers=1, vocab_size=64)
    source = builders.put(folder / "hf", builders.model(config, builders.tensors(config)))
    with pytest.raises(UsageError, match="is only read"):
        shardtool.save(source, f"{web.json}/{folder.name}/out", tp=2)


@pytest.mark.parametrize("seed", range(20))
def test_a_load_through_bad_weather_is_right_or_an_error(
    web: Web, folder: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See ``tests/test_network_faults.py``; here with a listing, and without one."""
    config = builders.config(num_hidden_layers=1, vocab_size=64)
    builders.put(tmp_path / "hf", builders.model(config, builders.tensors(config)))
    shardtool.save(tmp_path / "hf", folder, tp=2, max_part_size=10_000)
    right = shardtool.load(folder, rank=0)
    server = (web.json, web.page, web.bare)[seed % 3]
    weather = Weather(seed, odds=0.2)
    monkeypatch.setitem(stores.SCHEMES, "http", impatient)
    began = time.monotonic()
    with Proxy(server, weather) as proxy:
        address = f"{proxy.endpoint}/{folder.name}"
        try:
            loaded = shardtool.load(address, rank=0, verify=False)
            report = shardtool.verify(address)
        except (StoreError, FormatError) as error:
            assert address in str(error)  # noqa: PT017 - or there is none
        else:
            assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
                name: (t.dtype, t.tolist()) for name, t in right.items()
            }
            assert report.exit_code == 0, [check.why for check in report.files]
    assert time.monotonic() - began < 50.0


def impatient(uri: str) -> HttpStore:
    return HttpStore(uri, again=Again(attempts=4, backoff=0.005), wire=Wire(pace=Pace(silence=0.2, floor=200)))
