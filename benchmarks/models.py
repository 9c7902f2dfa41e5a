"""What noise levels per frame, shot-causal attention, the KV cache and guidance cost: `python benchmarks/models.py`.

per_frame     A level per latent frame against one per clip, on the same Wan, and against the way of diffusers (Wan 2.2
              5B), which is a time per token.
kv_cache      A scene made shot after shot behind a KV cache, against running the whole history in every step.
group_causal  One attention call per shot over the keys up to its end, against full attention and a dense mask.
guidance      The branches of classifier-free guidance as one batch, against one after another.

Weights are random: nothing here depends on what a model has learned. Every part also checks that its variants agree.
Ratios are of CPU-seconds on a CPU (one thread by default) and of wall time on a GPU, medians of paired repetitions.
The last line printed is one JSON object of figures and goals; the exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import _common
import diffusers
import torch
from _common import Goal
from _measure import measure
from _ratios import Part, Quotient, figures, goals_of, report
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from infra.config import knob, load_config
from infra.storage import atomic_write_text
from models.attention import block_mask, grouped_attention, sdpa
from models.backbones.wan import WanBackbone
from models.layout import shots_layout
from models.methods import get_method
from models.noise import base_levels
from models.text import TextContext
from sample.guidance import Guidance
from sample.rollout import RolloutShot, rollout
from sample.sampler import draw_noise, sample

HEAD = 128  # width of an attention head, as in Wan
CHANNELS, TEXT_WIDTH = 16, 256
CAUSAL_RULE: Literal["group_causal"] = "group_causal"
CAUSAL = get_method("lct", attention_rule=CAUSAL_RULE)


@dataclass(kw_only=True)
class Speed:
    """Keys of this benchmark. The model has Wan's proportions: heads of 128, a feed-forward of 35/6 of the width."""

    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto = the CPU, and a GPU where there is one")
    threads: int = knob(1, "CPU threads of PyTorch")
    width: int = knob(384, "of the model, a multiple of 128")
    layers: int = knob(6, "blocks of the model")
    text_tokens: int = knob(32, "of each text")
    grid: int = knob(8, "patches along each side of a frame, so tokens per frame are its square")
    frames: int = knob(8, "per_frame: latent frames")
    shots: list[int] = knob([2, 5, 9], "kv_cache: shots of a scene")
    shot_frames: int = knob(4, "kv_cache: latent frames of a shot")
    scene_layers: int = knob(2, "kv_cache: blocks of the model; the ratio does not depend on them")
    steps: int = knob(10, "kv_cache: denoising steps of a shot")
    causal_shots: list[int] = knob([4, 8], "group_causal: shots")
    causal_tokens: int = knob(1024, "group_causal: tokens of a shot")
    causal_heads: int = knob(1, "group_causal: attention heads; they are a batch to the kernels")
    guided_frames: list[int] = knob([1, 4, 8], "guidance: latent frames")
    repetitions: int = knob(7, "timed runs of each variant; per_frame and guidance take three times as many")
    scene_repetitions: int = knob(3, "kv_cache: timed scenes of each variant")
    results: Path = knob(_common.RESULTS, "folder for models.json and models.md")

    def __post_init__(self) -> None:
        if self.width < HEAD or self.width % HEAD:
            raise ValueError(f"width={self.width}: heads are {HEAD} wide, so give a multiple of that")


QUICK = {"width": 256, "layers": 2, "steps": 4, "causal_tokens": 512, "repetitions": 2, "scene_repetitions": 1}
GPU = {"width": 1536, "causal_heads": 12, "repetitions": 15, "scene_repetitions": 5}  # so that a GPU has work


@dataclass(frozen=True)
class Setup:
    config: Speed
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def tolerance(self) -> float:
        """Of what should be equal, relative to its rms: rounding in another order."""
        return 1e-4 if self.device.type == "cpu" else 5e-2

    def randn(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def transformer(self, layers: int) -> WanTransformer3DModel:
        width, heads = self.config.width, self.config.width // HEAD
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=HEAD, in_channels=CHANNELS,
                out_channels=CHANNELS, text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=width * 35 // 6,
                num_layers=layers, rope_max_seq_len=1024,
            )  # fmt: skip
        model.to(self.device)
        for name, parameter in model.named_parameters():  # as `from_pretrained` does: some stay in float32
            if not any(kept in name for kept in model._keep_in_fp32_modules):
                parameter.data = parameter.data.to(self.dtype)
        return model

    def latents(self, batch: int, frames: int, seed: int = 1) -> Tensor:
        side = 2 * self.config.grid
        return self.randn(batch, CHANNELS, frames, side, side, seed=seed)

    def texts(self, batch: int, count: int, seed: int = 2) -> Tensor:
        return self.randn(batch, count, self.config.text_tokens, TEXT_WIDTH, seed=seed)


