"""What a shell hands over reaches the configuration: text, paths, numbers, times and free maps."""

import copy
import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from yxanul_nemo.config.base import alternatives
from yxanul_nemo.config.command_line import annotation_of, for_hydra
from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import keys_of
from yxanul_nemo.errors import UserError

LARGE = ["recipe=yxanul_197m_ultra", "cluster=slurm", "+validation.domains.mine.path=x.parquet"]
TEXT_KEYS = (
    "prompt",
    "tokenizer.eos_token",
    "run.description",
    "run.name",
    "logging.wandb_project",
    "cluster.partition",
)
PATH_KEYS = (
    "run.dir",
    "tokenizer.path",
    "data.dir",
    "data.sources.text.path",
    "validation.dir",
    "validation.domains.mine.path",
    "evaluate.tasks_folder",
    "from",
)
ODD = "ab '\"\\{}[](),:;=#%~!*?|&<>@$\t\u00f7\u4f60"


def value_of(config: RunConfig, key: str) -> object:
    """The value of a dotted key."""
    value: object = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, "from_" if part == "from" else part)
    return value


@functools.cache
def composed() -> dict[str, Any]:
    """The large recipe's values, with the optimizer that has most keys."""
    return OmegaConf.to_container(compose([*LARGE, "optim=muon"]), resolve=True)


def changed(key: str, value: object) -> dict[str, Any]:
    """The large recipe's values with another one for this key."""
    values = copy.deepcopy(composed())
    *sections, last = key.split(".")
    place: Any = values
    for section in sections:
        place = place[int(section) if section.isdigit() else section]
    place[last] = value
    return values


def keys_of_kind(kind: type, at_least: int) -> list[str]:
    """All keys of the schema that hold such values."""
    keys = [key.replace(".N.", ".0.") for key in keys_of(RunConfig) if ".NAME." not in key]
    found = [key for key in keys if kind in alternatives(annotation_of(key))]
    assert len(found) >= at_least
    return found


def typed(*arguments: str) -> RunConfig:
    """What the launcher makes of these words after the recipe's."""
    return parse(compose(for_hydra([*LARGE, *arguments])))


ALL_TEXT = st.fixed_dictionaries({key: st.text(alphabet=ODD, min_size=1).filter(str.strip) for key in TEXT_KEYS})
ALL_PATHS = st.fixed_dictionaries({key: st.text(alphabet=ODD.replace("$", ""), min_size=1) for key in PATH_KEYS})


@settings(max_examples=10, deadline=None)
@given(ALL_TEXT)
@example(dict.fromkeys(TEXT_KEYS, "$${run.name} \\${a} '\\' \\\\${b}\\"))
@example({"prompt": "null", "run.name": "2026", "tokenizer.eos_token": "</s>", "logging.wandb_project": "true"})
@example({"run.description": 'it\'s "so", {not}: [a] 100%=b', "prompt": "[a, b]"})
def test_text_arrives_as_it_was_typed(texts: dict[str, str]) -> None:
    config = typed(*(f"{key}={text}" for key, text in texts.items()))
    assert {key: value_of(config, key) for key in texts} == texts


@settings(max_examples=10, deadline=None)
@given(ALL_PATHS)
@example({"data.sources.text.path": "d/dump=CC-MAIN-2024/x[v2]/*.parquet", "run.dir": "a,b", "from": "a,b=[c"})
@example({"run.dir": "\u00fcber b/\u4f60", "data.dir": "it's/'here'", "from": "[v2] x"})
def test_paths_arrive_as_they_were_typed(paths: dict[str, str]) -> None:
    config = typed(*(f"{key}=/{text}" for key, text in paths.items()))
    assert {key: Path(value_of(config, key)) for key in paths} == {key: Path(f"/{text}") for key, text in paths.items()}


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home of/somebody")
    config = typed(*(f"{key}=~/data" for key in PATH_KEYS))
    assert {str(value_of(config, key)) for key in PATH_KEYS} == {"/home of/somebody/data"}
    with pytest.raises(UserError, match=r"data\.dir: got '~no_such_user_here/data'"):
        typed("data.dir=~no_such_user_here/data")


def test_no_path_of_the_schema_may_be_empty() -> None:
    """It would be the folder at hand. A new field that says Path instead of PathValue is found here."""
    for key in [*keys_of_kind(Path, 8), "data.sources.text.path", "validation.domains.mine.path"]:
        with pytest.raises(UserError, match="is empty"):
            parse(changed(key, ""))


def test_a_path_may_refer_to_another_key() -> None:
    assert typed("run.dir=runs/lr_${optim.lr}", "optim.lr=0.5").run.dir == Path("runs/lr_0.5")


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(alphabet=ODD.replace(",", "").replace("'", "").replace('"', ""), min_size=1), min_size=1))
@example(["runs/a=1", "runs/b[v2]"])
def test_lists_of_text_are_split_at_commas_alone(parts: list[str]) -> None:
    stripped = [part.strip() for part in parts]
    assert typed(f"report.prompts=[{','.join(parts)}]").report.prompts == stripped


def test_a_part_with_a_comma_is_quoted() -> None:
    assert typed("""report.prompts=['Well, ', "I'd, say", it's, ""]""").report.prompts == [
        "Well, ",
        "I'd, say",
        "it's",
        "",
    ]
    assert typed("from=['a,b',c d]").sources == [Path("a,b"), Path("c d")]
    assert typed("runs=[runs/a, runs/b]").runs == [Path("runs/a"), Path("runs/b")]


