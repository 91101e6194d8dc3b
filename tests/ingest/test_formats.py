"""The table of formats: every row has a file that ends in FORMAT, and only the file of the requested format is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from voco.ingest import formats
from voco.ingest.formats import Format, get_format
from voco.job import tables

FILES = sorted(path for path in Path(formats.__file__).parent.glob("*.py") if path.stem != "__init__")


def test_every_row_has_a_file_and_every_file_a_row() -> None:
    assert {path.stem for path in FILES} == {name for name, row in tables.FORMATS.items() if row.module is None}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_ends_in_format(path: Path) -> None:
    last = ast.parse(path.read_text()).body[-1]
    assert isinstance(last, ast.Assign)
    assert ast.unparse(last).startswith("FORMAT = Format(read")
    assert isinstance(get_format(path.stem), Format)


def test_what_formats_differ_in() -> None:
    every = {name: get_format(name) for name in tables.FORMATS}
    assert {name for name, row in every.items() if row.takes_answers} == {"question_jsonl", "video_qa", "scienceqa", "refcoco"}
    assert {name for name, row in every.items() if row.open_media} == {"webdataset", "cc3m_tsv", "mmbench_tsv", "parquet"}
    vanishing = {"webvid_csv", "video_chatgpt", "video_qa", "webdataset", "cc3m_tsv"}
    assert {name: row.missing_share for name, row in every.items()} == {
        name: 1.0 if name in vanishing else 0.02 for name in every
    }


def test_a_format_of_another_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "other_format.py").write_text(
        "from voco.ingest.formats import Format\nFORMAT = Format(read=None, missing_share=0.5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tables.FORMATS, "other", tables.FormatRow("other_format"))
    assert get_format("other").missing_share == 0.5


def test_only_the_requested_format_is_imported() -> None:
    code = (
        "import sys; from voco.ingest import listing, accounting, media_sources; from voco.ingest.formats import get_format\n"
        "prefix = 'voco.ingest.formats.'; assert not [name for name in sys.modules if name.startswith(prefix)]\n"
        "get_format('webvid_csv'); assert [name for name in sys.modules if name.startswith(prefix)] == [prefix + 'webvid_csv']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
