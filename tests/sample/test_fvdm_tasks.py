"""Every task of FVDM through the sampler, with an oracle of every process; and videos longer than a clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.methods import get_method
from models.noise import base_levels
from models.process import FlowMatching, Process
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

    process = FlowMatching()

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, **kwargs) -> Tensor:
        return x - torch.arange(x.shape[2]).view(-1, 1, 1) - x[:, :, :1].mean()


@pytest.mark.parametrize(("overlap", "clips"), [(2, 4), (4, 3), (1, 1)])
def test_every_clip_goes_on_from_the_last_frames_of_the_one_before(overlap: int, clips: int) -> None:
    def run(start: Tensor | None = None, clips: int = clips) -> Tensor:
        return sample_extended(
            Drift(), METHOD, base_levels(3), TEXT, shape=(B, C, F, H, W), overlap=overlap, clips=clips, start=start,
            generator=torch.Generator().manual_seed(4),
        )  # fmt: skip

    video = run()
    assert video.shape == (B, C, F + (clips - 1) * (F - overlap), H, W)
    generator = torch.Generator().manual_seed(4)  # by hand: t2v, then extension given the tail
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
    longer = run(start=video, clips=2)
    assert torch.equal(longer[:, :, : video.shape[2]], video) and longer.shape[2] == video.shape[2] + F - overlap


def test_what_cannot_be_extended_is_refused() -> None:
    options = dict(shape=(B, C, F, H, W), generator=torch.Generator())
    with pytest.raises(ValueError, match="overlap is 5, expected 1 to 4"):
        sample_extended(Drift(), METHOD, base_levels(2), TEXT, overlap=5, clips=2, **options)
    with pytest.raises(ValueError, match="start has 1 latent frames, but 2"):
        sample_extended(
            Drift(), METHOD, base_levels(2), TEXT, overlap=2, clips=2, start=torch.zeros(B, C, 1, H, W), **options
        )
    with pytest.raises(ValueError, match="no task 't2v'"):  # its own extension goes on from a cache of shots
        sample_extended(
            Drift(),
            get_method("lct", attention_rule="group_causal"),
            base_levels(2),
            TEXT,
            overlap=2,
            clips=2,
            **options,
        )
    with pytest.raises(ValueError, match="clips is 0"):
        sample_extended(Drift(), METHOD, base_levels(2), TEXT, overlap=2, clips=0, **options)


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
