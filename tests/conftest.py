"""What every test can rely on: an environment without accounts, laws tried often enough, and no silent skips.

* No variable of the machine reaches a test: credentials, proxies and shardtool's own settings are removed before the
  first test module is imported, and again before each test.
* A test marked ``cuda`` is skipped where there is no GPU. With ``CI`` set, every other skip fails the run.
* Hypothesis runs 100 examples without a deadline; ``--hypothesis-profile=thorough`` runs 2000.
"""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.register_assert_rewrite("tests.servers")  # they import each other, and pytest must see each before that
pytest_plugins = [
    "tests.servers.s3",
    "tests.models",
    "tests.servers.azure",
    "tests.servers.gcs",
    "tests.servers.hub",
    "tests.servers.redis",
    "tests.servers.sftp",
    "tests.servers.web",
]

# From the plain default, not from the profile that Hypothesis would choose where CI is set, which tries nothing new.
settings.register_profile(
    "shardtool",
    parent=settings.get_profile("default"),
    max_examples=100,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # a slow machine is not a fault of the test
)
settings.register_profile("thorough", parent=settings.get_profile("shardtool"), max_examples=2000)
settings.load_profile("shardtool")

_PREFIXES = (
    *("AWS_", "AZURE_", "BOTO_", "CLOUDSDK_", "GCE_", "GCLOUD_", "GCS_", "GOOGLE_", "HF_", "HUGGING_FACE_", "REDIS_"),
    *("FSSPEC_", "RUNAI_STREAMER_", "SHARDTOOL_", "STORAGE_", "SSL_CERT_", "SSH_AUTH_", "REQUESTS_CA_", "CURL_CA_"),
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY")
_NOWHERE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
_PATCH = pytest.StashKey[pytest.MonkeyPatch]()


def _isolate(patch: pytest.MonkeyPatch, nowhere: Path) -> None:
    """Remove what the machine says about accounts and networks; ``nowhere`` is an empty directory."""
    for name in list(os.environ):
        if name.startswith(_PREFIXES) or name.upper() in _PROXIES:
            patch.delenv(name)
    patch.setenv("AWS_CONFIG_FILE", str(nowhere / "aws-config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere / "aws-credentials"))
    patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AZURE_CONFIG_DIR", str(nowhere / "azure"))
    patch.setenv("CLOUDSDK_CONFIG", str(nowhere / "gcloud"))
    patch.setenv("NO_GCE_CHECK", "true")
    patch.setenv("HF_HOME", str(nowhere / "huggingface"))
    patch.setenv("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Isolate the process before any test module is imported; libraries read some variables at import."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: its children would ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_NOWHERE] = tempfile.TemporaryDirectory(prefix="shardtool-nowhere-")
    config.stash[_PATCH] = pytest.MonkeyPatch()
    _isolate(config.stash[_PATCH], Path(config.stash[_NOWHERE].name))
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipsFail(), "shardtool-skips-fail")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give the process its environment back."""
    config.stash[_PATCH].undo()
    config.stash[_NOWHERE].cleanup()


@pytest.fixture(autouse=True)
def isolated_environment(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without accounts and proxies, whatever an earlier test or fixture has set."""
    _isolate(monkeypatch, Path(pytestconfig.stash[_NOWHERE].name))


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs an engine, unless it was asked for by its mark."""
    if "engine" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("engine")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("engine")]
        config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda") and not _has_gpu():
        pytest.skip("needs a GPU")


class SkipsFail:
    """In CI a test that did not run is a failure, because nobody reads the count of skipped tests.

    Lives in the process that reports: with xdist that is the controller, which hears every worker's reports. A module
    skipped while it is collected counts as well, since nothing tells which marks its tests would have had.
    """

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skipped[report.nodeid] = reason.removeprefix("Skipped: ")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a skipped test, unless it is an expected failure or needs a GPU."""
        if report.skipped and not hasattr(report, "wasxfail") and "cuda" not in report.keywords:
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a skipped module."""
        if report.skipped:
            self._note(report)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Turn a session that would have passed into a failed one."""
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what was skipped."""
        if self.skipped:
            terminalreporter.section("skipped in CI, which fails the run", red=True)
            for nodeid, reason in sorted(self.skipped.items()):
                terminalreporter.line(f"{nodeid}: {reason}")
