"""Fine-tuned with LCT, a single-shot model keeps who is in a scene better from shot to shot than it does alone.

Long Context Tuning, 2503.10589. Same held-out storyboards, same start noise, same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import _common
import numpy as np
from _bootstrap import Difference, paired_bootstrap
from _common import Goal

from infra.config import knob
from infra.machine import usable_cores
from pipelines.demo_stages import LCT_PARAMS
from pipelines.demo_types import DemoConfig

if TYPE_CHECKING:
    from pipelines.train import TrainConfig

SCENE_METRICS = ("identity_said", "place_agreement", "colour", "shape", "place", "style", "action", "legibility")
MORE_THAN_THE_DEMO = DemoConfig(steps=6_000, batch_size=8, learning_rate=5e-4)
# The tuning goes on with scenes of two characters, most of them with some shots given: who is which, and what the
# others look like, is what a scene has to keep. Then each shot sees the earlier ones alone (the paper's second stage),
# at the high levels where a shot's looks are decided. At last few shots are given and nearly all texts are told: who
# is meant has to be read from them again.
CAST_PARAMS = LCT_PARAMS | {"context_prob": 0.3}
CAUSAL_PARAMS = LCT_PARAMS | {"context_prob": 0.6, "shift": 6.0, "attention_rule": "group_causal"}
TOLD_PARAMS = CAUSAL_PARAMS | {"context_prob": 0.25}
CAST_DROP = {"shots": 0.1}
TOLD_DROP = {"shots": 0.05, "story": 0.05}
HELD_OUT = 0.006  # share of the training scenes that only tell how well the tuning goes
EMA_DECAY = 0.998  # a run of thousands of steps is averaged over more of them than the demo's


@dataclass(kw_only=True)
class LctDemoClaim:
    """Keys of lct-demo."""

    model: Path | None = knob(None, "model fine-tuned with LCT; null = make one the way the demo does")
    scenes: int = knob(8_000, "training scenes of three shots, if the model is made here (claim_cells.data)")
    cast_scenes: int = knob(5_000, "training scenes of mostly two characters, for the tuning that follows")
    cast_steps: int = knob(4_000, "steps of that second tuning")
    causal_steps: int = knob(8_000, "steps of the third, on the same scenes, each shot behind the earlier ones")
    told_steps: int = knob(8_000, "steps of the fourth, on the same scenes, nearly all texts told")
    pairs: int = knob(320, "held-out scenes of three shots, each made by every side")
    seed: int = knob(2, "of the held-out scenes and the start noise")
    batch_size: int = knob(8, "scenes made at once")
    workers: int = knob(0, "sides made at once, each in a process of one thread; 0 = one per core, 1 = in this process")
    out: Path = knob(Path("runs/claims/lct-demo"), "videos, and the data set and model if they are made here")
    results: Path = knob(_common.RESULTS, "folder for lct_demo.json and lct_demo.md")
    demo: DemoConfig = knob(MORE_THAN_THE_DEMO, "starting model, training, sampling, as the demo has them")

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise ValueError(f"pairs={self.pairs}: a comparison needs at least 2")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative")


@dataclass(frozen=True)
class Side:
    """One way to make the scenes."""

    name: str
    tuned: bool
    independent: bool
    text: str
    guided: bool = True  # over the other shots, where there are any


# The first is the claim's baseline, the last the claim. Between them: the same baseline with the sentences it knows
# best, the tuned model without the other shots, which tells what sharing a context adds to tuning, and with them, but
# guided by text alone, which tells what guidance over them adds.
SIDES = (
    Side("single-shot", tuned=False, independent=True, text="scene"),
    Side("single-shot, sentences", tuned=False, independent=True, text="sentence"),
    Side("LCT, shots alone", tuned=True, independent=True, text="scene"),
    Side("LCT, only text guided", tuned=True, independent=False, text="scene", guided=False),
    Side("LCT", tuned=True, independent=False, text="scene"),
)


def lct_demo(claim: LctDemoClaim, quick: bool, command: str) -> tuple[dict[str, Any], list[Goal], str]:
    """Figures, goals and a table of the claim."""
    if quick:
        claim = replace(
            claim,
            pairs=4,
            demo=replace(claim.demo, steps=20, sample_steps=4),
            scenes=6,
            cast_scenes=6,
            cast_steps=20,
            causal_steps=20,
            told_steps=20,
        )
    tuned = claim.model or _finetune(claim)
    readings = _make_all(claim, tuned)
    sums = {name: _sums(side_readings) for name, side_readings in readings.items()}
    baseline, lct = sums[SIDES[0].name], sums[SIDES[-1].name]
    differences = {metric: _compare(baseline, lct, metric) for metric in baseline}
    beyond = {
        side.name: {m: _compare(sums[side.name], lct, m) for m in ("identity_said", "identity_unsaid")}
        for side in SIDES[1:-1]
    }
    drawn = _sums(_drawn(claim))
    best = {metric: _compare(baseline, drawn, metric).after for metric in baseline}
    said, unsaid = differences["identity_said"], differences["identity_unsaid"]
    goals = [
        Goal("identity_said, LCT minus single-shot, lower end of the 95 % interval", said.low, ">", 0.0, not quick),
        Goal(
            "identity_unsaid, LCT minus single-shot, upper end of the 95 % interval", unsaid.high, "<", 0.0, not quick
        ),
        Goal("paired held-out scenes", claim.pairs, ">", 15, not quick),
    ]
    record = {
        "claim": "lct-demo",
        "quick": quick,
        "command": command,
        "pairs": claim.pairs,
        "seed": claim.seed,
        "sample_steps": claim.demo.sample_steps,
        "guidance": claim.demo.guidance,
        "scene_guidance": claim.demo.scene_guidance,
        "trained": _trained(claim, tuned),
        "metrics": {metric: _rounded(difference) for metric, difference in differences.items()},
        "drawn_through_the_vae": {metric: round(value, 4) for metric, value in best.items()},
        "against_other_sides": {
            name: {m: _rounded(difference) for m, difference in rows.items()} for name, rows in beyond.items()
        },
    }
    return record, goals, _text(record)


def _finetune(claim: LctDemoClaim) -> Path:
    """A model tuned as the demo tunes it, on more scenes, then in stages on scenes of more characters; each stage kept
    in `out` and taken up again by a run of equal keys."""
    from claim_cells.data import dataset
    from pipelines.demo_stages import train_config

    demo = claim.demo
    kind = f"{claim.scenes}-scenes-{demo.steps}-steps-of-{demo.batch_size}-rate-{demo.learning_rate:g}"
    data = dataset(claim.out, "dressed-scenes", claim.scenes, demo.model)
    model = _tune(train_config(demo, data, claim.out / f"model-{kind}-seed-{demo.seed}"))
    data = dataset(claim.out, "cast-scenes", claim.cast_scenes, demo.model)
    kind += f"-then-{claim.cast_scenes}-casts"
    for stage in _on_casts(claim):
        kind += f"-{stage.name}{stage.steps}-steps"
        config = train_config(
            replace(demo, steps=stage.steps, model=model), data, claim.out / f"model-{kind}-seed-{demo.seed}"
        )
        model = _tune(
            replace(config, method_params=stage.params, text_drop=replace(config.text_drop, **stage.text_drop))
        )
    return model


@dataclass(frozen=True)
class CastStage:
    """One tuning on the scenes of more characters."""

    name: str  # in the folder's name
    steps: int
    params: dict[str, Any]
    text_drop: dict[str, float]  # what differs from the demo's


def _on_casts(claim: LctDemoClaim) -> list[CastStage]:
    return [
        CastStage("", claim.cast_steps, CAST_PARAMS, CAST_DROP),
        CastStage("causal-", claim.causal_steps, CAUSAL_PARAMS, CAST_DROP),
        CastStage("told-", claim.told_steps, TOLD_PARAMS, TOLD_DROP),
    ]


def _tune(config: TrainConfig) -> Path:
    from pipelines.train import HeldOutConfig, run_train

    held_out = HeldOutConfig(share=HELD_OUT, every=500, batches=8)
    run_train(replace(config, num_workers=0, ema_decay=EMA_DECAY, held_out=held_out))
    return config.run_dir / "model"


def _make_all(claim: LctDemoClaim, tuned: Path) -> dict[str, list[Any]]:
    """The readings of every side; the two that the claim compares are made first."""
    order = (SIDES[0], SIDES[-1], *SIDES[1:-1])
    workers = min(claim.workers or usable_cores(), len(order))
    if workers == 1:
        return {side.name: _make(claim, side, tuned) for side in order}
    with ProcessPoolExecutor(workers, get_context("spawn"), _take_one_thread) as pool:
        made = {side.name: pool.submit(_make, claim, side, tuned) for side in order}
        return {name: readings.result() for name, readings in made.items()}


def _take_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _make(claim: LctDemoClaim, side: Side, tuned: Path) -> list[Any]:
    """Generate every scene by one side and read it with the judge: one SceneReading per scene."""
    from pipelines.demo_stages import held_out_storyboards
    from pipelines.evaluate import read_storyboard
    from pipelines.sample import SampleConfig, run_sample
    from sample.video_io import read_video

    folder = claim.out / "videos" / side.name.replace(", ", "-").replace(" ", "-")
    boards = held_out_storyboards(claim.pairs, claim.seed)
    report = run_sample(
        SampleConfig(
            model=tuned if side.tuned else claim.demo.model,
            out=folder,
            independent=side.independent,
            task=_task(tuned) if side.tuned and not side.independent else "auto",
            text=side.text,  # type: ignore[arg-type]
            steps=claim.demo.sample_steps,
            guidance=claim.demo.guidance,
            scene_guidance=claim.demo.scene_guidance if side.guided and not side.independent else None,
            batch_size=claim.batch_size,
            seed=claim.seed,
        ),
        boards,
    )
    readings = []
    for board, record in zip(boards, report.records, strict=True):
        if record["status"] != "completed":
            raise ValueError(f"{side.name}: {record['name']} could not be made: {record['error']}")
        frames, _ = read_video(folder / record["file"])
        readings.append(read_storyboard(frames, record["cuts"], board))
    return readings


def _task(tuned: Path) -> Literal["auto", "autoregressive"]:
    """All shots at once, or one after another where the model's shots see earlier ones only."""
    from models.folder import load_settings

    causal = load_settings(tuned).method_params.get("attention_rule") == "group_causal"
    return "autoregressive" if causal else "auto"


