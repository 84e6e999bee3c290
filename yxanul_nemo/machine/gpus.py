"""GPUs that this process may use, and how many training processes share a machine. No driver is loaded for that."""

import os
import shutil
import subprocess
from pathlib import Path

from yxanul_nemo.config.run import RunConfig

QUERY_SECONDS = 10.0


def found_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as nvidia-smi reports them; none where it is absent, fails or does not answer."""
    rows = [[part.strip() for part in line.split(",", 2)] for line in _query("index,uuid,name")]
    visible = visible_devices()
    if visible is None:
        return [name for _, _, name in rows]
    names = []
    for asked in visible:
        # CUDA takes the start of a UUID, and nothing that comes after what it does not know.
        if asked.startswith("MIG"):
            # nvidia-smi's rows are whole GPUs, whose memory and speed a slice does not have.
            names.append(f"a slice of a GPU, {asked}")
            continue
        named = [name for index, uuid, name in rows if asked == index or (asked[:1] == "G" and uuid.startswith(asked))]
        if not named:
            break
        names.append(named[0])
    return names


def visible_devices() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lists, numbers or UUIDs; None where it is not set and all GPUs are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else [part.strip() for part in visible.split(",") if part.strip()]


def visible_gpus() -> int:
    """GPUs by device files, so that the launcher need not load the driver."""
    visible = visible_devices()
    if visible is not None:
        return len([device for device in visible if device != "-1"])
    return sum(1 for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit())


def read_power_watts(uuid: str) -> float | None:
    """What the GPU of this UUID draws now, by nvidia-smi; None where it does not say."""
    readings = _query("power.draw", f"--id={uuid}")
    try:
        return float(readings[0]) if readings else None
    except ValueError:
        return None


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none, or nvidia-smi does not answer."""
    return next(iter(_query("driver_version")), None)


def _query(what: str, *options: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def world_size(config: RunConfig) -> int:
    """Training processes of the run, on all of its machines."""
    nodes = config.cluster.nodes if config.cluster.scheduler == "slurm" else 1
    return nodes * process_count(config)


def process_count(config: RunConfig) -> int:
    """Training processes on one machine: this one, or a node of the cluster."""
    count = config.parallel.processes_per_node
    if count != "auto":
        return count
    if config.cluster.scheduler == "slurm":
        return 1 if config.parallel.device == "cpu" else max(1, config.cluster.gpus_per_node)
    return 1 if config.parallel.device == "cpu" else max(1, visible_gpus())


def threads_per_process(config: RunConfig, processes: int) -> int:
    """OpenMP threads of each of so many processes on one machine."""
    return config.parallel.cpu_threads or max(1, len(os.sched_getaffinity(0)) // processes)


def rank_and_processes() -> tuple[int, int]:
    """This process's number among those that torchrun or srun has started, and how many these are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
