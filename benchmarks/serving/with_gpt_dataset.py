"""Megatron-core's GPTDataset on a prepared corpus: `python -m benchmarks.serving.with_gpt_dataset PREFIX TOKENIZER`.

PREFIX is a pair of files without `.bin` and `.idx`, as in runs/demo/data/prose/train/prose-000; TOKENIZER the run's folder of it.
"""

import sys
import tempfile
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from transformers import AutoTokenizer

prefix, folder = sys.argv[1:]
SEQ_LEN = 256
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29599", rank=0, world_size=1)
theirs = AutoTokenizer.from_pretrained(folder)
eos_id = theirs.eos_token_id
tokenizer = SimpleNamespace(
    eod=eos_id, eos=eos_id, pad=eos_id, vocab_size=len(theirs), unique_identifiers={"path": folder}
)
with tempfile.TemporaryDirectory() as cache:
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ_LEN,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    documents = train.dataset
    stored = np.concatenate([documents[i] for i in range(len(documents.sequence_lengths))])
    ends = np.flatnonzero(stored == eos_id)
    lengths_agree = np.array_equal(np.diff(ends, prepend=-1), documents.sequence_lengths)
    whole = {bytes(document) for document in np.split(stored, ends + 1)[:-1]}
    # A sample is a stretch of documents in Megatron's own order: what lies between two EOS must be a document as it was stored.
    found = read = 0
    for sample in (train[i] for i in range(len(train))):
        tokens = np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1]).astype(stored.dtype)
        assert np.array_equal(tokens[1:], sample["labels"].numpy()), "labels are the tokens after each"
        inside = np.split(tokens, np.flatnonzero(tokens == eos_id) + 1)[1:-1]
        read += len(inside)
        found += sum(bytes(document) in whole for document in inside)
    print(f"megatron-core {version('megatron-core')}")
    print(f"{len(ends):,} documents, {len(stored):,} tokens; each document ends with EOS, once: {lengths_agree}")
    print(f"{len(train):,} samples of {SEQ_LEN} tokens; documents whole inside them: {read:,}, as stored: {found:,}")
    print(f"a text that was read: {theirs.decode(documents[0][:24])!r}")
torch.distributed.destroy_process_group()
if not lengths_agree or found != read or read == 0:
    sys.exit(1)
