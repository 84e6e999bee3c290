"""How fast a model writes: tokens per second of one text and of batches, beside transformers' own generation.

    python -m benchmarks.generate [--from MODEL] [--batches 1 64 256] [--tokens 256]

Without a model it is one of the recipe's shape with random weights, which is as fast as a trained one. Sampling is that of `stage=generate`
(temperature 0.8, top_p 0.95); `greedy` leaves it out. The first text of each kind is not timed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from transformers import GenerationConfig, LlamaForCausalLM

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.export.decoding import Decoder
from yxanul_nemo.export.fold import llama_config, to_llama
from yxanul_nemo.export.llama import build_llama, generate_ids, moved
from yxanul_nemo.export.sampling import Chooser, Sampling
from yxanul_nemo.export.source import load_source
from yxanul_nemo.log import configure_logging, logger, quiet_libraries, table_console
from yxanul_nemo.model.build import build_model, reference_precision

PROMPT_TOKENS = 32
VOCAB_SIZE = 200_005


def random_model(recipe: str, device: torch.device) -> LlamaForCausalLM:
    """A model of a recipe's shape."""
    shape = parse(compose([f"recipe={recipe}"])).model
    model = build_model(shape, VOCAB_SIZE, *reference_precision(), seed=0)
    weights = to_llama(model.state_dict(), shape, VOCAB_SIZE)
    llama = build_llama(weights, llama_config(shape, VOCAB_SIZE, eos_id=0, pad_id=None, dtype="float32"))
    return moved(llama, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


@torch.inference_mode()
def ours(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int, temperature: float) -> None:
    """Write as `stage=generate` does, but for turning tokens into text."""
    decoder = Decoder(model, prompts, 0, PROMPT_TOKENS + tokens)
    chooser = Chooser(Sampling(max_new_tokens=tokens, temperature=temperature), decoder.prompt_BT)
    logits_BV = decoder.read_prompts()
    for step in range(tokens):
        ids_B = chooser.choose(logits_BV)
        if step + 1 < tokens:
            logits_BV = decoder.step(ids_B)
        ids_B.tolist()


def theirs(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int, temperature: float) -> None:
    """Write with `model.generate` and its growing cache."""
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0} if temperature else {}
    settings = GenerationConfig(max_new_tokens=tokens, pad_token_id=0, **sampling)
    generate_ids(model, torch.tensor(prompts, device=model.device), settings)


def seconds(device: torch.device, write: Callable[[], None]) -> float:
    """Return the seconds of the second of two calls."""
    write()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    write()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(arguments: list[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, metavar="MODEL", help="as from= of stage=generate")
    parser.add_argument("--recipe", default="yxanul_197m_h100", help="whose shape a random model has")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256], help="texts at once")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each text")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    configure_logging()
    quiet_libraries()
    device = torch.device(options.device)
    if options.source is not None:
        model = load_source(options.source, device=options.device).model
    else:
        model = random_model(options.recipe, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table = Table(title=f"new tokens per second, {options.tokens} after {PROMPT_TOKENS}, {name}")
    for column in ("texts at once", "sampled", "greedy", "transformers, sampled", "transformers, greedy"):
        table.add_column(column, justify="right")
    generator = torch.Generator().manual_seed(0)
    for batch in options.batches:
        prompts = torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()
        row = [str(batch)]
        for way in (ours, theirs):
            for temperature in (0.8, 0.0):
                taken = seconds(device, partial(way, model, prompts, options.tokens, temperature))
                row.append(f"{batch * options.tokens / taken:,.0f}")
        table.add_row(*row)
        # A larger batch may take all memory.
        logger.info("%s", row)
    table_console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
