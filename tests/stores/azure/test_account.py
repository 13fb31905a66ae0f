"""Which account an address means, who we are there, and what never leaves this process."""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from shardtool.errors import AccessDenied, UsageError
from shardtool.stores import open_store
from shardtool.stores.accounts import AzureAccount
from shardtool.stores.azure.account import Address, Sas, account_of
from shardtool.stores.azure.store import AzureStore
from shardtool.stores.wire.retry import Again
from tests.servers.azure import ACCOUNT, KEY, AzureServer, Identity

CLOUD = "https://acme.blob.core.windows.net"


# Addresses


@pytest.mark.parametrize(
    ("uri", "endpoint", "container", "prefix"),
    [
        ("az://models", CLOUD, "models", ""),
        ("az://models/", CLOUD, "models", ""),
        ("az://models/llama/tp8/", CLOUD, "models", "llama/tp8"),
        ("az://models@acme/llama", CLOUD, "models", "llama"),
        ("az://models@acme.blob.core.windows.net/llama", CLOUD, "models", "llama"),
        ("abfss://models@acme.dfs.core.windows.net/llama", CLOUD, "models", "llama"),
        ("abfs://models@acme.dfs.core.windows.net/llama", CLOUD, "models", "llama"),
        ("abfss://m-1@acme.dfs.core.chinacloudapi.cn/x", "https://acme.blob.core.chinacloudapi.cn", "m-1", "x"),
        ("abfss://m-1@acme.dfs.core.usgovcloudapi.net/x", "https://acme.blob.core.usgovcloudapi.net", "m-1", "x"),
        ("abfss://m-1@acme.z12.dfs.storage.azure.net/x", "https://acme.z12.blob.storage.azure.net", "m-1", "x"),
    ],
)
def test_an_address_names_a_container_of_an_account(uri: str, endpoint: str, container: str, prefix: str) -> None:
    address = Address.of(uri)
    assert (address.container, address.prefix) == (container, prefix)
    assert account_of(address, AzureAccount(name="acme", sas="sig=x")).endpoint == endpoint


@pytest.mark.parametrize(
    "uri",
    [
        *("az://", "az:///folder", "models/folder", "s3://models/folder", "az://models/a/../b", "az://models/a//b"),
        *(
            "az://ab/x",
            "az://$root/x",
            "az://Models/x",
            "az://a--b/x",
            "az://-abc/x",
            "az://models_1/x",
            f"az://{'a' * 64}/x",
        ),
        *("abfss://models/x", "az://models@/x", "az://models@acme.example.com/x", "az://models@acme:80/x"),
        *("az://models@evil.com/x", "az://models@acme.blob.core.windows.net.evil.com/x", "az://models@a@b/x"),
        "az://user:secret@acme/x",
    ],
)
def test_an_address_that_names_no_container_or_no_account_of_azure_is_refused(uri: str) -> None:
    """Another host than Azure's is only asked where the environment names it: an address could come from anywhere."""
    with pytest.raises(UsageError):
        AzureStore(uri, access=AzureAccount(name="acme", sas="sig=x"))


def test_an_account_must_be_known() -> None:
    with pytest.raises(
        UsageError, match=r"az://models/x .*which account.*AZURE_STORAGE_ACCOUNT.*az://container@account"
    ):
        AzureStore("az://models/x")


def test_two_names_of_one_place_are_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acme")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sig=x")
    uris = ("az://models/a", "az://models@acme/a/", "abfss://models@acme.dfs.core.windows.net/a")
    stores = [open_store(uri) for uri in uris]
    assert {store.place() for store in stores} == {f"{CLOUD}/models/a"}
    assert [store.uri for store in stores] == [uri.rstrip("/") for uri in uris]
    for store in stores:
        store.close()


