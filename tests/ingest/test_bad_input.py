"""Faults of every source format in one table, each with its row or file and its reason. No fault stops a job, none is lost."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ingest.clips import clip
from ingest.shards import pack
from ingest.source import image, row, table
from ingest.web_server import serving

import pipelines
from voco.job.load import build_job
from voco.store import schemas

MEDIA_BYTES, TEXT_BYTES = 100_000, 2000


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 3.6 billion pixels."""
    data = bytearray(image(1, "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


FILES: list[tuple[str, str, bytes, str]] = [
    ("half a JPEG", "half.jpg", half(image(1, "JPEG", (96, 96))), "corrupt_media"),
    ("half a PNG", "half.png", half(image(1, "PNG")), "corrupt_media"),
    ("half a GIF", "half.gif", half(image(1, "GIF")), "corrupt_media"),
    ("half a WebP", "half.webp", half(image(1, "WEBP", (96, 96))), "corrupt_media"),
    ("a PNG with a bit turned", "bit.png", flipped(image(1, "PNG"), 200), "corrupt_media"),
    ("an empty image", "empty.jpg", b"", "corrupt_media"),
    ("an error page for an image", "page.jpg", b"<html>403 Forbidden</html>", "unsupported_format"),
    ("a PDF", "paper.jpg", b"%PDF-1.7 ...", "unsupported_format"),
    ("a drawing", "drawing.svg", b"<svg></svg>", "unsupported_format"),
    ("a decompression bomb", "bomb.png", bomb(), "media_too_large"),
    ("an image of too many bytes", "large.jpg", image(1) + bytes(MEDIA_BYTES), "media_too_large"),
    ("a video for an image", "video.jpg", clip(), "unsupported_format"),
    ("half an mp4", "half.mp4", half(clip()), "corrupt_media"),
    ("half a Matroska file", "half.mkv", half(clip("matroska")), "corrupt_media"),
    ("half an AVI", "half.avi", half(clip("avi")), "corrupt_media"),
    ("an empty video", "empty.mp4", b"", "corrupt_media"),
    ("an error page for a video", "page.mp4", b"<html>403 Forbidden</html>", "unsupported_format"),
    ("an image for a video", "image.mp4", image(1), "unsupported_format"),
    ("a video of too many bytes", "large.mp4", clip() + bytes(MEDIA_BYTES), "media_too_large"),
]


def about(path: str, text: str = "<image>\nWhat?", answer: str = "That") -> dict[str, Any]:
    video = path.endswith((".mp4", ".mkv", ".avi"))
    return {**row(path, None, text, answer), "video" if video else "image": path}


def members(key: str, *, caption: bytes | None = b"a kite", **media: bytes) -> list[tuple[str, bytes] | tarfile.TarInfo]:
    texts = [] if caption is None else [(f"{key}.txt", caption)]
    return [*((f"{key}.{extension}", data) for extension, data in media.items()), *texts]


def link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


def option(**keys: str) -> list[str]:
    picture = base64.b64encode(image(len(str(keys)))).decode()
    defaults = {"index": str(abs(hash(str(keys)))), "question": "Which?", "A": "cat", "B": "dog", "answer": "B", "image": picture}
    return list({**defaults, **keys}.values())


def seed(identity: str, **keys: Any) -> dict[str, Any]:
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    defaults = {"question_id": identity, "question": "What?", "data_type": "image", "data_id": "good.jpg", "question_type_id": 1}
    return {**defaults, **choices, "answer": "A", **keys}


# Format, fault, the row as `write` below takes it, reason.
ROWS: list[tuple[str, str, Any, str]] = [
    *(("llava_json", fault, about(name), reason) for fault, name, _, reason in FILES),
    ("llava_json", "a missing file", about("gone.jpg"), "missing_media"),
    ("llava_json", "a folder for a file", about("folder.jpg"), "missing_media"),
    ("llava_json", "a pipe that never ends", about("pipe.jpg"), "missing_media"),
    ("llava_json", "a link to itself", about("loop.jpg"), "missing_media"),
    ("llava_json", "a name that no disk takes", about("n" * 300 + ".jpg"), "missing_media"),
    ("llava_json", "a link out of the folder", about("link.jpg"), "unsafe_path"),
    ("llava_json", "a folder that is a link out", about("up/x.json"), "unsafe_path"),
    ("llava_json", "an absolute path", about("/etc/passwd"), "unsafe_path"),
    ("llava_json", "a path that climbs", about("a/../../mix.json"), "unsafe_path"),
    ("llava_json", "a URL", about("http://host/a.jpg"), "unsafe_path"),
    ("llava_json", "a path with a NUL", about("a\0.jpg"), "unsafe_path"),
    ("llava_json", "an empty path", about(""), "bad_record"),
    ("llava_json", "a member with a wrong checksum", about("packed/crc.jpg"), "corrupt_media"),
    ("llava_json", "a member without its header", about("packed/header.jpg"), "corrupt_media"),
    ("llava_json", "a member with a wrong size in its header", about("packed/lies.jpg"), "corrupt_media"),
    ("llava_json", "a member that is a link", about("packed/link.jpg"), "unsafe_path"),
    ("llava_json", "an encrypted member", about("packed/secret.jpg"), "unsupported_format"),
    ("llava_json", "a method that may be a bomb", about("packed/bz2.jpg"), "unsupported_format"),
    ("llava_json", "a member of too many bytes", about("packed/large.jpg"), "media_too_large"),
    ("llava_json", "a missing member", about("packed/gone.jpg"), "missing_media"),
    ("llava_json", "half an archive", about("cut/a.jpg"), "missing_media"),
    ("llava_json", "a number for a row", 7, "bad_record"),
    ("llava_json", "nothing for a row", None, "bad_record"),
    ("llava_json", "no conversations", {"id": 1}, "bad_record"),
    ("llava_json", "a list of images", {**row(1, None, "a", "b"), "image": ["good.jpg"]}, "bad_record"),
    ("llava_json", "an image and a video", {**row(1, "good.jpg", "a", "b"), "video": "a.mp4"}, "unsupported_format"),
    ("llava_json", "no turns", {"conversations": []}, "bad_conversation"),
    ("llava_json", "no answer", row(1, None, "a"), "bad_conversation"),
    ("llava_json", "an unknown speaker", {"conversations": [{"from": "system", "value": "a"}] * 2}, "bad_conversation"),
    ("llava_json", "an answer of blanks", about("good.jpg", answer=" \n"), "empty_text"),
    ("llava_json", "a long text", row(1, None, "x" * TEXT_BYTES, "b"), "text_too_large"),
    ("llava_json", "the same row again", about("good.jpg", "<image>\nGood 0", "Yes"), "duplicate"),
    ("webvid_csv", "too few fields", b"1,A boat", "bad_record"),
    ("webvid_csv", "bytes that are not UTF-8", b"2,bad \xff bytes,good", "bad_record"),
    ("webvid_csv", "a NUL", b"3,a\0,good", "bad_record"),
    ("webvid_csv", "a field without end", b'4,"' + b"x" * 140_000 + b'",good', "bad_record"),
    ("webvid_csv", "no id", b" ,A boat,good", "bad_record"),
    ("webvid_csv", "no caption", b"good, ,.", "empty_text"),
    ("webvid_csv", "a folder that climbs", b"5,A boat,../..", "unsafe_path"),
    ("webvid_csv", "a missing video", b"6,A boat,012301_012350", "missing_media"),
    ("webvid_csv", "half a video", b"half,A boat,.", "corrupt_media"),
    ("video_chatgpt", "a string for a row", "What?", "bad_record"),
    ("video_chatgpt", "a number for a question", {"q": 1, "a": "b", "video_id": "good"}, "bad_record"),
    ("video_chatgpt", "an empty id", {"q": "a", "a": "b", "video_id": "v_.mp4"}, "bad_record"),
    ("video_chatgpt", "an empty question", {"q": "", "a": "b", "video_id": "good"}, "empty_text"),
    ("video_chatgpt", "only the stray marker", {"q": "a", "a": "QA_GT_caption_based_noisy", "video_id": "good"}, "empty_text"),
    ("video_chatgpt", "an id that climbs", {"q": "a", "a": "b", "video_id": "../good"}, "unsafe_path"),
    ("video_chatgpt", "a video that is gone", {"q": "a", "a": "b", "video_id": "v_gone"}, "missing_media"),
    ("webdataset", "no image", members("1"), "missing_media"),
    ("webdataset", "a download that failed", members("2", json=b'{"status": "failed_to_download"}'), "download_failed"),
    ("webdataset", "a link in the shard", [link("3.jpg"), *members("3")], "unsafe_path"),
    ("webdataset", "a name that climbs", members("../4", jpg=image(4)), "unsafe_path"),
    ("webdataset", "two images of one key", members("5", jpg=image(5), png=image(5, "PNG")), "bad_record"),
    ("webdataset", "notes that are no JSON", members("6", jpg=image(6), json=b"{"), "bad_record"),
    ("webdataset", "no caption", members("7", jpg=image(7), caption=None), "empty_text"),
    ("webdataset", "a long caption", members("8", jpg=image(8), caption=b"x" * (TEXT_BYTES + 1)), "text_too_large"),
    ("webdataset", "half an image", members("9", jpg=half(image(9, "JPEG", (96, 96)))), "corrupt_media"),
    ("cc3m_tsv", "one field", b"a kite", "bad_record"),
    ("cc3m_tsv", "an empty line", b"", "bad_record"),
    ("cc3m_tsv", "no URL", b"a kite\tkite.jpg", "bad_record"),
    ("cc3m_tsv", "no caption", b" \tWEB/image/1.jpg", "empty_text"),
    ("cc3m_tsv", "a dead link", b"a kite\tWEB/status/404", "download_failed"),
    ("cc3m_tsv", "a server that sends back for ever", b"a kite\tWEB/loop", "download_failed"),
    ("cc3m_tsv", "a server that speaks no HTTP", b"a kite\tWEB/garbage/x", "download_failed"),
    ("cc3m_tsv", "another protocol", b"a kite\tftp://host/kite.jpg", "download_refused"),
    ("cc3m_tsv", "an image that must not be used", b"a kite\tWEB/robots/noai", "download_refused"),
    ("cc3m_tsv", "a file without end", b"a kite\tWEB/huge/x", "media_too_large"),
    ("cc3m_tsv", "a page for an image", b"a kite\tWEB/status/200", "unsupported_format"),
    ("question_jsonl", "a line that is no JSON", b"{", "bad_record"),
    ("question_jsonl", "brackets without end", b"[" * 100_000, "bad_record"),
    ("question_jsonl", "no answer for the id", b'{"question_id": 404, "image": "good.jpg", "text": "a"}', "bad_record"),
    ("question_jsonl", "two answers for the id", b'{"question_id": 203, "image": "good.jpg", "text": "a"}', "bad_record"),
    ("question_jsonl", "the id of another question", b'{"question_id": 0, "image": "good.jpg", "text": "Why?"}', "bad_record"),
    ("question_jsonl", "an empty question", b'{"question_id": 205, "image": "good.jpg", "text": " "}', "empty_text"),
    ("video_qa", "no video", {"id": 1, "question": "a", "answer": "b"}, "bad_record"),
    ("video_qa", "no answer", {"id": 2, "question": "a", "video_id": "good"}, "bad_record"),
    ("video_qa", "a video that is gone", {"id": 3, "question": "a", "video_id": "gone", "answer": "b"}, "missing_media"),
    ("mmbench_tsv", "too few fields", ["1", "Which?"], "bad_record"),
    ("mmbench_tsv", "no options", option(A="nan"), "bad_record"),
    ("mmbench_tsv", "an answer that is no option", option(answer="C"), "bad_record"),
    ("mmbench_tsv", "an empty question", option(question="none"), "empty_text"),
    ("mmbench_tsv", "an image that is no base64", option(image="%" * 80), "corrupt_media"),
    ("mmbench_tsv", "an image of no row", option(image="9999"), "missing_media"),
    ("mmbench_tsv", "a page in base64", option(image=base64.b64encode(b"<html>" * 20).decode()), "unsupported_format"),
    ("scienceqa", "no problem of this id", row("404", "good.jpg", "<image>\na", "b"), "bad_record"),
    ("scienceqa", "an answer that is no choice", row("wrong", "good.jpg", "<image>\na", "b"), "bad_record"),
    ("scienceqa", "several questions", row("1", "good.jpg", "<image>\na", "b", "c", "d"), "bad_conversation"),
    ("seed_json", "an answer that is no choice", seed("1", answer="E"), "bad_record"),
    ("seed_json", "three choices", seed("2", choice_d=None), "bad_record"),
    ("seed_json", "a sound", seed("3", data_type="audio"), "unsupported_format"),
    ("seed_json", "a frame that was not extracted", seed("4", data_type="video"), "missing_media"),
]

GOOD: dict[str, Callable[[int], Any]] = {
    "llava_json": lambda number: about("good.jpg", f"<image>\nGood {number}", "Yes"),
    "webvid_csv": lambda number: f"good,Caption {number},.".encode(),
    "video_chatgpt": lambda number: {"q": f"Good {number}?", "a": "Yes", "video_id": "good"},
    "webdataset": lambda number: members(f"good{number}", jpg=image(number)),
    "cc3m_tsv": lambda number: f"a kite\tWEB/image/{number}.jpg".encode(),
    "question_jsonl": lambda number: json.dumps({"question_id": number, "image": "good.jpg", "text": f"{number}?"}).encode(),
    "video_qa": lambda number: {"id": f"good{number}", "question": f"{number}?", "video_id": "good", "answer": "Yes"},
    "mmbench_tsv": lambda number: option(question=f"Good {number}?"),
    "scienceqa": lambda number: row(f"good{number}", "good.jpg", "<image>\nWhich?", "A"),
    "seed_json": lambda number: seed(f"good{number}"),
}


def lay_media(folder: Path) -> None:
    """Good and bad files, links, and archives in place of the folders `packed` and `cut`."""
    folder.mkdir()
    for name, data in [("good.jpg", image(0)), ("good.mp4", clip()), *((name, data) for _, name, data, _ in FILES)]:
        (folder / name).write_bytes(data)
    (folder / "SEED-Bench-image").mkdir()
    (folder / "SEED-Bench-image" / "good.jpg").write_bytes(image(0))
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "link.jpg").symlink_to("/etc/passwd")
    (folder / "up").symlink_to("..")
    marked = {"crc": b"checksum", "header": b"", "lies": b"", "secret": b"", "large": bytes(MEDIA_BYTES)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, end in marked.items():
            packed.writestr(f"packed/{name}.jpg", image(1) + end)
        packed.writestr("packed/bz2.jpg", image(1), zipfile.ZIP_BZIP2)
        link = zipfile.ZipInfo("packed/link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
    data = bytearray(buffer.getvalue().replace(b"checksum", b"CHECKSUM"))
    local = data.index(b"packed/header.jpg") - 30
    data[local : local + 4] = b"none"
    entry = data.rindex(b"packed/lies.jpg") - 46
    data[entry + 24 : entry + 28] = (7).to_bytes(4, "little")
    data[data.rindex(b"packed/secret.jpg") - 46 + 8] |= 1
    (folder / "packed.zip").write_bytes(data)
    (folder / "cut.zip").write_bytes(half(bytes(data)))


def write(kind: str, folder: Path, rows: list[Any], web: str) -> dict[str, str]:
    """Write the annotation file of a format and, if it has one, the answers' file. Returns the job's inputs."""
    answers: Any = None
    path = folder / {"webdataset": "x.tar", "webvid_csv": "x.csv", "question_jsonl": "x.jsonl"}.get(kind, "x.json")
    if kind == "webdataset":
        pack(path, *(member for sample in rows for member in sample))
    elif kind == "mmbench_tsv":
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([["index", "question", "A", "B", "answer", "image"], *rows])
    elif kind in ("webvid_csv", "cc3m_tsv", "question_jsonl"):
        head = [b"videoid,name,page_dir"] if kind == "webvid_csv" else []
        path.write_bytes(b"".join(line.replace(b"WEB", web.encode()) + b"\n" for line in [*head, *rows]))
    else:
        path.write_text(json.dumps({"question_type": {"x": 1}, "questions": rows} if kind == "seed_json" else rows))
    if kind == "question_jsonl":
        answers = [{"question_id": number, "answer": f"{number}"} for number in (0, 1, 203, 205)]
        answers.append({"question_id": 203, "answer": "another"})
    elif kind == "scienceqa":
        problem = {"choices": ["a", "b"], "answer": 0}
        answers = {"good0": problem, "good1": problem, "1": problem, "wrong": {**problem, "answer": 2}}
    inputs = {"annotations": str(path)}
    if answers is not None:
        (folder / "answers.json").write_text(json.dumps(answers))
        inputs["answers"] = str(folder / "answers.json")
    located = kind in ("webdataset", "cc3m_tsv", "mmbench_tsv")
    return inputs if located else {**inputs, "media": str(folder / "media")}


def test_the_table_has_every_reason() -> None:
    assert len({fault for _, fault, _, _ in ROWS}) > 80
    timed = {"decode_timeout"}  # a decoder that is killed by its alarm: test_video_media
    assert {reason for *_, reason in ROWS} == set(schemas.REASONS) - timed
    assert {kind for kind, *_ in ROWS} == set(GOOD)


@pytest.mark.parametrize("kind", GOOD)
def test_bad_input_is_counted_and_stops_nothing(tmp_path, kind: str) -> None:
    lay_media(tmp_path / "media")
    bad = [(fault, raw, reason) for name, fault, raw, reason in ROWS if name == kind]
    with serving() as web:
        inputs = write(kind, tmp_path, [GOOD[kind](0), *(raw for _, raw, _ in bad), GOOD[kind](1)], web)
        block = {
            "format": kind, "dataset": "x", "split": "test" if "answers" in inputs else "train", "unit_rows": 5,
            "max_missing_share": 1.0, "max_reject_share": 1.0, "max_media_bytes": MEDIA_BYTES, "max_text_bytes": TEXT_BYTES,
            "allow_private_addresses": True, "download_retries": 0,
        }  # fmt: skip
        job = {"name": "bad", "kind": "ingest", "inputs": inputs, "output": str(tmp_path / "out"), "ingest": block}
        counts = pipelines.run(build_job("test.yaml", job)).counts
    rejects = table(tmp_path / "out", "rejects")
    reasons = {reject["source"].rpartition(":")[2]: reject["reason"] for reject in rejects}
    counted = {fault: reasons.get(str(index)) for index, (fault, _, _) in enumerate(bad, 1)}
    assert counted == {fault: reason for fault, _, reason in bad}
    assert all(reject["detail"] for reject in rejects)
    assert counts["rejected"] == Counter(reason for _, _, reason in bad)
    assert counts["read"] == len(bad) + 2 == counts["written"] + len(rejects)
    talks = [talk for sample in table(tmp_path / "out", "samples") for talk in sample["conversations"]]
    assert len(talks) == counts["written"] == 2
