"""Every source through the complete stage: rows add up, bytes are stored once, a second run writes the same bytes."""

import csv
import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ingest.clips import clip, shipped
from ingest.source import image, part_hashes, row, table

import pipelines
from voco.errors import JobFailed
from voco.ingest.accounting import Totals, check_limits, missing_share
from voco.job.config import Ingest
from voco.job.load import build_job
from voco.job.spec import Job
from voco.run import manifest

LAX = {"max_missing_share": 1.0, "max_reject_share": 1.0}


def job(folder: Path, kind: str, annotations: str, output: str = "out", **block: Any) -> Job:
    raw = {
        "name": "sources",
        "kind": "ingest",
        "inputs": {"annotations": str(folder / annotations), "media": str(folder / "media")},
        "output": str(folder / output),
        "ingest": {"format": kind, "dataset": kind, **block},
    }
    return build_job("test.yaml", raw)


def put(folder: Path, media: dict[str, bytes]) -> None:
    for path, data in media.items():
        target = folder / "media" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def adds_up(folder: Path, counts: dict[str, Any], expected: dict[str, int]) -> None:
    """Check read = written + rejected in the manifest, and the row counts of both tables."""
    assert counts["rejected"] == expected
    assert counts["read"] == counts["written"] + sum(expected.values())
    samples, rejects = table(folder / "out", "samples"), table(folder / "out", "rejects")
    assert sum(len(sample["conversations"]) for sample in samples) == counts["written"]
    assert len(samples) == counts["samples"]
    assert Counter(reject["reason"] for reject in rejects) == expected
    assert len({reject["source"] for reject in rejects}) == len(rejects)


def rerun_is_equal(folder: Path, ingest_job: Job) -> None:
    before = part_hashes(folder / "out")
    (folder / "out" / "manifest.json").unlink()
    (folder / "out" / "units" / "00000.json").unlink()
    (folder / "out" / "samples" / "part-00000.parquet").unlink()
    pipelines.run(ingest_job)
    assert part_hashes(folder / "out") == before


LLAVA = {
    "coco/train2017/000000000001.jpg": image(1), "gqa/images/2.jpg": image(2), "ocr_vqa/images/3.jpg": image(3, "GIF"),
    "ocr_vqa/images/7.jpg": image(7, "PNG"), "textvqa/train_images/4.jpg": image(4), "vg/VG_100K/5.jpg": image(5),
    "vg/VG_100K_2/5.jpg": image(5),
}  # fmt: skip
FOUND = {"ocr_vqa/images/7.jpg": "ocr_vqa/images/7.png"}  # as downloaded; LLaVA's guide renames it

# The published archives, with the prefix of the paths in them.
ARCHIVES = {
    "coco/train2017.zip": "coco/", "gqa/images.zip": "gqa/", "ocr_vqa/images.zip": "ocr_vqa/images/",
    "textvqa/train_val_images.zip": "textvqa/", "vg/images.zip": "vg/", "vg/images2.zip": "vg/",
}  # fmt: skip


def lay_out(folder: Path, layout: str) -> None:
    """LLaVA's images in folders, in archives, or in both, where a file takes precedence over a member of its name."""
    if layout == "folders, all renamed":
        return put(folder, LLAVA)
    files = {FOUND.get(path, path): data for path, data in LLAVA.items()}
    if layout == "folders":
        return put(folder, files)
    for name, start in ARCHIVES.items():
        second = name.endswith("2.zip")
        target = folder / "media" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if second else zipfile.ZIP_STORED) as packed:
            for path, data in files.items():
                if path.startswith(start) and ("VG_100K_2" in path) == second:
                    packed.writestr(path.removeprefix(start), image(99) if layout == "some in each" and "gqa" in path else data)
    if layout == "some in each":
        put(folder, {path: data for path, data in files.items() if path.startswith(("gqa", "ocr_vqa/images/3"))})


