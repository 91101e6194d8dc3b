"""The cache store: round trips, files of another compressor, damaged files, many writers, and the bytes beyond the numbers."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import tiny
import torch

from voco.model.cache import CacheKey, VocoCache
from voco.model.cache_store import CacheStore, content_key
from voco.store import storage

KEY = CacheKey("weights", "voco", 2, (1,), "pixels")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def cache(key=KEY, dtype=torch.bfloat16, seed=0, views=1):
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(3, 2, 2 * views, 8, generator=draw).to(dtype) for _ in range(2))
    return VocoCache(keys, values, (2,) * views, key)


def same(a, b):
    return torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) and (a.tokens, a.text_ids) == (b.tokens, b.text_ids)


def there_and_back(uri):
    store = CacheStore(uri, KEY, torch.bfloat16, ROPE)
    content = content_key([(b"an image", ())])
    assert store.get(content) is None
    cached = cache(views=3)
    store.put(content, cached)
    loaded = CacheStore(uri, KEY, torch.bfloat16, ROPE).get(content)
    assert loaded is not None
    assert same(loaded, cached)
    assert loaded.key == KEY
    assert store.get(content_key([(b"an image", [1])])) is None
    assert store.get(content_key([(b"an image", ())], [5], 2)) is None


def test_a_cache_comes_back_bit_by_bit(tmp_path):
    there_and_back(str(tmp_path))


def test_a_cache_comes_back_from_s3(s3_server):
    (s3_server / "caches").mkdir()
    there_and_back("s3://caches/store")


@pytest.mark.parametrize(
    "other",
    [
        {"key": replace(KEY, compressor="others")},
        {"key": replace(KEY, n=4)},
        {"key": replace(KEY, preprocessing="others")},
        {"key": replace(KEY, prefix_ids=(1, 7))},
        {"rope": {**ROPE, "rope_theta": 1e6}},
        {"dtype": torch.float32},
    ],
)
def test_another_compressors_cache_is_not_returned_and_its_file_is_an_error(tmp_path, other):
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    other_store = CacheStore(str(tmp_path), **{"key": KEY, "dtype": torch.bfloat16, "rope": ROPE, **other})
    content = content_key([(b"x", ())])
    store.put(content, cache())
    assert other_store.get(content) is None
    storage.write_bytes(other_store.cache_uri(content), storage.read_bytes(store.cache_uri(content)))
    with pytest.raises(ValueError, match="was made with"):
        other_store.get(content)
    if "key" in other:
        with pytest.raises(ValueError, match="this store holds caches of"):
            store.put(content, cache(other["key"]))


def test_a_file_under_the_name_of_another_content_is_an_error(tmp_path):
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    store.put(content_key([(b"x", ())]), cache())
    x, y = (store.cache_uri(content_key([(data, ())])) for data in (b"x", b"y"))
    storage.write_bytes(y, storage.read_bytes(x))
    with pytest.raises(ValueError, match="was made with content"):
        store.get(content_key([(b"y", ())]))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: b"{" * 400])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path, damage):
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    uri = store.put(content_key([(b"x", ())]), cache())
    storage.write_bytes(uri, damage(storage.read_bytes(uri)))
    with pytest.raises(ValueError, match=r"not a complete cache.*delete it"):
        store.get(content_key([(b"x", ())]))


def write_many(uri):
    store = CacheStore(uri, KEY, torch.bfloat16, ROPE)
    for number in range(40):
        content = content_key([(bytes([number % 8]), ())])
        loaded = store.get(content)
        if loaded is not None and not same(loaded, cache(seed=number % 8)):
            raise SystemExit(1)
        store.put(content, cache(seed=number % 8))


def test_concurrent_writers_leave_complete_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(str(tmp_path),)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * 4
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    assert all(same(store.get(content_key([(bytes([number]), ())])), cache(seed=number)) for number in range(8))
    assert len(storage.list_names(store.folder)) == 8  # and no partial file is left


def test_one_token_at_7b_is_524288_bytes_and_its_file_one_percent_more(tmp_path):
    key = replace(KEY, compressor="c" * 64, n=1, preprocessing="p" * 64)
    cached = VocoCache(
        torch.zeros(32, 32, 1, 128, dtype=torch.bfloat16), torch.zeros(32, 32, 1, 128, dtype=torch.bfloat16), (1,), key
    )
    store = CacheStore(str(tmp_path), key, torch.bfloat16, ROPE)
    assert cached.bytes == 524_288
    assert 524_288 < storage.file_size(store.put(content_key([(b"x", ())]), cached)) < 524_288 * 1.01


def test_a_model_reads_what_it_wrote(tmp_path):
    model = tiny.model("voco", 2)
    store = CacheStore(str(tmp_path), model.cache_key(), model.dtype, model.language_model.config.rope_parameters)
    (cached,) = model.compress_features([tiny.features(2)])
    store.put(content_key([(b"x", ())]), cached)
    assert model.generate(store.get(content_key([(b"x", ())])), "what?", 8) == model.generate(cached, "what?", 8)
