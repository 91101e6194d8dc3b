"""The two sizes of the demo's data and flow: minutes for a first look, or hours for the tables of docs/results.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """A flow's job file, the folder of its data, cluster and outputs, and how much data is written."""

    flow: str
    folder: Path
    train_scenes: int
    test_scenes: int
    captions: int
    train_clips: int
    test_clips: int
    webvid_clips: int
    val_scenes: int  # held out of training, for the threshold of adaptive N
    describe: bool  # train scenes also have a description of their four shapes: more to learn from in each image

    @property
    def data(self) -> Path:
        return self.folder / "data"


DEMO = Recipe("jobs/demo/flow.yaml", Path(".demo"), 3000, 500, 400, 500, 150, 60, 0, describe=True)
EVIDENCE = Recipe("jobs/evidence/flow.yaml", Path(".evidence"), 6000, 1500, 1500, 1200, 300, 300, 300, describe=False)
