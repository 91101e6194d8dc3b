"""`voco ask`: a question about images and videos, answered from caches that are made once.

Pass 1 compresses what was not asked about before, pass 2 reads the question behind the caches (arXiv 2406.12275, section 3.2).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from voco import model
from voco.errors import Refused
from voco.model.cache import VocoCache, join_caches
from voco.model.cache_store import CacheStore, content_key
from voco.model.generation import prompt_ids, shared_prompt_ids
from voco.model.sampling import GREEDY, Sampling
from voco.model.voco_llama import VocoLlama
from voco.model.weights import COMPRESSOR, load_compressor
from voco.sequence.anyres import Size
from voco.store import storage
from voco.video.decode import Video
from voco.video.sample_frames import evenly_spaced

CACHE = "~/.cache/voco"
FRAMES_AT_ONCE = 64  # decoded, and under voco compressed, in one pass: any number fits
Views = tuple[list[Tensor], list[Size | None]]  # features of images or frames, and the size of each that is cut into tiles
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")


@dataclass(frozen=True)
class AskOptions:
    """How to answer. `cache` None keeps nothing; `tokens` reads fewer of each view than were made; with `keep_system` the
    template's own text is kept behind the views of a single medium.
    """

    cache: str | None = CACHE
    tokens: int | None = None
    frames: int = 8
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    keep_system: bool = False


def ask(checkpoint: str, media: Sequence[str], question: str, how: AskOptions | None = None) -> Iterator[str]:
    """The answer in pieces, then lines on both passes. Raises Refused for a file that is no image or video, and for fewer
    tokens than 1 or more than the checkpoint's.
    """
    how = how or AskOptions()
    if how.frames < 1 or how.max_new_tokens < 1 or "" in how.stop:
        raise Refused("expected --frames and --max-new-tokens of at least 1, and no empty --stop")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = model.load(checkpoint, device=device)
    if how.keep_system and (not media or (len(media) > 1 and reader.layout.method == "voco")):
        raise Refused(f"--keep-system: the kept text reads the views of one medium, got {len(media)}")
    if reader.layout.template == "plain":
        raise Refused(f"{checkpoint}: was trained on captions (text.template: plain) and reads no question")
    prompt = prompt_ids([{"role": "user", "text": question}], reader.tokenizer, reader.layout, bool(media))
    maker = CacheMaker(checkpoint, reader, how, prompt)
    started = time.monotonic()
    caches = maker.caches(media)
    _wait(device)
    compressed = time.monotonic()
    whole = join_caches(caches) if caches else None
    first = None
    for (answer,) in reader.write([whole], [prompt], how.max_new_tokens, how.sampling, how.stop):
        piece = answer.piece()
        first = first or time.monotonic()
        yield piece
    ended = time.monotonic()
    views, size = sum(len(cache.tokens) for cache in caches), sum(cache.bytes for cache in caches)
    if caches:
        yield (
            f"\n\npass 1, views to caches: {compressed - started:.2f} s, {views} views, {size / 1e6:,.2f} MB; "
            f"{maker.hits} of {len(caches)} caches found"
            + (f" in {how.cache}" if how.cache else ", keeping is off")
            + (f"; not kept: {maker.lost}" if maker.lost else "")
        )
    yield (
        f"\npass 2, question to answer: {(first or ended) - compressed:.2f} s to the first token, {ended - compressed:.2f} s for "
        f"{len(answer.ids)} tokens; ended by {answer.ended}\n"
    )


@dataclass(frozen=True)
class LoadedMedium:
    """One image or video, with the numbers of the frames that are looked at."""

    uri: str
    data: bytes
    video: Video | None
    frames: tuple[int, ...]


class CacheMaker:
    """Caches of media, from the store or made now."""

    def __init__(self, checkpoint: str, reader: VocoLlama, how: AskOptions, prompt: list[int]) -> None:
        self.checkpoint, self.reader, self.how = checkpoint, reader, how
        self.hits, self.lost = 0, ""  # caches found; why the latest that was not kept was not
        method, n = reader.layout.method, reader.layout.tokens
        if how.tokens is not None and not (method == "voco" and 1 <= how.tokens <= n):
            raise Refused(f"--tokens: expected 1 to {n} of a checkpoint of method voco, got {how.tokens} of {method}")
        # what the text of the prompt reads of each view; under other methods than voco all there is
        self.tokens = (how.tokens or n) if method == "voco" else None
        shared = tuple(shared_prompt_ids(reader.tokenizer, reader.layout)) if how.keep_system else ()
        # no prompt is refused because its first characters melt into the text before them
        self.text_ids = shared if tuple(prompt[: len(shared)]) == shared and len(prompt) > len(shared) else ()
        self.compressor: VocoLlama | None = None
        # a checkpoint that reads another's caches: images are one frame to it, and text that it has read is its own alone
        self.apart = storage.exists(storage.join(storage.resolve(checkpoint), COMPRESSOR, "model", "config.json"))
        rope = reader.language_model.config.rope_parameters
        self.store = None if how.cache is None else CacheStore(how.cache, reader.cache_key(), reader.dtype, rope)

    def caches(self, media: Sequence[str]) -> list[VocoCache]:
        """One cache for each medium; under other methods than voco, where views see each other, one for all of them."""
        found = [self._read(uri) for uri in media]
        groups = [[one] for one in found] if self.reader.layout.method == "voco" else [found] if found else []
        return [self._cache(group) for group in groups]

    def _cache(self, group: list[LoadedMedium]) -> VocoCache:
        parts = [(one.data, one.frames) for one in group]
        if self.text_ids and not self.apart:
            content = content_key(parts, self.text_ids, self.tokens)
            return self._kept(content, lambda: self.reader.keep_text(self._taken(self._made(group)), self.text_ids))
        cache = self._taken(self._kept(content_key(parts), lambda: self._made(group)))
        return self.reader.keep_text(cache, self.text_ids) if self.text_ids else cache

    def _kept(self, content: str, make: Callable[[], VocoCache]) -> VocoCache:
        if self.store is None:
            return make()
        try:
            found = self.store.get(content)
        except OSError as error:  # a folder of somebody else: the answer is worth more than the cache
            found, self.lost = None, str(error)
        if found is not None:
            self.hits += 1
            return replace(found, keys=found.keys.to(self.reader.device), values=found.values.to(self.reader.device))
        made = make()
        try:
            self.store.put(content, made)
        except OSError as error:  # or a full disk
            self.lost = str(error)
        return made

    def _taken(self, cache: VocoCache) -> VocoCache:
        return cache if self.tokens is None or set(cache.tokens) == {self.tokens} else cache.take(self.tokens)

    def _read(self, uri: str) -> LoadedMedium:
        try:
            data = storage.read_bytes(storage.resolve(uri))
            video = Video(data) if PurePosixPath(uri.lower()).suffix in VIDEOS else None
        except (FileNotFoundError, IsADirectoryError) as error:
            raise Refused(f"{uri}: no such file") from error
        except (OSError, ValueError) as error:
            raise Refused(f"{uri}: {error}") from error
        if video is None:
            return LoadedMedium(uri, data, None, (0,) if self.apart else ())
        return LoadedMedium(uri, data, video, tuple(evenly_spaced(video.num_frames, self.how.frames)))

    def _made(self, group: list[LoadedMedium]) -> VocoCache:
        if self.compressor is None:
            self.compressor = load_compressor(self.checkpoint, str(self.reader.device)) if self.apart else self.reader
        looked: Iterator[Views] = (views for one in group for views in self._features(self.compressor, one))
        if self.reader.layout.method != "voco":  # views see each other: one sequence
            whole = list(looked)
            looked = iter([([view for views, _ in whole for view in views], [size for _, sizes in whole for size in sizes])])
        cache = join_caches([self.compressor.compress_features([views], sizes=[sizes])[0] for views, sizes in looked])
        return replace(cache, keys=cache.keys.to(self.reader.dtype), values=cache.values.to(self.reader.dtype))

    def _features(self, model: VocoLlama, one: LoadedMedium) -> Iterator[Views]:
        """Features of an image, with its size when it is cut into tiles, or of a video's frames, `FRAMES_AT_ONCE` at a time."""
        tower = model.tower
        if tower is None:
            raise Refused(f"{self.checkpoint}: a checkpoint without a vision tower cannot look at {one.uri}")
        try:
            if one.video is None:
                image = Image.open(io.BytesIO(one.data))
                pixels, size = (tower.preprocess(image)[None], None) if self.apart else tower.tiles(image)
                yield [tower(pixels).squeeze(0)], [size]
                return
            for start in range(0, len(one.frames), FRAMES_AT_ONCE):
                frames = one.video.frames(list(one.frames[start : start + FRAMES_AT_ONCE]))
                pixels = torch.stack([tower.preprocess(Image.fromarray(frame)) for frame in frames])
                yield list(tower(pixels)), [None] * len(pixels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Refused(f"{one.uri}: expected an image, or a video with one of {', '.join(VIDEOS)} ({error})") from error


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