def _drawn(claim: LctDemoClaim) -> list[Any]:
    """The scenes as ToyWorld draws them, encoded and decoded: about as well as anything behind this VAE can do."""
    import torch

    from models.codecs import to_frames, to_video
    from models.folder import load_model
    from pipelines.demo_stages import held_out_scenes
    from toyworld.judge import read_scene
    from toyworld.render import render_shot

    model = load_model(claim.demo.model, parts=("codec",))
    codec, size = model.codec, model.settings.height
    readings = []
    for scene in held_out_scenes(claim.pairs, claim.seed):
        shots = []
        for shot in range(len(scene.shots)):
            with torch.no_grad():
                mean, _ = codec.encode(to_video([render_shot(scene, shot, size)]))
                shots.append(to_frames(codec.decode(codec.normalize(mean)))[0])
        readings.append(read_scene(np.concatenate(shots), scene.cuts, scene))
    return readings


def _sums(readings: Sequence[Any]) -> dict[str, np.ndarray]:
    """Per metric the sums [N,M,2] of every scene."""
    from toyworld.judge import score_scene_reading, unsaid_sums

    scores = [score_scene_reading(reading) for reading in readings]
    sums = {
        metric: np.array([[[s[metric].value * s[metric].count, s[metric].count]] for s in scores], dtype=np.float64)
        for metric in SCENE_METRICS
    }
    return {**sums, "identity_unsaid": unsaid_sums(readings)}


