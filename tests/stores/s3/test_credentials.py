"""Credentials that are lent for a while: of a web identity, a container's service, a program. The server checks each.

moto verifies every signature and every session token here, so that whatever is read was asked for with what was lent.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs

import pytest

from shardtool.errors import AccessDenied, Unavailable, UsageError
from shardtool.stores.s3.store import S3Store
from shardtool.testing import write
from shardtool.testing.words import content
from tests.servers import S3Server
from tests.servers.process import free_port
from tests.servers.web import Scripted, Visit, reply

LARGE = 12 << 20
HOUR = 3600.0
EVERYTHING = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
ROLE = "arn:aws:iam::123456789012:role/"


@pytest.fixture
def bucket(moto_iam: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of a server that knows who may do what; of nobody's keys the environment says anything."""
    name = moto_iam.bucket(monkeypatch)
    for key in KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return f"s3://{name}/folder"


@pytest.fixture
def role(moto_iam: S3Server) -> str:
    """A role that may do everything."""
    name = f"reader-{time.monotonic_ns()}"
    trusting = json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}],
        }
    )
    with closing(moto_iam._client("iam")) as iam:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trusting)
        iam.put_role_policy(RoleName=name, PolicyName="all", PolicyDocument=EVERYTHING)
    return ROLE + name


def lent(moto: S3Server, role: str) -> dict[str, str]:
    """Credentials of a role, with a session token."""
    with closing(moto._client("sts")) as sts:
        found = sts.assume_role(RoleArn=role, RoleSessionName="test")["Credentials"]
    return {name: str(value) for name, value in found.items()}


def soon(seconds: float) -> str:
    """A time so far away, as AWS writes it."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def use(store: S3Store) -> None:
    """All that is asked, by boto3 and by the wire."""
    data, room = content(LARGE), bytearray(1 << 20)
    store.put("small", b"abc", exclusive=True)
    write(store, "large", data, slice_size=8 << 20)
    assert [found.key for found in store.list()] == ["large", "small"]
    store.readinto("large", 5, memoryview(room))
    assert room == data[5 : 5 + len(room)]
    assert store.get("small", limit=3) == b"abc"
    store.delete("small")


class Sts:
    """moto's service of tokens, which takes one web identity at a time; ``lends``: for how many seconds.

    moto asks even those for a signature who come to get their first credentials; so here it is told not to, once.
    """

    def __init__(self, moto: S3Server, good: str) -> None:
        self.good = good
        self.lends = HOUR
        self.asked: list[str] = []
        self._moto = moto

    def __call__(self, visit: Visit) -> None:
        form = {name: values[0] for name, values in parse_qs(visit.body.decode()).items()}
        self.asked.append(form["WebIdentityToken"])
        assert "authorization" not in visit.headers
        if form["WebIdentityToken"] != self.good:
            text = (
                "<ErrorResponse><Error><Code>InvalidIdentityToken</Code><Message>no</Message></Error></ErrorResponse>"
            )
            visit.say(reply(400, text.encode(), Content_Type="text/xml"))
            return
        self._post("/moto-api/reset-auth", b"1", Content_Type="text/plain")
        found = self._post("/", visit.body, Content_Type="application/x-www-form-urlencoded")
        before, _, after = found.partition(b"<Expiration>")
        found = before + b"<Expiration>" + soon(self.lends).encode() + after[after.index(b"</") :]
        visit.say(reply(200, found, Content_Type="text/xml"))

    def _post(self, path: str, body: bytes, **headers: str) -> bytes:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self._moto.endpoint + path, body, named, method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            said: bytes = answer.read()
        return said


@pytest.fixture
def token(tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a web identity, as Kubernetes mounts it."""
    file = tmp_path / "token"
    file.write_text("first")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
    monkeypatch.setenv("AWS_ROLE_ARN", role)
    monkeypatch.setenv("AWS_ROLE_SESSION_NAME", "a-pod")
    return file


@pytest.fixture
def sts(moto_iam: S3Server, token: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sts]:
    service = Sts(moto_iam, "first")
    with Scripted(service) as served:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", served.url)
        yield service


# Web identity


def test_a_web_identity_is_enough(bucket: str, sts: Sts) -> None:
    """It is shown once: what is lent for it lasts an hour."""
    with S3Store(bucket) as store:
        use(store)
        found = store._client.credentials()
    assert found is not None
    assert found.token
    assert sts.asked == ["first"]


