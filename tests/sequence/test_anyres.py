"""Tiles and their packing are transformers' own, for every shape of image."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from transformers import LlavaNextConfig
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next import modeling_llava_next as llava_next

from voco.sequence.anyres import NEWLINE, Anyres, best_resolution, fit_inside
from voco.sequence.sequence import VISION, VOCO, build_sample

LLAVA = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PINPOINTS = [list(resolution) for resolution in LLAVA]
SIZES = [(h, w) for h in (1, 7, 100, 335, 336, 337, 480, 673, 1500) for w in (1, 30, 333, 336, 500, 640, 672, 1009, 4000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resolution_and_packing_are_transformers_own(size):
    anyres = Anyres(grid_pinpoints=LLAVA, tile=336)
    assert best_resolution(size, LLAVA) == tuple(select_best_resolution(size, PINPOINTS))
    target = anyres.resolution(size)
    assert fit_inside(size, target) == get_patch_output_size(np.zeros((3, *size)), target, "channels_first")
    assert anyres.tiles(size) == llava_next.image_size_to_num_patches(list(size), PINPOINTS, 336)
    slots = 576
    tiles = anyres.tiles(size)
    rows = torch.arange(tiles * slots, dtype=torch.float64).view(tiles, slots, 1)

    class Model:  # all that `pack_image_features` reads
        config = LlavaNextConfig(image_grid_pinpoints=PINPOINTS)

    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    (packed,), _ = llava_next.LlavaNextModel.pack_image_features(Model, [rows], [list(size)], "default", newline)
    assert packed[:, 0].long().tolist() == anyres.packing(size, slots).tolist()


def test_a_tile_is_a_view_and_under_none_an_image_is_one():
    anyres = Anyres(grid_pinpoints=((8, 8), (4, 8)), tile=4)
    sizes = [(8, 8), (1, 8)]
    for method, views, voco in (("voco", 5 + 3, 2 * 8), ("avg_pool", 5 + 3, 0), ("none", 2, 2 * 2)):
        layout = tiny.layout(method, 2, anyres=anyres)
        sample = build_sample("s", [tiny.question("a", "b")], ["x", "y"], tiny.TOKENIZER, layout, sizes=sizes)
        assert (len(set(sample.view.tolist())) - 1, (sample.kinds == VOCO).sum(), sample.tiles) == (views, voco, 8)
        assert len(sample) - layout.prefix_tokens(sizes) == (sample.view == -1).sum()
        slots = (sample.kinds == VISION).sum()
        if method == "none":
            assert slots == len(sample.packing) == 2 * 9 + 6 * 7 + 1 * 7
            assert (sample.packing == NEWLINE).sum() == 6 + 1
            assert sample.position.tolist() == list(range(len(sample)))
        else:
            assert slots == 8 * (9 if method == "voco" else 2)
    frames = build_sample("s", [tiny.question("a", "b")], ["x", "y"], tiny.TOKENIZER, tiny.layout("voco", 2, anyres=anyres))
    plain = build_sample("s", [tiny.question("a", "b")], ["x", "y"], tiny.TOKENIZER, tiny.layout("voco", 2))
    assert frames.ids.tolist() == plain.ids.tolist()
