# /// script
# requires-python = ">=3.10"
# dependencies = ["optimum-onnx[onnxruntime]==0.1.0", "torch>=2.8"]
# ///
"""ONNX Runtime through optimum on an exported folder: `uv run --script benchmarks/serving/with_onnx.py EXPORT ANSWERS.json`."""

import sys
from pathlib import Path
from typing import Any

from comparing import compare, read_answers
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder = Path(sys.argv[1]) / "hf"
model = ORTModelForCausalLM.from_pretrained(folder, export=True)
tokenizer = AutoTokenizer.from_pretrained(folder)


def tokens_of(row: dict[str, Any], most: int) -> list[int]:
    """Greedy tokens of one prompt, by transformers' loop over ONNX Runtime's logits."""
    prompt = tokenizer(row["prompt"], return_tensors="pt")
    ids_BT = model.generate(**prompt, max_new_tokens=most, min_new_tokens=most, do_sample=False)
    return ids_BT[0, prompt["input_ids"].shape[1] :].tolist()


names = ["optimum-onnx", "onnxruntime", "transformers"]
compare(names, read_answers(sys.argv[2]), lambda prompt: tokenizer(prompt).input_ids, tokens_of)
