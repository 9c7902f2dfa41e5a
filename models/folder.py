"""Model folders: the diffusers layout, which the family's plain pipeline reads, plus `shotloom.json`.

model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  shotloom.json
Wan 2.2 A14B: transformer_2/ besides, the expert of the lower noise levels
HunyuanVideo: text_encoder_2/ and tokenizer_2/ besides
Stable Video Diffusion: unet/ for transformer/, image_encoder/ and feature_extractor/ besides; text_encoder/ and
tokenizer/ only where a method is to read text (AID), and then not in model_index.json
conditioner/  a method's own modules, where it has some (FCA); plain diffusers leaves them out
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.backbones.base import Backbone
from models.backbones.experts import WanExperts
from models.codecs import VideoCodec
from models.experts import EXPERT_FOLDERS, Expert, ExpertName
from models.families import FAMILIES, FamilyName, Part, boundary_of, family_of_pipeline, folders_of, lies_in
from models.image_encoder import ImageEncoder
from models.methods import get_method, trained_params
from models.records import RecordError, decode
from models.schedules import process_of_scheduler
from models.text import TextEncoder
from models.text_hunyuan import HunyuanTextEncoder

SETTINGS_FILE = "shotloom.json"
INDEX_FILE = "model_index.json"
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
CONDITIONER_FILE = Path("conditioner") / "model.safetensors"
ORIGIN_KEYS = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}  # written by diffusers and transformers


@dataclass
class ModelSettings:
    """What the weights were trained for. The defaults are those of a plain Wan folder at 480p."""

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
        text: TextEncoder | None,
        settings: ModelSettings,
        scheduler: Mapping[str, Any] | None = None,  # its diffusers config; None: Wan's
        index: Mapping[str, Any] | None = None,  # entries of model_index.json besides the parts (`Family.index`)
        image: ImageEncoder | None = None,  # of a model that `reads_images`
    ) -> None:
        self._parts: dict[str, Any] = {"backbone": backbone, "codec": codec, "text": text, "image": image}
        self.settings = settings
        self.scheduler = scheduler
        self.index = dict(index or {})

    @property
    def backbone(self) -> Backbone:
        return self._part("backbone")

    @property
    def codec(self) -> VideoCodec:
        return self._part("codec")

    @property
    def text(self) -> TextEncoder:
        """ValueError for a model that reads an image in place of a text, and has no text encoder besides."""
        if self.reads_images and not self.has("text"):
            raise ValueError(
                f"a {self.settings.backbone} reads an image, no text: sample from a first frame; to prepare or train "
                "put text_encoder/ and tokenizer/ into its folder (methods aid and fvdm), use another "
                "model, or train it from Python (method svd)"
            )
        return self._part("text")

    @property
    def image_encoder(self) -> ImageEncoder:
        """Of a model that `reads_images`."""
        return self._part("image")

    @property
    def reads_images(self) -> bool:
        return FAMILIES[self.settings.backbone].reads_images

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
    expert: ExpertName | None = None,
) -> Model:
    """Open a model folder. The codec is always float32; `dtype` is for backbone and text encoder.

    `expert` opens one of the two models of a Wan 2.2 A14B alone, which is how each is trained; None opens all there is.
    Raises FileNotFoundError or RecordError naming the file for a folder that is not one, and ValueError for a GPU where
    there is none.
    """
    path = Path(path)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: PyTorch finds no GPU here (`shotloom doctor` says more); take device=cpu")
    settings = load_settings(path)
    family, index = FAMILIES[settings.backbone], read_index(path)
    boundary = boundary_of(index)
    if expert is not None:
        check_expert(path, expert)
    parts = [part for part in parts if lies_in(path, family, part)]
    for part in parts:
        for name in folders_of(family, part, index):
            if not (path / name).is_dir():
                raise FileNotFoundError(f"{path / name} is missing: the {part} of a model folder lies there")
    backbone, codec, scheduler = None, None, None
    text: TextEncoder | None = None
    image: ImageEncoder | None = None
    if "backbone" in parts:
        scheduler, around = _read_scheduler(path), family.surroundings(path, settings.fps)

        def load(name: str, *half: Expert) -> Backbone:
            # from_pretrained, not .to(dtype): it keeps the time embedding in float32
            loaded: Any = family.model_class.from_pretrained(
                path / name, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
            return family.build(loaded.to(device), process_of_scheduler(scheduler), *half, **around).eval()

        try:
            if boundary is None:
                backbone = load(family.folders["backbone"][0])
            elif expert is not None:
                backbone = load(EXPERT_FOLDERS[expert], Expert(expert, boundary))
            else:
                high, low = (load(EXPERT_FOLDERS[name], Expert(name, boundary)) for name in get_args(ExpertName))
                backbone = WanExperts(high, low).eval()  # type: ignore[arg-type]  # only a Wan has two
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if (path / CONDITIONER_FILE).is_file():
            if boundary is not None:
                raise ValueError(f"{path / CONDITIONER_FILE}: conditioning modules belong to one model, this has two")
            _load_conditioner(backbone, path / CONDITIONER_FILE, settings, device, dtype)
    if "codec" in parts:
        codec = VideoCodec.from_folder(path, device)
        if not isinstance(codec.vae, family.vae_class):
            raise ValueError(
                f"{path / 'vae'}: a {type(codec.vae).__name__}, but a {family.pipeline} has a "
                f"{family.vae_class.__name__}"
            )
    if "image" in parts:
        image = ImageEncoder.from_folder(path, device, dtype)
    if "text" in parts:
        if family.text_style.pooled:
            text = HunyuanTextEncoder.from_folder(path, settings.text_length, device, dtype)
        else:
            text = TextEncoder.from_folder(path, settings.text_length, device, dtype, family.text_style)
    return Model(backbone, codec, text, settings, scheduler, {k: index[k] for k in family.index if k in index}, image)


def read_index(path: Path | str) -> dict[str, Any]:
    """`model_index.json` of a model folder; FileNotFoundError or RecordError naming it for what is none."""
    index = Path(path) / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(
            f"{index} is missing: {path} is not a model folder in the diffusers layout, such as "
            "`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir FOLDER` makes"
        )
    found = json.loads(index.read_text())
    try:
        family_of_pipeline(found.get("_class_name"))
        boundary_of(found)
    except ValueError as error:
        raise RecordError(f"{index}: {error}") from error
    return found


def check_expert(path: Path | str, expert: ExpertName | None) -> None:
    """Raises ValueError unless `expert` names one where a model folder holds two, and is None where it holds one."""
    boundary = boundary_of(read_index(path))
    if boundary is None and expert is not None:
        raise ValueError(f"expert is {expert!r}, but {path} holds a single model: leave expert out")
    if boundary is not None and expert is None:
        raise ValueError(
            f"{path} holds two experts, which are trained one after another: set expert=high for levels from "
            f"{boundary} on (what happens where), or expert=low for those below (how it looks), then train the other "
            "from the folder that this leaves"
        )


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
    family = family_of_pipeline(read_index(path)["_class_name"])
    file = path / SETTINGS_FILE
    if not file.is_file():
        configs = [path / FAMILIES[family].folders["backbone"][0] / "config.json", path / SCHEDULER_FILE]
        model, scheduler = (json.loads(f.read_text()) if f.is_file() else {} for f in configs)
        return ModelSettings(backbone=family, **(FAMILIES[family].settings(model, scheduler) if model else {}))
    settings = decode(ModelSettings, json.loads(file.read_text()), str(file))
    if settings.backbone != family:
        raise RecordError(
            f"{file}: backbone is {settings.backbone!r}, but {INDEX_FILE} names {FAMILIES[family].pipeline}, which is "
            f"{family!r}"
        )
    return replace(settings, method_params=trained_params(settings.method, settings.method_params))


def is_distilled(path: Path | str) -> bool:
    """Whether the model of a folder was distilled to take its guidance as an input, as its configuration says."""
    file = Path(path) / FAMILIES[load_settings(path).backbone].folders["backbone"][0] / "config.json"
    return bool(json.loads(file.read_text()).get("guidance_embeds")) if file.is_file() else False


def pixel_multiple(path: Path | str) -> int:
    """Of which height and width of a video must be for the model of a folder: its VAE's stride times its patch."""
    family = FAMILIES[load_settings(path).backbone]
    config = json.loads((Path(path) / family.folders["backbone"][0] / "config.json").read_text())
    return VideoCodec.spatial_stride_of(path) * family.patch(config)


