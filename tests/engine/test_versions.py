"""Other versions of vLLM: the one on the path is traced, and what it does now is what was kept and what its ranks hold.

How an unpacked wheel is put on the path is in CONTRIBUTING. The models are those of ``tests/layouts/traced``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardtool.layouts import difference
from tests.engine import kept
from tests.engine.truth import Ranks, World
from tests.layouts import traced
from tests.layouts.traced import Golden
from tests.layouts.traced.__main__ import again

GROUPS = tuple(group for group in traced.SETS if group.startswith("vllm-"))
MODELS = [(group, name) for group in GROUPS for name in traced.names(group)]

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def version() -> str:
    """The version of the vLLM that is imported here."""
    import vllm

    return f"vllm-{str(vllm.__version__).partition('+')[0]}"


def mine(group: str, name: str, version: str) -> Golden:
    """A kept model, if it is of the version at hand."""
    if group != version:
        pytest.skip(f"this is {version}")
    return traced.read(group, name)


@pytest.mark.parametrize(("group", "name"), MODELS, ids=[f"{group}-{name}" for group, name in MODELS])
def test_a_trace_is_what_was_kept_and_what_the_ranks_hold(
    group: str, name: str, version: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = mine(group, name, version)
    now = again(before, None)
    assert difference.files(before.layout, now.layout) == []
    model = kept.make(before, tmp_path / "model")
    (tp,) = {one.parallel.tp for one in before.layout.traced}
    with Ranks(World(tp), tmp_path / "truth") as ranks:
        truth = ranks.load(model)
    assert not truth.error
    assert truth.engine_class == before.layout.model_class
    assert kept.differences(now, tp, model, truth.folder) == []
