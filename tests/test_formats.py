"""Checkpoints that earlier versions wrote are read for ever: verified, cut again, merged."""

from __future__ import annotations

import json
from pathlib import Path

import shardtool
from shardtool import manifest
from shardtool.manifest import decode
from tests.builders import contents

FIRST = Path(__file__).parent / "data" / "format-1"
"""Written by the version that wrote ``shardtool/1``: tp 2, a tied head that equals the embeddings, a kept tensor."""


def test_a_manifest_of_the_first_format_is_read_back_to_the_byte():
    data = (FIRST / "shardtool.json").read_bytes()
    made = decode(data, "here")
    assert made.format == "shardtool/1" != manifest.FORMAT
    assert made.encode() == data


def test_its_shards_are_verified_loaded_resharded_and_merged(tmp_path: Path):
    assert shardtool.verify(FIRST).ok
    assert shardtool.load(FIRST, rank=1)
    shardtool.merge(FIRST, tmp_path / "merged")
    assert shardtool.verify(FIRST, against=tmp_path / "merged").ok
    shardtool.reshard(FIRST, tmp_path / "tp4", tp=4)
    again = contents(tmp_path / "tp4")
    assert json.loads(again["shardtool.json"])["format"] == manifest.FORMAT
    assert shardtool.verify(tmp_path / "tp4", against=tmp_path / "merged").ok


def test_it_is_resharded_as_its_source_would_be_saved_today(tmp_path: Path):
    shardtool.merge(FIRST, tmp_path / "merged")
    shardtool.save(tmp_path / "merged", tmp_path / "saved", tp=4)
    shardtool.reshard(FIRST, tmp_path / "resharded", tp=4)
    saved, resharded = contents(tmp_path / "saved"), contents(tmp_path / "resharded")
    shards = {key for key in saved if key.endswith(".safetensors")}
    assert {key: saved[key] for key in shards} == {key: resharded[key] for key in shards}
