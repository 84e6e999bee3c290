"""A run with a committed checkpoint of large random weights, in which every part of the model matters, and its export."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig

REPO_DIR = Path(__file__).resolve().parents[2]
TEXTS = ["The quick brown fox", "  two spaces, \u4f60\u597d \U0001f389 and <|endoftext|> as text", ""]
WITH_TRANSFORMERS_ALONE = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, box = sys.argv[1], sys.argv[2]
ids = torch.from_numpy(np.load(f"{box}/ids.npy"))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    np.save(f"{box}/logits.npy", model(ids).logits.numpy())
    new = model.generate(ids[:1], max_new_tokens=64, min_new_tokens=64, do_sample=False)
np.save(f"{box}/greedy.npy", new.numpy())
texts = json.load(open(f"{box}/texts.json"))
told = {
    "class": type(model).__name__,
    "dtype": str(model.dtype),
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    "ids": [tokenizer(text).input_ids for text in texts],
    "pair": tokenizer(texts[0], texts[1]).input_ids,
    "inputs": sorted(tokenizer(texts[0])),
    "padded": tokenizer(["a", texts[0]], padding=True).input_ids[0],
    "specials": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "max_length": tokenizer.model_max_length,
    "ours": [name for name in sys.modules if name.startswith(("yxanul", "data_prep", "megatron", "nemo"))],
}
json.dump(told, open(f"{box}/told.json", "w"))
"""
WITH_THE_MODEL_PACKAGE_ALONE = """
import json, sys
import numpy as np, torch
import yxanul_nemo.model
assert "nemo" not in sys.modules, "importing the package is light"
from yxanul_nemo.model import YxanulModel
model = YxanulModel.restore_from(sys.argv[1], map_location=torch.device("cpu")).eval()
from nemo.core import ModelPT
assert isinstance(model, ModelPT)
with torch.no_grad():
    np.save(sys.argv[2] + "/logits.npy", model(torch.from_numpy(np.load(sys.argv[2] + "/ids.npy"))).numpy())
told = [model.tokenizer.fingerprint, [name for name in sys.modules if name.startswith("yxanul_nemo.training")]]
json.dump(told, open(sys.argv[2] + "/told.json", "w"))
"""

MakeRun = Callable[..., tuple[RunConfig, Checkpoint]]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by being spread over cores that others use too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_run(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> MakeRun:
    """A new run after its first phase: `make_run(*overrides)` gives its configuration and checkpoint."""

    def make(*overrides: str) -> tuple[RunConfig, Checkpoint]:
        folder = tmp_path_factory.mktemp("run")
        (folder / "tokenizer").symlink_to(prepared / "tokenizer")
        config = make_config(f"run.dir={folder}", f"data.dir={prepared / 'data'}", *overrides)
        return config, commit_random_weights(config)

    return make


@pytest.fixture(scope="session")
def exported(make_run: MakeRun) -> tuple[RunConfig, Checkpoint]:
    """A run that is validated and exported in FP32. Tests must not change it."""
    from yxanul_nemo.export.export import export_checkpoint
    from yxanul_nemo.validation.stage import validate_checkpoint

    config, checkpoint = make_run()
    validate_checkpoint(config)
    export_checkpoint(config)
    return config, checkpoint


@dataclass(frozen=True)
class Fresh:
    """A process at work on an export, and the folder that it reads `ids.npy` from and leaves its results in."""

    process: subprocess.Popen
    box: Path
    ids_BT: Any

    def results(self, name: str) -> Any:
        """What it left as `<name>.npy` or `told.json`; fails the test if the process failed."""
        assert self.process.wait() == 0
        if name == "told":
            return json.loads((self.box / "told.json").read_text())
        return numpy.load(self.box / f"{name}.npy")


@pytest.fixture(scope="session")
def fresh(
    exported: tuple[RunConfig, Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Fresh]]:
    """Fresh processes that load the exports as users do: `hf` and `nemo`. Both run while the tests go on."""
    import torch

    ids_BT = torch.randint(0, 700, (3, 50), generator=torch.Generator().manual_seed(3))
    started = {}
    without_path = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    for name, code, export in (
        ("hf", WITH_TRANSFORMERS_ALONE, "hf"),
        ("nemo", WITH_THE_MODEL_PACKAGE_ALONE, "model.nemo"),
    ):
        box = tmp_path_factory.mktemp(f"fresh_{name}")
        numpy.save(box / "ids.npy", ids_BT.numpy())
        (box / "texts.json").write_text(json.dumps(TEXTS))
        command = [sys.executable, "-c", code, str(exported[0].run.dir / "export" / export), str(box)]
        process = subprocess.Popen(command, cwd=REPO_DIR if name == "nemo" else box, env=without_path)
        started[name] = Fresh(process, box, ids_BT)
    yield started
    for one in started.values():
        one.process.kill()
        one.process.wait()


def commit_random_weights(config: RunConfig, seed: int = 1) -> Checkpoint:
    """Commit a checkpoint of the end of phase 1 as training does, with large random weights."""
    import torch

    from data_prep.corpus.manifest import load_manifest
    from yxanul_nemo.checkpoint.identity import expected_run, phase_plan
    from yxanul_nemo.checkpoint.ledger import Ledger
    from yxanul_nemo.checkpoint.shards import save_shards
    from yxanul_nemo.checkpoint.store import CheckpointStore
    from yxanul_nemo.config.load import to_yaml
    from yxanul_nemo.curriculum.phases import plan_phases
    from yxanul_nemo.model.build import build_model, reference_precision
    from yxanul_nemo.training.cpu_backend import CpuBackend

    manifest = load_manifest(config.data_dir)
    model = build_model(config.model, manifest.vocab_size, *reference_precision(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Far from where training starts: attention is sharp, and a token's own embedding does not decide what follows it.
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(drawn if "final" in name else 1 + 0.3 * drawn)
            else:
                weight.copy_(drawn * (0.5 if "embedding" in name else 0.2))
    phases = plan_phases(config.curriculum)
    ledger = Ledger.fresh(expected_run(config, manifest, phases)).start_phase(phase_plan(phases[0]), 4, 1)
    per_source = dict.fromkeys(config.data.source_names, 0) | {config.data.source_names[0]: phases[0].tokens}
    ledger = ledger.consume(phases[0].tokens, per_source)
    store = CheckpointStore(config.run.dir / "checkpoints")
    place = store.begin(ledger.tokens_total)
    save_shards(CpuBackend(model, config.optim).sharded_state(), place, rank=0)
    (place / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return store.commit(place, ledger, phase_end=True)