def test_llava_665k_lies_in_folders_or_archives(tmp_path) -> None:
    """Five folders, text-only rows, string and integer ids, OCR-VQA files of other formats: every layout gives the same bytes."""
    listed = [row(index, path, f"<image>\nWhat is {index}?", "A thing") for index, path in enumerate(LLAVA)]
    listed += [row("000000000001", path, "And its colour?\n<image>", "Red", "Sure?", "Yes") for path in LLAVA]
    listed += [{**row(f"sg_{index}", None, f"Write haiku {index}", "An old pond"), "model": ""} for index in range(5)]
    listed += [listed[0], {**listed[-1], "id": "other"}, row("x", "vg/VG_100K/6.jpg", "<image>\nHi", "Ho")]
    hashes = []
    for layout in ("folders, all renamed", "folders", "archives", "some in each"):
        folder = tmp_path / layout
        lay_out(folder, layout)
        (folder / "mix.json").write_text(json.dumps(listed))
        ingest_job = job(folder, "llava_json", "mix.json", unit_rows=4, **LAX)
        done = pipelines.run(ingest_job)
        adds_up(folder, done.counts, {"duplicate": 2, "missing_media": 1})
        samples = table(folder / "out", "samples")
        kinds = {"format.gif": 1, "format.jpeg": 5, "format.png": 1, "modality.image": 7, "modality.text": 5}
        assert done.statistics["kinds"] == kinds
        assert {sample["media"][0]["path"]: sample["media"][0]["bytes"] for sample in samples if sample["media"]} == LLAVA
        assert all(len(sample["conversations"]) == 2 for sample in samples if sample["media"])
        assert {talk["extra"] for sample in samples if not sample["media"] for talk in sample["conversations"]} == {
            '{"model":""}'
        }
        hashes.append({name: digest for name, digest in part_hashes(folder / "out").items() if name.startswith("samples")})
        rerun_is_equal(folder, ingest_job)
    assert all(digests == hashes[0] for digests in hashes)


def test_llama_vids_mix_of_images_videos_and_text(tmp_path) -> None:
    """One file with rows of LLaVA, WebVid and Video-ChatGPT: a video's bytes are stored once, missing videos are counted."""
    put(tmp_path, {"coco/train2017/1.jpg": image(1), "webvid/000001_000050/7.mp4": clip(), "v_a.mkv": clip("matroska", seed=1)})
    videos = [
        (7, "webvid/000001_000050/7.mp4", "Describe this video briefly.\n<image>", "A bar moves"),
        ("v_a", "v_a.pkl", "What is it?\n<video>", "A bar"), ("v_a", "v_a.pkl", "<image>\nAnd then?", "It stops"),
        (8, "webvid/000001_000050/8.mp4", "What happens?\n<image>", "Nobody knows"),
    ]  # fmt: skip
    listed = [row(1, "coco/train2017/1.jpg", "<image>\nWhat?", "A thing"), row("sg", None, "Write", "Done")]
    listed += [{**row(identity, None, prompt, answer), "video": path} for identity, path, prompt, answer in videos]
    (tmp_path / "mix.json").write_text(json.dumps(listed))
    done = pipelines.run(job(tmp_path, "llava_json", "mix.json", max_missing_share=0.2))
    adds_up(tmp_path, done.counts, {"missing_media": 1})
    samples = {sample["media"][0]["path"]: sample for sample in table(tmp_path / "out", "samples") if sample["media"]}
    assert {path: sample["modality"] for path, sample in samples.items()} == {
        "coco/train2017/1.jpg": "image", "webvid/000001_000050/7.mp4": "video", "v_a.mkv": "video",
    }  # fmt: skip
    assert [talk["placeholder"] for talk in samples["v_a.mkv"]["conversations"]] == ["after", "before"]
    assert samples["webvid/000001_000050/7.mp4"]["media"][0]["num_frames"] == 20


