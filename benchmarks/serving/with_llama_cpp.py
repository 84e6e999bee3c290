# /// script
# requires-python = ">=3.10"
# dependencies = ["xllamacpp==2026.10.11549"]
# ///
"""llama.cpp's server on an exported model.gguf: `uv run --script benchmarks/serving/with_llama_cpp.py EXPORT ANSWERS.json`."""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp
from comparing import compare, read_answers

params = xllamacpp.CommonParams()
params.model.path = str(Path(sys.argv[1]) / "model.gguf")
# By default llama.cpp keeps keys and values in FP16.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.n_parallel, params.warmup, params.verbosity = 1, False, 0
server = xllamacpp.Server(params)


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An answer of the server, which listens on this machine."""
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def ids_of(prompt: str) -> list[int]:
    """Ids by llama.cpp's own tokenizer."""
    return post("/tokenize", {"content": prompt, "add_special": True, "parse_special": False})["tokens"]


def tokens_of(row: dict[str, Any], most: int) -> list[int]:
    """Greedy tokens; as ids, because /completion reads `<|endoftext|>` in a text as the special token."""
    settings = {"n_predict": most, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    return post("/completion", {"prompt": ids_of(row["prompt"]), **settings})["tokens"]


compare(["xllamacpp"], read_answers(sys.argv[2]), ids_of, tokens_of)