def per_frame(setup: Setup) -> list[Part]:
    """One level, a level per frame, a time per token: forward, and with the backward pass for all weights."""
    config = setup.config
    plain = setup.transformer(config.layers)
    backbone = WanBackbone(copy.deepcopy(plain))
    x, text = setup.latents(1, config.frames), setup.texts(1, 1)[:, 0]
    levels = torch.linspace(0.1, 0.9, config.frames, device=setup.device)[None]
    per_token = (1000 * levels).repeat_interleave(config.grid**2, dim=1)
    models: dict[str, tuple[torch.nn.Module, Callable[[], Tensor]]] = {
        "diffusers, one time": (plain, lambda: plain(x, 1000 * levels[:, 0], text, return_dict=False)[0]),
        "a level per clip": (backbone, lambda: backbone(x, levels[:, 0], text)),
        "a level per frame": (backbone, lambda: backbone(x, levels, text)),
        "diffusers, a time per token": (plain, lambda: plain(x, per_token, text, return_dict=False)[0]),
    }

    def train(model: torch.nn.Module, run: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        out = run()
        out.float().square().mean().backward()
        return out.detach()

    parts = []
    for name, variants in (
        ("forward", {key: torch.no_grad()(run) for key, (_, run) in models.items()}),
        ("train", {key: partial(train, *pair) for key, pair in models.items()}),
    ):
        costs, outs = measure(variants, 3 * config.repetitions, setup.device)
        quotients = [
            Quotient("scalar", "a level per frame", "diffusers, one time", "<", 1.02),
            Quotient("own_scalar", "a level per frame", "a level per clip"),
            Quotient("token_expanded", "diffusers, a time per token", "diffusers, one time"),
        ]
        same = {
            "scalar": difference(outs["a level per clip"], outs["diffusers, one time"]),
            "token_expanded": difference(outs["a level per frame"], outs["diffusers, a time per token"]),
        }
        parts.append(Part(f"per_frame.{name}", costs, quotients, same))
    return parts


def kv_cache(setup: Setup) -> list[Part]:
    """Whole scenes, every shot behind all earlier ones. Both ways see the same noise and make the same shots."""
    config, backbone = setup.config, WanBackbone(setup.transformer(setup.config.scene_layers)).eval()
    levels = base_levels(config.steps, shift=3.0)
    parts = []
    for count in config.shots:
        texts = setup.texts(1, count)
        costs, made = measure(
            {
                "recomputed": lambda texts=texts: recomputed(setup, backbone, texts, levels),
                "KV cache": lambda texts=texts: cached(setup, backbone, texts, levels),
            },
            config.scene_repetitions,
            setup.device,
        )
        goal = (">", 3.5) if count == 9 else ("", 0.0)
        quotient = Quotient("speedup", "recomputed", "KV cache", *goal)
        parts.append(
            Part(f"kv_cache.{count}", costs, [quotient], {"shots": difference(made["KV cache"], made["recomputed"])})
        )
    return parts


def cached(setup: Setup, backbone: WanBackbone, texts: Tensor, levels: Tensor) -> Tensor:
    """Shots one after another as `shotloom sample` makes them; texts [B,S,L,D], latents [B,C,S*F,H,W]."""
    frames, shots = setup.config.shot_frames, texts.shape[1]
    asked = [
        RolloutShot(frames, texts[:, i], torch.zeros_like(texts[:, i]), [_seed(i)], tuple(range(i)))
        for i in range(shots)
    ]
    side = 2 * setup.config.grid
    made = rollout(backbone, CAUSAL, "autoregressive", asked, levels, size=(CHANNELS, side, side))
    return torch.cat(list(made), dim=2)


def recomputed(setup: Setup, backbone: WanBackbone, texts: Tensor, levels: Tensor) -> Tensor:
    """The same shots by the denoising loop alone, which runs history and shot in every step."""
    frames, side = setup.config.shot_frames, 2 * setup.config.grid
    made: list[Tensor] = []
    for index in range(texts.shape[1]):
        layout = CAUSAL.layout_for_task("autoregressive", [frames] * (index + 1))
        generators = [_seed(shot) for shot in range(index + 1)]
        for generator in generators[:-1]:  # a shot draws its start noise first, and then what it is noised with
            draw_noise(shots_layout([frames]), (1, CHANNELS, frames, side, side), [generator])
        shape = (1, CHANNELS, frames * (index + 1), side, side)
        given = torch.cat([*made, torch.zeros(1, CHANNELS, frames, side, side, device=setup.device)], dim=2)
        clip = sample(
            backbone,
            layout,
            CAUSAL.plan(layout, levels, "autoregressive").to(setup.device),
            TextContext(texts[:, : index + 1], layout.text_ids),
            shape=shape,
            generator=[generators],
            given=given,
            model_levels=CAUSAL.model_levels,
            **CAUSAL.backbone_kwargs(layout),
        )
        made.append(clip[:, :, layout.shot_slices[-1]])
    return torch.cat(made, dim=2)


def _seed(shot: int) -> torch.Generator:
    return torch.Generator().manual_seed(shot)


def group_causal(setup: Setup) -> list[Part]:
    """Attention alone. On a CPU training attends by plain matrix products (train/parallel.py)."""
    config = setup.config
    matrix_products = partial(dispatch_attention_fn, backend=AttentionBackendName("_native_math"))
    parts = []
    for shots in config.causal_shots:
        tokens, sizes = shots * config.causal_tokens, (config.causal_tokens,) * shots  # one token per frame
        q, k, v, gradient = (setup.randn(1, tokens, config.causal_heads, HEAD, seed=seed) for seed in range(4))
        mask = block_mask(torch.arange(shots, device=setup.device).repeat_interleave(config.causal_tokens), CAUSAL_RULE)
        kernels: dict[str, Callable[..., Tensor]] = {
            "full": sdpa,
            "group-causal": lambda q, k, v, sizes=sizes: grouped_attention(q, k, v, sizes, CAUSAL_RULE),
            "dense mask": lambda q, k, v, mask=mask: sdpa(q, k, v, mask),
        }
        products: dict[str, Callable[..., Tensor]] = {
            "full, matrix products": matrix_products,
            "group-causal, matrix products": lambda q, k, v, sizes=sizes: grouped_attention(
                q, k, v, sizes, CAUSAL_RULE, matrix_products
            ),
        }

        def forward(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...] = (q, k, v)) -> list[Tensor]:
            with torch.no_grad():
                return [attend(*inputs)]

        def train(
            attend: Callable[..., Tensor], inputs: tuple[Tensor, ...] = (q, k, v), gradient: Tensor = gradient
        ) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attend(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

        for name, passes, asked in (("forward", forward, kernels), ("train", train, kernels | products)):
            if name == "train" and setup.device.type != "cpu":
                asked = kernels
            costs, outs = measure(
                {key: partial(passes, attend) for key, attend in asked.items()}, config.repetitions, setup.device
            )
            quotients = [
                Quotient("full", "group-causal", "full", "<", 0.70),
                Quotient("dense_mask", "dense mask", "full"),
            ]
            same = {"dense_mask": max(map(difference, outs["group-causal"], outs["dense mask"]))}
            if "full, matrix products" in asked:
                over, under = "group-causal, matrix products", "full, matrix products"
                quotients.append(Quotient("matrix_products", over, under, "<", 0.70))
                same["matrix_products"] = max(map(difference, outs[over], outs["dense mask"]))
            parts.append(Part(f"group_causal.{shots}.{name}", costs, quotients, same))
    return parts


def guidance(setup: Setup) -> list[Part]:
    """One guided step: both branches as one batch, as `sample` runs them, or one after another."""
    config, backbone = setup.config, WanBackbone(setup.transformer(setup.config.layers)).eval()
    guided = Guidance([("text", 5.0)])
    parts = []
    for frames in config.guided_frames:
        x, text = setup.latents(1, frames), setup.texts(2, 1)[:, 0]
        level = torch.full((1,), 0.5, device=setup.device)

        @torch.no_grad()
        def batched(x: Tensor = x, text: Tensor = text, level: Tensor = level) -> Tensor:
            return guided.combine(backbone(torch.cat([x, x]), level.expand(2), text).chunk(2))

        @torch.no_grad()
        def sequential(x: Tensor = x, text: Tensor = text, level: Tensor = level) -> Tensor:
            return guided.combine([backbone(x, level, text[row : row + 1]) for row in range(2)])

        costs, outs = measure(
            {"one batch": batched, "one after another": sequential}, 3 * config.repetitions, setup.device
        )
        same = {"step": difference(outs["one batch"], outs["one after another"])}
        quotient = Quotient("batched", "one batch", "one after another")
        parts.append(Part(f"guidance.{frames * config.grid**2}", costs, [quotient], same))
    return parts


PARTS: dict[str, Callable[[Setup], list[Part]]] = {
    "per_frame": per_frame,
    "kv_cache": kv_cache,
    "group_causal": group_causal,
    "guidance": guidance,
}


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the rms of b."""
    return float((a.float() - b.float()).abs().max() / b.float().square().mean().sqrt())


def run(
    config: Speed, device: torch.device, name: str, judged: bool, command: str
) -> tuple[dict[str, Any], list[Goal]]:
    """One part on one device: a record of its figures, and its goals."""
    setup = Setup(config, device)
    clock = "cpu_s" if device.type == "cpu" else "wall_s"
    parts = PARTS[name](setup)
    found = figures(parts, clock)
    medians = {
        f"{part.name}: {variant}": {
            "cpu_s": round(statistics.median(cost.cpu_s), 5),
            "wall_s": round(statistics.median(cost.wall_s), 5),
            "gflop": round(cost.flops / 1e9, 3),
        }
        for part in parts
        for variant, cost in part.costs.items()
    }
    sizes = {key: value for key, value in asdict(config).items() if key not in ("device", "threads", "results")}
    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    record = {
        "command": command,
        "machine": machine,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "sizes": sizes,
        "figures": found,
        "medians": medians,
    }
    goals = goals_of(parts, found, setup.tolerance, judged)
    return record | {"goals": [goal.record() for goal in goals]}, goals


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _common.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(PARTS), help="measure one part; the others' results stay as they are")
    given = parser.parse_intermixed_args(arguments)
    with _common.refusing(parser):
        config = load_config(Speed, None, given.overrides)
    if config.device == "cuda" and not torch.cuda.is_available():
        parser.error("device=cuda, but PyTorch sees no GPU; take device=cpu")
    torch.set_num_threads(config.threads)
    words = [*["--only", given.only] * bool(given.only), *["--quick"] * given.quick, *given.overrides]
    command = " ".join(["python benchmarks/models.py", *words])

    kinds = ["cpu", *["cuda"] * torch.cuda.is_available()] if config.device == "auto" else [config.device]
    record: dict[str, Any] = {"benchmark": "models", "parts": {}}
    goals: list[Goal] = []
    for kind in kinds:
        changes = QUICK if given.quick else GPU if kind == "cuda" else {}
        sized = replace(config, **changes)  # type: ignore[arg-type]
        for name in [given.only] if given.only else PARTS:
            part, found = run(sized, torch.device(kind), name, not given.quick, command)
            record["parts"][f"{kind}.{name}"] = part
            goals += [replace(goal, name=f"{kind}.{goal.name}") for goal in found]
            if not given.quick:
                _write(config.results, f"{kind}.{name}", part)
    return _common.finish(record, goals, report(record["parts"]), as_json=given.json)


def _write(folder: Path, name: str, part: dict[str, Any]) -> None:
    """Put a part into models.json and write models.md anew: a run that ends early leaves what it finished."""
    file = folder / "models.json"
    known = json.loads(file.read_text())["parts"] if file.exists() else {}
    parts = dict(sorted((known | {name: part}).items()))
    record = {"benchmark": "models", "parts": parts}
    atomic_write_text(file, json.dumps(record, indent=2, sort_keys=True) + "\n")
    atomic_write_text(folder / "models.md", report(parts))


if __name__ == "__main__":
    sys.exit(main())
