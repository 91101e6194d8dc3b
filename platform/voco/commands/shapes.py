"""Shapes of a job's models, read without weights: the language model, the vision tower, and a view's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from voco.job.compression import Compression
from voco.job.config import Llama, Lora, Model, Tower
from voco.job.tables import METHODS
from voco.model.checkpoint_layout import config_uri, has_model, head_width
from voco.store import storage
from voco.store.number_types import frame_tensor_bytes

# transformers' LlamaConfig, where a config.json leaves a size out
LLAMA_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip
# CLIP ViT-L/14, LLaVA's tower, stands for a clip or siglip tower whose own config.json cannot be read here
VIT_L14 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
LITE0_STRIDE, LITE0_WIDTH = 16, 112  # EfficientNet-Lite0 up to its last block of this stride
LITE0_PARAMETERS, LITE0_FLOPS_224 = 720_000, 0.47e9  # of those blocks; operations of one image of 224 pixels
NUMBER_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}  # as a cache's metadata has them
SEPARATOR_TOKENS = 2  # BOS and the separator of a view's prefix


@dataclass(frozen=True)
class TowerShape:
    """V x C features of one view; FLOPs and parameters of the net."""

    slots: int
    width: int
    flops: float
    parameters: int
    assumed: bool = False  # its files cannot be read here


@dataclass(frozen=True)
class ModelShape:
    """A model as its costs need it. `config` has the names of transformers' Llama configuration."""

    config: Any
    tower: TowerShape
    method: str = "none"
    tokens: int = 0  # N of each view
    bytes_per_number: int = 2  # of its caches

    @property
    def view_tokens(self) -> int:
        """Tokens of one view in the language model's pass, its N included."""
        slots = 0 if METHODS[self.method].pooled else self.tower.slots
        return SEPARATOR_TOKENS + slots + self.tokens

    @property
    def seen_tokens(self) -> int:
        """Tokens of one view that text attends to."""
        return self.tokens if METHODS[self.method].views_apart else self.view_tokens

    @property
    def projector_parameters(self) -> int:
        width = int(self.config.hidden_size)
        return int(self.tower.width * width + width * width + 2 * width)

    @property
    def parameters(self) -> int:
        """Weights of the language model."""
        return count_parameters(self.config)

    def frame_bytes(self, dtype: str | None) -> int:
        """Keys and values of one frame in a cache, stored as a job's `frame_cache.dtype`; None: in the model's type."""
        config = self.config
        shape = (config.num_hidden_layers, config.num_key_value_heads, self.tokens, head_width(config))
        return cached_frame_bytes(shape, dtype or ("fp32" if self.bytes_per_number == 4 else "bf16"))

    def compressed(self, compression: Compression | None) -> ModelShape:
        """The same model under a job's compression method."""
        return self if compression is None else replace(self, method=compression.method, tokens=compression.most_tokens)


def cached_frame_bytes(shape: tuple[int, int, int, int], dtype: str) -> int:
    """Keys and values (layers, kv_heads, N, head_dim) of one frame in a cache."""
    return 2 * sum(frame_tensor_bytes(shape, NUMBER_TYPES[dtype]))


def count_parameters(config: Any) -> int:
    """Weights of a Llama-family model: embedding, output head unless tied, two norms a layer and one at the end; no biases."""
    width, head = int(config.hidden_size), head_width(config)
    attention = 2 * width * head * config.num_attention_heads + 2 * width * head * config.num_key_value_heads
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    embeddings = (1 if getattr(config, "tie_word_embeddings", False) else 2) * config.vocab_size * width
    return int(config.num_hidden_layers * layer + embeddings + width)


