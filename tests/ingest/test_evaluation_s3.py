"""Evaluation sets in S3, on a real server."""

import base64
import json

from ingest.source import image, part_hashes, write

import pipelines
from voco.job.load import build_job


def test_evaluation_sets_with_an_answers_file_and_with_images_inside(s3_server, tmp_path) -> None:
    """Both source files are fingerprinted, and a TSV's images are read by their offset: the same bytes as from disk."""
    folder = s3_server / "eval"
    write(folder, [], {"a.jpg": image(1)})
    questions = [{"question_id": n, "image": "a.jpg", "text": f"Question {n}?"} for n in range(3)]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    (folder / "a.json").write_text(json.dumps([{"question_id": n, "answer": f"answer {n}"} for n in (2, 0, 1)]))
    head = "index\tquestion\tA\tB\tanswer\timage\n"
    lines = [f"{n}\tWelche? é {n}\tcat\tdog\tB\t{base64.b64encode(image(n)).decode()}\n" for n in range(4)]
    (folder / "mmb.tsv").write_text(head + "".join(lines))
    (s3_server / "evalout").mkdir()
    for inputs, kind in (
        ({"annotations": "q.jsonl", "answers": "a.json", "media": "images"}, "question_jsonl"),
        ({"annotations": "mmb.tsv"}, "mmbench_tsv"),
    ):
        for root, output in (("s3://eval", f"s3://evalout/{kind}"), (str(folder), str(tmp_path / kind))):
            raw = {
                "name": "eval", "kind": "ingest", "output": output,
                "inputs": {key: f"{root}/{name}" for key, name in inputs.items()},
                "ingest": {"format": kind, "dataset": "set", "split": "test", "unit_rows": 2},
            }  # fmt: skip
            done = pipelines.run(build_job("test.yaml", raw))
            assert len(done.source) == len(inputs) - ("media" in inputs)
            assert done.counts["rejected"] == {}
        assert part_hashes(s3_server / "evalout" / kind) == part_hashes(tmp_path / kind)
