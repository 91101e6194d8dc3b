"""The simple readers beside which the demo's result is read."""

from __future__ import annotations

import json

from voco.demo import scenes, yardsticks


def test_simple_readers_score_what_they_can_know(tmp_path):
    scenes.write_scenes(tmp_path, train_scenes=4, test_scenes=60, seed=0)
    rows = json.loads((tmp_path / "scenes_test.json").read_text())
    blind = yardsticks.no_places(rows, tmp_path / "images")
    assert blind["count"] == blind["presence"] == 1.0
    assert 0.3 < blind["place"] < 0.8  # four cells, their commonest label
    assert yardsticks.majority(rows)["presence"] < 0.7
    assert yardsticks.majority([{**row, "category": "one"} for row in rows])["one"] < 0.3
