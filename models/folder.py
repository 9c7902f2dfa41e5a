"""Model folders: the diffusers layout, which the family's plain pipeline reads, plus `shotloom.json`.

model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  shotloom.json
Stable Video Diffusion: unet/ for transformer/, image_encoder/ and feature_extractor/ for text_encoder/ and tokenizer/
conditioner/  a method's own modules, where it has some (FCA); plain diffusers leaves them out
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.backbones.base import Backbone
from models.codecs import VideoCodec
from models.families import FAMILIES, Family, FamilyName, Part, family_of_pipeline
from models.image_encoder import ImageEncoder
from models.methods import get_method
from models.records import RecordError, decode
from models.schedules import process_of_scheduler
from models.text import TextEncoder

SETTINGS_FILE = "shotloom.json"
INDEX_FILE = "model_index.json"
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
CONDITIONER_FILE = Path("conditioner") / "model.safetensors"
ORIGIN_KEYS = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}  # written by diffusers and transformers


@dataclass
class ModelSettings:
    """What the weights were trained for. The defaults are those of a plain Wan 2.1 folder at 480p."""

    method: str = "fvdm"
    method_params: dict[str, Any] = field(default_factory=dict)
    backbone: FamilyName = "wan"
    text_length: int = 512  # tokens of a context
    level_shift: float = 3.0  # timestep shift of the sampling levels
    frames_per_shot: int = 81  # video frames, as many as the VAE takes (Wan: 4k+1)
    height: int = 480
    width: int = 832
    fps: float = 16.0
    text_positions: bool = False  # the text was trained with positions, as LCT's diagonal layout gives it
    train: dict[str, Any] = field(default_factory=dict)  # how the weights came about; read by people


class Model:
    """The loaded parts of a model folder; reading a part that was not loaded raises AttributeError."""

    def __init__(
        self,
        backbone: Backbone | None,
        codec: VideoCodec | None,
        text: TextEncoder | ImageEncoder | None,
        settings: ModelSettings,
        scheduler: Mapping[str, Any] | None = None,  # its diffusers config; None: Wan's
    ) -> None:
        self._parts: dict[str, Any] = {"backbone": backbone, "codec": codec, "text": text}
        self.settings = settings
        self.scheduler = scheduler

    @property
    def backbone(self) -> Backbone:
        return self._part("backbone")

    @property
    def codec(self) -> VideoCodec:
        return self._part("codec")

    @property
    def text(self) -> TextEncoder:
        """ValueError for a model that reads an image in place of a text."""
        if isinstance(self._part("text"), ImageEncoder):
            raise ValueError(
                f"a {self.settings.backbone} reads an image, no text: sample from a first frame; to prepare or train "
                "use another model, or train it from Python (method svd)"
            )
        return self._part("text")

    @property
    def image_encoder(self) -> ImageEncoder:
        """Of a model that `reads_images`."""
        return self._part("text")

    @property
    def reads_images(self) -> bool:
        return FAMILIES[self.settings.backbone].text_style is None

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def has(self, part: Part) -> bool:
        return self._parts[part] is not None

    def _part(self, part: Part) -> Any:
        if not self.has(part):
            raise AttributeError(f"this model was loaded without its {part}; add it to load_model(parts=...)")
        return self._parts[part]


def load_model(
    path: Path | str,
    parts: Sequence[Part] = get_args(Part),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Open a model folder. The codec is always float32; `dtype` is for backbone and text encoder.

    Raises FileNotFoundError or RecordError naming the file for a folder that is not one.
    """
    path = Path(path)
    settings = load_settings(path)
    family = FAMILIES[settings.backbone]
    for part in parts:
        for name in family.folders[part]:
            if not (path / name).is_dir():
                raise FileNotFoundError(f"{path / name} is missing: the {part} of a model folder lies there")
    backbone, codec, scheduler = None, None, None
    text: TextEncoder | ImageEncoder | None = None
    if "backbone" in parts:
        if (path / "transformer_2").is_dir():
            raise ValueError(f"{path}: two-expert Wan 2.2 models are not supported; use Wan 2.1 or a one-expert model")
        scheduler = _read_scheduler(path)
        # from_pretrained, not .to(dtype): it keeps the time embedding in float32
        loaded: Any = family.model_class.from_pretrained(
            path / family.folders["backbone"][0], torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
        try:
            backbone = family.build(loaded.to(device), process_of_scheduler(scheduler)).eval()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if (path / CONDITIONER_FILE).is_file():
            _load_conditioner(backbone, path / CONDITIONER_FILE, settings, device, dtype)
    if "codec" in parts:
        codec = VideoCodec.from_folder(path, device)
        if not isinstance(codec.vae, family.vae_class):
            raise ValueError(
                f"{path / 'vae'}: a {type(codec.vae).__name__}, but a {family.pipeline} has a "
                f"{family.vae_class.__name__}"
            )
    if "text" in parts:
        if family.text_style is None:
            text = ImageEncoder.from_folder(path, device, dtype)
        else:
            text = TextEncoder.from_folder(path, settings.text_length, device, dtype, family.text_style)
    return Model(backbone, codec, text, settings, scheduler)


def _read_scheduler(path: Path) -> dict[str, Any]:
    file = path / SCHEDULER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it says which diffusion process the model was trained for")
    return json.loads(file.read_text())


def _load_conditioner(
    backbone: Backbone, file: Path, settings: ModelSettings, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Give the backbone the modules of the folder's method with the weights of `file`."""
    get_method(settings.method, **settings.method_params).attach(backbone)
    if backbone.conditioner is None:
        raise ValueError(f"{file}: weights of conditioning modules, but method {settings.method!r} has none")
    try:
        backbone.conditioner.load_state_dict(load_file(file))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{file} does not fit the method_params of {SETTINGS_FILE}: {first}") from error
    backbone.conditioner.to(device, dtype).eval()


def load_settings(path: Path | str) -> ModelSettings:
    """`shotloom.json` of a model folder; for a plain diffusers folder, which has none, what its configurations say."""
    path = Path(path)
    index = path / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: {path} is not a model folder")
    try:
        family = family_of_pipeline(json.loads(index.read_text()).get("_class_name"))
    except ValueError as error:
        raise RecordError(f"{index}: {error}") from error
    file = path / SETTINGS_FILE
    if not file.is_file():
        config = path / FAMILIES[family].folders["backbone"][0] / "config.json"
        known = FAMILIES[family].settings(json.loads(config.read_text())) if config.is_file() else {}
        return ModelSettings(backbone=family, **known)
    settings = decode(ModelSettings, json.loads(file.read_text()), str(file))
    if settings.backbone != family:
        raise RecordError(
            f"{file}: backbone is {settings.backbone!r}, but {INDEX_FILE} names {FAMILIES[family].pipeline}, which is "
            f"{family!r}"
        )
    return settings


def part_folders(path: Path | str) -> Mapping[Part, tuple[str, ...]]:
    """The folders of each part in a model folder."""
    return FAMILIES[load_settings(path).backbone].folders


def save_model(
    path: Path | str,
    model: Model,
    settings: ModelSettings,
    copy_parts_from: Path | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder, whole or not at all; an older model folder at `path` is replaced.

    Parts that `model` does not hold are copied from the folder `copy_parts_from`. Weights are written in `dtype`, or as
    they are. Raises ValueError when a part is nowhere to be had, when LoRA is still injected, when parts and settings
    are of different families, or when `path` holds something else.
    """
    path = Path(path)
    if path.exists() and not (path / INDEX_FILE).is_file() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not a model folder; choose another place or remove it")
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for stale in (temporary, old):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    family = FAMILIES[settings.backbone]
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "_diffusers_version": diffusers.__version__,
        **family.index,
    }
    if model.has("backbone"):
        (folder,) = family.folders["backbone"]
        transformer: Any = getattr(model.backbone, folder, None)
        if not isinstance(transformer, family.model_class):
            raise ValueError(
                f"settings.backbone is {settings.backbone!r}, but the model is {type(transformer).__name__}"
            )
        if getattr(transformer, "peft_config", None):
            raise ValueError("the backbone still has LoRA layers: merge_lora it first, or save_lora them on their own")
        _in_type(transformer, dtype).save_pretrained(temporary / folder)
        index[folder] = ["diffusers", type(transformer).__name__]
        if model.backbone.conditioner is not None:
            weights = {name: w.contiguous() for name, w in model.backbone.conditioner.state_dict().items()}
            (temporary / CONDITIONER_FILE).parent.mkdir()
            save_file(weights, temporary / CONDITIONER_FILE)
    if model.has("codec"):
        _in_type(model.codec.vae, dtype).save_pretrained(temporary / "vae")
        index["vae"] = ["diffusers", type(model.codec.vae).__name__]
    if model.has("text"):
        _write_text(model, family, temporary, dtype, index)
    for part in get_args(Part):
        if not model.has(part):
            if copy_parts_from is None:
                raise ValueError(f"cannot write {path}: the model holds no {part}; load it, or give copy_parts_from")
            source = Path(copy_parts_from)
            source_index = json.loads((source / INDEX_FILE).read_text())
            if source_index["_class_name"] != family.pipeline:
                raise ValueError(f"{source} is for {source_index['_class_name']}, the model for {family.pipeline}")
            for name in family.folders[part]:
                shutil.copytree(source / name, temporary / name)
                index[name] = source_index[name]
            if part == "backbone" and (source / CONDITIONER_FILE).is_file():
                shutil.copytree(source / CONDITIONER_FILE.parent, temporary / CONDITIONER_FILE.parent)
    scheduler = _scheduler(model, settings, copy_parts_from)
    scheduler.save_pretrained(temporary / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (temporary / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2, sort_keys=True) + "\n")
    _forget_origin(temporary)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write_text(model: Model, family: Family, path: Path, dtype: torch.dtype | None, index: dict[str, Any]) -> None:
    """The encoder of texts or images, and what prepares them for it."""
    encoder: Any = model.image_encoder if family.text_style is None else model.text
    if (style := getattr(encoder, "style", None)) != family.text_style:
        raise ValueError(f"a {family.pipeline} reads texts as {family.text_style}, this encoder as {style}")
    folder, prepares = family.folders["text"]
    _in_type(encoder.model, dtype).save_pretrained(path / folder)
    getattr(encoder, prepares).save_pretrained(path / prepares)
    index[folder] = ["transformers", type(encoder.model).__name__]
    index[prepares] = ["transformers", type(getattr(encoder, prepares)).__name__]


def _forget_origin(folder: Path) -> None:
    """Take out of the configurations where parts were read from: folders are passed on, paths are private."""
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text())
        if told := config.keys() & ORIGIN_KEYS:
            kept = {key: value for key, value in config.items() if key not in told}
            path.write_text(json.dumps(kept, indent=2) + "\n")


def _in_type(module: Any, dtype: torch.dtype | None) -> Any:
    """The module, or a copy of it in another type."""
    return module if dtype is None else nn.Module.to(copy.deepcopy(module), dtype)


def _scheduler(model: Model, settings: ModelSettings, copy_parts_from: Path | str | None) -> Any:
    """The diffusers scheduler of a folder to write. A Wan's always samples as Shotloom does."""
    if settings.backbone == "wan":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=settings.level_shift)
    config = model.scheduler
    if config is None and copy_parts_from is not None:
        config = _read_scheduler(Path(copy_parts_from))
    if config is None:
        raise ValueError(f"a {settings.backbone} folder needs a scheduler: give Model(scheduler=...) its config")
    return getattr(diffusers, config["_class_name"]).from_config(dict(config))
