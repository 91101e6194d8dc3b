"""Evaluation sets in S3, on a real server."""

import base64
import json

from ingest.source import image, part_hashes, write

import pipelines
from voco.job import spec


def test_an_evaluation_set_with_answers_and_one_with_images_inside(s3_server, tmp_path) -> None:
    """Two source files, fingerprinted both; and a TSV's images read by their place: as from the disk."""
    folder = s3_server / "eval"
    write(folder, [], {"a.jpg": image(1)})
    asked = [{"question_id": n, "image": "a.jpg", "text": f"Question {n}?"} for n in range(3)]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    (folder / "a.json").write_text(json.dumps([{"question_id": n, "answer": f"answer {n}"} for n in (2, 0, 1)]))
    head = "index\tquestion\tA\tB\tanswer\timage\n"
    rows_of = [f"{n}\tWelche? é {n}\tcat\tdog\tB\t{base64.b64encode(image(n)).decode()}\n" for n in range(4)]
    (folder / "mmb.tsv").write_text(head + "".join(rows_of))
    (s3_server / "evalout").mkdir()
    for inputs, kind in (
        ({"annotations": "q.jsonl", "answers": "a.json", "media": "images"}, "question_jsonl"),
        ({"annotations": "mmb.tsv"}, "mmbench_tsv"),
    ):
        for place, output in (("s3://eval", f"s3://evalout/{kind}"), (str(folder), str(tmp_path / kind))):
            raw = {
                "name": "eval", "kind": "ingest", "output": output,
                "inputs": {key: f"{place}/{name}" for key, name in inputs.items()},
                "ingest": {"format": kind, "dataset": "set", "split": "test", "unit_rows": 2},
            }  # fmt: skip
            done = pipelines.run(spec.build_job("test.yaml", raw))
            assert len(done.source) == len(inputs) - ("media" in inputs)
            assert done.counts["rejected"] == {}
        assert part_hashes(s3_server / "evalout" / kind) == part_hashes(tmp_path / kind)
