"""`stage=fetch` with the real client against a local hub: what it takes, what it leaves alone, and what comes out of it."""

import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.open_shard import open_shard
from data_prep.prepare import run_data_stage
from tests.conftest import SMALL
from tests.fetch.hub_server import HubServer
from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, tokens_per_source
from yxanul_nemo.errors import UserError
from yxanul_nemo.fetch.needs import text_bytes_needed
from yxanul_nemo.fetch.stage import fetch_for_checks, fetch_sources, require_fetched
from yxanul_nemo.hub import COMMIT
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.validation.files import check_domain_files, texts

Configure = Callable[..., RunConfig]
WORDS = ["".join(pair) for pair in itertools.product(("ka", "men", "tor", "li", "sund", "per", "ova"), repeat=3)]
WEB, CODE, C4 = "them/web", "them/code", "them/c4"


def documents(first: int, count: int) -> list[str]:
    """Texts of made-up words, each another one."""
    rng = np.random.default_rng(first)
    words = rng.choice(WORDS, (count, 40))
    return [f"Text {first + i}: {' '.join(words[i])}." for i in range(count)]


def of_table(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def parquet(values: list[str], column: str = "text") -> bytes:
    return of_table(pa.table({"id": list(range(len(values))), column: values}))


def json_gz(values: list[str], column: str = "text") -> bytes:
    lines = (json.dumps({column: value, "url": f"http://{n}", "timestamp": "t"}) for n, value in enumerate(values))
    return gzip.compress(("\n".join(lines) + "\n").encode())


@pytest.fixture
def filled(hub: HubServer) -> HubServer:
    hub.add(WEB, {f"sample/{n:03}.parquet": parquet(documents(1000 * n, 400)) for n in range(6)})
    hub.add(CODE, {f"file-{n}.json.gz": json_gz(documents(50_000 + 1000 * n, 400), "content") for n in range(3)})
    hub.add(C4, {"en/validation.json.gz": json_gz(documents(90_000, 50))})
    return hub


def of_hub(repo: str, files: str, revision: str = "main") -> dict[str, str]:
    return {"repo": repo, "revision": revision, "files": files, "license": "ODC-By 1.0"}


@pytest.fixture
def own_conf(tmp_path: Path) -> Path:
    """Options `data=local` and `validation=local` that name the local hub, in a folder for `--config-dir`."""
    data = yaml.safe_load((CONF_DIR / "data" / "demo.yaml").read_text())
    data |= {"name": "local", "demo_corpus": False, "heldout_fraction": 0.05}
    data["sources"] = {
        "web": {"path": None, "hub": of_hub(WEB, "sample/*.parquet")},
        "code": {"path": None, "hub": of_hub(CODE, "file-*.json.gz"), "text_column": "content"},
    }
    validation = yaml.safe_load((CONF_DIR / "validation" / "demo.yaml").read_text())
    validation["domains"] = {"english": {"path": "c4.parquet", "hub": of_hub(C4, "en/*.json.gz"), "hub_rows": 20}}
    for group, values in (("data", data), ("validation", validation)):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "local.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "conf"


def overrides(tmp_path: Path, *more: str) -> list[str]:
    place = [f"run.dir={tmp_path / 'run'}", f"validation.dir={tmp_path / 'validation'}"]
    return [*SMALL, "data=local", "validation=local", "curriculum.total_tokens=200e3", *place, *more]


@pytest.fixture
def configure(tmp_path: Path, own_conf: Path) -> Configure:
    return lambda *more: parse(compose(overrides(tmp_path, *more), [own_conf]))


def shards(config: RunConfig, name: str) -> list[str]:
    return sorted(path.name for path in (config.fetched_dir / name).glob("*.parquet"))


def fetch(config: RunConfig) -> None:
    fetch_for_checks(config)
    fetch_sources(config)


def test_as_many_files_as_the_curriculum_needs(filled: HubServer, configure: Configure) -> None:
    config = configure()
    fetch(config)
    needed = text_bytes_needed(config)
    assert needed["web"] == needed["code"]
    for name, per_file in (("web", documents(0, 400)), ("code", documents(50_000, 400))):
        there = shards(config, name)
        size = len("".join(per_file).encode())
        assert (len(there) - 1) * size < needed[name] <= len(there) * size * 1.05
    assert shards(config, "web")[0] == "sample--000.parquet"
    assert 1 < len(shards(config, "web")) < 6
    read = [
        pq.read_table(config.fetched_dir / "code" / shard)["content"].to_pylist() for shard in shards(config, "code")
    ]
    assert read[1] == documents(51_000, 400)


def test_what_was_fetched_has_the_text_to_train_on(filled: HubServer, configure: Configure) -> None:
    config = configure()
    fetch(config)
    manifest = run_data_stage(config)
    read = tokens_per_source(plan_phases(config.curriculum), {"web": 1, "code": 1})
    for name, tokens in read.items():
        # The tokenizer is not known by name, so that a token is taken for four characters.
        assert manifest.sources[name].text_bytes("train") >= 4 * tokens


def test_a_prepared_corpus_needs_the_cache_no_more(filled: HubServer, configure: Configure, tmp_path: Path) -> None:
    config = configure()
    fetch(config)
    before = run_data_stage(config)
    shutil.rmtree(tmp_path / "hub_cache")
    filled.stop()
    fetch_sources(config)
    require_fetched(config)
    assert run_data_stage(config) == before


def test_the_first_rows_become_a_validation_file_with_all_columns(filled: HubServer, configure: Configure) -> None:
    config = configure()
    fetch_for_checks(config)
    check_domain_files(config.validation)
    domain = config.validation.domains["english"]
    assert list(texts(config.validation, "english", domain)) == documents(90_000, 20)
    assert pq.read_table(config.validation.dir / "c4.parquet").column_names == ["text", "url", "timestamp"]


def test_a_validation_file_of_ones_own_stays(filled: HubServer, configure: Configure) -> None:
    config = configure()
    config.validation.dir.mkdir()
    (config.validation.dir / "c4.parquet").write_bytes(parquet(["my own"]))
    fetch_for_checks(config)
    assert list(texts(config.validation, "english", config.validation.domains["english"])) == ["my own"]
    assert C4 not in {
        name for _, path, _ in filled.requests for name in [path.removeprefix("/api/datasets/")[: len(C4)]]
    }


def test_licence_and_size_are_said_before(
    filled: HubServer, configure: Configure, log: pytest.LogCaptureFixture
) -> None:
    fetch_sources(configure())
    lines = [record.getMessage() for record in log.records]
    said = next(i for i, line in enumerate(lines) if line.startswith("fetching source web: them/web at "))
    fetched = next(i for i, line in enumerate(lines) if line.startswith("web: file 1"))
    assert said < fetched
    assert "licence: ODC-By 1.0" in lines[said]
    assert "MB in" in lines[said]


def test_repeating_asks_for_nothing_and_needs_no_network(filled: HubServer, configure: Configure) -> None:
    fetch(configure())
    asked = len(filled.requests)
    filled.stop()
    fetch(configure())
    require_fetched(configure())
    assert len(filled.requests) == asked


def test_another_run_shares_the_cache_without_network(filled: HubServer, configure: Configure, tmp_path: Path) -> None:
    fetch(configure())
    filled.stop()
    other = configure(f"run.dir={tmp_path / 'other'}")
    fetch(other)
    assert shards(other, "web") == shards(configure(), "web")
    more = configure(f"run.dir={tmp_path / 'more'}", "curriculum.total_tokens=320e3")
    with pytest.raises(UserError, match=r"hub does not answer.*which the curriculum takes.*curriculum.total_tokens"):
        fetch_sources(more)


def test_more_tokens_fetch_more_files_of_the_same_commit(filled: HubServer, configure: Configure) -> None:
    fetch(configure())
    first = shards(configure(), "web")
    before = filled.downloads()
    with pytest.raises(UserError, match="them/web is not fetched yet"):
        require_fetched(configure("curriculum.total_tokens=320e3"))
    fetch(configure("curriculum.total_tokens=320e3"))
    now = shards(configure(), "web")
    assert now[: len(first)] == first and len(now) > len(first)
    assert set(before).isdisjoint(filled.downloads()[len(before) :])


def test_a_set_that_is_too_small_is_taken_whole(filled: HubServer, configure: Configure) -> None:
    config = configure("curriculum.total_tokens=4e6")
    fetch_sources(config)
    assert len(shards(config, "web")) == 6
    require_fetched(config)


def test_a_fetch_that_ends_in_the_middle_goes_on(filled: HubServer, configure: Configure) -> None:
    filled.failing["sample/001.parquet"] = 410
    with pytest.raises(UserError, match=r"data.sources.web.hub: them/web.*kept"):
        fetch_sources(configure())
    assert shards(configure(), "web") == ["sample--000.parquet"]
    with pytest.raises(UserError, match="not fetched yet"):
        require_fetched(configure())
    filled.failing.clear()
    fetch_sources(configure())
    assert filled.downloads().count(f"{WEB}/sample/000.parquet") == 1
    require_fetched(configure())


def test_another_data_set_in_the_folder_is_refused(filled: HubServer, configure: Configure) -> None:
    fetch(configure())
    with pytest.raises(UserError, match=r"has files of them/web \(sample/\*.parquet"):
        fetch(configure("data.sources.web.hub.files='sample/00*'"))


def test_a_damaged_record_is_refused(filled: HubServer, configure: Configure) -> None:
    fetch(configure())
    (configure().fetched_dir / "web.json").write_text("{")
    with pytest.raises(UserError, match=r"web.json: is damaged"):
        fetch(configure())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no gzip" * 300, "cannot be read"),
        (json_gz(documents(0, 400), "content")[:-3000], "cannot be read"),
        (json_gz(documents(0, 400), "code"), "line 1 of .* has no key 'content'"),
        (gzip.compress(b"[1, 2]\n" * 40), "line 1 of .* is no JSON object"),
        (gzip.compress(b""), "has no rows"),
    ],
    # Not the bytes, in which a packed file has its time: processes that share the tests must call them the same.
    ids=["no gzip", "cut short", "another key", "no object", "empty"],
)
def test_rows_that_cannot_be_used_are_named(filled: HubServer, configure: Configure, data: bytes, message: str) -> None:
    filled.add(CODE, {"file-0.json.gz": data})
    with pytest.raises(UserError, match=message):
        fetch_sources(configure())
    assert shards(configure(), "code") == []


