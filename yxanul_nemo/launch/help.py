"""What `--help` and `stage=help` say: stages, recipes, groups and keys, where things end up, exit codes."""

import textwrap

from yxanul_nemo.config.conf_files import CONF_DIR, recipes

WIDTH = 132
"""Characters of a line."""
PIPELINE = {
    "fetch": "what the recipe names on the Hugging Face hub: text to train on, validation files, tokenizer; HF_ENDPOINT, HF_TOKEN, HF_HOME",
    "data": "parquet to tokenizer to Megatron .bin/.idx files with a manifest",
    "train": "the phases of the curriculum, each a process that starts from the checkpoint before it; phases=3-5 for a part",
    "validate": "bits per byte of the newest checkpoint on held-out text; from=PATH for another model, from=[A,B] compares two",
    "export": "export/model.nemo and export/hf of the newest checkpoint, loaded anew and compared with it",
}
LOOKING = {
    "plan": "before anything is spent: steps, learning rates, speed, time, memory, cost, disk; beside a run what is done;\n"
    "plan.gpu=h100 plan.gpus=8 plan.price_per_gpu_hour=2.5",
    "check": "what this machine can do and what the recipe would use here; exit code 1 if it cannot run",
    "bench": "tokens/s, MFU and memory of the training step for each phase; bench.seq_len=[8,2048] bench.profile=true",
    "status": "what is done, running and waiting, with speed and time left; 'runs=[runs/*]' lists several runs",
    "cancel": "ends the jobs of a run that cluster=slurm has submitted, or its launcher on this machine",
    "inspect_data": "the prepared corpus with samples",
    "compare_tokenizers": "the run's tokenizer beside plain BPE of its size",
    "report": "run.dir/report/index.html: curves, plan and reality, held-out text, samples; runs=[runs/a,runs/b] compares",
    "generate": "text from the run's best checkpoint or from=PATH: prompt='Once upon a time' generate.temperature=0.8",
    "evaluate": "the same model at tasks of lm-evaluation-harness and at questions made of held-out text",
    "publish": "the export and its model card to the Hugging Face hub: publish.repo=OWNER/NAME publish.dry_run=true",
    "import": "from=PATH, a .nemo file or Hugging Face folder, as the first checkpoint of a new run",
    "branch": "from=RUN@TOKENS run.dir=NEW: a new run from a checkpoint of another, with its moments and its place in the data",
    "help": "this page",
}


def help_text() -> str:
    """The whole page."""
    groups = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "recipe")
    options = {name: sorted(path.stem for path in (CONF_DIR / name).glob("*.yaml")) for name in groups}
    choices = {name: ", ".join(names) for name, names in options.items() if len(names) > 1}
    return f"""\
Train a small GPT through a curriculum of rising sequence lengths: from text to a validated, exported model.

  python launcher.py                                    the demo: everything on a CPU, in about three minutes
  python launcher.py recipe=NAME stage=STAGE key=value ...

Try in this order: stage=plan, stage=check, stage=all, stage=report.

STAGES  all (the default) is these five; each also alone, several as 'stage=[train,export]' (quoted: shells read [])
{_entries(PIPELINE)}
These run alone; all but cancel, publish, import and branch only look:
{_entries(LOOKING)}

RECIPES  recipe=NAME, a short list of choices over conf/
{_entries(recipes())}

CHOICES  group=option, another file of conf/
{_entries(choices)}

KEYS  key=value changes one, as in optim.lr=3e-4 or curriculum.phases.0.seq_len=16; +key=value adds, ~key takes out.
  Numbers may be written as 10M, 1B or 1e9, times as 90s or 2h; text and paths are taken as the shell hands them over.
  All keys with meaning, unit and default: docs/config.md. What a command line comes to: --cfg job.
  --config-dir DIR  recipes and other options from a folder of your own, laid out as conf/

REPEATING a command does only what is not done yet, after a crash too; run.dir=X alone goes on with the run in X.
allow=[optim.lr] lets a key change from here on (docs/guide/going-on.md). Ctrl-C, SIGTERM and SIGUSR1 save and end.
Everything of a run is in run.dir (default runs/<recipe>): checkpoints/, metrics.jsonl, tensorboard/, validation/, export/, logs/.

SWEEPS  -m optim.lr=1e-3,2e-3 run.seed=1,2 runs every combination side by side (docs/guide/sweeps.md).

ON SLURM  cluster=slurm submits the stages as a chain of jobs; cluster.dry_run=true only prints them.

EXIT CODES  0 done, or saved and stopped by a scheduler; 1 a failure of ours; 2 a mistake in what was asked for; 130 Ctrl-C.

TAB COMPLETION in bash: eval "$(python launcher.py -sc install=bash)"; Hydra's own options: --hydra-help"""


def _entries(entries: dict[str, str]) -> str:
    width = max(map(len, entries)) + 2
    lines = []
    for name, words in entries.items():
        first, *more = (part for line in words.split("\n") for part in textwrap.wrap(line, WIDTH - 2 - width))
        lines += [f"  {name:<{width}}{first}", *(f"  {'':<{width}}{line}" for line in more)]
    return "\n".join(lines)
