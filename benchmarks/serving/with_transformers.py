# /// script
# requires-python = ">=3.10"
# dependencies = ["transformers>=4.57", "torch>=2.8"]
# ///
"""transformers on an exported folder: `uv run --script benchmarks/serving/with_transformers.py EXPORT ANSWERS.json`.

Another version: `uv run --script --with transformers==4.57.6 ...`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from comparing import compare, read_answers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, answers = Path(sys.argv[1]) / "hf", read_answers(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
LENGTH = len(answers["answers"][0]["tokens"])


def written(prompts: list[str], most: int) -> list[list[int]]:
    """Return what the model writes after each prompt, all in one batch, as users call it."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        ids_BT = model.generate(**batch, max_new_tokens=most, min_new_tokens=most, do_sample=False)
    return ids_BT[:, batch["input_ids"].shape[1] :].tolist()


def alone(row: dict[str, Any], most: int) -> list[int]:
    """One prompt without padding."""
    return written([row["prompt"]], most)[0]


batched = written([row["prompt"] for row in answers["answers"]], LENGTH)
equal = sum(tokens == row["tokens"] for tokens, row in zip(batched, answers["answers"], strict=True))
print(f"all prompts in one padded batch: {equal} of {len(batched)} answers equal")
compare(["transformers", "torch"], answers, lambda prompt: tokenizer(prompt).input_ids, alone)
