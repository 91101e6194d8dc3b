"""`voco ask`: a question about images and videos, answered from caches that are computed once.

Pass 1 compresses media that the cache does not hold yet; pass 2 reads the question after the caches (arXiv 2406.12275,
section 3.2).
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from voco import model
from voco.errors import Refused
from voco.evaluate.adaptive import AdaptiveReading
from voco.model.cache import VocoCache, join_caches
from voco.model.cache_store import CacheStore, content_key
from voco.model.checkpoint_layout import own_compressor
from voco.model.generation import prompt_ids, shared_prompt_ids
from voco.model.sampling import GREEDY, Answer, NotedMargin, Sampling
from voco.model.voco_llama import VocoLlama
from voco.model.weights import load_compressor
from voco.sequence.anyres import Size
from voco.store import storage
from voco.video.decode import Video
from voco.video.extensions import VIDEO_EXTENSIONS
from voco.video.sample_frames import evenly_spaced

CACHE = "~/.cache/voco"
AUTO = "auto"  # as --tokens: as many as the question needs
FRAMES_AT_ONCE = 64  # decoded, and under voco compressed, in one pass; a video may have any number
Views = tuple[list[Tensor], list[Size | None]]  # features of images or frames, and the size of each that is cut into tiles


@dataclass(frozen=True)
class AskOptions:
    """How to answer. Without a `cache` nothing is kept; `tokens` reads only the first tokens of each view; `adaptive` reads 1, 2,
    4 ... of them until the model is sure; `keep_system` also caches the template's own text, after the views of a single medium.
    """

    cache: str | None = CACHE
    tokens: int | None = None
    adaptive: float | None = None  # the least margin of the first token, as `evaluate` prints it for a budget
    frames: int = 8
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    keep_system: bool = False


def ask(checkpoint: str, media: Sequence[str], question: str, options: AskOptions | None = None) -> Iterator[str]:
    """The answer in pieces, then lines on both passes. Raises Refused for a file that is no image or video, and for a number of
    tokens that the checkpoint does not have.
    """
    options = options or AskOptions()
    if options.frames < 1 or options.max_new_tokens < 1 or "" in options.stop:
        raise Refused("expected --frames and --max-new-tokens of at least 1, and no empty --stop")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = model.load(checkpoint, device=device)
    if options.keep_system and (not media or (len(media) > 1 and reader.layout.rule.views_apart)):
        raise Refused(f"--keep-system: expected one medium, whose views the cached text reads, got {len(media)}")
    if reader.layout.drops_questions:
        template = reader.layout.template
        raise Refused(f"{checkpoint}: was trained on captions (text.template: {template}) and cannot read a question")
    if options.adaptive is not None and (options.keep_system or not media or not reader.layout.rule.views_apart):
        raise Refused("--tokens auto: expected images or videos, a checkpoint of method voco, and no --keep-system")
    prompt = prompt_ids([{"role": "user", "text": question}], reader.tokenizer, reader.layout, bool(media))
    maker = CacheMaker(checkpoint, reader, options, prompt)
    started = time.monotonic()
    caches = maker.caches(media)
    _synchronize(device)
    compressed = time.monotonic()
    joined = join_caches(caches) if caches else None
    first = None
    read: list[int] = []
    for (answer,) in _answers(reader, joined, prompt, options, read):
        piece = answer.piece()
        first = first or time.monotonic()
        yield piece
    ended = time.monotonic()
    views, size = sum(len(cache.tokens) for cache in caches), sum(cache.bytes for cache in caches)
    if caches:
        yield (
            f"\n\npass 1, views to caches: {compressed - started:.2f} s, {views} view{'s' * (views != 1)}, {size / 1e6:,.2f} MB; "
            f"{maker.hits} of {len(caches)} caches found"
            + (f" in {options.cache}" if options.cache else ", keeping is off")
            + (f"; not kept: {maker.failure}" if maker.failure else "")
        )
    readings = f"; read at N = {', '.join(map(str, read))}" if read else ""
    yield (
        f"\npass 2, question to answer: {(first or ended) - compressed:.2f} s to the first token, {ended - compressed:.2f} s for "
        f"{len(answer.ids)} tokens; ended by {answer.ended}{readings}\n"
    )


def _answers(
    reader: VocoLlama, cache: VocoCache | None, prompt: list[int], options: AskOptions, read: list[int]
) -> Iterator[list[Answer]]:
    """The answer after each new token. Adaptive: at the first N at which the model is sure; `read` gets every N that it tries."""
    arguments = ([prompt], options.max_new_tokens)
    if options.adaptive is None or cache is None:
        yield from reader.stream_answers([cache], *arguments, options.sampling, options.stop)
        return
    adaptive = AdaptiveReading(doubled_sizes(cache.tokens[0]), options.adaptive)
    for n in adaptive.sizes:
        read.append(n)
        noted = NotedMargin(**asdict(options.sampling))
        steps = reader.stream_answers([cache.take(n)], *arguments, noted, options.stop)
        begun = next(steps)
        if adaptive.is_sure(noted.margins[0], n):
            yield begun
            yield from steps
            return


def doubled_sizes(n: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `n`."""
    return (*(1 << power for power in range((n - 1).bit_length())), n)


