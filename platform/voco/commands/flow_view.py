"""A flow on a terminal: a bar for each stage that fills in as lines of the flow's log arrive.

The log itself stays plain lines; this reads the ones that `pipelines/flow.py`, `run/units.py` and `train/watch.py` write.
"""

from __future__ import annotations

import re
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from voco.job.spec import Job
from voco.job.trials import inner_jobs

STAGE_START = re.compile(r"^\[\d+/\d+\] (\S+): \w+$")
STAGE_END = re.compile(r"^\[\d+/\d+\] (\S+): [\d.]+ s$")
PROGRESS = re.compile(r"^(\S+): (?:unit|step) (\d+)/(\d+), (.*)$")
IMPORTANT = re.compile(r"^\S+: '.*' -> |^\S+: .*% of \d+ questions|^(warning|error|refused|failed|stopped): |: failed")
OTHER_ROWS = 3  # of the terminal, besides the stages'


def short_figures(text: str) -> str:
    """The figures of a progress line that fit beside a bar: of a training's those that a glance is for."""
    figures = text.split(", ")
    if not figures[0].startswith("loss "):
        return text
    chosen = [figure for figure in figures[1:] if figure.endswith((" samples/s", " left")) or "MFU" in figure]
    return ", ".join([figures[0], *chosen])


class FlowView:
    """Bars of a flow's stages. `feed` takes the log in pieces; answers, scores and errors are printed above the bars."""

    def __init__(self, job: Job, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.fields[mark]} {task.description:<18}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.stage_of: dict[str, str] = {}  # of each job: a stage, or a training or evaluation inside one
        self.parts: dict[str, dict[str, float]] = {}  # of each stage: its jobs' shares done
        for stage in job.stages:
            name = str(stage.name)
            row = self.progress.add_task(name, start=False, total=1.0, mark="·", text=stage.kind.replace("_", " "))
            self.tasks[name] = row
            jobs = [str(inner.name) for inner in inner_jobs(stage)] or [name]
            self.stage_of |= dict.fromkeys(jobs, name)
            self.parts[name] = dict.fromkeys(jobs, 0.0)
        self._partial = ""

    def __enter__(self) -> FlowView:
        self._show(next(iter(self.tasks)))
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def feed(self, text: str) -> None:
        """A piece of the log."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        if match := STAGE_END.match(line):
            self._end(match[1])
        elif match := STAGE_START.match(line):
            self._start(match[1])
        elif match := PROGRESS.match(line):
            self._advance(match[1], int(match[2]) / max(1, int(match[3])), f"{match[1]}: {short_figures(match[4])}")
        elif IMPORTANT.search(line):
            self.progress.console.print(line, markup=False, highlight=False)

    def _start(self, stage: str) -> None:
        if stage in self.tasks:
            self.progress.start_task(self.tasks[stage])
            self.progress.update(self.tasks[stage], mark="▶")
            self._show(stage)

    def _advance(self, job: str, share: float, text: str) -> None:
        stage = self.stage_of.get(job)
        if stage is None:
            return
        parts = self.parts[stage]
        parts[job] = share
        self.progress.update(self.tasks[stage], completed=sum(parts.values()) / len(parts), text=text.removeprefix(f"{stage}: "))

    def _end(self, stage: str) -> None:
        if stage in self.tasks:
            self.progress.update(self.tasks[stage], completed=1.0, mark="✓", text="")
            self.progress.stop_task(self.tasks[stage])

    def _show(self, current: str) -> None:
        """As many stages as the terminal has rows for, the current one among them: rich cuts off what is below the screen."""
        rows = max(1, self.console.height - OTHER_ROWS)
        names = list(self.tasks)
        first = max(0, min(names.index(current) - rows // 2, len(names) - rows))
        for number, name in enumerate(names):
            self.progress.update(self.tasks[name], visible=first <= number < first + rows)
