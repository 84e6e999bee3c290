"""Readers of a run's own files, given changed and made-up ones: the file as it is, or an error of ours that names it.

Beside these: `.idx` (tests/data_prep/corpus/test_indexed.py), checkpoint manifests (tests/checkpoint/test_store.py), checkpoint tensors
(tests/checkpoint/test_shards.py), `.nemo` archives and their configurations (tests/unpacking/test_safe_tar.py, test_safe_config.py),
models, tokenizers and checkpoints by somebody else (test_hostile_*.py).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus.manifest import CorpusManifest, load_manifest
from tests.checkpoint.test_ledger import in_second_phase
from tests.data_prep.corpus.test_manifest import manifest
from tests.hostile import attempt
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.config.load import compose, load_run_config, parse, to_yaml
from yxanul_nemo.config.run import RunConfig

INSERTED = st.binary(max_size=12) | st.sampled_from(
    [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b"9" * 5000,
        b"[" * 3000,
        b"{" * 3000,
        b'"',
        b"\\ud800",
        b"\xff",
        b"!!python/object:os.system ",
    ]
)
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), INSERTED), min_size=1, max_size=3)
FILES = st.one_of(st.binary(max_size=200), CHANGES)


def read(name: str, valid: str, reader: Callable[[Path], object], made: bytes | list) -> object:
    """What the reader gives for the made-up file, None if it refuses it; anything else than a `UserError` fails the test."""
    raw = made
    if isinstance(made, list):
        raw = valid.encode()
        for place, removed, inserted in made:
            begin = int(place * len(raw))
            raw = raw[:begin] + inserted + raw[begin + removed :]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(raw)
        found: list[object] = []
        attempt(name, Path(folder), lambda: found.append(reader(Path(folder) / name)))
        return found[0] if found else None


LEDGER = in_second_phase().to_json()


@given(FILES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ledger(made):
    found = read("ledger.json", LEDGER, Ledger.read, made)
    assert found is None or sum(found.tokens_per_source.values()) == found.tokens_total


MANIFEST = manifest().model_dump_json(indent=1)


@given(FILES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_corpus_manifest(made):
    found = read("manifest.json", MANIFEST, lambda path: load_manifest(path.parent), made)
    assert found is None or isinstance(found, CorpusManifest)


CONFIG = to_yaml(parse(compose(["run.dir=runs/demo"])))


@given(FILES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_configuration_of_a_run(made):
    found = read("config.yaml", CONFIG, load_run_config, made)
    assert found is None or isinstance(found, RunConfig)
