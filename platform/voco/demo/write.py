"""The demo's source data, all of it: `python -m voco.demo.write OUT`. Sent again it writes nothing.

Each part is in its dataset's own file format: LLaVA's JSON (scenes), CC3M's chat.json with images.zip (captions), WebVid's CSV
and Video-ChatGPT's JSON with mp4 files (clips).
"""

from __future__ import annotations

import sys
from pathlib import Path

from voco.demo import captions, clips, scenes

CAPTIONS = 1500


def write_data(out: Path) -> None:
    """Write what is not there yet; a function of the packages' images and fixed seeds."""
    scenes.write_scenes(out)
    captions.write_captions(out, CAPTIONS)
    clips.write_clips(out)


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
