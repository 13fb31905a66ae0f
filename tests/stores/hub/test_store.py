"""HubStore reads models of a hub: at one commit, from the cache where it can, and never with the token elsewhere."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.hf_api import RepoFile

from shardtool.errors import AccessDenied, FormatError, NotFound, StoreError, Unavailable, UsageError
from shardtool.stores import open_store
from shardtool.stores.base import Object, Store, Wrapper
from shardtool.stores.hub.store import HubStore, Place
from shardtool.stores.wire.http import Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again
from shardtool.testing import ReadOnlyContract
from tests import builders
from tests.servers import Proxy, Weather
from tests.servers.hub import PAGE, Hub, use
from tests.servers.weather import READS

MIB = 1 << 20
QUICK = Again(backoff=0.001)
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": random.Random(1).randbytes(3 * MIB),
    "code/modeling.py": b"pass\n",
    "code/deep/er.py": b"1\n",
    "original/model.safetensors": b"other",
}


class Latest(Wrapper):
    """The model as it is now: opened anew when something was pushed."""

    def __init__(self, uri: str) -> None:
        super().__init__(HubStore(uri))

    def pushed(self) -> None:
        self.inner.close()
        self.inner = HubStore(self.uri)


class Contract(ReadOnlyContract):
    """A folder of a model that has other files too."""

    lfs: tuple[str, ...] = ()

    @pytest.fixture
    def store(self, hub: Hub) -> Iterator[Latest]:
        for key in ("folder/ab", "folder/b", "folders", "z"):
            hub.commit("model", {key: b"not ours"}, replace=False)
        with Latest(hub.uri("model") + "/folder/a/") as store:
            yield store

    @pytest.fixture
    def fill(self, hub: Hub, store: Latest) -> Callable[[str, bytes], None]:
        def put(key: str, data: bytes) -> None:
            hub.commit("model", {f"folder/a/{key}": data}, lfs=self.lfs, replace=False)
            store.pushed()

        return put


class TestSmallFiles(Contract):
    """What git keeps itself."""


class TestLargeFiles(Contract):
    """What lies on another host."""

    lfs = ("",)


@pytest.fixture
def pushed(hub: Hub) -> str:
    """The address of a model."""
    hub.commit("llama", FILES)
    return hub.uri("llama")


def read(store: Store, key: str) -> bytes:
    return store.get(key, limit=1 << 30)


def everything(store: Store) -> dict[str, bytes]:
    return {found.key: read(store, found.key) for found in store.list()}


# Addresses.


@pytest.mark.parametrize(
    ("uri", "repo", "revision", "folder"),
    [
        ("hf://org/name", "org/name", None, ""),
        ("hf://org/name/", "org/name", None, ""),
        ("hf://models/org/name", "org/name", None, ""),
        ("hf://org/Name-1.5_b@v1.0/a/b", "org/Name-1.5_b", "v1.0", "a/b"),
        ("hf://org/name@refs/pr/12/a", "org/name", "refs/pr/12", "a"),
        ("hf://org/name@feature%2Fone/a", "org/name", "feature/one", "a"),
    ],
)
def test_an_address_names_a_model_a_revision_and_a_folder(uri, repo, revision, folder):
    assert Place.of(uri) == Place(repo, revision, folder)


@pytest.mark.parametrize(
    "uri",
    [
        *("hf://", "hf://name", "hf://org/", "hf://org//name", "hf://org/na me", "hf://o--g/name", "hf://org/a..b"),
        *("hf://org/name@", "hf://../name", "hf://org/.name", "hf://org/name/../x", "hf://org/name//x"),
        *("hf://org/näme", "hf://datasets/org/name", "hf://org/name?x=1", "hf://user:secret@org/name"),
    ],
)
def test_what_names_no_model_is_refused(uri):
    with pytest.raises(UsageError):
        HubStore(uri)


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
    with pytest.raises(UsageError, match=r"hf://org/name needs huggingface_hub: pip install 'shardtool\[hf\]'"):
        HubStore("hf://org/name")
    with pytest.raises(NotFound, match=r"org/name does not exist here; .*pip install 'shardtool\[hf\]'"):
        HubStore("hf://org/name", bare=True)


# Listing, and the commit.


def test_a_model_is_what_was_pushed(pushed):
    assert len(FILES) > PAGE
    with open_store(pushed) as store:
        assert everything(store) == FILES
        assert store.remote


def test_a_folder_of_a_model_is_a_store_of_its_own(pushed):
    with HubStore(f"{pushed}/code") as store:
        assert everything(store) == {"modeling.py": b"pass\n", "deep/er.py": b"1\n"}
        assert store.locate("modeling.py") == f"{pushed}/code/modeling.py"
    for name in ("none", "config.json", "cod"):
        with HubStore(f"{pushed}/{name}") as store, pytest.raises(NotFound, match=rf"llama/{name} does not exist"):
            list(store.list())


def test_sizes_hashes_and_versions_come_with_the_listing(hub, pushed):
    data = FILES["model.safetensors"]
    sha256 = hashlib.sha256(data).hexdigest()
    with HubStore(pushed) as store:
        assert store.stat("model.safetensors") == Object("model.safetensors", len(data))
        assert store.stat("model.safetensors").version == sha256
        assert store.checksums("model.safetensors") == {"sha256": sha256}
        assert store.checksums("config.json") == {}
    assert not [one for one in hub.asked() if "/resolve/" in one.path]


def test_a_commit_is_read_to_its_end_whatever_is_pushed_meanwhile(hub, pushed):
    with HubStore(pushed) as store:
        before = store.stat("config.json")
        commit = hub.commit("llama", {"config.json": b'{"new": 2, "longer": 3}', "model.safetensors": b"x"})
        assert everything(store) == FILES
        assert store.stat("config.json").version == before.version
        assert store.commit() != commit
    with HubStore(pushed) as store:
        assert store.commit() == commit
        assert len(everything(store)) == 2


def test_a_revision_is_a_branch_a_reference_or_a_commit(hub):
    first = hub.commit("m", {"a": b"1"})
    hub.commit("m", {"a": b"2"}, branch="refs/pr/3")
    hub.commit("m", {"a": b"3"}, branch="feature/x")
    hub.commit("m", {"a": b"4"})
    for revision, content in ((first, b"1"), ("refs/pr/3", b"2"), ("feature%2Fx", b"3"), ("main", b"4")):
        with HubStore(f"{hub.uri('m')}@{revision}") as store:
            assert read(store, "a") == content


def test_a_model_that_was_renamed_is_followed(hub, pushed):
    hub.set("old", moved=f"{hub.org}/llama")
    with HubStore(hub.uri("old")) as store:
        assert everything(store) == FILES


# Reading.


def test_a_signed_address_serves_many_ranges(hub, pushed):
    """The hub is asked once for a file, the other host for each range."""
    with HubStore(pushed) as store:
        store.stat("config.json")
        before = len(hub.asked())
        room = bytearray(10)
        for start in range(0, 100, 10):
            store.readinto("model.safetensors", start, memoryview(room))
            assert room == FILES["model.safetensors"][start : start + 10]
    assert [one.host for one in hub.asked()[before:]] == ["hub", *["cdn"] * 10]


def test_a_signed_address_that_has_ended_is_asked_for_anew(hub, pushed):
    with HubStore(pushed, again=QUICK) as store:
        room = bytearray(10)
        store.readinto("model.safetensors", 0, memoryview(room))
        hub.server.set(secret="another")
        before = len(hub.asked())
        store.readinto("model.safetensors", 10, memoryview(room))
        assert room == FILES["model.safetensors"][10:20]
    assert [(one.host, one.method) for one in hub.asked()[before:]] == [("cdn", "GET"), ("hub", "HEAD"), ("cdn", "GET")]


def test_a_host_of_large_files_that_keeps_refusing_is_told_of(hub, pushed):
    with HubStore(pushed, again=QUICK) as store:
        store.readinto("model.safetensors", 0, memoryview(bytearray(1)))
        (hub.server.folder / "blobs" / store.stat("model.safetensors").version).unlink()
        with pytest.raises(NotFound, match="the host that has large files does not have it"):
            store.readinto("model.safetensors", 0, memoryview(bytearray(1)))


def test_a_signed_address_that_ends_in_the_middle_of_a_file_is_asked_for_anew(hub, pushed, monkeypatch):
    """What has come is not asked for again."""
    with Proxy(hub.server.cdn) as proxy, HubStore(pushed, again=QUICK) as store:
        hub.server.set(cdn=proxy.endpoint)
        proxy.trouble.cuts, proxy.trouble.cut_after = 1, MIB
        between = SimpleNamespace(sleep=lambda _: hub.server.set(secret="the next"), monotonic=time.monotonic)
        monkeypatch.setattr("shardtool.stores.wire.retry.time", between)  # the moment between two tries
        assert read(store, "model.safetensors") == FILES["model.safetensors"]
    asked = [(one.host, one.range) for one in hub.asked() if one.host == "cdn" or one.method == "HEAD"]
    whole, rest = f"bytes=0-{3 * MIB - 1}", f"bytes={MIB}-{3 * MIB - 1}"
    assert asked == [("hub", ""), ("cdn", whole), ("cdn", rest), ("hub", ""), ("cdn", rest)]


def test_an_address_that_is_refused_whatever_it_is_ends_the_read_without_being_shown(hub, pushed):
    with Proxy(hub.server.cdn) as proxy, HubStore(pushed, again=QUICK) as store:
        hub.server.set(cdn=proxy.endpoint)
        proxy.trouble.refused, proxy.trouble.status = 1000, 403
        with pytest.raises(AccessDenied, match=r"refuses hf://\S+/model\.safetensors .*403") as caught:
            read(store, "model.safetensors")
    assert "Signature" not in str(caught.value)
    assert len(proxy.trouble.seen) == 2


def test_many_threads_ask_once_where_a_file_is(hub, pushed):
    with HubStore(pushed, again=QUICK) as store:
        store.stat("config.json")

        def one(start: int) -> bytes:
            room = bytearray(1000)
            store.readinto("model.safetensors", start, memoryview(room))
            return bytes(room)

        for secret in ("now", "then"):
            hub.server.set(secret=secret)
            with ThreadPoolExecutor(16) as pool:
                found = b"".join(pool.map(one, range(0, 64_000, 1000)))
            assert found == FILES["model.safetensors"][:64_000]
    asked = [one.method for one in hub.asked("hub")]
    assert asked.count("HEAD") == 2


@pytest.mark.parametrize("key", ["config.json", "model.safetensors"])
def test_a_busy_or_broken_hub_is_asked_again(hub, pushed, monkeypatch, tmp_path, key):
    with Proxy(hub.endpoint) as proxy:
        use(monkeypatch, proxy.endpoint, tmp_path)
        proxy.trouble.refused, proxy.trouble.code = 2, ""
        with HubStore(pushed, again=QUICK) as store:
            assert len(list(store.list())) == len(FILES)
            proxy.trouble.refused = 2
            assert read(store, key) == FILES[key]
        proxy.trouble.refused = 1000
        with HubStore(pushed, again=Again(attempts=2, backoff=0.001)) as store, pytest.raises(Unavailable, match="503"):
            store.stat(key)


def test_a_small_file_whose_body_is_cut_is_whole_in_the_end(hub, monkeypatch, tmp_path):
    data = random.Random(3).randbytes(100_000)
    hub.commit("m", {"tokenizer.json": data})
    with Proxy(hub.endpoint) as proxy:
        use(monkeypatch, proxy.endpoint, tmp_path)
        with HubStore(hub.uri("m"), again=QUICK) as store:
            store.stat("tokenizer.json")
            proxy.trouble.cuts, proxy.trouble.cut_after, proxy.trouble.methods = 3, 30_000, ("GET",)
            assert read(store, "tokenizer.json") == data


def outcome(uri: str, run: Callable[[], object]) -> object:
    """What a run gives, or nothing where it ends with an error, which names the address and shows no secret."""
    try:
        return run()
    except (StoreError, FormatError) as error:
        text = str(error)
    assert uri in text
    assert "Signature" not in text
    return None


@pytest.mark.parametrize("seed", range(30))
def test_what_is_read_in_bad_weather_is_right_or_an_error_that_names_it(hub, pushed, seed):
    """Between us and both hosts anything may go wrong."""
    began = time.monotonic()
    listed = {key: len(data) for key, data in FILES.items()}
    with (
        Proxy(hub.endpoint, Weather(f"hub {seed}", odds=0.3, kinds=READS)) as proxy,
        Proxy(hub.server.cdn, Weather(f"cdn {seed}", odds=0.3, kinds=READS)) as far,
        Wire(pace=Pace(connect=2.0, silence=0.2, floor=200)) as wire,
        HubStore(pushed, again=Again(attempts=4, backoff=0.005), wire=wire) as store,
    ):
        store._endpoint = proxy.endpoint
        hub.server.set(cdn=far.endpoint)
        for key, data in FILES.items():
            assert outcome(pushed, lambda: {found.key: found.size for found in store.list()}) in (None, listed)
            for start in (0, 1):
                room = memoryview(bytearray(len(data) - start))
                if outcome(pushed, lambda: [store.readinto(key, start, room)]):  # type: ignore[func-returns-value]  # noqa: B023 - called at once
                    assert room == data[start:]
    assert time.monotonic() - began < 60


# Who asks.


def test_the_token_goes_to_the_hub_alone(hub, pushed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubStore(pushed) as store:
        assert everything(store) == FILES
    assert {one.token for one in hub.asked("hub")} == {"hf_secret"}
    assert {one.token for one in hub.asked("cdn")} == {""}
    assert {one.agent.partition("/")[0] for one in hub.asked()} == {"shardtool"}


def test_the_token_of_a_login_is_used_unless_the_user_does_not_want_it(hub, pushed, monkeypatch):
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_login\n")
    with HubStore(pushed) as store:
        store.stat("config.json")
    assert {one.token for one in hub.asked()} == {"hf_login"}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    before = len(hub.asked())
    with HubStore(pushed) as store:
        store.stat("config.json")
    assert {one.token for one in hub.asked()[before:]} == {""}


def test_a_private_model_is_there_for_its_readers(hub, pushed, monkeypatch):
    hub.set("llama", private=True, readers=["hf_mine"])
    for token in ("", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        with HubStore(pushed) as store, pytest.raises(NotFound, match=r"no model .*/llama, or it is private.*HF_TOKEN"):
            store.stat("config.json")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with HubStore(pushed) as store:
        assert everything(store) == FILES


def test_a_gated_model_can_be_listed_but_is_read_by_those_who_were_let_in(hub, pushed, monkeypatch):
    hub.set("llama", gated=True, readers=["hf_mine"])
    for token in ("", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        with HubStore(pushed) as store:
            assert store.exists("model.safetensors")
            for key in ("config.json", "model.safetensors"):
                with pytest.raises(AccessDenied, match=rf"llama/{key} is gated: ask for access on http\S+/llama"):
                    read(store, key)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with HubStore(pushed) as store:
        assert everything(store) == FILES


def test_a_token_that_is_none_is_told_of_without_showing_it(pushed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "bad_secret")
    with HubStore(pushed) as store, pytest.raises(AccessDenied, match=r"token .*not valid.*HF_TOKEN") as caught:
        store.stat("config.json")
    assert "bad_secret" not in str(caught.value)


# What is not there.


def test_a_model_a_revision_or_a_file_that_is_not_there_is_not_found(hub, pushed):
    for uri, message in (
        (hub.uri("none"), r"there is no model http\S+/none, or it is private"),
        (f"{pushed}@v9", r"llama@v9: .*no such revision"),
    ):
        with HubStore(uri) as store, pytest.raises(NotFound, match=message):
            list(store.list())
    with HubStore(pushed) as store, pytest.raises(NotFound, match=r"llama/none\.json does not exist"):
        store.stat("none.json")


def test_a_hub_that_does_not_answer_is_unavailable(hub, monkeypatch, tmp_path):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with (
        HubStore("hf://org/name", again=Again(attempts=1)) as store,
        pytest.raises(Unavailable, match="cannot be reached"),
    ):
        store.stat("a")


def test_an_endpoint_that_is_no_hub_is_found_out(hub, pushed, monkeypatch):
    """Whatever it answers, nothing is read from it."""
    path = hub.server.folder / "repos" / hub.org / "llama" / "about.json"
    good = hub.about("llama")
    commit = good["refs"]["main"]
    for about in (
        {**good, "refs": {"main": "x"}, "commits": {"x": {}}},
        {**good, "commits": {commit: {"a": {"size": "12", "oid": "x", "lfs": None}}}},
        {**good, "commits": {commit: {"a": {"size": -1, "oid": "x", "lfs": None}}}},
        {**good, "commits": {commit: {"a": {"size": 1 << 70, "oid": "x", "lfs": "y"}}}},
        {**good, "commits": {commit: {"a": {"size": 1, "oid": None, "lfs": None}}}},
    ):
        hub.set("llama", **about)
        with HubStore(pushed) as store, pytest.raises(FormatError, match="as no hub does: check HF_ENDPOINT"):
            list(store.list())
    path.unlink()


def test_names_that_lead_elsewhere_are_no_files(hub):
    hub.commit("m", {"../../evil": b"x", "/etc/evil": b"x", "a//b": b"x", "a\\b": b"x", "good": b"x"})
    with HubStore(hub.uri("m")) as store:
        assert [found.key for found in store.list()] == ["good"]


def test_a_large_file_that_is_another_one_is_not_read(hub, pushed):
    """The hub says the hash of what it redirects to."""
    with HubStore(pushed) as store:
        store.stat("config.json")
        about = hub.about("llama")
        about["commits"][about["refs"]["main"]]["model.safetensors"]["lfs"] = "0" * 64
        hub.set("llama", **about)
        with pytest.raises(StoreError, match=r"model\.safetensors was replaced"):
            read(store, "model.safetensors")


# The cache.


def fetched(uri: str, *names: str) -> Path:
    """Let huggingface_hub fetch files into its cache; gives the folder of the commit."""
    repo = uri.removeprefix("hf://")
    paths = [huggingface_hub.hf_hub_download(repo, name, endpoint=constants.ENDPOINT) for name in names]
    return Path(paths[0]).parents[names[0].count("/")]


def test_what_is_in_the_cache_is_read_from_there(hub, pushed):
    fetched(pushed, "model.safetensors", "config.json")
    with HubStore(pushed) as store:
        before = len(hub.asked())
        assert store.stat("model.safetensors").version == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
        listing = len(hub.asked())
        assert read(store, "model.safetensors") == FILES["model.safetensors"]
        assert read(store, "config.json") == FILES["config.json"]
        assert bytes(store.borrow("model.safetensors")[:10]) == FILES["model.safetensors"][:10]
        assert len(hub.asked()) == listing > before
        assert read(store, "code/modeling.py") == b"pass\n"
        assert len(hub.asked()) > listing
        with pytest.raises(UsageError, match="borrow"):
            store.borrow("code/modeling.py")


def test_a_file_of_the_cache_that_is_not_whole_is_not_taken(hub, pushed):
    path = fetched(pushed, "model.safetensors") / "model.safetensors"
    os.truncate(os.path.realpath(path), 1000)
    with HubStore(pushed) as store:
        assert read(store, "model.safetensors") == FILES["model.safetensors"]


def test_the_cache_of_another_commit_is_not_taken(hub, pushed):
    fetched(pushed, "config.json")
    hub.commit("llama", {"config.json": b'{"a": 2}'})
    with HubStore(pushed) as store:
        assert read(store, "config.json") == b'{"a": 2}'


@pytest.mark.parametrize("revision", ["", "@main", "@{commit}"])
def test_offline_a_model_is_what_the_cache_has(hub, pushed, monkeypatch, revision):
    names = ("config.json", "model.safetensors", "code/modeling.py")
    commit = fetched(pushed, *names).name
    hub.commit("llama", {"config.json": b"newer"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.asked())
    uri = pushed + revision.format(commit=commit)
    with HubStore(uri) as store:
        assert everything(store) == {key: FILES[key] for key in names}
        assert not store.remote
        assert store.commit() == commit
        assert store.checksums("model.safetensors") == {
            "sha256": hashlib.sha256(FILES["model.safetensors"]).hexdigest()
        }
        with pytest.raises(NotFound, match=r"code/deep/er\.py is not in the cache, and HF_HUB_OFFLINE is set"):
            store.stat("code/deep/er.py")
    with HubStore(f"{uri}/code") as store:
        assert everything(store) == {"modeling.py": b"pass\n"}
    assert len(hub.asked()) == before


@pytest.mark.parametrize("revision", ["", "@v9", "@../../x", "@" + "0" * 40])
def test_offline_a_model_that_is_not_in_the_cache_is_not_found(hub, monkeypatch, revision):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    uri = f"{hub.uri('none')}{revision.replace('/', '%2F')}"
    with HubStore(uri) as store, pytest.raises(NotFound, match=r"is not in the cache .*hf download \S+/none"):
        list(store.list())
    assert not hub.asked()


# The hub of the tests.


def test_the_hub_of_these_tests_is_one_for_huggingface_hub_too(hub, pushed, monkeypatch, tmp_path):
    """What the official library asks it answers as that expects, errors too."""
    api = huggingface_hub.HfApi(endpoint=hub.endpoint)
    repo = pushed.removeprefix("hf://")
    listed = {one.path: one for one in api.list_repo_tree(repo, recursive=True) if isinstance(one, RepoFile)}
    assert {key: one.size for key, one in listed.items()} == {key: len(data) for key, data in FILES.items()}
    large = listed["model.safetensors"].lfs
    assert large is not None
    assert large.sha256 == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert {one.path for one in api.list_repo_tree(repo, "code")} == {"code/modeling.py", "code/deep"}
    assert sorted(api.list_repo_files(repo)) == sorted(FILES)
    assert (
        builders.contents(api.snapshot_download(repo, local_dir=tmp_path / "all", token=False)).items() >= FILES.items()
    )
    for kind, call in (
        (errors.RepositoryNotFoundError, lambda: api.model_info(f"{hub.org}/none")),
        (errors.RevisionNotFoundError, lambda: api.model_info(repo, revision="v9")),
        (errors.EntryNotFoundError, lambda: api.hf_hub_download(repo, "none.json")),
    ):
        with pytest.raises(kind):
            call()
    hub.set("llama", gated=True, readers=[])
    with pytest.raises(errors.GatedRepoError):
        api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path / "cache")


def test_requests_are_told_apart(hub, pushed):
    """The log that these tests rest on sees the token and the range of a request."""
    with HubStore(pushed) as store:
        store.readinto("model.safetensors", 5, memoryview(bytearray(3)))
    assert asdict(hub.asked("cdn")[-1])["range"] == "bytes=5-7"
