"""All of the demo's source data: `python -m voco.demo.write OUT`. A second call writes nothing.

Each part has the file format of a real dataset: LLaVA's JSON (scenes), CC3M's chat.json with images.zip (captions), WebVid's
CSV and Video-ChatGPT's JSON with mp4 files (clips).
"""

from __future__ import annotations

import sys
from pathlib import Path

from voco.demo import captions, clips, scenes

CAPTIONS = 1500


def write_data(out: Path) -> None:
    """Write the parts that do not exist yet. The data depend only on the packages' images and fixed seeds."""
    scenes.write_scenes(out)
    captions.write_captions(out, CAPTIONS)
    clips.write_clips(out)


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