def adapter_parameters(config: Any, lora: Lora) -> int:
    """Weights of an adapter: in each layer and for each target rank x (inputs + outputs), and with DoRA a length a row."""
    width, head, mlp = int(config.hidden_size), head_width(config), int(config.intermediate_size)
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    sizes = {"q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (queries, width)}
    sizes |= {"gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width)}
    layer = sum(lora.rank * sum(sizes[name]) + lora.dora * sizes[name][1] for name in lora.layers)
    return int(config.num_hidden_layers * layer)


def llama_config(llama: Llama) -> Any:
    """A new Llama's shape under transformers' names."""
    return SimpleNamespace(
        num_hidden_layers=llama.layers, hidden_size=llama.width, num_attention_heads=llama.heads,
        num_key_value_heads=llama.kv_heads, intermediate_size=llama.mlp_width, vocab_size=llama.vocabulary,
    )  # fmt: skip


def new_model(model: Model) -> ModelShape | None:
    """The shape of a job's `model` block; None where neither the block nor a readable config.json says it."""
    config: Any = None
    tower = model.tower
    if model.llama is not None:
        config = llama_config(model.llama)
    elif (described := _read_config(model.pretrained or "")) is not None:
        if tower is None:  # a LLaVA directory, with a tower described in it or CLIP ViT-L/14
            path = model.pretrained if "vision_config" in described else "openai/clip-vit-large-patch14-336"
            tower = Tower(name="clip", image_size=336, path=path, layer=-2)
        sizes = LLAMA_DEFAULTS | described.get("text_config", described)
        config = SimpleNamespace(**{"num_key_value_heads": sizes["num_attention_heads"], **sizes})
    elif model.expect is not None:
        config = llama_config(model.expect)
    if config is None or tower is None:
        return None
    return ModelShape(config, tower_shape(tower), bytes_per_number=2 if model.llama is None else 4)


def checkpoint_model(uri: str) -> ModelShape | None:
    """The shape of a checkpoint of ours; None where it does not exist yet, or its storage does not answer."""
    if not uri or uri.startswith("@") or storage.is_placeholder(uri):
        return None
    try:
        if not has_model(uri):
            return None
        config: dict[str, Any] = storage.read_json(config_uri(uri))
    except unreachable(uri):
        return None
    layout, language = config["layout"], dict(config["language_model"])
    tower = tower_shape(Tower.model_validate(config["tower"]))
    tower = replace(tower, slots=int(layout["vision_slots"]), width=int(config["feature_width"]))
    number_bytes = 4 if "32" in str(language.get("dtype")) else 2
    return ModelShape(SimpleNamespace(**language), tower, str(layout["method"]), int(layout["tokens"]), number_bytes)


def tower_shape(tower: Tower) -> TowerShape:
    """The shape of a vision tower at its image size."""
    if tower.name == "efficientnet_lite0":
        slots = (tower.image_size // LITE0_STRIDE) ** 2
        flops = LITE0_FLOPS_224 * (tower.image_size / 224) ** 2
        return TowerShape(slots, LITE0_WIDTH, flops, LITE0_PARAMETERS)
    described = _read_config(tower.path or "")
    described = (described or {}).get("vision_config", described)
    vit = SimpleNamespace(**{**VIT_L14, **(described or {})})
    slots = (tower.image_size // vit.patch_size) ** 2
    width, layers = vit.hidden_size, vit.num_hidden_layers + min(0, tower.layer + 1)
    linear = 4 * width * width + 2 * width * vit.intermediate_size
    tokens = slots + (tower.name == "clip")  # CLIP's class token
    flops = 2 * (layers * (linear * tokens + 2 * width * tokens * tokens) + slots * width * 3 * vit.patch_size**2)
    parameters = layers * linear + width * (3 * vit.patch_size**2 + tokens)
    return TowerShape(slots, width, float(flops), int(parameters), assumed=described is None)


def _read_config(uri: str) -> dict[str, Any] | None:
    """transformers' config.json of a directory, if there is one here."""
    if not uri or storage.is_placeholder(uri):
        return None
    path = storage.join(storage.resolve(uri), "config.json")
    try:
        config: dict[str, Any] = storage.read_json(path) if storage.exists(path) else {}
    except OSError:
        return None
    except unreachable(path):
        return None
    return config or None


def unreachable(uri: str) -> tuple[type[BaseException], ...]:
    """The errors of storage that does not answer, or has no credentials."""
    if not uri.startswith("s3://"):
        return (TimeoutError,)
    from botocore.exceptions import BotoCoreError

    return (OSError, BotoCoreError)
