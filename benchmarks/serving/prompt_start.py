"""Does a prompt do better behind EOS? `python -m benchmarks.serving.prompt_start RUN`.

Prints, for the first tokens of the run's held-out documents, bits per byte with EOS before them and without, and the difference
with its standard error over documents. The first token of a document is scored in neither, because without EOS nothing precedes it.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.export.llama import LlamaLoss
from yxanul_nemo.export.source import load_source
from yxanul_nemo.validation.domains import domain_texts

RANGES = ((1, 4), (4, 16), (16, 64), (64, 128))


@torch.inference_mode()
def main(run: Path) -> None:
    """Score the beginnings of all documents twice."""
    config = load_run_config(run / "config.yaml")
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run})})
    loaded = load_source(run, device="cpu")
    loss, tokenizer = LlamaLoss(loaded.model), loaded.tokenizer
    rows = []
    for texts in domain_texts(config).values():
        for whole in tokenizer.encode_batch(texts):
            if len(whole) >= RANGES[-1][1]:
                ids = whole[: RANGES[-1][1]].tolist()
                behind_eos = loss(torch.tensor([[tokenizer.eos_id, *ids[:-1]]]), torch.tensor([ids]))[0, 1:]
                alone = loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0]
                range_bytes = [len(tokenizer.decode(ids[begin:end]).encode()) for begin, end in RANGES]
                rows.append((behind_eos.double().numpy(), alone.double().numpy(), range_bytes))
    print(f"{len(rows)} documents of at least {RANGES[-1][1]} tokens, {loaded.described}")
    print("tokens       behind EOS    alone    difference +- standard error (bits per byte)")
    for place, (begin, end) in enumerate(RANGES):
        # The first token, number 0, has no place in the scores.
        sums = np.array([[row[0][begin - 1 : end - 1].sum(), row[1][begin - 1 : end - 1].sum()] for row in rows])
        bits, text_bytes = sums / math.log(2), np.array([row[2][place] for row in rows])
        with_eos, without = bits.sum(axis=0) / text_bytes.sum()
        each = (bits[:, 1] - bits[:, 0]) - (without - with_eos) * text_bytes
        error = math.sqrt((each**2).sum() * len(rows) / (len(rows) - 1)) / text_bytes.sum()
        print(f"{begin + 1:>4} to {end:<4}{with_eos:>12.3f}{without:>9.3f}{without - with_eos:>14.3f} +- {error:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
