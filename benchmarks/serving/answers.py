"""Write what an exported model must answer: `python -m benchmarks.serving.answers EXPORT ANSWERS.json`.

The answers come from the `.nemo` file of the export, so from Megatron-core's model with the project's tokenizer, computed token by
token without a cache. The scripts `with_*.py` compare other engines with them.
"""

import json
import sys
from pathlib import Path

import torch

from yxanul_nemo.model import YxanulModel

NEW_TOKENS = 64
PROMPTS = (
    "The function returns",
    "In 1987, 12345678 people",
    "def read(path: str) -> bytes:\n    ",
    "Caf\u00e9 \u4f60\u597d \U0001f469\u200d\U0001f4bb is",
    "  two spaces,\n\nthen a new paragraph",
    "The text <|endoftext|> is no special token here",
    "Parameters\n----------\nx : array_like\n",
    "A",
    "class Tokenizer:\n    \"\"\"",
    "See also https://example.org/a?b=c#d for",
)  # fmt: skip


@torch.inference_mode()
def main(export: Path, answers: Path) -> None:
    """Write ids, the most likely 64 tokens other than EOS, and how far each stands before the second, for every prompt."""
    model = YxanulModel.restore_from(str(export / "model.nemo"), map_location=torch.device("cpu")).eval()
    tokenizer = model.tokenizer
    rows = []
    for prompt in PROMPTS:
        ids = [tokenizer.eos_id, *tokenizer.encode(prompt).tolist()]
        tokens: list[int] = []
        margins: list[float] = []
        for _ in range(NEW_TOKENS):
            logits_V = model(torch.tensor([ids + tokens]))[0, -1].double()
            logits_V[tokenizer.eos_id] = -torch.inf
            best = logits_V.topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        rows.append({"prompt": prompt, "ids": ids, "tokens": tokens, "margins": margins})
    answers.write_text(json.dumps({"eos_id": tokenizer.eos_id, "answers": rows}, indent=1), encoding="utf-8")
    least = min(margin for row in rows for margin in row["margins"])
    print(f"{len(rows)} prompts with {NEW_TOKENS} tokens each; the closest two tokens are {least:.2g} logits apart")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