def part_folders(path: Path | str) -> Mapping[Part, tuple[str, ...]]:
    """The folders of each part in a model folder; none of a part that it does not hold."""
    index = read_index(path)
    family = FAMILIES[load_settings(path).backbone]
    return {
        part: folders_of(family, part, index) if lies_in(Path(path), family, part) else () for part in get_args(Part)
    }


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
    source = None if copy_parts_from is None else Path(copy_parts_from)
    source_index = {} if source is None else read_index(source)
    if source_index and source_index["_class_name"] != family.pipeline:
        raise ValueError(f"{source} is for {source_index['_class_name']}, the model for {family.pipeline}")
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "_diffusers_version": diffusers.__version__,
        **family.index,
        **{key: value for key, value in source_index.items() if key in family.index},
        **model.index,
    }
    if model.has("backbone"):
        for folder, transformer in model.backbone.models_by_folder.items():
            if not isinstance(transformer, family.model_class):
                raise ValueError(
                    f"settings.backbone is {settings.backbone!r}, but the model is {type(transformer).__name__}"
                )
            if getattr(transformer, "peft_config", None):
                raise ValueError(
                    "the backbone still has LoRA layers: merge_lora it first, or save_lora them on their own"
                )
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
        if model.text.style != family.text_style:
            raise ValueError(
                f"a {family.pipeline} reads texts as {family.text_style}, this encoder as {model.text.style}"
            )
        _write_encoder(model.text.modules_by_folder, temporary, dtype, {} if "text" in family.optional else index)
    if model.has("image"):
        _write_encoder(model.image_encoder.modules_by_folder, temporary, dtype, index)
    for part in get_args(Part):
        if part in family.optional and not model.has(part) and (source is None or not lies_in(source, family, part)):
            continue
        missing = [name for name in folders_of(family, part, index) if not (temporary / name).is_dir()]
        if missing and source is None:
            raise ValueError(
                f"cannot write {path}: the model holds no {part} for {missing[0]}/; load it, or give copy_parts_from"
            )
        for name in missing:
            assert source is not None
            shutil.copytree(source / name, temporary / name)
            if part not in family.optional:
                index[name] = source_index[name]
        if part == "backbone" and source is not None and not model.has(part) and (source / CONDITIONER_FILE).is_file():
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


def _write_encoder(modules: Mapping[str, Any], path: Path, dtype: torch.dtype | None, index: dict[str, Any]) -> None:
    """An encoder of texts or images, and what prepares them for it, each in its folder."""
    for folder, module in modules.items():
        (_in_type(module, dtype) if isinstance(module, nn.Module) else module).save_pretrained(path / folder)
        index[folder] = ["transformers", type(module).__name__]


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
    """The diffusers scheduler of a folder to write. A flow's always samples as Shotloom does."""
    if settings.backbone in ("wan", "hunyuan"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=settings.level_shift)
    config = model.scheduler
    if config is None and copy_parts_from is not None:
        config = _read_scheduler(Path(copy_parts_from))
    if config is None:
        raise ValueError(f"a {settings.backbone} folder needs a scheduler: give Model(scheduler=...) its config")
    return getattr(diffusers, config["_class_name"]).from_config(dict(config))