def test_too_little_room_is_told_before(
    filled: HubServer, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yxanul_nemo.fetch.stage.free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"needs .* MB, and the disk of .* free.*HF_HOME"):
        fetch_sources(configure())
    assert filled.downloads() == []


def test_the_launcher_fetches_and_prepares_with_the_environments_hub(
    filled: HubServer, tmp_path: Path, own_conf: Path
) -> None:
    environment = os.environ | {"HF_ENDPOINT": filled.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": ""}
    environment.pop("HF_HUB_CACHE")
    command = [sys.executable, "launcher.py", "--config-dir", str(own_conf), *overrides(tmp_path)]

    def launch(stage: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, f"stage={stage}"], cwd=REPO_DIR, env=environment, capture_output=True, text=True, check=False
        )

    early = launch("data")
    assert (early.returncode, "stage=fetch" in early.stderr) == (2, True), early.stderr
    done = launch("[fetch,data]")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    filled.stop()
    again = launch("[fetch,data]")
    assert again.returncode == 0, again.stderr


def test_the_recipes_on_the_hub_are_pinned() -> None:
    """A branch would give other text tomorrow; tokenizers are compared by their content instead."""
    for recipe in ("yxanul_197m_ultra", "yxanul_197m_h100"):
        config = parse(compose([f"recipe={recipe}"]))
        named = [source.hub for source in config.data.sources.values()]
        named += [domain.hub for domain in config.validation.domains.values()]
        assert named and all(hub is not None and COMMIT.fullmatch(hub.revision) for hub in named)
        assert config.data.sources["text"].is_fetched


