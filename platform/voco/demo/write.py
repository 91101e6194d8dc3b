"""All of the demo's source data: `python -m voco.demo.write OUT`, or `OUT evidence` for the long recipe's.

A second call writes nothing. Each part has the file format of a real dataset: LLaVA's JSON (scenes), CC3M's chat.json with
images.zip (captions), WebVid's CSV and Video-ChatGPT's JSON with mp4 files (clips).
"""

from __future__ import annotations

import sys
from pathlib import Path

from voco.demo import captions, clips, scenes
from voco.demo.recipe import DEMO, EVIDENCE, Recipe


def write_data(out: Path, recipe: Recipe) -> None:
    """Write the parts that do not exist yet. The data depend only on the packages' images and fixed seeds."""
    scenes.write_scenes(out, recipe.train_scenes, recipe.test_scenes, describe=recipe.describe)
    captions.write_captions(out, recipe.captions)
    clips.write_clips(out, recipe.train_clips, recipe.test_clips, recipe.webvid_clips)


if __name__ == "__main__":
    write_data(Path(sys.argv[1]), EVIDENCE if sys.argv[2:] == ["evidence"] else DEMO)
