"""Greedy generation with SGLang on a CPU, an engine after another: ``python -m tests.engine.sglang_generate JOBS OUT``.

``JOBS`` is a JSON list of ``{"name", "model", "tp", "load_format", "extra"}``. For each a line of ``OUT`` has the
tokens and their log-probability, or SGLang's error; what the engine and its schedulers say goes to stdout below a line
``### name``. An engine that does not start ends its own process, so that each job is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS = [[5, 17, 200, 33], [250, 9, 77, 120, 64, 3]]
TOKENS = 8


def generated(job: dict[str, Any]) -> list[list[Any]]:
    """The tokens of each prompt, and the log-probability of all of them."""
    import sglang

    engine: Any = sglang.Engine(
        model_path=job["model"],
        tp_size=job["tp"],
        load_format=job["load_format"],
        model_loader_extra_config=json.dumps(job.get("extra") or {}),
        skip_tokenizer_init=True,
        device="cpu",
        attention_backend="torch_native",
        disable_overlap_schedule=True,
        disable_cuda_graph=True,
        max_total_tokens=512,
        log_level="info",
    )
    try:
        wanted = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        found = engine.generate(input_ids=PROMPTS, sampling_params=wanted, return_logprob=True)
        return [[one["output_ids"], round(_probability(one["meta_info"]), 3)] for one in found]
    finally:
        engine.shutdown()


def _probability(said: dict[str, Any]) -> float:
    return float(sum(one[0] for one in said["output_token_logprobs"]))


def main(jobs: str, out: str, name: str = "") -> None:
    """Do all jobs, or the one of a name; one that fails does not end the others."""
    for job in json.loads(Path(jobs).read_text()):
        if not name:
            print(f"### {job['name']}", flush=True)
            binding = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(["0"] * job["tp"])}
            me = [sys.executable, "-m", __spec__.name, jobs, out, job["name"]]
            done = subprocess.run(me, env={**os.environ, **binding}, check=False)
            _write(out, {"name": job["name"], "code": done.returncode})
        elif name == job["name"]:
            _write(out, {"name": name, "generated": generated(job)})


def _write(out: str, line: dict[str, Any]) -> None:
    with Path(out).open("a") as lines:
        lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
