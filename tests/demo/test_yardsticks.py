"""The simple baselines that the demo's result is compared with."""

from __future__ import annotations

import json

from voco.demo import scenes, yardsticks


def test_baselines_score_as_expected(tmp_path):
    scenes.write_scenes(tmp_path, train_scenes=4, test_scenes=60, seed=0)
    rows = json.loads((tmp_path / "scenes_test.json").read_text())
    scores = yardsticks.without_places(rows, tmp_path / "images")
    assert scores["count"] == scores["presence"] == 1.0
    assert 0.3 < scores["place"] < 0.8  # the most common label of four cells
    assert yardsticks.majority(rows)["presence"] < 0.7
    assert yardsticks.majority([{**row, "category": "one"} for row in rows])["one"] < 0.3
