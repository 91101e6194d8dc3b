"""The files of a checkpoint directory, found without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny

from voco.model.checkpoint_layout import compressor_uri, config_uri, has_model, head_width, model_uri, own_compressor
from voco.store import storage


def test_a_checkpoint_and_its_compressor(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert not has_model(uri)
    storage.write_json(config_uri(uri), {})
    assert has_model(uri)
    assert config_uri(uri) == f"{model_uri(uri)}/config.json" == f"{uri}/model/config.json"
    assert not own_compressor(uri)
    storage.write_json(config_uri(compressor_uri(uri)), {})
    assert own_compressor(uri)
    assert compressor_uri("s3://bucket/run/") == "s3://bucket/run/compressor"


def test_the_width_of_a_head_from_an_object_or_its_dict() -> None:
    for changes, width in (({}, 8), ({"head_dim": 16}, 16)):
        config = tiny.llama(**changes).config
        assert head_width(config) == head_width(config.to_dict()) == width
    assert head_width({"hidden_size": 12, "num_attention_heads": 3}) == 4


def test_it_needs_no_torch() -> None:
    code = "import sys, voco.model.checkpoint_layout, voco.model.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
