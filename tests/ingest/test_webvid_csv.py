"""How WebVid's CSV is read."""

import pytest

from voco.errors import Refused
from voco.ingest.captions import VIDEO_REQUESTS, video_request
from voco.ingest.formats.webvid_csv import read
from voco.ingest.source_row import Reject, SourceRow, sample_id
from voco.job.config import Ingest

BLOCK = Ingest(format="webvid_csv", dataset="webvid", max_text_bytes=2000)
HEADER = b"videoid,name,page_idx,page_dir,duration,contentUrl\n"


def rows(tmp_path, data: bytes, block: Ingest = BLOCK) -> list[SourceRow | Reject]:
    path = tmp_path / "results.csv"
    path.write_bytes(data)
    return list(read(str(path), block, None))


def test_golden_row(tmp_path) -> None:
    (item,) = rows(
        tmp_path, HEADER + b'1012345678,"Boat, leaving a ""small"" harbour",7,012301_012350,PT00H00M14S,https://h/x.mp4\n'
    )
    assert isinstance(item, SourceRow)
    assert (item.source, item.modality, item.paths) == ("results.csv:0", "video", ("012301_012350/1012345678.mp4",))
    assert item.conversation == {
        "source_id": "1012345678",
        "turns": [
            {"role": "user", "text": video_request("1012345678")},
            {"role": "assistant", "text": 'Boat, leaving a "small" harbour'},
        ],
        "placeholder": "after", "answers": [], "choices": [], "category": "",
        "extra": '{"contentUrl":"https://h/x.mp4","duration":"PT00H00M14S"}',
    }  # fmt: skip
    assert sample_id("webvid", "train", item) == "94f6458aade4a9d07e83c2924f2a270f"


def test_requests_are_by_the_video_and_all_are_used() -> None:
    assert video_request("1012345678") == VIDEO_REQUESTS[1]  # golden: the choice must never change
    assert {video_request(str(number)) for number in range(200)} == set(VIDEO_REQUESTS)
    assert len(set(VIDEO_REQUESTS)) == len(VIDEO_REQUESTS) >= 5


def test_an_evaluation_split_keeps_the_caption_as_reference(tmp_path) -> None:
    (item,) = rows(tmp_path, HEADER + b"1,A boat,7,d,,\n", BLOCK.model_copy(update={"split": "val"}))
    assert isinstance(item, SourceRow)
    assert [turn["role"] for turn in item.conversation["turns"]] == ["user"]
    assert item.conversation["answers"] == ["A boat"]


BAD = {
    "too few fields": (b"1,A boat,7,d,", "bad_record"),
    "too many fields": (b"1,A boat, at dawn,7,d,,", "bad_record"),
    "one field": (b"1", "bad_record"),
    "no video id": (b" ,A boat,7,d,,", "bad_record"),
    "no folder": (b"1,A boat,7,,,", "bad_record"),
    "no caption": (b"1, ,7,d,,", "empty_text"),
    "not UTF-8": (b"1,A bo\xe4t,7,d,,", "bad_record"),
    "an id that is not UTF-8": (b"\xff1,A boat,7,d,,", "bad_record"),
    "a NUL": (b"1,A b\0oat,7,d,,", "bad_record"),
    "a NUL in the path": (b"1,A boat,7,d\0,,", "bad_record"),
    "a long caption": (b"1," + b"x" * 2000 + b",7,d,,", "text_too_large"),
    "a field without end": (b"1," + b"x" * 140_000 + b",7,d,,", "bad_record"),
    "a path that climbs": (b"1,A boat,7,../d,,", "unsafe_path"),
    "an id that climbs": (b"../../1,A boat,7,d,,", "unsafe_path"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_itself_only(tmp_path, name: str) -> None:
    raw, reason = BAD[name]
    first, bad, last = rows(tmp_path, HEADER + b"1,One,7,d,,\n" + raw + b"\n2,Two,7,d,,\n")
    assert isinstance(first, SourceRow)
    assert isinstance(last, SourceRow)
    assert isinstance(bad, Reject)
    assert (bad.source, bad.reason, last.source) == ("results.csv:1", reason, "results.csv:2")
    assert bad.detail.encode()  # can be encoded


def test_layouts_that_are_no_fault(tmp_path) -> None:
    """A byte order mark, CRLF, empty lines, other column order and further columns, a line break and ü in a caption."""
    data = b'\xef\xbb\xbfname,videoid,page_dir,page_idx,mark\r\n\r\n"A b\xc3\xbcrd\r\nflies",5,d,3,x\r\nB,6,d,3,\r\n\r\n'
    first, second = rows(tmp_path, data)
    assert isinstance(first, SourceRow)
    assert isinstance(second, SourceRow)
    assert first.turns[1] == ("assistant", "A bürd\r\nflies")
    assert (first.source, second.source) == ("results.csv:0", "results.csv:1")
    assert first.conversation["extra"] == '{"mark":"x"}'


def test_an_open_quote_ends_at_the_field_limit(tmp_path) -> None:
    """It swallows some of the lines after it, but fills no memory and does not lose the file."""
    good = b"".join(b"%d,Caption %d,7,d,,\n" % (number, number) for number in range(20_000))
    parsed = rows(tmp_path, HEADER + b'a,"An open quote,7,d,,\n' + good)
    assert [type(item) for item in parsed].count(Reject) <= 2
    assert len(parsed) > 10_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1,A boat,7,d,,\n",
        b"videoid,name,duration\n1,A,2\n",
        "videoid,name,page_dir".encode("utf-16"),
        b"name,name,videoid,page_dir\n",
    ],
)
def test_a_file_without_the_header_is_refused(tmp_path, data: bytes) -> None:
    with pytest.raises(Refused, match=r"inputs.annotations: .*results.csv: expected a header with videoid, name, page_dir"):
        rows(tmp_path, data)