def _compare(before: dict[str, np.ndarray], after: dict[str, np.ndarray], metric: str) -> Difference:
    return paired_bootstrap(before[metric], after[metric])


def _trained(claim: LctDemoClaim, tuned: Path) -> dict[str, Any]:
    """What the fine-tuned folder says of itself, and the demo's settings where the model was made here."""
    from models.folder import load_model

    settings = load_model(tuned, parts=()).settings
    record = {"method": settings.method, "method_params": settings.method_params}
    if claim.model:
        return record
    demo = {k: v for k, v in asdict(claim.demo).items() if isinstance(v, int | float)}
    casts = [
        {"scenes": claim.cast_scenes, "steps": one.steps, "method_params": one.params, "text_drop": one.text_drop}
        for one in _on_casts(claim)
    ]
    return record | {"demo": demo, "scenes": claim.scenes, "then_on_casts": casts}


def _recipe(trained: dict[str, Any]) -> str:
    """The stages of tuning, in words."""
    if "demo" not in trained:
        return "The tuned model was given."
    stages = [f"{trained['demo']['steps']:,} steps on {trained['scenes']:,} scenes"]
    for stage in trained["then_on_casts"]:
        params = stage["method_params"]
        rule = "each behind the earlier ones" if params.get("attention_rule") == "group_causal" else "all together"
        words = f"{stage['steps']:,} on {stage['scenes']:,} of more characters, shots {rule}"
        stages.append(f"{words}, {params['context_prob']:g} of the samples with given shots")
    return "\n- ".join([f"Tuned with {trained['demo']['batch_size']} scenes a step:\n", *stages])


