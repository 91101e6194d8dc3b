"""The store of caches: what comes back, what is refused, many writers, and what a file costs beyond its numbers."""

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
    made = cache(views=3)
    store.put(content, made)
    found = CacheStore(uri, KEY, torch.bfloat16, ROPE).get(content)
    assert found is not None
    assert same(found, made)
    assert found.key == KEY
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
def test_what_another_made_is_not_found_and_moved_there_is_an_error(tmp_path, other):
    mine = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    theirs = CacheStore(str(tmp_path), **{"key": KEY, "dtype": torch.bfloat16, "rope": ROPE, **other})
    content = content_key([(b"x", ())])
    mine.put(content, cache())
    assert theirs.get(content) is None
    storage.write_bytes(theirs.place(content), storage.read_bytes(mine.place(content)))
    with pytest.raises(ValueError, match="was made with"):
        theirs.get(content)
    if "key" in other:
        with pytest.raises(ValueError, match="this store holds caches of"):
            mine.put(content, cache(other["key"]))


def test_a_file_under_another_contents_name_is_an_error(tmp_path):
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    store.put(content_key([(b"x", ())]), cache())
    storage.write_bytes(store.place(content_key([(b"y", ())])), storage.read_bytes(store.place(content_key([(b"x", ())]))))
    with pytest.raises(ValueError, match="was made with content"):
        store.get(content_key([(b"y", ())]))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: b"{" * 400])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path, damage):
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    place = store.put(content_key([(b"x", ())]), cache())
    storage.write_bytes(place, damage(storage.read_bytes(place)))
    with pytest.raises(ValueError, match=r"not a whole cache.*delete it"):
        store.get(content_key([(b"x", ())]))


def write_many(uri, number):
    store = CacheStore(uri, KEY, torch.bfloat16, ROPE)
    for at in range(40):
        content = content_key([(bytes([at % 8]), ())])
        found = store.get(content)
        if found is not None and not same(found, cache(seed=at % 8)):
            raise SystemExit(1)
        store.put(content, cache(seed=at % 8))


def test_writers_at_once_leave_whole_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(str(tmp_path), number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * 4
    store = CacheStore(str(tmp_path), KEY, torch.bfloat16, ROPE)
    assert all(same(store.get(content_key([(bytes([at]), ())])), cache(seed=at)) for at in range(8))
    assert len(storage.list_names(store.folder)) == 8  # and no partial file is left


def test_one_token_at_7b_is_524288_bytes_and_its_file_one_percent_more(tmp_path):
    key = replace(KEY, compressor="c" * 64, n=1, preprocessing="p" * 64)
    made = VocoCache(
        torch.zeros(32, 32, 1, 128, dtype=torch.bfloat16), torch.zeros(32, 32, 1, 128, dtype=torch.bfloat16), (1,), key
    )
    store = CacheStore(str(tmp_path), key, torch.bfloat16, ROPE)
    assert made.bytes == 524_288
    assert 524_288 < storage.file_size(store.put(content_key([(b"x", ())]), made)) < 524_288 * 1.01


def test_a_model_reads_what_it_wrote(tmp_path):
    model = tiny.model("voco", 2)
    store = CacheStore(str(tmp_path), model.cache_key(), model.dtype, model.language_model.config.rope_parameters)
    (made,) = model.compress_features([tiny.features(2)])
    store.put(content_key([(b"x", ())]), made)
    assert model.generate(store.get(content_key([(b"x", ())])), "what?", 8) == model.generate(made, "what?", 8)
