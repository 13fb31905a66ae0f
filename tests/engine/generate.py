"""Greedy generation with vLLM, one engine after the other in one process: ``python -m tests.engine.generate JOBS OUT``.

``JOBS`` is a JSON list of ``{"name", "model", "tp", "load_format", "extra"}``. For each a line of ``OUT`` has the
tokens and their log-probability, or the error of vLLM's front end; what the engine and its workers say goes to stdout
below a line ``### name``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = [[5, 17, 200, 33], [250, 9, 77, 120, 64, 3]]


def generated(job: dict[str, Any]) -> list[list[Any]]:
    """The tokens of each prompt, and the log-probability of all of them."""
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        model=job["model"],
        tensor_parallel_size=job["tp"],
        load_format=job["load_format"],
        model_loader_extra_config=job.get("extra") or {},
        distributed_executor_backend="mp" if job["tp"] > 1 else "uni",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        disable_log_stats=True,
    )
    try:
        wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1)
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], wanted, use_tqdm=False)
        return [[list(one.outputs[0].token_ids), round(float(one.outputs[0].cumulative_logprob), 4)] for one in found]
    finally:
        engine.llm_engine.engine_core.shutdown()


def main(jobs: str, out: str) -> None:
    """Do all jobs; one that fails does not end the others."""
    for job in json.loads(Path(jobs).read_text()):
        print(f"### {job['name']}", flush=True)
        found: dict[str, Any] = {"name": job["name"]}
        try:
            found["generated"] = generated(job)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        with Path(out).open("a") as lines:
            lines.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
