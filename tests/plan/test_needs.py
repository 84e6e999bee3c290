"""What a run needs is named before anything is spent: each thing that is missing, with its key."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yxanul_nemo.config.command_line import for_hydra
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.plan import needs


@pytest.fixture
def complete(tmp_path: Path) -> Callable[..., RunConfig]:
    """A large recipe with everything that it needs, and further settings."""
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "data" / "a.parquet")
    (tmp_path / "tokenizer").mkdir()
    for name, columns in (
        ("c4_validation_2k", ["text"]),
        ("gsm8k_validation", ["question", "answer"]),
        ("humaneval_validation", ["prompt", "canonical_solution"]),
    ):
        (tmp_path / "validation").mkdir(exist_ok=True)
        pq.write_table(pa.table({column: ["x"] for column in columns}), tmp_path / "validation" / f"{name}.parquet")
    settings = [
        "recipe=yxanul_197m_ultra",
        f"run.dir={tmp_path}/run",
        f"data.sources.text.path={tmp_path}/data",
        f"tokenizer.path={tmp_path}/tokenizer",
        f"validation.dir={tmp_path}/validation",
    ]
    return lambda *more: parse(compose(for_hydra([*settings, *more])))


def test_a_run_that_has_all_is_let_begin(complete: Callable[..., RunConfig]) -> None:
    needs.require_all(complete())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["phases=12"], r"^phases: is '12'; expected a number or a range within 1-10"),
        (["phases=0-2"], r"^phases: "),
        (["data.sources.text.path=/absent"], r"^data\.sources\.text\.path: /absent does not exist"),
        (["data.sources.text.text_column=txt"], r"a\.parquet: has no column 'txt'.*one of: text"),
        (["data.sources.text.text_column=n"], r"a\.parquet: column 'n' is of type int64; expected string"),
        (
            ["validation.dir=/absent", "validation.domains.english.hub=null"],
            r"^validation\.domains\.english\.path: /absent/",
        ),
        (["validation.domains.english.template={txt}"], r"^validation\.domains\.english\.template: names column 'txt'"),
        (["tokenizer.path=/absent"], r"^tokenizer\.path: /absent does not exist"),
    ],
)
def test_what_is_missing_is_named_by_its_key(
    complete: Callable[..., RunConfig], settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        needs.require_all(complete(*settings))


def test_what_can_be_fetched_is_not_missing(complete: Callable[..., RunConfig], tmp_path: Path) -> None:
    needs.require_all(
        complete("data.sources.text.path=null", f"validation.dir={tmp_path}/absent", "tokenizer.path=null")
    )


def test_all_that_is_missing_is_named_at_once(complete: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"3 things") as caught:
        needs.require_all(
            complete(
                "phases=12",
                "data.sources.text.path=/absent",
                "validation.dir=/absent",
                "validation.domains.english.hub=null",
            )
        )
    assert all(key in str(caught.value) for key in ("phases:", "data.sources.text.path:", "validation.domains."))


@pytest.mark.parametrize(
    ("setting", "package"),
    [("logging.wandb=true", "wandb"), ("logging.mlflow=true", "mlflow"), ("export.formats=[gguf]", "gguf")],
)
def test_packages_are_looked_for(
    complete: Callable[..., RunConfig], setting: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    needs.require_all(complete())
    with pytest.raises(UserError, match=f"--extra {package}"):
        needs.require_all(complete(setting))


def test_shared_tokens_need_their_tokenizer(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(f"run.dir={tmp_path}", f"data.dir={prepared}/data")
    with pytest.raises(UserError, match=r"tokenizer: does not exist, though the tokens are prepared.*stage=data"):
        needs.require_all(config)
    shutil.copytree(prepared / "tokenizer", tmp_path / "tokenizer")
    needs.require_all(config)
