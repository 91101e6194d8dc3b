"""The plugin of lmms-eval: it answers as `voco ask` does, and, where lmms-eval is installed, runs a task made here."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
import world
from PIL import Image

from voco.commands.ask import AskOptions, ask
from voco.commands.lmms_eval_plugin import TaskResponder, bare_text, encode_visual, generation_options
from voco.job.config import Model, Text
from voco.model import build, weights
from voco.model.batch import collate_cached
from voco.model.cache import join_caches
from voco.model.sampling import GREEDY, Sampling
from voco.sequence.sequence import build_sample

ROOT = Path(__file__).parents[2]
QUESTION = "what color is the left?"
INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3 <voco> tokens and four images."""
    folder = tmp_path_factory.mktemp("plugin")
    block = Model.model_validate({"llama": shapes.llama(vocabulary=320), "tower": shapes.tower(image_size=64)})
    model = build.create_model(block, "voco", 3, Text(template="vicuna_v1"), [QUESTION, " red", " green"], seed=1)
    weights.save_checkpoint(model, weights.own_state(model), folder / "checkpoint" / "model")
    for index in range(4):
        (folder / f"{index}.png").write_bytes(world.picture(index)[0])
    return folder


def responder(files: Path, tokens: int | None = None) -> TaskResponder:
    return TaskResponder(str(files / "checkpoint"), tokens, 8, None, "cpu")


def ask_answer(files: Path, names: list[str], **options: Any) -> str:
    pieces = ask(str(files / "checkpoint"), [str(files / name) for name in names], QUESTION, AskOptions(cache=None, **options))
    return "".join(piece for piece in pieces if not piece.startswith(("\n\npass 1", "\npass 2"))).strip()


@pytest.mark.parametrize("names", [[], ["0.png"], ["0.png", "1.png"]])
@pytest.mark.parametrize("tokens", [None, 2])
def test_it_answers_as_voco_ask_does(files: Path, names: list[str], tokens: int | None) -> None:
    visuals = [Image.open(files / name) for name in names]
    answer = responder(files, tokens).answer(f"<image>\n{QUESTION}", visuals, {"max_new_tokens": 6})
    assert answer == ask_answer(files, names, tokens=tokens, max_new_tokens=6)


def test_pictures_in_memory_and_paths_are_the_same(files: Path) -> None:
    image = Image.open(files / "0.png")
    plugin = responder(files)
    assert plugin.answer(QUESTION, [image], {"max_new_tokens": 4}) == plugin.answer(
        QUESTION, [str(files / "0.png")], {"max_new_tokens": 4}
    )
    assert Image.open(io.BytesIO(encode_visual(image))).tobytes() == image.tobytes()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected images and paths of videos, got dict"):
        plugin.answer(QUESTION, [{"array": []}], {})


@pytest.mark.parametrize("with_image", [True, False])
def test_the_loss_is_that_of_one_pass_over_prompt_and_answer(files: Path, with_image: bool) -> None:
    plugin = responder(files)
    visuals = [Image.open(files / "0.png")] if with_image else []
    cache = join_caches(plugin.maker.caches([encode_visual(visual) for visual in visuals])) if visuals else None
    reader, losses = plugin.reader, {}
    for answer in (" red", "green", "color the left", "what"):
        turns = [{"role": "user", "text": QUESTION}, {"role": "assistant", "text": answer}]
        sample = build_sample("", [turns], ["view"] * len(visuals), reader.tokenizer, reader.layout, cached=True)  # type: ignore[list-item]
        batch = collate_cached([sample], [cache])
        states = reader.hidden_cached(batch, batch.text.predict_at)
        logits = reader.permitted(reader.language_model.lm_head(states))
        expected = torch.nn.functional.cross_entropy(logits, batch.text.predict_id).item()
        loss, greedy = plugin.loss(QUESTION, answer, visuals)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert greedy == bool((logits.argmax(-1) == batch.text.predict_id).all())
        losses[answer] = loss
    assert max(losses.values()) - min(losses.values()) > 0.01