def webvid(folder: Path) -> dict[str, int]:
    """Write a CSV with good and bad videos and rows. Returns the expected rejects by reason."""
    bikes = shipped("bikes.mp4")
    put(
        folder,
        {
            **{f"000001_000050/{index}.mp4": clip(frames=10 + index, seed=index) for index in range(6)},
            "000001_000050/100.mp4": bikes, "000001_000050/101.mp4": bikes[:200_000],
            "000001_000050/102.mp4": b"<html>403 Forbidden</html>", "000001_000050/103.mp4": b"",
            "000001_000050/104.mp4": clip("webm"),
        },
    )  # fmt: skip
    rows = [
        [index, f'A bar, "number {index}"', 7, "000001_000050", "PT00H00M01S", f"https://h/{index}.mp4"] for index in range(6)
    ]
    rows += [[index, f"caption {index}", 7, "000001_000050", "", ""] for index in (100, 101, 102, 103, 104, 999)]
    rows += [rows[0], [*rows[1], "more"], ["7", " ", 7, "000001_000050", "", ""], ["8", "x", 7, "../..", "", ""]]
    rows += [[0, "a second caption of the first video", 7, "000001_000050", "", ""]]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"])
        writer.writerows(rows)
    with (folder / "results.csv").open("ab") as file:
        file.write(b"9,bad \xff bytes,7,000001_000050,,\n")
    return {
        "bad_record": 2, "corrupt_media": 2, "duplicate": 1, "empty_text": 1, "missing_media": 1, "unsafe_path": 1,
        "unsupported_format": 1,
    }  # fmt: skip


@pytest.mark.parametrize("check", ["header", "full"])
def test_webvid(tmp_path, check: str) -> None:
    expected = webvid(tmp_path)
    ingest_job = job(tmp_path, "webvid_csv", "results.csv", unit_rows=3, validate=check, max_reject_share=1.0)
    done = pipelines.run(ingest_job)
    assert done.counts["read"] == 18
    adds_up(tmp_path, done.counts, expected)
    samples = {sample["media"][0]["path"]: sample for sample in table(tmp_path / "out", "samples")}
    first = samples["000001_000050/0.mp4"]
    assert first["modality"] == "video"
    assert [talk["turns"][1]["text"] for talk in first["conversations"]] == [
        'A bar, "number 0"',
        "a second caption of the first video",
    ]
    medium = samples["000001_000050/100.mp4"]["media"][0]
    assert (medium["width"], medium["height"], medium["num_frames"], medium["fps"], medium["duration_s"]) == (
        640,
        272,
        250,
        25,
        10,
    )
    assert medium["sha256"] == hashlib.sha256(shipped("bikes.mp4")).hexdigest()
    assert done.statistics["kinds"] == {"format.mp4": 7, "format.webm": 1, "modality.video": 8}
    figures = done.statistics["figures"]
    assert (figures["num_frames"]["min"], figures["num_frames"]["max"], figures["fps"]["max"]) == (10, 250, 25)
    assert figures["duration_s"]["count"] == 8
    rerun_is_equal(tmp_path, ingest_job)


def video_chatgpt(folder: Path) -> list[dict[str, Any]]:
    put(folder, {"v_a.mp4": clip(), "v_b.mkv": clip("matroska", seed=1), "v_c.webm": clip("webm", seed=2), "v_d.mp4": b"cut"})
    put(folder, {"v_e.mkv": clip("matroska", frames=40)[:1500]})
    return [
        {"q": f"What is {number} in {video}?", "a": f"Thing {number}\nQA_GT_caption_based_noisy", "video_id": f"v_{video}"}
        for number in range(3) for video in "abcdef"
    ]  # fmt: skip


@pytest.mark.parametrize("split", ["train", "test"])
def test_video_chatgpt(tmp_path, split: str) -> None:
    listed = video_chatgpt(tmp_path)
    listed += [{**listed[0], "category": "order"}, {"q": "", "a": "x", "video_id": "v_a"}, 5]
    (tmp_path / "vc.json").write_text(json.dumps(listed))
    ingest_job = job(tmp_path, "video_chatgpt", "vc.json", unit_rows=2, split=split, max_reject_share=1.0)
    done = pipelines.run(ingest_job)
    expected = {"bad_record": 1, "corrupt_media": 3, "duplicate": 1, "empty_text": 1, "missing_media": 3, "unsupported_format": 3}
    adds_up(tmp_path, done.counts, expected)
    samples = {sample["media"][0]["path"]: sample for sample in table(tmp_path / "out", "samples")}
    assert {path: sample["media"][0]["format"] for path, sample in samples.items()} == {
        "v_a.mp4": "mp4", "v_b.mkv": "mkv", "v_c.webm": "webm",
    }  # fmt: skip
    stem = hashlib.sha256(f'["video_chatgpt","{split}",["v_b"]]'.encode()).hexdigest()[:32]
    assert samples["v_b.mkv"]["sample_id"] == stem
    for number, talk in enumerate(samples["v_b.mkv"]["conversations"]):
        spoken = [turn["text"] for turn in talk["turns"]]
        answers = [f"Thing {number}"]
        assert (spoken[1:], talk["answers"]) == ((answers, []) if split == "train" else ([], answers))
        assert talk["placeholder"] == "before"  # rows 1, 7 and 13
    rerun_is_equal(tmp_path, ingest_job)


