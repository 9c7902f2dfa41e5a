"""TIC-FT: caps, plan and training levels, and the faults of the authors' code, each caught by the check that it fails.

F latent frames, B buffer frames.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from models.backbones.wan import WanBackbone
from models.codecs import VideoCodec
from models.layout import ClipLayout, Segment, shots_layout
from models.methods import get_method
from models.modules.lora import inject_lora, merge_lora
from models.noise import base_levels, diffusion_loss, loss_weights, noise_plan, shift_levels
from models.process import FlowMatching
from models.tiny import TEXT_DIM, tiny_transformer, tiny_vae
from sample.sampler import sample

METHOD = get_method("tic_ft").for_model(FlowMatching(), 3.0)
TASK = "i2v_in_context"
LAYOUT = METHOD.layout_for_task(TASK, [9], condition_frames=[4])  # c1b3t9, the authors' shipped mode


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(frames: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, frames, 4, 4, generator=seeded(seed))


# --- conditions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "task"),
    [
        (["image"], "i2v_in_context"),
        (["portrait"], "i2v_in_context"),
        (["portrait", "place"], "multi_image"),
        (["keyframe"], "keyframes"),
        (["keyframe"] * 3, "keyframes"),
        (["source"], "v2v_style"),
        (["action", "first_frame"], "action_transfer"),
    ],
)
def test_the_roles_of_the_references_make_the_task(roles, task):
    assert METHOD.task_of(roles) == task


@pytest.mark.parametrize(
    "roles", [[], ["source", "source"], ["first_frame", "action"], ["keyframe", "image"], ["face"]]
)
def test_roles_that_make_no_task_are_refused(roles):
    with pytest.raises(ValueError, match="has no task for references"):
        METHOD.task_of(roles)


def test_the_last_condition_feeds_the_buffer():
    assert METHOD.condition_frames(["image"], [None]) == [4]
    assert METHOD.condition_frames(["portrait", "place"], [None, 6]) == [1, 4]
    assert METHOD.condition_frames(["source"], [7]) == [7]
    assert METHOD.condition_frames(["action", "first_frame"], [5, None]) == [5, 4]
    bare = get_method("tic_ft", buffer_frames=0, image_frames=2)
    assert bare.condition_frames(["image"], [None]) == [2]
    assert bare.layout_for_training([3], [2]).roles == ["condition"] * 2 + ["target"] * 3


@pytest.mark.parametrize(
    ("roles", "lengths", "message"),
    [
        (["source"], [3], r"reference 0 \(source\) has 3 latent frames, but tic_ft needs 4"),
        (["source"], [None], "has 0 latent frames"),
        (["image"], [3], r"reference 0 \(image\) has 3 latent frames, but tic_ft needs 4"),
        (["portrait", "place"], [1, 1], r"reference 1 \(place\)"),
    ],
)
def test_conditions_too_short_for_the_buffer_are_refused(roles, lengths, message):
    with pytest.raises(ValueError, match=message):
        METHOD.condition_frames(roles, lengths)


@pytest.mark.parametrize("params", [{"buffer_frames": -1}, {"image_frames": 0}, {"model_time": "vector"}])
def test_parameters_that_make_no_sense_are_refused(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        get_method("tic_ft", **params)


# --- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [0, 1, 3, 7])
def test_caps_rise_evenly(buffer):
    method = get_method("tic_ft", buffer_frames=buffer)
    layout = method.layout_for_training([2], [2 + buffer])
    ramp = [b / (buffer + 1) for b in range(1, buffer + 1)]
    assert method.caps(layout).tolist() == pytest.approx([0.0, 0.0, *ramp, 1.0, 1.0])


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_plan_holds_each_buffer_frame_until_the_clock_reaches_its_cap(shift):
    levels = base_levels(50, shift)
    plan = METHOD.plan(LAYOUT, levels, TASK)
    assert (plan[1:] <= plan[:-1]).all() and (plan[-1] == 0).all()
    assert (plan[:, 0] == 0).all()
    for b, cap in ((1, 0.25), (2, 0.5), (3, 0.75)):
        held = levels > cap
        assert (plan[held, b] == cap).all() and torch.equal(plan[~held, b], levels[~held])
        assert held.any()
    assert all(torch.equal(plan[:, f], levels) for f in range(4, 13))


def closure_gap(method, plan: Tensor) -> float:
    """Largest distance of a plan row from what training draws at the row's own target level.

    Training levels are a function of the target's level; it is read off the draws themselves.
    """
    draws = method.sample_levels(LAYOUT, 40000, seeded())  # [n,F]
    gaps = []
    for row in plan[:-1]:
        near = (draws[:, -1] - row[-1]).abs().argmin()
        slack = float((draws[near, -1] - row[-1]).abs())
        gaps.append(float((draws[near] - row).abs().max()) - slack)
    return max(gaps)


def test_buffers_are_at_the_same_level_in_training_and_sampling():
    """The authors cap training at 0.25, 0.5, 0.75 and sampling at quantiles of the steps, 0.514, 0.750, 0.905."""
    levels = base_levels(50, shift=3.0)
    assert closure_gap(METHOD, METHOD.plan(LAYOUT, levels, TASK)) < 1e-6
    quantiles = [float(levels[int(50 * (1 - q))]) for q in (0.25, 0.5, 0.75)]
    assert quantiles == pytest.approx([0.514, 0.750, 0.905], abs=0.02)
    authors = noise_plan(LAYOUT, levels, "min", caps=[0.0, *quantiles, *[1.0] * 9])
    assert closure_gap(METHOD, authors) > 0.2

    for target in METHOD.sample_levels(LAYOUT, 200, seeded(1)):
        row = METHOD.plan(LAYOUT, torch.stack([target[-1], torch.tensor(0.0)]), TASK)[0]
        assert torch.equal(row, target)


def test_the_shift_acts_once_and_never_on_caps():
    shifted = get_method("tic_ft", shift=5.0, density="logit_normal").sample_levels(LAYOUT, 4000, seeded())
    plain = METHOD.sample_levels(LAYOUT, 4000, seeded())
    assert torch.equal(shifted[:, 4:], shift_levels(plain[:, 4:], 5.0)), "targets, once"
    assert torch.equal(shifted[:, 1:4], torch.minimum(shifted[:, 4:5], torch.tensor([0.25, 0.5, 0.75])))
    buggy = torch.minimum(shifted[:, 4:5], shift_levels(torch.tensor([0.25, 0.5, 0.75]), 5.0))
    assert not torch.equal(shifted[:, 1:4], buggy)
    assert torch.equal(METHOD.plan(LAYOUT, base_levels(9, 5.0), TASK)[0, 1:4], torch.tensor([0.25, 0.5, 0.75]))


def test_training_levels_follow_the_authors_density_unshifted():
    logit = torch.logit(METHOD.sample_levels(LAYOUT, 20000, seeded())[:, -1])
    assert float(logit.mean()) == pytest.approx(0, abs=0.03) and float(logit.std()) == pytest.approx(1, abs=0.03)


# --- model time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_time", ["scalar", "per_frame"])
def test_the_backbone_is_told_the_targets_level_or_every_frames(model_time):
    method = get_method("tic_ft", model_time=model_time, density="logit_normal")
    assert get_method("tic_ft", **method.config()) == method and method.config()["model_time"] == model_time
    backbone = WanBackbone(tiny_transformer()).eval()
    text = torch.randn(2, 6, TEXT_DIM, generator=seeded(5))
    x, levels = clip(13), method.sample_levels(LAYOUT, 2, seeded(3))
    with torch.no_grad():
        out = backbone(x, method.model_levels(levels), text, **method.backbone_kwargs(LAYOUT))
        plain = tiny_transformer().eval()(x, 1000 * levels[:, -1], text, return_dict=False)[0]
    assert torch.equal(out, plain) == (model_time == "scalar")
    assert method.model_levels(levels).shape == ((2,) if model_time == "scalar" else (2, 13))


def test_equal_levels_are_the_same_in_both_forms_of_model_time():
    levels = torch.tensor([0.3, 0.8])[:, None].expand(2, 5)
    backbone = WanBackbone(tiny_transformer()).eval()
    x, text = clip(5), torch.randn(2, 6, TEXT_DIM, generator=seeded(5))
    with torch.no_grad():
        outs = [
            backbone(x, get_method("tic_ft", model_time=t).model_levels(levels), text) for t in ("scalar", "per_frame")
        ]
    assert torch.equal(*outs)


def test_sampling_tells_the_backbone_the_clock():
    levels, told = base_levels(6, 3.0), []

    def backbone(x: Tensor, level: Tensor, text: Tensor) -> Tensor:
        told.append(level)
        return x

    run(backbone, METHOD.plan(LAYOUT, levels, TASK), model_levels=METHOD.model_levels)
    assert torch.equal(torch.stack(told), levels[:-1, None].expand(-1, 2))


# --- sampling ------------------------------------------------------------------------------------------------------


def run(backbone, plan: Tensor, seed: int = 7, given: Tensor | None = None, **options) -> Tensor:
    given = clip(13) if given is None else given
    text = torch.zeros(2, 4, TEXT_DIM)
    return sample(
        backbone, LAYOUT, plan, text, shape=tuple(given.shape), generator=[seeded(seed), seeded(seed + 1)],
        given=given, process=FlowMatching(), **options,
    )  # fmt: skip


def oracle(truth: Tensor):
    """Velocity towards `truth`, from the levels that the frames really have, which a scalar model is not told."""
    rows = iter(METHOD.plan(LAYOUT, base_levels(25, 3.0), TASK))

    def backbone(x: Tensor, level: Tensor, text: Tensor) -> Tensor:
        u = next(rows)[:, None, None]
        return torch.where(u > 0, (x - truth) / u.clamp_min(1e-9), torch.nan)

    return backbone


def test_an_oracle_leads_every_buffer_and_target_to_its_truth_and_conditions_stay_bit_equal():
    given, truth = clip(13), clip(13, seed=1)
    plan = METHOD.plan(LAYOUT, base_levels(25, 3.0), TASK)
    out = run(oracle(truth), plan, given=given, model_levels=METHOD.model_levels)
    torch.testing.assert_close(out[:, :, 1:], truth[:, :, 1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(out[:, :, :1], given[:, :, :1]), "whatever is predicted for it, even nan"


def start_of(given: Tensor) -> Tensor:
    seen = []

    def backbone(x: Tensor, level: Tensor, text: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    run(backbone, METHOD.plan(LAYOUT, base_levels(3, 3.0), TASK), given=given)
    return seen[0]


def test_buffers_start_from_their_source_at_their_cap():
    """(1 - cap) source + cap noise. The authors ask UniPC to add noise before it knows the flow levels."""
    zero, one = torch.zeros(2, 4, 13, 4, 4), torch.ones(2, 4, 13, 4, 4)
    noise = start_of(zero)  # cap * eps
    kept = (start_of(one) - noise).mean(dim=(0, 1, 3, 4))
    assert kept.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, *[0.0] * 9], abs=1e-6)
    assert noise.std(dim=(0, 1, 3, 4))[1:4].tolist() == pytest.approx([0.25, 0.5, 0.75], rel=0.2)
    assert (noise[:, :, 0] == 0).all()

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    buggy = scheduler.add_noise(torch.ones(1), torch.zeros(1), torch.tensor([250]))
    assert float(buggy) == pytest.approx(-16.25, abs=0.01), "before set_timesteps it holds levels of another process"


def test_the_seed_decides_the_noise():
    """The authors compare a device with a string, so that their generator is never used."""
    plan = METHOD.plan(LAYOUT, base_levels(3, 3.0), TASK)

    def half(x: Tensor, level: Tensor, text: Tensor) -> Tensor:
        return 0.5 * x

    first = run(half, plan)
    torch.manual_seed(99)
    assert torch.equal(first, run(half, plan)), "the global generator does not matter"
    other = run(half, plan, seed=40)
    assert all((first[:, :, f] != other[:, :, f]).any() for f in range(1, 13))


def test_a_condition_reaches_every_target():
    backbone = WanBackbone(tiny_transformer()).eval()
    plan = METHOD.plan(LAYOUT, base_levels(2, 3.0), TASK)
    options = METHOD.backbone_kwargs(LAYOUT) | {"model_levels": METHOD.model_levels}
    given = clip(13)
    changed = given.clone()
    changed[0, 0, 0, 0, 0] += 1.0
    base, other = run(backbone, plan, given=given, **options), run(backbone, plan, given=changed, **options)
    assert all((base[0, :, f] != other[0, :, f]).any() for f in range(1, 13))
    assert torch.equal(base[1], other[1])


# --- training ------------------------------------------------------------------------------------------------------


def test_only_targets_are_learnt():
    prediction = clip(13).requires_grad_()
    diffusion_loss(prediction, clip(13, seed=1), METHOD.loss_weights(LAYOUT)).backward()
    gradient = prediction.grad
    assert (gradient[:, :, :4] == 0).all()
    assert (gradient[:, :, 4:] != 0).flatten(3).any(dim=3).all()
    assert METHOD.loss_weights(LAYOUT)[4:].tolist() == pytest.approx([1 / 9] * 9)
    # a layout that counts one frame too few would move the weights: sum and shape say so
    with pytest.raises(RuntimeError):
        diffusion_loss(prediction, clip(13, seed=1), METHOD.loss_weights(METHOD.layout_for_training([8], [4])))


def test_without_conditions_it_is_plain_text_to_video_bit_for_bit():
    layout = METHOD.layout_for_training([5])
    plain = get_method("fvdm", p=0.0, clean_prob=0.0, shift=METHOD.shift, density=METHOD.density)
    assert layout == shots_layout([5]) and torch.equal(METHOD.loss_weights(layout), plain.loss_weights(layout))
    levels = METHOD.sample_levels(layout, 8, seeded())
    assert torch.equal(levels, plain.sample_levels(layout, 8, seeded()))
    clock = base_levels(6, 3.0)
    assert torch.equal(METHOD.plan(layout, clock, TASK), plain.plan(layout, clock, "t2v"))

    backbone, process = WanBackbone(tiny_transformer()), FlowMatching()
    x, noise, text = clip(5, batch=8), clip(5, seed=1, batch=8), torch.randn(8, 6, TEXT_DIM, generator=seeded(2))
    losses = []
    for method in (METHOD, plain):
        out = backbone(
            process.add_noise(x, noise, levels), method.model_levels(levels), text, **method.backbone_kwargs(layout)
        )
        losses.append(diffusion_loss(out, process.target(x, noise, levels), method.loss_weights(layout)))
    assert torch.equal(*losses)


def test_one_training_step_against_a_naive_loop():
    layout = METHOD.layout_for_training([2], [4])
    process = FlowMatching()
    x, noise, prediction = (clip(6, seed=s).double() for s in (1, 2, 3))
    levels = METHOD.sample_levels(layout, 2, seeded(4))
    noisy = process.add_noise(x, noise, levels)
    loss = diffusion_loss(prediction, process.target(x, noise, levels), METHOD.loss_weights(layout))
    expected = 0.0
    for b in range(2):
        u = float(levels[b, -1])
        for f, level in enumerate([0.0, min(u, 0.25), min(u, 0.5), min(u, 0.75), u, u]):
            torch.testing.assert_close(noisy[b, :, f], (1 - level) * x[b, :, f] + level * noise[b, :, f])
            if f >= 4:
                expected += float((prediction[b, :, f] - (noise[b, :, f] - x[b, :, f])).square().mean()) / 2 / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.75, 1.0])
def test_lora_merges_at_a_scale(scale):
    backbone = WanBackbone(tiny_transformer())
    before = {name: value.clone() for name, value in backbone.transformer.state_dict().items()}
    inject_lora(backbone, rank=2, alpha=4, targets=["to_q"])
    updates = {}
    for name, parameter in backbone.transformer.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=seeded(len(updates)))
            updates[name] = parameter.data.clone()
    merge_lora(backbone, scale)
    for name, value in backbone.transformer.state_dict().items():
        down, up = (updates.get(name.replace("weight", f"lora_{x}.default.weight")) for x in "AB")
        expected = before[name] if down is None else before[name] + scale * 4 / 2 * up @ down
        torch.testing.assert_close(value, expected)
    assert len(updates) == 2 * 2 * 2


def test_lora_starts_as_the_base_and_at_scale_zero_stays_it():
    backbone = WanBackbone(tiny_transformer()).eval()
    x, text, level = clip(13), torch.randn(2, 6, TEXT_DIM, generator=seeded(5)), torch.tensor([0.4, 0.9])
    with torch.no_grad():
        base = backbone(x, level, text)
        inject_lora(backbone, rank=2, alpha=2)
        assert torch.equal(backbone(x, level, text), base)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=seeded(6))
        assert not torch.equal(backbone(x, level, text), base)
        backbone.transformer.set_adapters(["default"], [0.0])
        torch.testing.assert_close(backbone(x, level, text), base, atol=0, rtol=0)


# --- latents -------------------------------------------------------------------------------------------------------


def test_conditions_and_target_encoded_alone_know_nothing_of_each_other():
    """Encoded across the hard cut, as the authors do, the target's latents depend on the condition."""
    codec = VideoCodec(tiny_vae())
    one, other = (torch.rand(1, 3, 1, 16, 16, generator=seeded(s)).expand(-1, -1, 13, -1, -1) * 2 - 1 for s in (0, 1))
    target = torch.rand(1, 3, 4, 16, 16, generator=seeded(2)) * 2 - 1

    def encode(*parts: Tensor) -> Tensor:
        return codec.encode(torch.cat(parts, dim=2))[0]

    torch.testing.assert_close(encode(one, target)[:, :, :4], encode(one))
    leak = (encode(one, target)[:, :, 4:] - encode(other, target)[:, :, 4:]).abs().max()
    assert leak > 1e-3, "what encoding the target alone avoids"
    for frames in (1, 2, 3):  # a shorter still clip is the head of a longer one: the VAE is causal in time
        torch.testing.assert_close(encode(one[:, :, : 4 * frames - 3]), encode(one)[:, :, :frames])


def test_a_layout_that_does_not_count_the_frames_is_refused():
    """The authors' Wan path takes any c/b/t string, and silently trains on the wrong frames."""
    backbone = WanBackbone(tiny_transformer())
    short = ClipLayout((Segment("condition", 1), Segment("buffer", 3), Segment("target", 8)))
    with pytest.raises(ValueError, match="the layout has 12 latent frames, x has 13"):
        backbone(clip(13), torch.tensor([0.5, 0.5]), torch.zeros(2, 6, TEXT_DIM), layout=short)
    assert loss_weights(short).shape == (12,)