def test_the_loss_reads_the_picture(files: Path) -> None:
    plugin = responder(files)
    losses = {plugin.loss(QUESTION, "red", [Image.open(files / f"{index}.png")])[0] for index in range(4)}
    assert len({round(loss, 4) for loss in losses}) == 4


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (GREEDY, ())),
        ({"until": ["\n\n", ""], "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}, (GREEDY, ("\n\n",))),
        ({"until": "ASSISTANT:"}, (GREEDY, ("ASSISTANT:",))),
        ({"temperature": 0.2, "top_p": 0.9}, (Sampling(0.2, top_p=0.9), ())),
        ({"temperature": 0.2, "do_sample": False}, (GREEDY, ())),
    ],
)
def test_generation_arguments(generation: dict[str, Any], expected: tuple[Sampling, tuple[str, ...]]) -> None:
    assert generation_options(generation) == expected


def test_what_cannot_be_done_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_beams: expected 1"):
        generation_options({"num_beams": 5})
    assert bare_text("<image>\nWhat?<video>") == "What?"


def write_tasks(folder: Path, files: Path) -> Path:
    """Two tasks of lmms-eval with data made here: short answers, and a choice by likelihood."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    folder.mkdir()
    rows = [
        {"picture": str(files / f"{index % 4}.png"), "question": QUESTION, "answer": ["red", "green"][index % 2]}
        for index in range(8)
    ]
    features = Features({"picture": ImageColumn(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "rows.parquet"))
    shared = {
        "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.parquet")}}, "test_split": "test",
        "doc_to_text": "{{question}}",
    }  # fmt: skip
    short = {
        **shared, "task": "voco_short", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_new_tokens": 4, "temperature": 0, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    choice = {
        **shared, "task": "voco_choice", "output_type": "multiple_choice", "doc_to_choice": ["red", "green"],
        "doc_to_target": "{{['red', 'green'].index(answer)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "visual.py").write_text("def picture(doc):\n    return [doc['picture'].convert('RGB')]\n")
    for task in (short, choice):
        text = json.dumps(task)[:-1] + ', "doc_to_visual": !function visual.picture}'
        (folder / f"{task['task']}.yaml").write_text(text)
    return folder


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: it is no dependency of ours")
def test_its_command_runs_two_tasks(files: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", files)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "voco", "--model_args", f"checkpoint={files / 'checkpoint'},cache=none",
        "--tasks", "voco_short,voco_choice", "--include_path", str(tasks), "--device", "cpu", "--log_samples",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    log = done.stdout[-3000:] + done.stderr[-9000:]
    assert done.returncode == 0, log
    assert (tmp_path / "out").exists(), log  # after an error lmms-eval ends with 0 all the same
    (results,) = (tmp_path / "out").rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]
    (samples,) = (tmp_path / "out").rglob("*samples_voco_short.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    plugin = responder(files)
    pictures = [Image.open(files / f"{index % 4}.png").convert("RGB") for index in range(8)]
    expected = [plugin.answer(QUESTION, [picture], {"max_new_tokens": 4, "until": ["\n"]}) for picture in pictures]
    written = [answer["filtered_resps"] for answer in answers]
    assert [text if isinstance(text, str) else text[0] for text in written] == expected
    right = [int(answer == ["red", "green"][index % 2]) for index, answer in enumerate(expected)]
    assert figures["voco_short"]["exact_match,none"] == pytest.approx(sum(right) / 8)
    losses = [[plugin.loss(QUESTION, text, [picture])[0] for text in ("red", "green")] for picture in pictures]
    chosen = [int(green < red) == index % 2 for index, (red, green) in enumerate(losses)]
    assert figures["voco_choice"]["acc,none"] == pytest.approx(sum(chosen) / 8)
    assert torch.tensor(losses).isfinite().all()