def test_the_blend_decides_how_much_of_each_source() -> None:
    config = parse(compose(["recipe=yxanul_197m_experimental_1b"]))
    needed = text_bytes_needed(config)
    total = sum(needed.values())
    assert {name: round(count / total, 3) for name, count in needed.items()} == {
        "text": 0.7,
        "math": 0.15,
        "code": 0.15,
    }
    # A billion tokens of 6.9 characters, and something over.
    assert 6.9e9 < total < 8e9


def fill_as_the_recipes_name_it(hub: HubServer) -> None:
    """The repositories of the large recipes at their pinned commits, with small files of the same names and columns."""

    def add(name: str, commit: str, files: dict[str, bytes], kind: str = "dataset") -> None:
        hub.add(name, files, kind).commit = commit

    solutions = pa.table(
        {
            "task_id": ["HumanEval/0"],
            "prompt": ["def double(x):\n"],
            "canonical_solution": ["    return 2 * x\n"],
            "test": ["def check(candidate):\n    assert candidate(2) == 4\n"],
            "entry_point": ["double"],
        }
    )
    questions = pa.table({"question": ["What is 2 + 2?"] * 3, "answer": ["#### 4"] * 3})
    web = {f"sample/100BT/00{n}_00000.parquet": parquet(documents(n, 50)) for n in range(2)}
    add("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", web)
    maths = {
        "finemath-4plus/train-00000-of-00064.parquet": parquet(documents(5, 50)),
        "finemath-3plus/x.parquet": b"no",
    }
    add("HuggingFaceTB/finemath", "e92b25a616738fe95dc186b64dfb19f9c8525594", maths)
    code = {"file-000000000001.json.gz": json_gz(documents(6, 50), "content")}
    add("codeparrot/codeparrot-clean", "35a59fb025bc0a102f7d96eac09d145b896d487b", code)
    c4 = {f"en/c4-validation.0000{n}-of-00008.json.gz": json_gz(documents(n, 2500)) for n in range(2)}
    add("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", c4)
    gsm8k = {"main/test-00000-of-00001.parquet": of_table(questions)}
    add("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", gsm8k)
    humaneval = {"openai_humaneval/test-00000-of-00001.parquet": of_table(solutions)}
    add("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", humaneval)
    tokenizer = {"vocab.json": b"{}", "merges.txt": b"#version: 0.2\n", "model.safetensors": bytes(2000)}
    add("UW/OLMo2-8B-SuperBPE-t80k", "a" * 40, tokenizer, "model")


@pytest.mark.parametrize("recipe", ["yxanul_197m_ultra", "yxanul_197m_h100"])
def test_the_large_recipes_as_they_stand(hub: HubServer, tmp_path: Path, recipe: str) -> None:
    fill_as_the_recipes_name_it(hub)
    place = [f"run.dir={tmp_path / 'run'}", f"validation.dir={tmp_path / 'validation'}"]
    config = parse(compose([f"recipe={recipe}", *place, "stage=fetch"]))
    run_stages(config)
    check_domain_files(config.validation)
    require_fetched(config)
    assert pq.read_metadata(tmp_path / "validation" / "c4_validation_2k.parquet").num_rows == 2000
    problems = pq.read_table(tmp_path / "validation" / config.evaluate.humaneval_path)
    assert {"prompt", "test", "entry_point"} <= set(problems.column_names)
    for name, source in config.corpus_sources.items():
        for shard in resolve_shards(str(source.path), name):
            with open_shard(shard, source.text_column) as reader:
                assert reader.rows == 50
    # The weights of the model that the tokenizer belongs to are not wanted.
    assert [path for path in hub.downloads() if path.endswith(".safetensors")] == []
    asked = len(hub.requests)
    fetch_sources(config)
    assert len(hub.requests) == asked
