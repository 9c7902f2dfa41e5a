"""Every task of FVDM through the sampler, with an oracle of every process; and videos longer than a clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.backbones.wan import WanBackbone
from models.methods import get_method
from models.noise import base_levels
from models.process import FlowMatching, Process
from models.windows import clip_windows
from sample.extension import sample_extended
from sample.guidance import Guidance
from sample.sampler import sample
from tests.models.processes import PROCESSES
from tests.models.test_methods import FVDM_TASKS
from tests.sample.test_sampler import Oracle

METHOD = get_method("fvdm")
B, C, F, H, W = 2, 3, 5, 2, 4
TEXT = torch.zeros(B, 1, 4, 5)


class Layered(Oracle):
    """Takes what a method tells a backbone."""

    def __call__(self, x: Tensor, levels: Tensor, text: Tensor, **kwargs) -> Tensor:
        return super().__call__(x, levels, text)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("task", FVDM_TASKS)
def test_an_oracle_recovers_every_task_and_held_frames_are_bit_equal(task: str, process: Process) -> None:
    layout = METHOD.layout_for_task(task, [F], **FVDM_TASKS[task][0])
    plan = METHOD.plan(layout, base_levels(6, shift=3.0), task)
    clean = torch.randn(B, C, F, H, W, generator=torch.Generator().manual_seed(3))
    given = torch.where((plan[0] == 1).view(-1, 1, 1), 77.0, clean)  # must not matter where frames start from noise
    result = sample(
        Layered(clean, process), layout, plan, TEXT, shape=(B, C, F, H, W), given=given,
        generator=torch.Generator().manual_seed(0), process=process,
    )  # fmt: skip
    torch.testing.assert_close(result, clean, atol=5e-4, rtol=1e-4)
    assert torch.equal(result[:, :, layout.is_given], clean[:, :, layout.is_given])


class Drift(nn.Module):
    """A model whose velocity leads to the frame's number after the first, so that clips differ."""

    process, capabilities = FlowMatching(), WanBackbone.capabilities

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, **kwargs) -> Tensor:
        return x - torch.arange(x.shape[2]).view(-1, 1, 1) - x[:, :, :1].mean()


def extended(backbone: nn.Module, frames: int, **options) -> Tensor:
    return sample_extended(
        backbone, METHOD, base_levels(3), TEXT, shape=(B, C, frames, H, W), clip=F,
        generator=torch.Generator().manual_seed(4), **options,
    )  # fmt: skip


@pytest.mark.parametrize(("overlap", "clips"), [(2, 4), (4, 3), (1, 1)])
def test_every_clip_goes_on_from_the_last_frames_of_the_one_before(overlap: int, clips: int) -> None:
    """F + (J-1)(F-M) frames, each clip by hand: t2v, then extension given the tail; M = F-1 slides by one frame."""
    told: list[tuple[int, int]] = []
    video = extended(
        Drift(), F + (clips - 1) * (F - overlap), overlap=overlap, callback=lambda *step: told.append(step)
    )
    generator = torch.Generator().manual_seed(4)
    expected = None
    for _ in range(clips):
        task, head = ("t2v", {}) if expected is None else ("extension", {"head": overlap})
        layout = METHOD.layout_for_task(task, [F], **head)
        given = None
        if expected is not None:
            given = torch.full((B, C, F, H, W), 55.0)
            given[:, :, :overlap] = expected[:, :, -overlap:]
        plan = METHOD.plan(layout, base_levels(3), task)
        clip = sample(Drift(), layout, plan, TEXT, shape=(B, C, F, H, W), given=given, generator=generator)
        if expected is not None:
            assert torch.equal(clip[:, :, :overlap], expected[:, :, -overlap:]), "what is taken over is bit-equal"
        expected = clip if expected is None else torch.cat([expected, clip[:, :, overlap:]], dim=2)
    assert torch.equal(video, expected)
    assert told == [(k, 3 * clips) for k in range(1, 3 * clips + 1)]


