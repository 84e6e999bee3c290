"""Composing, checking and the words of errors."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from yxanul_nemo.config.command_line import config_dirs_in
from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.config.load import (
    CONF_DIR,
    RETIRED_KEYS,
    compose,
    load_run_config,
    parse,
    to_yaml,
)
from yxanul_nemo.config.outputs import LoggingConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import keys_of
from yxanul_nemo.config.training import ParallelConfig
from yxanul_nemo.errors import UserError

RECIPES = sorted(path.stem for path in (REPO_DIR / "recipes").glob("*.yaml"))
BENCHMARKS_DIR = REPO_DIR / "benchmarks" / "conf"
OF_BENCHMARKS = sorted(path.stem for path in (BENCHMARKS_DIR / "recipe").glob("*.yaml"))
GROUPS = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "recipe")


@pytest.mark.parametrize("recipe", [*RECIPES, *OF_BENCHMARKS])
def test_every_recipe_is_valid_and_named_after_its_file(recipe: str) -> None:
    config = parse(compose([f"recipe={recipe}"], [BENCHMARKS_DIR] if recipe in OF_BENCHMARKS else []))
    assert config.run.name == recipe
    assert config.run.dir == Path("runs") / recipe
    assert config.run.description


@pytest.mark.parametrize("group", ["model", "curriculum", "precision", "optim", "tokenizer"])
def test_every_option_of_a_group_composes(group: str) -> None:
    for option in sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")):
        overrides = [f"{group}={option}"]
        if group == "curriculum":
            overrides += ["model.max_position_embeddings=4096", "parallel.micro_batch_tokens=32768"]
            overrides += [f"+data.sources.{name}.path=/somewhere" for name in ("text", "math", "code")]
            overrides += ["data.demo_corpus=false", "validation=multi_domain"]
        if option == "sentencepiece" or option == "huggingface":
            overrides += ["tokenizer.path=/somewhere"]
        parse(compose(overrides))


def dotted(mapping: dict, prefix: str) -> Iterator[str]:
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def test_every_key_of_the_schema_stands_in_conf() -> None:
    """Hydra refuses overrides of absent keys, so each key must stand in the default run or in some file of its group."""
    shown = set(dotted(OmegaConf.to_container(compose(), resolve=False), ""))
    for group in GROUPS:
        for path in (CONF_DIR / group).glob("*.yaml"):
            shown |= {group, *dotted(yaml.safe_load(path.read_text(encoding="utf-8")), f"{group}.")}
    nested_in_lists_or_maps = ("curriculum.phases.", "data.sources.", "validation.domains.")
    missing = [key for key in keys_of(RunConfig) if key not in shown and not key.startswith(nested_in_lists_or_maps)]
    assert missing == []


def test_sections_without_a_folder_have_the_defaults_of_the_schema() -> None:
    config = parse(compose(["recipe=yxanul_197m_ultra", "parallel.cpu_threads=3"]))
    assert config.parallel == ParallelConfig(cpu_threads=3) and config.logging == LoggingConfig()
    assert {"parallel", "logging", "guards", "report"}.isdisjoint(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_of_conf_says_what_it_is_for(group: str) -> None:
    for path in sorted((CONF_DIR / group).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# "), f"{path} does not begin with what it is for"
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("optim.lrr=3", "optim.lrr", "Did you mean 'optim.lr'?"),
        ("optin.lr=3", "optin.lr", "Did you mean 'optim.lr'?"),
        ("optim.lr=abc", "optim.lr", "number"),
        ("optim.lr=-1", "optim.lr", "greater than 0"),
        ("recipe=demoo", "recipe", "Did you mean 'demo'?"),
        ("model=yxanul_197n", "model", "Did you mean 'yxanul_197m'?"),
        ("+optim.foo=1", "optim.foo", "no such key"),
        ("model.kv_groups=3", "model", "not a multiple of kv_groups=3"),
        ("curriculum.phases.0.seq_len=24", "curriculum.phases.0", "not a multiple of seq_len=24"),
        ("curriculum.phases.0.seq_len=128", "curriculum", "lengths must not fall"),
        ("model.max_position_embeddings=100", "phase 3", "over model.max_position_embeddings=100"),
        ("parallel.tensor_parallel=4", "tensor_parallel=4", "cannot be split"),
        ("validation.stride=300", "validation", "stride=300 is over eval_len"),
        ("~optim.lr", "optim.lr", "is not set"),
        ("foo", "command line", "key=value"),
        ("curriculum.phases.0.seqlen=8", "curriculum.phases.0.seqlen", "Did you mean 'curriculum.phases.0.seq_len'?"),
        ("+curriculum.phases.0.seqlen=8", "curriculum.phases.0.seqlen", "Did you mean 'curriculum.phases.0.seq_len'?"),
        ("curriculum.phases.3.seq_len=8", "curriculum.phases.3.seq_len", "curriculum.phases has the entries 0 to 2."),
        ("validation.domains.prose.pth=x", "validation.domains.prose.pth", "'validation.domains.prose.path'?"),
        ("validation.domains.pros.path=x", "validation.domains.pros.path", "'validation.domains.prose.path'?"),
        ("optim.lr.peak=1", "optim.lr.peak", "'optim.lr' is a value of its own"),
        ("runs.dir=x", "runs.dir", "no such key"),
        ("optim.zzz=1", "optim.zzz", "Under optim: beta1, beta2"),
        ("zzz=1", "zzz", "docs/config.md lists all keys"),
    ],
)
def test_mistakes_are_named_with_a_way_out(override: str, where: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(compose([override]))
    assert where in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("data.sources.text.pth=/x", "Did you mean 'data.sources.text.path'?"),
        ("data.sources.txt.path=/x", "Did you mean 'data.sources.text.path'?"),
        ("+data.sources.new.pth=/x", "Did you mean 'data.sources.new.path'?"),
        ("data.sources.new.path=/x", "is added with +key=value"),
    ],
)
def test_mistakes_in_what_a_recipe_has_are_named_by_that_recipe(override: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(compose(["recipe=yxanul_197m_h100", override]))
    assert str(caught.value).startswith(override.lstrip("+").partition("=")[0])
    assert hint in str(caught.value)


def test_a_folder_of_ones_own_has_options_like_conf(tmp_path: Path) -> None:
    for arguments in (["--config-dir", f"{tmp_path}"], [f"--config-dir={tmp_path}"], ["-cd", f"{tmp_path}"]):
        assert config_dirs_in(["recipe=my_own", *arguments, "optim.lr=1"]) == [tmp_path]
    folder = tmp_path / "a folder, of my_own"
    (folder / "recipe").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: yxanul_197m\nrun:\n  name: my_own\n"
    (folder / "recipe" / "my_own.yaml").write_text(text, encoding="utf-8")
    config = parse(compose(["recipe=my_own"], [folder]))
    assert (config.run.name, config.model.name) == ("my_own", "yxanul_197m")
    for overrides, folders, words in (
        (["recipe=my_ow"], [folder], "Did you mean 'my_own'?"),
        (["recipe=my_own", "optim.lrr=1"], [folder], "Did you mean 'optim.lr'?"),
        (["recipe=my_own"], [tmp_path / "absent"], "is not a folder"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            compose(overrides, folders)


def test_numbers_may_be_written_as_text() -> None:
    """PyYAML reads 6e-4 as a string; the schema makes it a number all the same."""
    assert parse(compose(["optim.lr='6e-4'"])).optim.lr == 6e-4


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse(compose())
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_run_config(tmp_path / "config.yaml") == config


def test_a_configuration_of_an_earlier_version_is_read_and_a_command_line_like_it_refused(tmp_path: Path) -> None:
    for key in RETIRED_KEYS:
        stored = OmegaConf.create(to_yaml(parse(compose())))
        OmegaConf.update(stored, key, None, force_add=True)
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(stored), encoding="utf-8")
        assert load_run_config(tmp_path / "config.yaml") == parse(compose())
        with pytest.raises(UserError, match=re.escape(key)):
            parse(compose([f"+{key}=1"]))


@pytest.mark.parametrize(
    ("asked", "stored_by_others", "named"),
    [
        ("callbacks=[my_module.Watcher]", "callbacks: [os.abort]", r"\(callbacks\): names code, \['os\.abort'\]"),
        ("notify.command=mail", "notify: {command: touch x}", r"\(notify\): names code, touch x"),
    ],
    ids=["callbacks", "notices"],
)
def test_code_is_not_stored_and_where_a_file_names_it_refused(
    tmp_path: Path, asked: str, stored_by_others: str, named: str
) -> None:
    stored = to_yaml(parse(compose([asked])))
    assert asked.split("=")[0].split(".")[0] not in stored
    (tmp_path / "config.yaml").write_text(f"{stored}{stored_by_others}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"config\.yaml {named}"):
        load_run_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"a: [", b"\xff\xfe", b"run: 3"])
def test_a_damaged_configuration_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError):
        load_run_config(tmp_path / "config.yaml")


def test_a_read_configuration_looks_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YXANUL_TEST_SECRET", "s3cret")
    text = "${oc.env:YXANUL_TEST_SECRET} and ${run.seed}"
    config = parse(compose())
    config = config.model_copy(update={"run": config.run.model_copy(update={"description": text})})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    read = load_run_config(tmp_path / "config.yaml")
    assert read == config and read.run.description == text
    assert "s3cret" not in to_yaml(read)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "a: !!python/object/apply:os.getcwd []\n",
        "a: 1\na: 2\n",
        "a: " + "[" * 2000,
        "#" * 300_000,
    ],
)
def test_a_configuration_is_plain_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_run_config(tmp_path / "config.yaml")


def test_a_wrong_value_of_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    text = to_yaml(parse(compose())).replace("seed: ", "seed: x")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml \(run\.seed\): got 'x"):
        load_run_config(tmp_path / "config.yaml")


SECRET = "hunter2"


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"+cluster.environment.{name}={SECRET}"
            for name in (
                "WANDB_API_KEY",
                "HF_TOKEN",
                "AWS_SECRET_ACCESS_KEY",
                "AWS_ACCESS_KEY_ID",
                "MLFLOW_TRACKING_PASSWORD",
                "my_token",
            )
        ),
        f"cluster.setup=['export WANDB_API_KEY={SECRET}']",
        f"cluster.setup=['export A=1 HF_TOKEN=\"{SECRET}\"']",
        f"cluster.sbatch=['--export=ALL,WANDB_API_KEY={SECRET}']",
        f"cluster.srun=['--export=HF_TOKEN={SECRET}']",
        f"+cluster.environment.MLFLOW_TRACKING_URI='https://me:{SECRET}@host/x'",
        f"logging.mlflow='https://me:{SECRET}@host'",
    ],
)
def test_a_secret_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(UserError, match="would lie in files that others can read") as caught:
        parse(compose(["cluster=slurm", override]))
    assert SECRET not in str(caught.value)


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    config = parse(
        compose(
            [
                "cluster=slurm",
                "+cluster.environment={TOKENIZERS_PARALLELISM: 'true', NETRC_PATH: /a, API_KEY_FILE: /b, MONKEY: x}",
                "cluster.setup=['export HF_TOKEN=$(cat ~/.token)', 'source ~/.secrets', 'export WANDB_API_KEY=\"$MINE\"']",
                "logging.mlflow='https://host:5000/x@y'",
            ]
        )
    )
    assert len(config.cluster.environment) == 4


def test_from_is_a_path_or_a_list_and_no_part_of_a_runs_record(tmp_path: Path) -> None:
    assert parse(compose(["from=runs/a"])).sources == [Path("runs/a")]
    config = parse(compose(["from=[a.nemo,b/c]", "prompt=x"]))
    assert config.sources == [Path("a.nemo"), Path("b/c")]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml").sources == []
    with pytest.raises(UserError, match=r"form: no such key.*Did you mean 'from'\?"):
        compose(["form=a"])
