#!/usr/bin/env bash
# Pillow 13.0.0, seen 2026-11-30: a grey TIFF that counts from white (PhotometricInterpretation 0, WhiteIsZero) is inverted on reading
# when it has 8 bits a pixel, and is not when it has 16.
#
# One would guess that both come out alike, or that neither is touched: the tag is the same. In fact the 8-bit file is turned into
# ordinary grey (its black paper reads 0), while the 16-bit file keeps its stored values in mode I;16, so the picture is a negative
# of what a viewer shows. Scanners and medical tools write such files. A 12-bit grey TIFF comes out as 0 to 4,095 in mode I;16 as
# well, so mode I;16 does not say which value is white.
# This writes the same picture in 8 and in 16 bits with tifffile, prints what Pillow reads, and fails when that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import tifffile
from PIL import Image, __version__

stored = np.zeros((4, 8), np.uint8)  # with WhiteIsZero this is white
stored[:, 4:] = 255  # and this is black
tifffile.imwrite("8.tif", stored, photometric="miniswhite")
tifffile.imwrite("16.tif", stored.astype(np.uint16) * 257, photometric="miniswhite")
read = {}
for bits in (8, 16):
    with Image.open(f"{bits}.tif") as image:
        values = np.asarray(image)
        read[bits] = (image.mode, int(values[0, 0]), int(values[0, 7]))
        print(f"Pillow {__version__}, {bits} bits: mode {image.mode}, the white half reads {values[0, 0]}, the black half {values[0, 7]}")
assert read[8] == ("L", 255, 0), read
assert read[16] == ("I;16", 0, 65535), read
PYTHON