def test_webvid_clips_in_one_flat_folder_or_zip(tmp_path) -> None:
    """Samples have the same bytes as from WebVid's folders: the row's path stays. A clip in its page's folder comes first."""
    rows = [("1012345678", "012301_012350"), ("7", "000001_000050"), ("8", "000001_000050"), ("9", "other")]
    clips = {identity: clip(seed=index) for index, (identity, _) in enumerate(rows)}
    hashes = []
    for layout in ("folders", "flat", "zip"):
        folder = tmp_path / layout
        (folder / "media").mkdir(parents=True)
        (folder / "x.csv").write_text("videoid,name,page_dir\n" + "".join(f"{name},A boat,{page}\n" for name, page in rows))
        if layout == "folders":
            put(folder, {f"{page}/{name}.mp4": clips[name] for name, page in rows[:2]} | {"7.mp4": clip(seed=9)})
        elif layout == "flat":
            put(folder, {f"{name}.mp4": clips[name] for name in ("1012345678", "7", "9")})
        else:
            with zipfile.ZipFile(folder / "media" / "clips.zip", "w") as packed:
                for name in ("1012345678", "7", "9"):
                    packed.writestr(f"{name}.mp4", clips[name])
        done = pipelines.run(job(folder, "webvid_csv", "x.csv"))
        adds_up(folder, done.counts, {"missing_media": 2})  # 8 is nowhere, and `other` is no folder of WebVid's
        samples = table(folder / "out", "samples")
        read = {sample["media"][0]["path"]: sample["media"][0]["bytes"] for sample in samples}
        assert read == {"012301_012350/1012345678.mp4": clips["1012345678"], "000001_000050/7.mp4": clips["7"]}
        hashes.append({name: digest for name, digest in part_hashes(folder / "out").items() if name.startswith("samples")})
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize("kind", ["webvid_csv", "video_chatgpt"])
def test_a_video_set_may_miss_every_video(tmp_path, kind: str) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "x.csv").write_text("videoid,name,page_dir\n1,A boat,d\n2,A car,d\n")
    (tmp_path / "x.json").write_text(json.dumps([{"q": "a?", "a": "b", "video_id": f"v_{index}"} for index in range(2)]))
    source = "x.csv" if kind == "webvid_csv" else "x.json"
    with pytest.raises(JobFailed, match=r"nothing was written \(read 2 = written 0 \+ rejected 2 \(missing_media 2\)"):
        pipelines.run(job(tmp_path, kind, source))
    assert [reject["reason"] for reject in table(tmp_path / "out", "rejects")] == ["missing_media"] * 2
    allowed = job(tmp_path, kind, source, allow_empty=True)
    assert manifest.job_run_id(allowed) == manifest.job_run_id(job(tmp_path, kind, source)), "the same run, which may now end"
    done = pipelines.run(allowed)
    assert done.counts == {"read": 2, "written": 0, "samples": 0, "rejected": {"missing_media": 2}}
    with pytest.raises(JobFailed, match=r"ingest.max_missing_share: 2 of 2 rows \(100.00%\) lack their media, more than 50.00%"):
        pipelines.run(job(tmp_path, kind, source, "other", max_missing_share=0.5))


def test_the_default_limit_goes_by_the_format(tmp_path) -> None:
    limits = {kind: missing_share(Ingest(format=kind, dataset="x")) for kind in ("llava_json", "webvid_csv", "video_chatgpt")}
    assert limits == {"llava_json": 0.02, "webvid_csv": 1.0, "video_chatgpt": 1.0}
    account = Totals(100, 97, 97, {"missing_media": 3}, {}, {})
    check_limits(Ingest(format="webvid_csv", dataset="x"), account, str(tmp_path))
    with pytest.raises(JobFailed, match=r"more than 2.00%, the default of llava_json"):
        check_limits(Ingest(format="llava_json", dataset="x"), account, str(tmp_path))
