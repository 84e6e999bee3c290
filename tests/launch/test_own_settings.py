"""A run's file gives its settings to a command line, and none of what jobs run."""

from pathlib import Path

import pytest

from yxanul_nemo.config.cluster import ClusterConfig
from yxanul_nemo.config.load import compose, parse, to_yaml
from yxanul_nemo.launch.own_settings import asked_settings

RUNS_SOMETHING = {
    "setup": ("cluster.setup=['touch x']", ["touch x"]),
    "environment": ("+cluster.environment={LD_PRELOAD: /tmp/x.so}", {"LD_PRELOAD": "/tmp/x.so"}),
    "sbatch": ("cluster.sbatch=['--comment=x']", ["--comment=x"]),
    "srun": ("cluster.srun=['--task-prolog=/tmp/x']", ["--task-prolog=/tmp/x"]),
    "container": ("cluster.container.image=/tmp/x.sqsh", None),
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run whose file chooses what jobs run."""
    chosen = [override for override, _ in RUNS_SOMETHING.values()]
    config = parse(
        compose([f"run.dir={tmp_path}", "cluster=slurm", "cluster.partition=gpu", "optim.lr=0.004", *chosen])
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return tmp_path


def test_a_file_chooses_settings_and_not_what_jobs_run(begun: Path) -> None:
    config, said = asked_settings([f"run.dir={begun}"])
    assert (config.optim.lr, config.cluster.partition) == (0.004, "gpu")
    for key in RUNS_SOMETHING:
        assert getattr(config.cluster, key) == getattr(ClusterConfig(), key)
        assert any(line.startswith(f"cluster.{key} is not taken from the run's file") for line in said)


def test_the_command_line_may_choose_what_jobs_run(begun: Path) -> None:
    override, value = RUNS_SOMETHING["setup"]
    config, said = asked_settings([f"run.dir={begun}", override])
    assert config.cluster.setup == value
    assert not any("cluster.setup" in line for line in said)


def test_who_only_looks_is_not_told(begun: Path) -> None:
    _, said = asked_settings([f"run.dir={begun}", "stage=status"])
    assert not any("is not taken" in line for line in said)
