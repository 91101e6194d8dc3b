"""A model plugin of lmms-eval: `lmms-eval --model voco --model_args checkpoint=URI --tasks ...` runs its tasks on a checkpoint.

lmms-eval (0.7.3 and later) finds the plugin by the entry point of the group `lmms_eval.models` in `pyproject.toml`; it is no
dependency of ours. Questions are answered as `voco ask` does: each medium is compressed once and kept, the prompt has the
checkpoint's own chat template, and `until`, `max_new_tokens`, `temperature` and `top_p` of a task are honoured.

Model arguments: `checkpoint`; `tokens` (default: the checkpoint's N); `frames` of a video (8); `cache`, a folder (~/.cache/voco)
or `none`; `device` and `batch_size` come from lmms-eval, and questions are asked one at a time.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from voco import model
from voco.commands.ask import CACHE, AskOptions, CacheMaker
from voco.errors import Refused
from voco.model.cache import VocoCache, join_caches
from voco.model.generation import prompt_ids
from voco.model.sampling import GREEDY, Sampling
from voco.sequence.chat_template import Turn
from voco.sequence.sequence import TEXT, build_sample

PLACEHOLDERS = ("<image>", "<video>")  # some tasks have them in the question; here views are always before it
MAX_NEW_TOKENS = 1024  # of a task that does not say


@dataclass(frozen=True)
class ForcedTokens(Sampling):
    """Chooses given ids, one answer at a time, and notes the log-probability of each and whether it was the likeliest."""

    ids: tuple[int, ...] = ()
    log_probabilities: list[float] = field(default_factory=list)
    likeliest: list[bool] = field(default_factory=list)

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        token = self.ids[len(self.likeliest)]
        self.log_probabilities.append(float(logits.log_softmax(dim=-1)[0, token]))
        self.likeliest.append(int(logits[0].argmax()) == token)
        return torch.tensor([token], device=logits.device)


class TaskResponder:
    """A checkpoint that answers questions of lmms-eval's tasks. `visuals` are Pillow images and paths of videos, or nothing."""

    def __init__(self, checkpoint: str, tokens: int | None, frames: int, cache_folder: str | None, device: str) -> None:
        self.reader = model.load(checkpoint, device=device)
        if self.reader.layout.drops_questions:
            raise Refused(f"{checkpoint}: was trained on captions and cannot read a question")
        self.maker = CacheMaker(checkpoint, self.reader, AskOptions(cache=cache_folder, tokens=tokens, frames=frames), [])

    def answer(self, question: str, visuals: Sequence[Any] | None, generation: dict[str, Any]) -> str:
        """The answer, without the string of `until` that ended it."""
        sampling, stop = generation_options(generation)
        return self.reader.generate(
            self._joined(visuals), bare_text(question), int(generation.get("max_new_tokens", MAX_NEW_TOKENS)), sampling, stop
        )

    def loss(self, question: str, answer: str, visuals: Sequence[Any] | None) -> tuple[float, bool]:
        """The mean negative log-probability of the answer's tokens and its end token, and whether greedy decoding gives them.

        lmms-eval calls this number the log-likelihood, and takes the least one as its LLaVA models return a loss.
        """
        joined = self._joined(visuals)
        turns: list[Turn] = [{"role": "user", "text": bare_text(question)}]
        prompt = prompt_ids(turns, self.reader.tokenizer, self.reader.layout, joined is not None)
        views = ["view"] if joined is not None else []
        whole = build_sample(
            "", [[*turns, {"role": "assistant", "text": answer}]], views, self.reader.tokenizer, self.reader.layout
        )
        ids = whole.ids[whole.kinds == TEXT].tolist()
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise ValueError(f"the tokens of the answer {answer[:40]!r} do not follow those of the prompt")
        forced = ForcedTokens(ids=tuple(ids[len(prompt) :]))
        for _ in zip(forced.ids, self.reader.decode_steps([joined], [prompt], forced), strict=False):
            pass
        return -sum(forced.log_probabilities) / len(forced.ids), all(forced.likeliest)

    def _joined(self, visuals: Sequence[Any] | None) -> VocoCache | None:
        caches = self.maker.caches([encode_visual(visual) for visual in visuals or []])
        return join_caches(caches) if caches else None


def bare_text(question: str) -> str:
    """The question without placeholders."""
    for placeholder in PLACEHOLDERS:
        question = question.replace(f"{placeholder}\n", "").replace(placeholder, "")
    return question.strip()


def encode_visual(visual: Any) -> str | bytes:
    """A path as it is; a Pillow image as PNG, which loses nothing. Raises ValueError for anything else, such as audio."""
    if isinstance(visual, str):
        return visual
    if not isinstance(visual, Image.Image):
        raise ValueError(f"expected images and paths of videos, got {type(visual).__name__}")
    buffer = io.BytesIO()
    visual.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def generation_options(generation: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """How to sample, and the strings that end an answer, of a task's generation_kwargs. Raises ValueError for a beam search."""
    if int(generation.get("num_beams") or 1) > 1:
        raise ValueError("num_beams: expected 1: there is no beam search")
    until = generation.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    temperature = float(generation.get("temperature") or 0)
    if temperature == 0 or generation.get("do_sample") is False:
        return GREEDY, stop
    return Sampling(temperature, top_p=float(generation.get("top_p") or 1)), stop


def manifests() -> Any:
    """What lmms-eval registers: `--model voco`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("voco", simple_class_path=f"{__name__}.VocoModel")


def __getattr__(name: str) -> Any:
    """`VocoModel`, a class that can only be made where lmms-eval is installed."""
    if name == "VocoModel":
        return _model_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@cache
def _model_class() -> type:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
    from tqdm import tqdm

    class VocoModel(lmms):  # type: ignore[misc,unused-ignore]
        """lmms-eval's interface: requests with `args` in, answers in the same order out."""

        is_simple = True

        def __init__(
            self,
            checkpoint: str,
            tokens: int | None = None,
            frames: int = 8,
            cache: str = CACHE,
            device: str | None = None,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            usable = "cuda" if torch.cuda.is_available() else "cpu"  # lmms-eval's own default is cuda:0 everywhere
            chosen = device if device and (usable == "cuda" or not device.startswith("cuda")) else usable
            folder = None if cache in ("none", "None", "") else cache
            self.responder = TaskResponder(str(checkpoint), None if tokens is None else int(tokens), int(frames), folder, chosen)

        def _visuals(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> list[Any]:
            return list(doc_to_visual(self.task_dict[task][split][doc_id]) or []) if doc_to_visual else []

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = []
            for request in tqdm(requests, desc="voco"):
                context, generation, doc_to_visual, doc_id, task, split = request.args
                visuals = self._visuals(doc_to_visual, doc_id, task, split)
                answers.append(self.responder.answer(context, visuals, generation))
                self.cache_hook.add_partial("generate_until", (context, generation), answers[-1])
            return answers

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            losses = []
            for request in tqdm(requests, desc="voco"):
                context, target, doc_to_visual, doc_id, task, split = request.args
                answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
                losses.append(self.responder.loss(context, answer.strip(), self._visuals(doc_to_visual, doc_id, task, split)))
            return [GenerationResult(pair) for pair in losses]  # 0.7.3 turns a bare pair into its text, which no task can read

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError("voco answers one question at a time")

    return VocoModel