def test_a_web_identity_of_a_profile_is_enough(
    bucket: str, role: str, sts: Sts, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE")
    monkeypatch.delenv("AWS_ROLE_ARN")
    (tmp_path / "config").write_text(f"[profile pod]\nrole_arn = {role}\nweb_identity_token_file = {token}\n")
    monkeypatch.setenv("AWS_PROFILE", "pod")
    with S3Store(bucket) as store:
        store.put("a", b"abc")
        assert store.get("a", limit=3) == b"abc"
    assert sts.asked == ["first"]


def test_a_token_that_is_rotated_is_read_anew(bucket: str, sts: Sts, token: Path) -> None:
    """Kubernetes writes another one into the file; the old one is not taken any more when new credentials are due."""
    sts.lends = 60  # seconds, so few that botocore asks anew before each request
    data, room = content(LARGE), bytearray(LARGE)
    with S3Store(bucket) as store:
        writer = store.create("a", LARGE)
        writer.write(0, data[: 8 << 20])
        token.write_text("second")
        sts.good, before = "second", len(sts.asked)
        sts.lends = HOUR
        writer.write(8 << 20, data[8 << 20 :])
        writer.commit()
        store.readinto("a", 0, memoryview(room))
    assert room == data
    assert sts.asked == ["first"] * before + ["second"]


def test_a_web_identity_that_is_not_taken_is_denied(bucket: str, sts: Sts, token: Path) -> None:
    """Once, without a second try, and nobody is told the token."""
    token.write_text("forged-token")
    with S3Store(bucket) as store:
        for call in (lambda: list(store.list()), lambda: store.readinto("a", 0, memoryview(bytearray(1)))):
            sts.asked.clear()
            with pytest.raises(AccessDenied, match=f"the credentials for {bucket}/.* InvalidIdentityToken") as caught:
                call()
            assert "forged" not in str(caught.value)
            assert sts.asked == ["forged-token"]


def test_a_role_that_may_do_nothing_is_denied(bucket: str, sts: Sts, role: str, moto_iam: S3Server) -> None:
    with closing(moto_iam._client("iam")) as iam:
        iam.delete_role_policy(RoleName=role.removeprefix(ROLE), PolicyName="all")
    with S3Store(bucket) as store, pytest.raises(AccessDenied, match=f"access to {bucket}/a is denied"):
        store.get("a", limit=1)
    assert sts.asked[0] == "first"


def test_a_file_of_a_token_that_is_missing_is_named(
    bucket: str, sts: Sts, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other try would help."""
    token.unlink()
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr("shardtool.stores.wire.retry.time", clock)
    with S3Store(bucket) as store, pytest.raises(UsageError, match=rf"{bucket}/a .*{token}: No such file") as caught:
        store.get("a", limit=1)
    assert waits == []
    assert not caught.value.retryable
    assert sts.asked == []


def test_a_web_identity_without_a_role_is_refused(bucket: str, sts: Sts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ROLE_ARN")
    with pytest.raises(UsageError, match=r"AWS_ROLE_ARN.*: correct"), S3Store(bucket) as store:
        store.get("a", limit=1)


def test_a_service_of_tokens_that_is_not_there_is_named(
    bucket: str, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another server than that of the bucket."""
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{port}")
    with (
        S3Store(bucket, attempts=1) as store,
        pytest.raises(Unavailable, match=rf"cannot be reached at 127\.0\.0\.1:{port} \(Connection refused\)"),
    ):
        store.get("a", limit=1)


# Containers


class Container:
    """The service that gives a container its credentials, to whoever shows the token that lies in a file of its."""

    def __init__(self, found: Mapping[str, str], token: str = "") -> None:
        self.found = dict(found)
        self.token = token
        self.lends = HOUR
        self.asked = 0

    def __call__(self, visit: Visit) -> None:
        self.asked += 1
        if visit.headers.get("authorization", "") != self.token:
            visit.say(reply(401, b"{}"))
            return
        said = {
            "AccessKeyId": self.found["AccessKeyId"],
            "SecretAccessKey": self.found["SecretAccessKey"],
            "Token": self.found.get("SessionToken", ""),
            "Expiration": soon(self.lends),
        }
        visit.say(reply(200, json.dumps(said).encode(), Content_Type="application/json"))


Contained = Callable[[Container], Container]


@pytest.fixture
def contained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Contained]:
    """Lets the environment point to a container's service, which botocore asks again at once where it refuses."""
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0.01)
    opened: list[Scripted] = []

    def contained(service: Container) -> Container:
        opened.append(Scripted(service).__enter__())
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{opened[-1].url}/v1/credentials")
        return service

    yield contained
    for served in opened:
        served.__exit__()