def _rounded(difference: Difference) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(difference).items()}


def _text(record: dict[str, Any]) -> str:
    rows = [
        [metric, f"{d['before']:.3f}", f"{d['after']:.3f}", f"{d['difference']:+.3f}",
         f"[{d['low']:+.3f}, {d['high']:+.3f}]", str(d["count_after"]),
         f"{record['drawn_through_the_vae'][metric]:.3f}"]
        for metric, d in record["metrics"].items()
    ]  # fmt: skip
    other = [
        [metric, name, f"{d['before']:.3f}", f"{d['difference']:+.3f}", f"[{d['low']:+.3f}, {d['high']:+.3f}]"]
        for name, metrics in record["against_other_sides"].items()
        for metric, d in metrics.items()
    ]
    main = _common.table(["metric", "single-shot", "LCT", "difference", "95 % interval", "readings", "drawn"], rows)
    rest = _common.table(["metric", "other side", "its score", "LCT minus it", "95 % interval"], other)
    how = (
        f"{record['pairs']} held-out scenes of three shots, seed {record['seed']}, {record['sample_steps']} steps, "
        f"guidance {record['guidance']:g},\nof LCT's other shots {record['scene_guidance']:g}. Each scene is made by "
        "both sides from the same storyboard and start noise; intervals are\npercentiles of a paired bootstrap over "
        f"scenes.\n\n{_recipe(record['trained'])}\n"
    )
    return f"""# LCT keeps who is in a scene from shot to shot

    {record["command"]}

{how}
identity_unsaid is better when lower (1 = no memory of other shots), all others when higher. "drawn": the scenes as
ToyWorld draws them, encoded and decoded by the model's VAE: about what a model behind it can reach.

{main}

"single-shot, sentences" reads self-contained sentences instead of story and shot prompt; "LCT, shots alone" is the
fine-tuned model without the other shots in its context, "only text guided" with them, but not amplified.

{rest}
"""
