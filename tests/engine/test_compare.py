"""The comparison that the zoo rests on can fail: each way in which a rank's files can be wrong is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.compare import compare
from tests.engine.truth import World

RIGHT = {"a": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(1.0)}


def put(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model-rank-0-part-0.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def differences(tmp_path: Path, ours: dict[str, torch.Tensor]) -> list[str]:
    return compare(put(tmp_path / "ours", ours), put(tmp_path / "truth", RIGHT), World(1)).differences


def test_equal_files_have_no_difference(tmp_path):
    assert differences(tmp_path, dict(RIGHT)) == []


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"a": RIGHT["a"]}, "rank 0: scale float32[] is missing"),
        (RIGHT | {"b": torch.zeros(1)}, "rank 0: b float32[1] is too much"),
        (RIGHT | {"a": RIGHT["a"].T.contiguous()}, "rank 0: a is float32[3, 2], should be float32[2, 3]"),
        (RIGHT | {"a": RIGHT["a"].bfloat16()}, "rank 0: a is bfloat16[2, 3], should be float32[2, 3]"),
        (RIGHT | {"a": RIGHT["a"].flip(1)}, "rank 0: a float32[2, 3]: 4 of 6 elements, first 0: 2.0 should be 0.0"),
        (
            RIGHT | {"scale": torch.tensor(-0.0)},
            "rank 0: scale float32[]: 1 of 1 elements, first 0: -0.0 should be 1.0",
        ),
    ],
)
def test_each_kind_of_difference_is_said(tmp_path, ours, said):
    assert differences(tmp_path, ours) == [said]


def test_a_negative_zero_is_not_a_zero(tmp_path):
    truth = put(tmp_path / "truth", {"a": torch.tensor([0.0])})
    assert compare(put(tmp_path / "ours", {"a": torch.tensor([-0.0])}), truth, World(1)).differences


def test_what_vllm_leaves_uninitialised_is_tolerated_and_reported(tmp_path):
    truth = put(tmp_path / "truth", {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([2**63 - 1])})
    ours = put(tmp_path / "ours", {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0])})
    found = compare(ours, truth, World(1))
    assert found.differences == []
    assert found.uninitialised == ["rank 0: a: 1 of 2 elements", "rank 0: b: 1 of 1 elements"]


def test_the_initialised_rest_of_such_a_tensor_still_counts(tmp_path):
    truth = put(tmp_path / "truth", {"a": torch.tensor([1.0, torch.nan])})
    assert compare(put(tmp_path / "ours", {"a": torch.tensor([2.0, 0.0])}), truth, World(1)).differences


def test_every_rank_of_every_stage_is_compared(tmp_path):
    names = [f"model-pp-{pp}-tp-{tp}-part-0.safetensors" for pp in range(2) for tp in range(2)]
    for name in names:
        put(tmp_path / "truth", RIGHT, name)
        put(tmp_path / "ours", RIGHT if name != names[2] else RIGHT | {"scale": torch.tensor(2.0)}, name)
    found = compare(tmp_path / "ours", tmp_path / "truth", World(tp=2, pp=2))
    assert found.tensors == 8
    assert [line.partition(":")[0] for line in found.differences] == ["rank 2"]
