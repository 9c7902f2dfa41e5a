"""The stages that pretrain the shipped models: their data, and a whole run in miniature."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from pipelines.toy_models.cache import cache_clip
from pipelines.toy_models.data import IMAGE_STEPS, TEXT_LENGTH, vae_batch
from pipelines.toy_models.measure import PROMPT_SEED, held_out_scenes
from pipelines.toy_models.texts import SLOTS, fitting, text_batch
from toyworld.text import parse_sentence, parse_shot_prompt, parse_story, sentence
from toyworld.vocabulary import ACTIONS, COLOURS
from toyworld.world import is_held_out
from train.text_encoder import TextEncoderSettings, train_text_encoder


def test_vae_batches_depend_on_seed_and_step_only() -> None:
    video, weight = vae_batch(0, IMAGE_STEPS)
    assert video.shape == (3, 3, 9, 64, 64) and weight.shape == (3, 1, 9, 64, 64)
    assert torch.equal(video, vae_batch(0, IMAGE_STEPS)[0])
    assert not torch.equal(video, vae_batch(1, IMAGE_STEPS)[0])
    assert vae_batch(0, 0)[0].shape == (16, 3, 1, 64, 64)
    assert 0.005 < (weight > 1).float().mean() < 0.5  # the weight marks characters, not the whole picture


def test_texts_say_what_the_slots_hold() -> None:
    texts, classes = text_batch(0, 3)
    assert classes.keys() == SLOTS.keys()
    seen = 0
    for row, text in enumerate(texts):
        said = {name: values[row] for name, values in classes.items() if values[row] >= 0}
        assert all(0 <= value < SLOTS[name] for name, value in said.items())
        if "shots" in said:
            story = parse_story(text)
            assert said["character0_colour"] == COLOURS.index(story.characters[0].colour)
            assert said["shots"] == story.num_shots - 1
        elif "actor" in said:
            prompt = parse_shot_prompt(text)
            assert (said["actor"], said["action"]) == (prompt.ids[0], ACTIONS.index(prompt.action))
        else:
            shot = parse_sentence(text)
            assert said["character0_colour"] == COLOURS.index(shot.actor.colour)
            assert said["action"] == ACTIONS.index(shot.action)
        seen += 1
    assert seen == 48


def test_training_never_shows_what_is_held_out() -> None:
    trained = set()
    for index, patterned in product(range(200), (False, True)):
        scene, texts = cache_clip("small", "train", 0, index, patterned)
        shot = scene.shots[0]
        who = scene.characters[shot.actor]
        assert not is_held_out(who, shot.action) and not any(is_held_out(c) for c in scene.characters)
        trained.add((who.colour, who.shape, who.pattern, shot.action))
        assert len(texts) == 3 and len(texts[2]) == 2
        assert sum(len(part) + 1 for part in texts[2]) <= TEXT_LENGTH
    patterns = Counter(pattern for _, _, pattern, _ in trained)
    assert len(patterns) == 3 and len({(colour, shape) for colour, shape, *_ in trained}) == 18
    for scene in held_out_scenes("small", 64):
        assert scene.seed == PROMPT_SEED
        who = scene.characters[scene.shots[0].actor]
        assert (who.colour, who.shape, who.pattern, scene.shots[0].action) not in trained


def tiny_encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(
            vocab_size=384, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0, pad_token_id=0
        )
    )


def test_text_encoder_learns_and_resumes(tmp_path: Path) -> None:
    slots = {"colour": 2}

    def texts(step: int) -> tuple[list[str], dict[str, list[int]]]:
        return ["a red one", "a blue one"] * 8, {"colour": [0, 1] * 8}

    settings = TextEncoderSettings(steps=60, learning_rate=3e-3, warmup_steps=5, checkpoint_every=20)
    whole = tiny_encoder()
    accuracy = train_text_encoder(whole, ByT5Tokenizer(), slots, texts, settings, tmp_path / "a", say=lambda _: None)
    assert accuracy["colour"] == 1.0

    def dies(step: int) -> tuple[list[str], dict[str, list[int]]]:
        if step == 45:
            raise KeyboardInterrupt
        return texts(step)

    killed = tiny_encoder()
    with pytest.raises(KeyboardInterrupt):
        train_text_encoder(killed, ByT5Tokenizer(), slots, dies, settings, tmp_path / "b", say=lambda _: None)
    again = tiny_encoder()
    train_text_encoder(again, ByT5Tokenizer(), slots, texts, settings, tmp_path / "b", say=lambda _: None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_padded_text_encoder_reads_as_the_codec_of_texts_does(tmp_path: Path) -> None:
    """What it learned on is what `TextEncoder` gives: without a mask, all `pad_to` tokens read."""
    from models.text import TextEncoder, TextStyle

    def texts(step: int) -> tuple[list[str], dict[str, list[int]]]:
        return fitting((["a red one", "a blue one", "much too long for it"] * 8, {"colour": [0, 1, 0] * 8}), 15)

    assert texts(0) == (["a red one", "a blue one"] * 8, {"colour": [0, 1] * 8})
    settings = TextEncoderSettings(steps=60, learning_rate=3e-3, warmup_steps=5, checkpoint_every=100)
    model, seen = tiny_encoder(), []
    model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state[0]))
    slots = {"colour": 2}
    found = train_text_encoder(model, ByT5Tokenizer(), slots, texts, settings, tmp_path, lambda _: None, pad_to=16)
    assert found["colour"] == 1.0 and seen[-1].shape == (16, 16)
    first = tiny_encoder()
    encoder = TextEncoder(ByT5Tokenizer(), first, 16, style=TextStyle(padded=True))
    assert torch.allclose(encoder.encode(["a red one"])[0], seen[0], atol=1e-5), "the first step's, untrained"


@pytest.mark.slow
def test_the_whole_run_in_miniature(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    from models.folder import load_model
    from pipelines.toy_models.build import build_toy_models
    from pipelines.toy_models.settings import ToyModelsConfig

    config = ToyModelsConfig(
        run_dir=tmp_path / "run", out=tmp_path / "model", vae_steps=2, vae_polish_steps=1, text_steps=2, clips=8,
        patterned=8, steps=2, batch_size=4, decoder_steps=2, width=64, layers=1, prompts=2,
    )  # fmt: skip
    assert build_toy_models(config) == tmp_path / "model"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "python -m pipelines.toy_models steps=2" in card and "| colour |" in card and "| decoder | step" in card
    WanPipeline.from_pretrained(tmp_path / "model")

    onward = ToyModelsConfig(
        run_dir=tmp_path / "onward", out=tmp_path / "onward-model", start=tmp_path / "model", clips=8, patterned=8,
        steps=1, batch_size=4, decoder_steps=0, prompts=2,
    )  # fmt: skip
    build_toy_models(onward)
    assert not (tmp_path / "onward" / "vae").exists()
    card = (tmp_path / "onward-model" / "README.md").read_text()
    assert card.index("steps=2 ") < card.index("steps=1 ")  # the card tells of both runs, in order
    assert card.count("| transformer | step") == 2 and card.count("| vae | step") == 1

    reader = ToyModelsConfig(
        run_dir=tmp_path / "reader", out=tmp_path / "reader-model", start=tmp_path / "model", clips=8, patterned=8,
        text_steps=1, steps=1, batch_size=4, decoder_steps=0, prompts=2,
    )  # fmt: skip
    build_toy_models(reader)
    before, onward_text, after = (
        load_model(tmp_path / name, parts=("text",)).text for name in ("model", "onward-model", "reader-model")
    )
    assert before.hash == onward_text.hash != after.hash, "text_steps trains an earlier model's text encoder on"
    assert (tmp_path / "reader-model" / "README.md").read_text().count("| text_encoder | step") == 2

    polished = ToyModelsConfig(
        run_dir=tmp_path / "polished", out=tmp_path / "polished-model", start=tmp_path / "model", steps=0,
        decoder_steps=1, prompts=2,
    )  # fmt: skip
    build_toy_models(polished)
    assert not list((tmp_path / "polished").glob("latents*")), "no clips are encoded for a decoder"
    one, two = (load_model(tmp_path / name) for name in ("model", "polished-model"))
    for name, value in one.backbone.state_dict().items():
        assert torch.equal(value, two.backbone.state_dict()[name]), name
    changed = {
        name.partition(".")[0] for name, value in one.codec.vae.state_dict().items()
        if not torch.equal(value, two.codec.vae.state_dict()[name])
    }  # fmt: skip
    assert changed <= {"decoder", "post_quant_conv"} and changed


def test_the_card_says_how_a_run_was_started(tmp_path: Path) -> None:
    from pipelines.toy_models.card import command
    from pipelines.toy_models.settings import ToyModelsConfig

    assert command(ToyModelsConfig(steps=5)) == "python -m pipelines.toy_models steps=5"
    onward = ToyModelsConfig(steps=0, start=tmp_path, run_dir=Path("runs/b"), compile=True, decoder_steps=30)
    assert command(onward) == (
        f"python -m pipelines.toy_models steps=0 run_dir=runs/b start={tmp_path} decoder_steps=30 compile=true"
    )
    with pytest.raises(ValueError, match="steps=0 trains no transformer: give start=FOLDER"):
        ToyModelsConfig(steps=0)


@pytest.mark.parametrize("backbone", ["cogvideox", "latte", "svd"])
def test_the_shipped_sizes_are_small(backbone) -> None:
    from pipelines.toy_models.parts import SMALL

    small = SMALL[backbone]
    parts = (small.make_vae(), small.make_transformer(small.width, small.layers))
    assert sum(p.numel() for part in parts for p in part.parameters()) <= 2_900_000


def test_texts_that_the_model_would_cut_are_left_out() -> None:
    from models.text import TextStyle
    from models.tiny import tiny_text_encoder
    from pipelines.toy_models.cache import readable

    scene, texts = cache_clip("small", "train", 0, 3)
    assert readable(texts, tiny_text_encoder(max_length=256), scene) == texts
    for encoder in (tiny_text_encoder(max_length=120), tiny_text_encoder(max_length=120, style=TextStyle(padded=True))):
        found = readable(texts, encoder, scene)
        assert found == [text for text in texts[:2] if len(text[0]) < 120], "the story is longer"
        assert readable([("x" * 120,)], encoder, scene) == [(sentence(scene, 0),)]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["cogvideox", "latte", "svd"])
def test_the_other_families_in_miniature(tmp_path: Path, backbone) -> None:
    import diffusers
    from safetensors import safe_open

    from models.families import FAMILIES
    from models.folder import load_model
    from pipelines.toy_models.build import build_toy_models
    from pipelines.toy_models.settings import ToyModelsConfig

    config = ToyModelsConfig(
        backbone=backbone, run_dir=tmp_path / "run", out=tmp_path / "model", vae_steps=2, vae_polish_steps=1,
        text_steps=2, clips=4, patterned=4, steps=2, batch_size=4, decoder_steps=2,
        width=64, layers=1, prompts=2,
    )  # fmt: skip
    assert build_toy_models(config) == tmp_path / "model"
    assert (tmp_path / "run" / "text_encoder").exists() == (backbone == "cogvideox"), "it learns to read padding"
    card = (tmp_path / "model" / "README.md").read_text()
    family = FAMILIES[backbone]
    assert f"python -m pipelines.toy_models steps=2 backbone={backbone} " in card and "| decoder | step" in card
    assert f"`{family.vae_class.__name__}`" in card and f"`{family.pipeline}.from_pretrained(FOLDER)`" in card
    for file in (tmp_path / "model").rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    getattr(diffusers, family.pipeline).from_pretrained(tmp_path / "model", local_files_only=True)
    model = load_model(tmp_path / "model")
    latents = model.codec.normalize(model.codec.encode(vae_batch(0, 0, images=True)[0])[0])
    assert 0.3 < latents.std() < 3.0, "the units of the model"