class User:
    """A user who may do everything, with one key at a time."""

    def __init__(self, moto: S3Server) -> None:
        self._moto = moto
        self._name = f"user-{time.monotonic_ns()}"
        self._key = ""
        with closing(moto._client("iam")) as iam:
            iam.create_user(UserName=self._name)
            iam.put_user_policy(UserName=self._name, PolicyName="all", PolicyDocument=EVERYTHING)

    def key(self) -> dict[str, str]:
        """Another key; the one before is not valid any more."""
        with closing(self._moto._client("iam")) as iam:
            if self._key:
                iam.delete_access_key(UserName=self._name, AccessKeyId=self._key)
            found = iam.create_access_key(UserName=self._name)["AccessKey"]
        self._key = found["AccessKeyId"]
        return {"AccessKeyId": self._key, "SecretAccessKey": found["SecretAccessKey"]}


@pytest.fixture
def user(moto_iam: S3Server) -> User:
    return User(moto_iam)


def test_the_credentials_of_a_container_are_enough(
    bucket: str, role: str, moto_iam: S3Server, contained: Contained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token with which it is asked lies in a file, as EKS has it."""
    (tmp_path / "authorization").write_text("pod-token")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "authorization"))
    service = contained(Container(lent(moto_iam, role), "pod-token"))
    with S3Store(bucket) as store:
        use(store)
    assert service.asked == 1


def test_credentials_of_a_container_that_end_are_renewed(bucket: str, user: User, contained: Contained) -> None:
    service = contained(Container(user.key()))
    service.lends = 60
    with S3Store(bucket) as store:
        store.put("a", b"abc")
        before = service.asked
        service.found, service.lends = user.key(), HOUR
        assert store.get("a", limit=3) == b"abc"
        assert service.asked == before + 1
        assert store.get("a", limit=3) == b"abc"
        assert service.asked == before + 1


def test_credentials_of_a_container_that_are_revoked_before_their_end_are_asked_for_anew(
    bucket: str, user: User, contained: Contained
) -> None:
    """Until there are no others: then that they are not valid is said, whether the service answers or not."""
    service = contained(Container(user.key()))
    with S3Store(bucket) as store:
        store.put("a", b"abc")
        service.found = user.key()
        assert store.get("a", limit=3) == b"abc"
        assert service.asked == 2
        user.key()
        with pytest.raises(AccessDenied, match=f"the credentials for {bucket}/a are not valid"):
            store.get("a", limit=3)
        service.token = "another"
        for call in (lambda: store.get("a", limit=3), lambda: store.stat("a")):
            with pytest.raises(AccessDenied, match=f"{bucket}/a"):
                call()


def test_a_service_of_a_container_that_refuses_is_denied(bucket: str, user: User, contained: Contained) -> None:
    contained(Container(user.key(), "pod-token"))
    with pytest.raises(AccessDenied, match=f"no credentials for {bucket}"), S3Store(bucket) as store:
        store.get("a", limit=1)


# Programs


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str], float], None]:
    """Writes what the program of a profile says next: credentials, and for how many seconds they last."""
    said = tmp_path / "said.json"
    (tmp_path / "program.py").write_text(
        f"print(open({str(said)!r}).read()); open({str(tmp_path / 'asked')!r}, 'a').write('.')"
    )
    (tmp_path / "config").write_text(
        f"[profile vault]\ncredential_process = {sys.executable} {tmp_path / 'program.py'}\nregion = us-east-1\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "vault")

    def says(found: Mapping[str, str], lends: float) -> None:
        said.write_text(json.dumps({"Version": 1, **found, "Expiration": soon(lends)}))

    return says


Program = Callable[[Mapping[str, str], float], None]


def test_a_program_of_a_profile_is_asked(
    bucket: str, role: str, moto_iam: S3Server, program: Program, tmp_path: Path
) -> None:
    program(lent(moto_iam, role), HOUR)
    with S3Store(bucket) as store:
        use(store)
    assert (tmp_path / "asked").read_text() == "."


@pytest.mark.parametrize("lends", [60, HOUR], ids=["ended", "revoked"])
def test_a_program_of_a_profile_is_asked_again(bucket: str, user: User, program: Program, lends: float) -> None:
    """When what it said ends, and when it is not valid any more before that."""
    program(user.key(), lends)
    with S3Store(bucket) as store:
        writer = store.create("a", LARGE)
        writer.write(0, content(LARGE))
        program(user.key(), HOUR)
        writer.commit()
        assert store.get("a", limit=LARGE) == content(LARGE)


def test_a_program_that_fails_is_denied(bucket: str, program: Program, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; sys.exit('the vault is shut')")
    with pytest.raises(AccessDenied, match=f"no credentials for {bucket}.*the vault is shut"), S3Store(bucket) as store:
        store.get("a", limit=1)
