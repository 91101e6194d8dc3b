"""`voco show` on outputs of several kinds: real tables, and no terminal control characters."""

import pytest
import report.report_world as report_world

from voco.commands.show import printable, show_output
from voco.errors import Refused


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return report_world.flow(tmp_path_factory.mktemp("flow"))


def test_ingest_shows_a_sample_and_rejects_by_reason(flow):
    text = show_output(str(flow / "ingest-test"))
    assert "read 363, written 360" in text.replace("samples 120, ", "")
    assert "scene0.png: png, 128 x 128" in text
    assert "user: How many shapes are red?" in text
    assert "rejected, missing_media: 2" in text
    assert "rejected, corrupt_media: 1" in text
    assert "\x1b" not in text
    assert "\\x1b[31m" in text


def test_evaluation_shows_answers_and_scores(flow):
    text = show_output(str(flow / "eval-voco"))
    assert "answers: 360, the first 8" in text
    assert "[right]" in text
    assert "[wrong]" in text
    assert all(f"\n{category} " in text for category in ("all", "colour", "count", "presence"))
    assert "\x1b" not in text


def test_other_outputs_show_their_tables(flow):
    assert show_output(str(flow / "features-test")).startswith("features-test: features, run features-test-")


def test_unfinished_and_absent_outputs_are_refused(flow, tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        show_output(str(tmp_path / "nowhere"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{}")
    with pytest.raises(Refused, match="is not finished"):
        show_output(str(tmp_path / "half"))


def test_printable_shows_codes_and_cuts():
    assert printable("a\x1b[2J\nb\u202ec\u00e9") == "a\\x1b[2J\\nb\\u202ec\u00e9"
    assert len(printable("x" * 5000)) < 500
