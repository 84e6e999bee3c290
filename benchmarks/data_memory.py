"""Peak memory of data preparation on one large file of JSON lines or plain text.

    python -m benchmarks.data_memory --tokenizer runs/demo/tokenizer --gigabytes 2 --formats jsonl jsonl.gz txt --workers 2

The file is made of words drawn at random, documents of 100 to 20,000 characters. Preparation runs in processes of its own; every fifth of
a second the memory of all of them together is read, shared pages counted once (PSS of /proc/PID/smaps_rollup), without the kernel's
cache of files.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS_SEED, WORDS = 0, 50_000
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="10^9 bytes of text")
    parser.add_argument("--formats", nargs="+", default=["jsonl", "jsonl.gz", "txt"])
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    for ending in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"made.{ending}")
            write(path, int(options.gigabytes * 1e9))
            seconds, peak_bytes = prepare(path, options.tokenizer, Path(folder, "tokens"), options.workers)
            speed = options.gigabytes * 1e3 / seconds
            print(
                f"{ending}: {path.stat().st_size:,} bytes on disk, {seconds:.0f} s, {speed:.1f} MB/s, peak {peak_bytes / 2**20:.0f} MiB"
            )


def write(path: Path, text_bytes: int) -> None:
    """Write a file with so many bytes of text."""
    rng = random.Random(WORDS_SEED)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(WORDS)]
    pool = " ".join(rng.choices(words, k=4_000_000))
    written = 0
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else open(path, "w") as file:
        while written < text_bytes:
            start, length = rng.randrange(len(pool) - 20_000), rng.randint(100, 20_000)
            text = pool[start : start + length]
            file.write(json.dumps({"text": text}) + "\n" if "json" in path.name else text + "\n\n")
            written += length


def prepare(path: Path, tokenizer: Path, output: Path, workers: int) -> tuple[float, int]:
    """Return the seconds and the peak memory in bytes of all processes together."""
    command = [sys.executable, "-m", "data_prep.prepare", "--input", str(path), "--tokenizer", str(tokenizer)]
    start, peak_bytes = time.monotonic(), 0
    process = subprocess.Popen([*command, "--output", str(output), "--workers", str(workers)])
    while process.poll() is None:
        peak_bytes = max(peak_bytes, sum(map(pss_bytes, family(process.pid))))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"preparation ended with code {process.returncode}")
    return time.monotonic() - start, peak_bytes


def family(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def pss_bytes(pid: int) -> int:
    """Return a process's memory with its part of what it shares; 0 if it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
