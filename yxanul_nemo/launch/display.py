"""What a task prints, on the launcher's terminal: two bars and the newest record while a phase trains; plain lines elsewhere."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn
from rich.progress import Task as Bar
from rich.text import Text

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, total_tokens
from yxanul_nemo.figures import GIB, clock, count
from yxanul_nemo.launch.interrupts import ASKED_TO_STOP, StopSignals
from yxanul_nemo.launch.tasks import Task


class TaskDisplay:
    """Context manager around one task.

    On a terminal, while a phase trains, lines scroll above two bars (phase and run) with the newest record below them; the
    records' own lines are left to the log file then. Everything else is passed on as it comes.
    """

    def __init__(self, config: RunConfig, task: Task, signals: StopSignals, console: Console | None = None):
        self._signals = signals
        self._console = console or Console(stderr=True, highlight=False)
        self._live: Live | None = None
        if task.kind == "train" and self._console.is_terminal and not self._console.is_dumb_terminal:
            phases = plan_phases(config.curriculum)
            self._phase, self._total_tokens = phases[task.phase - 1], total_tokens(phases)
            self._record: Mapping[str, Any] | None = None
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[tokens]} tokens"),
                _TimeLeft(),
                console=self._console,
                expand=True,
            )
            of = f"phase {task.phase}/{len(phases)}: {self._phase.seq_len} tokens"
            self._phase_bar = self._bars.add_task(of, total=self._phase.tokens, tokens="", left=None)
            self._run_bar = self._bars.add_task("run", total=self._total_tokens, tokens="", left=None)
            self._show(self._phase.first_token)
            self._live = Live(console=self._console, get_renderable=self._render, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self._signals.announces = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._signals.announces = True
        if self._record is not None:
            self._console.print(self._last_words(self._record), soft_wrap=True)

    def text(self, text: bytes, progress: Mapping[str, Any] | None) -> None:
        """Show a line of the task; `progress` is the record that it tells of, if it tells of one."""
        if self._live is None:
            sys.stderr.buffer.write(text if text.endswith(b"\n") else text + b"\n")
            sys.stderr.flush()
        elif progress is None:
            self._console.print(Text(text.decode(errors="replace").rstrip("\n")), soft_wrap=True)
        else:
            self._record = progress
            self._show(progress["tokens_total"])

    def _show(self, tokens_total: int) -> None:
        record = self._record or {}
        in_phase = tokens_total - self._phase.first_token
        for bar, done, planned, left in (
            (self._phase_bar, in_phase, self._phase.tokens, record.get("phase_seconds_left")),
            (self._run_bar, tokens_total, self._total_tokens, record.get("run_seconds_left")),
        ):
            self._bars.update(bar, completed=done, tokens=f"{count(done)}/{count(planned)}", left=left)

    def _render(self) -> Group:
        lines = [Text("starting", style="dim") if self._record is None else figures(self._record)]
        if self._bars.tasks[0].finished:
            lines.append(Text("saving, then validating on held-out text", style="dim"))
        if self._signals.received is not None:
            lines.append(Text(ASKED_TO_STOP.decode().strip(), style="yellow"))
        return Group(self._bars, *lines)

    def _last_words(self, record: Mapping[str, Any]) -> Text:
        """What stays on the terminal of a phase that has ended or was stopped."""
        done = record["tokens_total"] - self._phase.first_token
        line = Text(f"phase {self._phase.number}: {done:,} of {self._phase.tokens:,} tokens, ")
        return line.append_text(figures(record))


class _TimeLeft(ProgressColumn):
    """Time left as the task itself has computed it."""

    def render(self, task: Bar) -> Text:
        left = task.fields["left"]
        return Text("" if left is None else f"{clock(left)} left", style="cyan")


def figures(record: Mapping[str, Any]) -> Text:
    """A record's figures in one line; what is not a number is shown as -."""

    def number(name: str, form: str) -> str:
        value = record.get(name)
        return "-" if value is None else format(value, form)

    parts = [
        ("loss ", number("loss_nats_per_token", ".4f")),
        ("bits/byte ", number("bits_per_byte", ".4f")),
        ("lr ", number("learning_rate", ".2e")),
        ("grad norm ", f"{number('grad_norm', '.2f')} (clip {number('grad_clip', 'g')})"),
        ("", f"{number('tokens_per_second', ',.0f')} tokens/s"),
    ]
    if record.get("mfu") is not None:
        parts.append(("MFU ", f"{record['mfu']:.1%}"))
    of = f"/{record['device_memory_bytes'] / GIB:.1f}" if "device_memory_bytes" in record else ""
    parts.append(("memory ", f"{record['peak_memory_bytes'] / GIB:.1f}{of} GiB"))
    line = Text()
    for i, (label, value) in enumerate(parts):
        line.append("  " if i else "").append(label, style="dim").append(value)
    if record.get("skipped_steps"):
        line.append(f"  {record['skipped_steps']} steps skipped", style="red")
    return line