@pytest.mark.parametrize("secret", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"])
def test_the_secret_of_one_account_does_not_go_to_another(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acme")
    monkeypatch.setenv(secret, KEY)
    with pytest.raises(UsageError, match=r"account other, but .*acme.*AZURE_STORAGE_ACCOUNT"):
        AzureStore("az://models@other/x")


def test_a_connection_string_is_of_the_account_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=acme;AccountKey={KEY}")
    with AzureStore("az://models@acme/x") as store:
        assert store.place() == f"{CLOUD}/models/x"
    with pytest.raises(UsageError, match=r"account other, but AZURE_STORAGE_CONNECTION_STRING is of acme"):
        AzureStore("az://models@other/x")


@pytest.mark.parametrize(
    "text", ["nonsense", f"AccountKey={KEY}", "AccountName=acme", f"AccountName=acme;AccountKey={KEY[:-1]}", "a=b;c"]
)
def test_a_connection_string_that_is_none_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(UsageError, match="AZURE_STORAGE_CONNECTION_STRING") as caught:
        AzureStore("az://models/x", access=AzureAccount(connection_string=text))
    assert KEY[:20] not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_is_none_is_refused_without_showing_it() -> None:
    with pytest.raises(UsageError, match="AZURE_STORAGE_KEY") as caught:
        AzureStore("az://models/x", access=AzureAccount(name="acme", key=KEY[:-1]))
    assert KEY[:20] not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "endpoint", ["acme", "ftp://acme", "https://", "https://user:pass@acme", "https://acme?sig=x", "http://[::1"]
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="AZURE_STORAGE_ENDPOINT"):
        AzureStore("az://models/x", access=AzureAccount(endpoint=endpoint, key=KEY))


def test_a_token_does_not_go_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:1/{ACCOUNT}")
    with pytest.raises(UsageError, match="tokens only go over TLS"):
        AzureStore("az://models/x")


@pytest.mark.parametrize(
    ("module", "access"),
    [
        ("azure.storage.blob", AzureAccount(name="acme", key=KEY)),
        ("azure.storage.blob", AzureAccount(connection_string=f"AccountName=acme;AccountKey={KEY}")),
        ("azure.identity", AzureAccount(name="acme")),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    module: str, access: AzureAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UsageError, match=r"pip install 'shardtool\[azure\]'"):
        AzureStore("az://models/x", access=access)


# Who we are, on a real server


@pytest.fixture
def bare(container: str, azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A container with a blob, of which the environment only says where it is."""
    azure_server.client.get_blob_client(container, "a").upload_blob(b"x")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_server.endpoint)
    return container


def outcome(container: str, **settings: object) -> bytes:
    """What can be read of the blob."""
    with AzureStore(f"az://{container}", **settings) as store:  # type: ignore[arg-type]
        return store.get("a", limit=1)


@pytest.mark.parametrize("name", [{}, {"AZURE_STORAGE_ACCOUNT": ACCOUNT}, {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT}])
@pytest.mark.parametrize("key", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY"])
def test_an_account_key_opens_the_account(
    bare: str, name: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**name, key: KEY}.items():
        monkeypatch.setenv(variable, value)
    assert outcome(bare) == b"x"


def test_a_shared_access_signature_opens_the_container(
    bare: str, azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for question in ("", "?"):
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", question + azure_server.sas(bare))
        assert outcome(bare) == b"x"
    text = f"BlobEndpoint={azure_server.endpoint};SharedAccessSignature={azure_server.sas(bare)}"
    assert outcome(bare, access=AzureAccount(connection_string=text)) == b"x"


def test_a_wrong_key_is_denied(bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "d3Jvbmc=")
    with pytest.raises(AccessDenied, match=rf"access to az://{bare}/a is denied .*check the account key"):
        outcome(bare)


def test_a_signature_that_has_expired_is_denied(bare: str, azure_server: AzureServer) -> None:
    with pytest.raises(AccessDenied, match=rf"the shared access signature for az://{bare}/a has expired at 20"):
        outcome(bare, access=AzureAccount(endpoint=azure_server.endpoint, sas=azure_server.sas(bare, hours=-1)))


def test_a_signature_that_allows_reading_does_not_allow_writing(bare: str, azure_server: AzureServer) -> None:
    access = AzureAccount(endpoint=azure_server.endpoint, sas=azure_server.sas(bare, "rl"))
    with AzureStore(f"az://{bare}", access=access) as store:
        assert store.get("a", limit=1) == b"x"
        with pytest.raises(AccessDenied, match=f"access to az://{bare}/b is denied .*the shared access signature, its"):
            store.put("b", b"x")


def test_a_signature_knows_when_it_ended() -> None:
    for text, ended in (
        ("se=2020-01-02T03%3A04%3A05Z&sig=x", "2020-01-02T03:04:05Z"),
        ("?se=2020-01-02&sig=x", "2020-01-02"),
        ("se=2999-01-02T03:04:05Z&sig=x", ""),
        ("se=never&sig=x", ""),
        ("si=policy&sig=x", ""),
    ):
        assert Sas(text).ended() == ended


def test_nobody_may_read_what_is_not_open_to_all(
    bare: str, azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    with pytest.raises(AccessDenied, match=rf"az://{bare}/a"):
        outcome(bare)
    azure_server.client.get_container_client(bare).set_container_access_policy({}, public_access="blob")
    assert outcome(bare) == b"x"


def test_no_secret_is_in_an_error_or_a_representation(bare: str, azure_server: AzureServer) -> None:
    """Neither the key nor the signature, whatever goes wrong, and also not in what an error comes from."""
    sas = azure_server.sas(bare, "r")
    signature = sas.split("sig=")[1].partition("&")[0]
    here = azure_server.endpoint
    accounts = [
        AzureAccount(endpoint=here, sas=sas),
        AzureAccount(endpoint=here, key=KEY),
        AzureAccount(endpoint="http://127.0.0.1:9/x", sas=sas),
        AzureAccount(connection_string=f"AccountName=acme;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:9/acme"),
    ]
    for access in accounts:
        assert KEY not in repr(access)
        assert signature not in repr(access)
        with AzureStore(f"az://{bare}", access=access, again=Again(attempts=1)) as store:
            assert signature not in repr(vars(store)) + store.place()
            for call in (lambda: store.stat("missing"), lambda: list(store.list()), lambda: store.put("a/..b", b"")):
                try:
                    call()
                except Exception as error:
                    text = "".join(traceback.format_exception(error))
                    assert signature not in text
                    assert "sig=" not in text
                    assert KEY not in text


# Credentials that change while they are used


@dataclass
class Given:
    """What a credential of Azure's gives."""

    token: str
    expires_on: int


class Credential:
    """A credential whose tokens a test makes."""

    def __init__(self, *given: Given | Exception) -> None:
        self.given = list(given)
        self.scopes: list[str] = []

    def get_token(self, *scopes: str) -> Given:
        self.scopes += scopes
        found = self.given.pop(0) if len(self.given) > 1 else self.given[0]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def guarded(azure_tls_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A container of a server that speaks TLS, with a blob; the environment says where it is."""
    container = azure_tls_server.container(monkeypatch)
    azure_tls_server.client.get_blob_client(container, "a").upload_blob(b"x")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_tls_server.endpoint)
    return container


def lasting(identity: Identity, seconds: float) -> Given:
    """A token that the server takes for so long."""
    identity.lasting = seconds
    return Given(*identity.token())


def test_a_token_is_asked_for_once_while_it_lasts(guarded: str, identity: Identity) -> None:
    credential = Credential(lasting(identity, 3600))
    with AzureStore(f"az://{guarded}", credential=credential) as store:
        for _ in range(5):
            assert store.get("a", limit=1) == b"x"
    assert credential.scopes == ["https://storage.azure.com/.default"]


def test_a_token_is_renewed_before_it_ends(guarded: str, identity: Identity) -> None:
    credential = Credential(lasting(identity, 200), lasting(identity, 3600))
    with AzureStore(f"az://{guarded}", credential=credential) as store:
        for _ in range(3):
            assert store.get("a", limit=1) == b"x"
    assert len(credential.scopes) == 2


def test_a_token_that_still_lasts_is_used_where_none_can_be_had(guarded: str, identity: Identity) -> None:
    from azure.core.exceptions import ClientAuthenticationError

    away = ClientAuthenticationError("the identity is away")
    credential = Credential(lasting(identity, 200), away)
    with AzureStore(f"az://{guarded}", credential=credential) as store:
        for _ in range(3):
            assert store.get("a", limit=1) == b"x"
    with (
        AzureStore(f"az://{guarded}", credential=Credential(away)) as store,
        pytest.raises(AccessDenied, match=r"no credentials for az://.*the identity is away.*AZURE_STORAGE"),
    ):
        store.stat("a")


@pytest.mark.parametrize("deed", ["read", "write", "list"])
def test_a_token_that_is_refused_is_renewed_once(guarded: str, identity: Identity, deed: str) -> None:
    """The server's clock and ours may differ, and an identity may be made anew."""
    refused = Given(lasting(identity, -600).token, int(time.time()) + 3600)
    credential = Credential(refused, lasting(identity, 3600))
    with AzureStore(f"az://{guarded}", credential=credential) as store:
        match deed:
            case "read":
                room = bytearray(1)
                store.readinto("a", 0, memoryview(room))
                assert room == b"x"
            case "write":
                store.put("b", b"y")
            case _:
                assert [found.key for found in store.list()] == ["a"]
    assert len(credential.scopes) == 2
    with (
        AzureStore(f"az://{guarded}", credential=Credential(refused)) as store,
        pytest.raises(AccessDenied, match="the identity for az://"),
    ):
        store.stat("a")


def test_many_threads_are_refused_and_one_renews(guarded: str, identity: Identity) -> None:
    """The others go on with what it got: their own question would give them the same token."""
    refused = Given(lasting(identity, -600).token, int(time.time()) + 3600)
    credential = Credential(refused, lasting(identity, 3600))
    together = threading.Barrier(4)
    with AzureStore(f"az://{guarded}", credential=credential) as store:
        send = store._wire.send

        def refusing(request, *args, **settings):
            answer = send(request, *args, **settings)
            if answer.status in (401, 403):
                together.wait(30)
            return answer

        store._wire.send = refusing  # type: ignore[method-assign]  # all of them are on their way with the old token
        with ThreadPoolExecutor(4) as pool:
            assert [found.size for found in pool.map(store.stat, "aaaa")] == [1] * 4


def test_a_signature_is_renewed_by_its_owner(bare: str, azure_server: AzureServer) -> None:
    from azure.core.credentials import AzureSasCredential

    credential = AzureSasCredential(azure_server.sas(bare, hours=-1))
    with AzureStore(f"az://{bare}", credential=credential) as store:
        with pytest.raises(AccessDenied):
            store.stat("a")
        credential.update(azure_server.sas(bare))
        assert store.get("a", limit=1) == b"x"


def test_a_key_is_changed_by_its_owner(bare: str) -> None:
    from azure.core.credentials import AzureNamedKeyCredential

    credential = AzureNamedKeyCredential(ACCOUNT, "d3Jvbmc=")
    with AzureStore(f"az://{bare}", credential=credential) as store:
        with pytest.raises(AccessDenied, match="account key"):
            store.stat("a")
        credential.update(ACCOUNT, KEY)
        for _ in range(2):
            assert store.get("a", limit=1) == b"x"


def test_where_there_is_no_identity_it_is_said_what_to_do(
    guarded: str, identity: Identity, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence: what Azure's library writes about it to the screen is not shown."""
    identity.refused = True
    with (
        AzureStore(f"az://{guarded}") as store,
        pytest.raises(AccessDenied, match=rf"no credentials for az://{guarded} .*az login"),
    ):
        store.stat("a")
    assert capfd.readouterr() == ("", "")


def test_of_many_reasons_the_one_that_matters_is_told(guarded: str) -> None:
    from azure.core.exceptions import ClientAuthenticationError

    said = (
        "DefaultAzureCredential failed to retrieve a token from the included credentials.\nAttempted credentials:\n"
        "\tWorkloadIdentityCredential: WorkloadIdentityCredential authentication unavailable. Not configured.\n"
        "\tEnvironmentCredential: Authentication failed: AADSTS7000215: Invalid client secret provided.\n"
    )
    with (
        AzureStore(f"az://{guarded}", credential=Credential(ClientAuthenticationError(said))) as store,
        pytest.raises(
            AccessDenied, match=r"\(EnvironmentCredential: .*AADSTS7000215: Invalid client secret provided\)"
        ),
    ):
        store.stat("a")


def test_a_server_that_is_not_trusted_gets_nothing(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    credential = Credential(Given("secret", int(datetime.now(UTC).timestamp() + timedelta(hours=1).seconds)))
    with (
        AzureStore(f"az://{guarded}", credential=credential) as store,
        pytest.raises(Exception, match="cannot be trusted"),
    ):
        store.stat("a")