def test_null_stays_nothing_and_switches_stay_switches() -> None:
    config = typed("from=null", "logging.mlflow=true", "data.dir=NULL", "phases=3")
    assert config.from_ is None and config.logging.mlflow is True and config.data.dir is None and config.phases == "3"
    assert typed("logging.mlflow=http://a:5000/b").logging.mlflow == "http://a:5000/b"


def test_free_maps_take_new_names() -> None:
    config = typed(
        "cluster=slurm", "cluster.environment={NCCL_DEBUG: INFO, URL:http://a:1/b c}", "cluster.environment.X=1,2"
    )
    assert config.cluster.environment == {"NCCL_DEBUG": "INFO", "URL": "http://a:1/b c", "X": "1,2"}
    assert typed("cluster.times.data=90m").cluster.times == {"data": "01:30:00"}
    blend = typed("+data.sources.more.path=/x", "curriculum.blend={text: 0.75, more: 0.25}").curriculum.blend
    assert blend == {"text": 0.75, "more": 0.25}


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("10M", 10_000_000),
        ("1B", 1_000_000_000),
        ("100K", 100_000),
        ("100k", 100_000),
        ("1.5G", 1_500_000_000),
        ("2T", 2_000_000_000_000),
        ("1e9", 1_000_000_000),
        ("1_000_000", 1_000_000),
        ("1e6", 1_000_000),
        ("700000", 700_000),
    ],
)
@pytest.mark.parametrize("key", ["curriculum.total_tokens", "validation.every_tokens", "generate.max_new_tokens"])
def test_numbers_are_read_as_people_write_them(written: str, number: int, key: str) -> None:
    assert value_of(typed(f"{key}={written}"), key) == number


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("guards.hang_minutes", "2h", 120),
        ("guards.hang_minutes", "90s", 1.5),
        ("guards.hang_minutes", "1h 30m", 90),
        ("cluster.signal_seconds", "5m", 300),
        ("cluster.time", "2h", "02:00:00"),
        ("cluster.time", "1d 12h", "1-12:00:00"),
        ("cluster.time", "04:00:00", "04:00:00"),
        ("cluster.time", "2-00:00:00", "2-00:00:00"),
    ],
)
def test_times_are_read_as_people_write_them(key: str, written: str, value: object) -> None:
    assert value_of(typed(f"{key}={written}"), key) == value


@pytest.mark.parametrize(
    "written", ["10m", "1 M B", "M", "1e", "--3", "0x10", "1,5", "1.5K5", "1e999999999", "inf", "nan", "-inf"]
)
@pytest.mark.parametrize("key", ["curriculum.total_tokens", "optim.lr", "generate.max_new_tokens"])
def test_what_is_no_number_is_refused_with_the_key(written: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        typed(f"{key}={written}")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_number_of_the_schema_may_be_infinite(value: float) -> None:
    for key in keys_of_kind(float, 20):
        with pytest.raises(UserError):
            parse(changed(key, value))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("seed=1", "'run.seed'"),
        ("wandb=true", "'logging.wandb'"),
        ("lr=1", "'optim.lr'"),
        ("batch_size=32", "curriculum.phases.N.tokens_per_step"),
        ("resume=true", "goes on from the newest checkpoint"),
        ("recipe=yxanul_197m", "'yxanul_197m_h100'"),
        ("plan.gpu=4090", "'rtx_4090'"),
        ("plan.gpu=RTX-4090", "'rtx_4090'"),
        ("precision=FP8", "'fp8_hybrid'"),
        ("optim.lr=1,e-3", "with a comma"),
        ("plan", "Did you mean stage=plan?"),
        ("yxanul_270m", "Did you mean model=yxanul_270m?"),
        ("data.workers={", "cannot read 'data.workers={'"),
        ("parallel.micro_batch_tokens=many", "parallel.micro_batch_tokens: got 'many'"),
    ],
)
def test_the_right_form_is_named(words: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        typed(words)
    assert hint in str(caught.value)
    assert "Exception" not in str(caught.value) and "mismatched" not in str(caught.value)


def test_fp8_is_the_usual_one() -> None:
    assert typed("precision=fp8").precision == typed("precision=fp8_hybrid").precision


@pytest.mark.parametrize("argument", [b"prompt=caf\xe9", b"run.dir=/d\xff", b"caf\xe9=1", b"optim.lr=\xc3", b"\xff"])
def test_what_is_not_utf8_is_refused_where_it_enters(argument: bytes) -> None:
    with pytest.raises(UserError, match="is not UTF-8"):
        for_hydra([os.fsdecode(argument)])


def test_the_launcher_says_so_in_one_message() -> None:
    command = [sys.executable, "launcher.py", "stage=help", b"prompt=caf\xe9"]
    done = subprocess.run(command, cwd=REPO_DIR, capture_output=True, check=False)
    assert done.returncode == 2 and b"prompt: got b'caf\\xe9'" in done.stderr and b"Traceback" not in done.stderr


def test_a_sweep_is_left_to_hydra() -> None:
    words = ["-m", "run.dir=runs/a,runs/b", "optim.lr=1e-3,2e-3"]
    assert for_hydra(words) == words