@dataclass(frozen=True)
class LoadedMedium:
    """One image or video, with the numbers of the frames to read."""

    uri: str
    data: bytes
    video: Video | None
    frames: tuple[int, ...]


class CacheMaker:
    """Caches of media, from the store or compressed now."""

    def __init__(self, checkpoint: str, reader: VocoLlama, options: AskOptions, prompt: list[int]) -> None:
        self.checkpoint, self.reader, self.options = checkpoint, reader, options
        self.hits, self.failure = 0, ""  # caches found; why the latest one could not be read or written
        layout = reader.layout
        self.views_apart = layout.rule.views_apart
        if options.tokens is not None and not (self.views_apart and 1 <= options.tokens <= layout.tokens):
            got = f"got {options.tokens} of {layout.method}"
            raise Refused(f"--tokens: expected 1 to {layout.tokens} of a checkpoint of method voco, {got}")
        # tokens of each view that the prompt reads; None where text sees the entire view
        self.tokens = (options.tokens or layout.tokens) if self.views_apart else None
        shared = tuple(shared_prompt_ids(reader.tokenizer, layout)) if options.keep_system else ()
        # a question whose first characters merge with the shared text into other tokens is read without that cache
        self.text_ids = shared if tuple(prompt[: len(shared)]) == shared and len(prompt) > len(shared) else ()
        self.compressor: VocoLlama | None = None
        # A video checkpoint reads its frozen compressor's caches: an image is one frame, and cached text cannot be shared.
        self.reads_frames = own_compressor(checkpoint)
        rope = reader.language_model.config.rope_parameters
        self.store = None if options.cache is None else CacheStore(options.cache, reader.cache_key(), reader.dtype, rope)

    def caches(self, media: Sequence[str | bytes]) -> list[VocoCache]:
        """One cache for each medium, a URI or an encoded image; one for all of them where views see each other."""
        loaded = [self._load(uri) for uri in media]
        groups = [[medium] for medium in loaded] if self.views_apart else [loaded] if loaded else []
        return [self._cache(group) for group in groups]

    def _cache(self, group: list[LoadedMedium]) -> VocoCache:
        parts = [(medium.data, medium.frames) for medium in group]
        if self.text_ids and not self.reads_frames:
            content = content_key(parts, self.text_ids, self.tokens)
            return self._stored(content, lambda: self.reader.keep_text(self._shorten(self._compress(group)), self.text_ids))
        cache = self._shorten(self._stored(content_key(parts), lambda: self._compress(group)))
        return self.reader.keep_text(cache, self.text_ids) if self.text_ids else cache

    def _stored(self, content: str, compress: Callable[[], VocoCache]) -> VocoCache:
        """The cache of a content from the store, or compressed now and stored."""
        if self.store is None:
            return compress()
        try:
            cached = self.store.get(content)
        except OSError as error:  # a folder of another user: the answer matters more than the cache
            cached, self.failure = None, str(error)
        if cached is not None:
            self.hits += 1
            return replace(cached, keys=cached.keys.to(self.reader.device), values=cached.values.to(self.reader.device))
        cache = compress()
        try:
            self.store.put(content, cache)
        except OSError as error:  # or a full disk
            self.failure = str(error)
        return cache

    def _shorten(self, cache: VocoCache) -> VocoCache:
        return cache if self.tokens is None or set(cache.tokens) == {self.tokens} else cache.take(self.tokens)

    def _load(self, uri: str | bytes) -> LoadedMedium:
        if isinstance(uri, bytes):
            return LoadedMedium("the image", uri, None, (0,) if self.reads_frames else ())
        try:
            data = storage.read_bytes(storage.resolve(uri))
            video = Video(data) if PurePosixPath(uri.lower()).suffix in VIDEO_EXTENSIONS else None
        except (FileNotFoundError, IsADirectoryError) as error:
            raise Refused(f"{uri}: no such file") from error
        except (OSError, ValueError) as error:
            raise Refused(f"{uri}: {error}") from error
        if video is None:
            return LoadedMedium(uri, data, None, (0,) if self.reads_frames else ())
        return LoadedMedium(uri, data, video, tuple(evenly_spaced(video.num_frames, self.options.frames)))

    def _compress(self, group: list[LoadedMedium]) -> VocoCache:
        if self.compressor is None:
            device = str(self.reader.device)
            self.compressor = load_compressor(self.checkpoint, device) if self.reads_frames else self.reader
        chunks: Iterator[Views] = (views for medium in group for views in self._features(self.compressor, medium))
        if not self.views_apart:  # one sequence
            parts = list(chunks)
            features = [view for views, _ in parts for view in views]
            chunks = iter([(features, [size for _, sizes in parts for size in sizes])])
        cache = join_caches([self.compressor.compress_features([views], sizes=[sizes])[0] for views, sizes in chunks])
        return replace(cache, keys=cache.keys.to(self.reader.dtype), values=cache.values.to(self.reader.dtype))

    def _features(self, compressor: VocoLlama, medium: LoadedMedium) -> Iterator[Views]:
        """Features of an image, with its size when it is cut into tiles, or of a video's frames, `FRAMES_AT_ONCE` at a time."""
        tower = compressor.tower
        if tower is None:
            raise Refused(f"{self.checkpoint}: a checkpoint without a vision tower cannot read {medium.uri}")
        try:
            if medium.video is None:
                image = medium.data  # encoded, as a features job reads it
                pixels, size = (tower.preprocess(image)[None], None) if self.reads_frames else tower.tiles(image)
                yield [tower(pixels).squeeze(0)], [size]
                return
            for start in range(0, len(medium.frames), FRAMES_AT_ONCE):
                frames = medium.video.frames(list(medium.frames[start : start + FRAMES_AT_ONCE]))
                pixels = torch.stack([tower.preprocess(Image.fromarray(frame)) for frame in frames])
                yield list(tower(pixels)), [None] * len(pixels)
        except (OSError, ValueError) as error:  # of an image ImageFault, which names the reason as a reject of ingest does
            extensions = ", ".join(VIDEO_EXTENSIONS)
            raise Refused(f"{medium.uri}: expected an image, or a video with one of {extensions} ({error})") from error


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_ask(options: Namespace) -> int:
    """Print an answer while it is generated. `options` come from the command line."""
    try:
        ask_options = AskOptions(
            cache=None if options.no_cache else options.cache,
            tokens=None if options.tokens == AUTO else options.tokens,
            adaptive=options.threshold if options.tokens == AUTO else None,
            frames=options.frames,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, top_p=options.top_p, seed=options.seed),
            stop=tuple(options.stop),
            keep_system=options.keep_system,
        )
        for piece in ask(options.operand, options.media, options.question, ask_options):
            print(piece, end="", flush=True)
    except ValueError as error:  # numbers out of range, a prompt too long, a damaged cache: each message is one line
        raise Refused(str(error)) from error
    return 0