class Watched(Drift):
    """Notes the levels and the frames of every clip that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, **kwargs) -> Tensor:
        self.seen.append((levels[0], x[0, 0, :, 0, 0].clone()))
        return super().forward(x, levels, text)


@pytest.mark.parametrize(
    ("frames", "known"), [(12, []), (9, [0, 1, 2]), (11, [*range(7)]), (13, [0, 6, 12]), (6, [0, 5])]
)
@pytest.mark.parametrize("context_level", [0.0, 0.1])
def test_a_long_video_follows_its_plan_and_keeps_known_frames_wherever_they_are(frames, known, context_level) -> None:
    """A beginning longer than a clip, an end to arrive at, a length that is no whole number of clips."""
    given = torch.randn(B, C, frames, H, W, generator=torch.Generator().manual_seed(9))
    model = Watched()
    video = extended(model, frames, overlap=2, given=given, known=known, context_level=context_level)
    assert torch.equal(video[:, :, known], given[:, :, known])
    layout = METHOD.layout_for_task("long_video", [frames], frames=known)
    plan = METHOD.plan(layout, base_levels(3), "long_video", clip=F, overlap=2, context_level=context_level)
    windows = clip_windows([f in known for f in range(frames)], F, 2)
    assert plan.shape == (3 * len(windows) + 1, frames) and len(model.seen) == 3 * len(windows)
    done = set(known)
    for number, window in enumerate(windows):
        rows = plan[3 * number : 3 * number + 3]
        for f in range(frames):
            if f not in window:
                assert (rows[:, f] == (0 if f in done else 1)).all(), "what is outside the clip waits or is finished"
            elif f in done:
                assert (rows[:, f] == context_level).all()
        for k, (levels, x) in enumerate(model.seen[3 * number : 3 * number + 3]):
            assert torch.equal(levels, rows[k, window.start : window.stop])
            if not context_level:
                held = [f for f in window if f in done]
                assert torch.equal(x[[f - window.start for f in held]], video[0, 0, held, 0, 0]), "seen as they end up"
        done |= set(window)
    assert done == set(range(frames)) and (plan[-1, layout.is_target] == 0).all()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_an_oracle_recovers_a_long_video(process: Process) -> None:
    frames = 8
    clean = torch.randn(B, C, frames, H, W, generator=torch.Generator().manual_seed(3))
    windows = iter(clip_windows([True] + [False] * 7, F, 3))

    class Windowed(Layered):
        calls, capabilities = 0, WanBackbone.capabilities

        def __call__(self, x: Tensor, levels: Tensor, text: Tensor, **kwargs) -> Tensor:
            if self.calls % 6 == 0:
                window = next(windows)
                self.clean = clean[:, :, window.start : window.stop]
            self.calls += 1
            return super().__call__(x, levels, text)

    video = sample_extended(
        Windowed(clean, process), METHOD, base_levels(6, shift=3.0), TEXT, shape=(B, C, frames, H, W), clip=F,
        overlap=3, given=clean, known=[0], generator=torch.Generator().manual_seed(0), process=process,
    )  # fmt: skip
    torch.testing.assert_close(video, clean, atol=5e-4, rtol=1e-4)


def test_what_cannot_be_extended_is_refused() -> None:
    options = dict(generator=torch.Generator())
    for frames, more, message in (
        (9, {"overlap": 5}, "overlap is 5, expected 1 to 4"),
        (9, {"overlap": 0}, "overlap is 0, expected 1 to 4"),
        (4, {}, "clip is 5, expected 1 to the video's 4"),
        (9, {"known": [0]}, r"latent frames \[0\] are known, so `given` must be \(2, 3, 9, 2, 4\), is None"),
        (9, {"known": range(9)}, "nothing is left to generate"),
    ):
        with pytest.raises(ValueError, match=message):
            extended(Drift(), frames, **more)
    causal = get_method("lct", attention_rule="group_causal")
    with pytest.raises(ValueError, match="no task 'long_video'"):  # its own extension goes on from a cache of shots
        sample_extended(Drift(), causal, base_levels(2), TEXT, shape=(B, C, 9, H, W), clip=F, **options)


# --- conditions besides the text -----------------------------------------------------------------------------------


class Told(nn.Module):
    """Its clean clip is the text's number plus what the image says."""

    process = FlowMatching()

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, *, image: Tensor, layout: object = None) -> Tensor:
        clean = text[:, 0, 0, 0].view(-1, 1, 1, 1, 1) + image.view(-1, 1, 1, 1, 1)
        level = levels.view(len(x), 1, -1, 1, 1)
        return (x - clean) / level.clamp_min(1e-6)


def test_conditions_are_prepared_once_for_all_branches_and_zeros_stand_in_for_dropped_ones() -> None:
    calls = []

    def prepare(text: Tensor, conditions) -> dict[str, Tensor]:
        calls.append((text[:, 0, 0, 0].tolist(), conditions["image"].tolist()))
        return {"image": conditions["image"]}

    layout = METHOD.layout_for_task("t2v", [F])
    run = dict(shape=(B, C, F, H, W), prepare=prepare, conditions={"image": torch.tensor([10.0, 20.0])})

    def made(*scales: tuple[str, float]) -> list[float]:
        out = sample(
            Told(), layout, METHOD.plan(layout, base_levels(4), "t2v"), TEXT + 1, guidance=Guidance(scales),
            null={"text": TEXT + 3}, generator=torch.Generator().manual_seed(0), **run,
        )  # fmt: skip
        return out.mean(dim=(1, 2, 3, 4)).tolist()

    assert made() == pytest.approx([11, 21], abs=1e-4) and calls == [([1.0, 1.0], [10.0, 20.0])]
    # nested: e_0 + s_i (e_i - e_0) + s_t (e_it - e_i)
    assert made(("image", 2.0), ("text", 3.0)) == pytest.approx([3 + 2 * 10 - 3 * 2, 3 + 2 * 20 - 3 * 2], abs=1e-3)
    assert calls[1] == ([3.0] * 4 + [1.0] * 2, [0.0, 0.0, 10.0, 20.0, 10.0, 20.0]) and len(calls) == 2
    assert made(("image", 1.0), ("text", 1.0)) == made()
    with pytest.raises(ValueError, match=r"conditions \['image'\] are given, but no `prepare`"):
        sample(
            Told(), layout, METHOD.plan(layout, base_levels(4), "t2v"), TEXT, generator=torch.Generator(),
            **run | {"prepare": None},
        )  # fmt: skip
