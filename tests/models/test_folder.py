"""Model folders, text, codec and LoRA, on a tiny random model that plain diffusers must read, too."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline

from models.codecs import VideoCodec
from models.folder import Model, ModelSettings, load_model, save_model
from models.modules.lora import inject_lora, load_lora, merge_lora, save_lora
from models.records import RecordError
from models.text import TextContext, TextEncoder, clean_prompt, null_text, pack_text
from models.tiny import TEXT_DIM, build_tiny_folder, tiny_text_encoder, tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_folder(path, 0, text_length=32)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    return WanPipeline.from_pretrained(folder)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, LEVELS, TEXT = randn(1, 4, 2, 4, 4), torch.tensor([[0.2, 0.9]]), randn(1, 8, TEXT_DIM, seed=1)


def predict(model) -> torch.Tensor:
    with torch.no_grad():
        return model.backbone(X, LEVELS, TEXT)


# --- folders -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_diffusers_opens_and_runs_the_folder(folder, pipeline):
    model = load_model(folder)
    level = torch.tensor([0.7])
    assert torch.equal(pipeline.transformer(X, 1000 * level, TEXT).sample, model.backbone(X, level, TEXT))
    assert pipeline.scheduler.config.shift == model.settings.level_shift
    frames = pipeline("a red circle", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 5, 32, 32, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="device=cuda: PyTorch finds no GPU here"):
        load_model(folder, device="cuda")


def test_a_folder_comes_back_as_it_was_written(tmp_path, folder):
    first = load_model(folder)
    save_model(tmp_path / "again", first, first.settings)
    again = load_model(tmp_path / "again")
    assert again.settings == first.settings == ModelSettings(
        method="lct", text_length=32, frames_per_shot=5, height=32, width=32, fps=8.0
    )  # fmt: skip
    assert torch.equal(predict(first), predict(again))
    assert first.codec.hash == again.codec.hash and first.text.hash == again.text.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"], "no scratch is left"


def test_a_folder_does_not_say_where_its_parts_came_from(tmp_path, folder):
    model = load_model(folder)
    save_model(tmp_path / "again", model, model.settings)
    told = [path for path in (tmp_path / "again").rglob("*.json") if str(folder) in path.read_text()]
    assert not told
    for part in ("transformer", "vae"):
        assert json.loads((tmp_path / "again" / part / "config.json").read_text())["_class_name"]


def test_parts_can_be_left_out_and_copied(tmp_path, folder):
    bare = load_model(folder, parts=())
    assert bare.settings.method == "lct"
    with pytest.raises(AttributeError, match="loaded without its codec"):
        _ = bare.codec
    backbone = load_model(folder, parts=("backbone",))
    with pytest.raises(ValueError, match="holds no codec"):
        save_model(tmp_path / "model", backbone, backbone.settings)
    assert not (tmp_path / "model").exists()
    save_model(tmp_path / "model", backbone, ModelSettings(fps=24.0), copy_parts_from=folder)
    save_model(tmp_path / "model", backbone, ModelSettings(fps=25.0), copy_parts_from=folder)
    whole = load_model(tmp_path / "model")
    assert whole.settings.fps == 25.0 and whole.codec.hash == load_model(folder).codec.hash
    WanPipeline.from_pretrained(tmp_path / "model")


def test_a_plain_wan_folder_needs_no_settings_file(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "shotloom.json").unlink()
    assert load_model(tmp_path / "plain", parts=("backbone",)).settings == ModelSettings()


def test_half_precision_keeps_the_time_embedding(folder):
    model = load_model(folder, parts=("backbone",), dtype=torch.bfloat16)
    transformer = model.backbone.transformer
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    exact = predict(load_model(folder, parts=("backbone",)))
    with torch.no_grad():
        assert (model.backbone(X.bfloat16(), LEVELS, TEXT.bfloat16()).float() - exact).abs().max() < 0.05


def test_what_is_wrong_with_a_folder_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="model_index.json is missing"):
        load_model(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    settings = json.loads((broken / "shotloom.json").read_text())
    for change, message in (
        ({"frames_per_shots": 5}, "unknown field 'frames_per_shots'; did you mean 'frames_per_shot'"),
        ({"fps": "8"}, r"shotloom\.json\.fps is '8' \(str\), expected float"),
        ({"backbone": "mochi"}, "backbone is 'mochi', expected one of 'wan', 'cogvideox', 'latte'"),
    ):
        (broken / "shotloom.json").write_text(json.dumps(settings | change))
        with pytest.raises(RecordError, match=message):
            load_model(broken, parts=())
    (broken / "shotloom.json").write_text(json.dumps(settings))
    shutil.rmtree(broken / "vae")
    with pytest.raises(FileNotFoundError, match=r"vae is missing: the codec"):
        load_model(broken)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    model = load_model(folder)
    with pytest.raises(ValueError, match="is not a model folder"):
        save_model(tmp_path / "photos", model, model.settings)
    assert (tmp_path / "photos" / "cat.png").exists()


# --- text ----------------------------------------------------------------------------------------------------------


def test_text_is_that_of_the_wan_pipeline(folder, pipeline):
    encoder = load_model(folder, parts=("text",)).text
    prompts = ["a  red circle\n&amp; a square", "", "x"]
    ours = encoder.encode(prompts)
    theirs = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=32)
    for own, padded in zip(ours, theirs, strict=True):
        assert torch.allclose(pack_text([own], 32), padded, atol=1e-5)
    assert torch.equal(null_text(encoder, 32), pack_text([ours[1]], 32))
    assert len(ours[1]) == 1 and clean_prompt(prompts[0]) == "a red circle & a square"


def test_an_embedding_does_not_depend_on_its_neighbours():
    encoder = tiny_text_encoder()
    alone = encoder.encode(["a red circle"])[0]
    assert torch.equal(alone, encoder.encode(["a much longer text than that", "a red circle"])[1])
    assert alone.shape == (13, TEXT_DIM) and not torch.equal(alone, encoder.encode(["a red square"])[0])


def test_long_texts_are_cut_counted_and_told():
    encoder = tiny_text_encoder(max_length=6)
    with pytest.warns(UserWarning, match="1 of 2 texts have over 6 tokens"):
        cut, short = encoder.encode(["abcdefghij", "abcde"])
    assert encoder.truncated == 1 and len(cut) == 6 == len(short)
    assert torch.equal(cut, short), "the end token stays"


def test_packing_is_concatenation_and_zeros():
    one, two = randn(2, 3, seed=1), randn(4, 3, seed=2)
    packed = pack_text([one, two], 9)
    assert torch.equal(packed[:2], one) and torch.equal(packed[2:6], two) and not packed[6:].any()
    with pytest.raises(ValueError, match=r"2 \+ 4 = 6 tokens do not fit a context of 5"):
        pack_text([one, two], 5)


def test_text_hash_is_that_of_the_files(folder):
    exact = load_model(folder, parts=("text",)).text
    half = load_model(folder, parts=("text",), dtype=torch.bfloat16).text
    assert exact.hash == half.hash and next(half.model.parameters()).dtype == torch.bfloat16
    assert tiny_text_encoder(0).hash == tiny_text_encoder(0).hash != tiny_text_encoder(1).hash


def test_an_unknown_text_encoder_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "text_encoder" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        TextEncoder.from_folder(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        TextEncoder.from_folder(tmp_path)


def test_a_context_names_its_frames():
    context = TextContext(randn(2, 3, 5, 7), torch.tensor([0, 1, 2, 2]))
    assert context.embeddings.shape[1] == 3


# --- codec ---------------------------------------------------------------------------------------------------------


def test_codec_shapes_and_units():
    codec = VideoCodec(tiny_vae())
    video = torch.rand(2, 3, 9, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = codec.encode(video)
    assert mean.shape == logvar.shape == (2, 4, 3, 4, 2) and codec.num_latent_frames(9) == 3
    z = codec.normalize(mean)
    for c, (m, s) in enumerate(zip(codec.vae.config.latents_mean, codec.vae.config.latents_std, strict=True)):
        assert torch.allclose(z[:, c], (mean[:, c] - m) / s, atol=1e-6)
    assert torch.allclose(codec.denormalize(z), mean, atol=1e-6)
    assert torch.equal(codec.normalize(mean[0]), z[0]), "also without a batch"
    decoded = codec.decode(z)
    assert decoded.shape == video.shape and decoded.abs().max() <= 1
    assert torch.allclose(decoded, codec.vae.decode(mean).sample.clamp(-1, 1), atol=1e-4)


def test_what_is_encoded_does_not_know_the_future():
    codec = VideoCodec(tiny_vae())
    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, first = codec.encode(video)[0], codec.encode(video[:, :, :1])[0]
    assert torch.allclose(whole[:, :, :1], first, atol=1e-5)
    assert (whole[:, :, 1:2] - first).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("part", "counts"), [("encoder", True), ("quant_conv", True), ("decoder", False), ("post_quant_conv", False)]
)
def test_codec_hash_follows_the_weights_that_make_latents(part: str, counts: bool):
    first, other = VideoCodec(tiny_vae(0)), VideoCodec(tiny_vae(0))
    assert first.hash == other.hash and len(first.hash) == 64
    with torch.no_grad():
        next(other.vae.get_submodule(part).parameters()).mul_(1.5)
    assert (VideoCodec(other.vae).hash != first.hash) == counts


def test_codec_refuses_what_it_cannot_encode():
    codec = VideoCodec(tiny_vae())
    for shape, message in (
        ((1, 3, 4, 16, 16), r"4 frames: the VAE takes 4k\+1"),
        ((1, 3, 5, 12, 16), "12x16, the VAE needs multiples of 8"),
        ((3, 5, 16, 16), r"expected \[B,3,T,H,W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.encode(torch.zeros(shape))


# --- LoRA ----------------------------------------------------------------------------------------------------------


def disturbed_lora(folder):
    """A model with LoRA whose low-rank weights are not at their start."""
    model = load_model(folder, parts=("backbone",))
    before = predict(model)
    names = inject_lora(model.backbone, rank=4, alpha=8)
    assert torch.equal(predict(model), before), "a new LoRA changes nothing"
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trainable == set(names) and len(names) == 2 * 2 * 10 and all("lora_" in name for name in names)
    for i, name in enumerate(sorted(names)):
        parameter = model.backbone.get_parameter(name)
        parameter.data = 0.1 * randn(*parameter.shape, seed=i)
    assert (predict(model) - before).abs().max() > 1e-3
    return model


def test_lora_files_go_both_ways(tmp_path, folder):
    model = disturbed_lora(folder)
    file = save_lora(model.backbone, tmp_path / "lora")
    for source in (file, file.parent):
        ours = load_model(folder, parts=("backbone",))
        load_lora(ours.backbone, source)
        assert torch.equal(predict(ours), predict(model))
    theirs = WanPipeline.from_pretrained(folder)
    theirs.load_lora_weights(tmp_path / "lora")
    level = torch.tensor([0.7])
    with torch.no_grad():
        expected = model.backbone(X, level, TEXT)
        assert torch.allclose(theirs.transformer(X, 1000 * level, TEXT).sample, expected, atol=1e-6)


def test_a_lora_of_diffusers_opens(tmp_path, folder):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained = WanPipeline.from_pretrained(folder).transformer
    trained.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained),
        **_collate_lora_metadata({"transformer": trained}),
    )
    ours = load_model(folder, parts=("backbone",))
    load_lora(ours.backbone, tmp_path)
    level = torch.tensor([0.7])
    with torch.no_grad():
        assert torch.equal(ours.backbone(X, level, TEXT), trained(X, 1000 * level, TEXT).sample)
    assert {n for n, p in ours.backbone.named_parameters() if p.requires_grad} == {
        n for n, _ in ours.backbone.named_parameters() if "lora_" in n
    }


def test_merged_lora_is_a_plain_model(tmp_path, folder):
    model = disturbed_lora(folder)
    with pytest.raises(ValueError, match="merge_lora it first"):
        save_model(tmp_path / "merged", model, model.settings, copy_parts_from=folder)
    expected = predict(model)
    merge_lora(model.backbone)
    assert torch.allclose(predict(model), expected, atol=1e-5)
    save_model(tmp_path / "merged", model, model.settings, copy_parts_from=folder)
    assert torch.equal(predict(load_model(tmp_path / "merged")), predict(model))
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_a_seed_fixes_the_start_of_lora(folder):
    def start(seed):
        model = load_model(folder, parts=("backbone",))
        torch.manual_seed(99)
        names = inject_lora(model.backbone, rank=2, alpha=2, seed=seed)
        return torch.cat([model.backbone.get_parameter(n).flatten() for n in names])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_lora_refuses_what_does_not_fit(tmp_path, folder):
    model = load_model(folder, parts=("backbone",))
    with pytest.raises(ValueError, match="target 'to_qq' matches no layer"):
        inject_lora(model.backbone, 4, 4, ["to_qq"])
    with pytest.raises(ValueError, match="rank is 0"):
        inject_lora(model.backbone, 0, 4)
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_lora(model.backbone, tmp_path)
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights"):
        load_lora(model.backbone, tmp_path)
    from safetensors.torch import save_file

    save_file({"unet.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no weights named transformer\.\*"):
        load_lora(model.backbone, tmp_path / "other.safetensors")


def test_a_model_says_where_it_is(folder):
    model = load_model(folder)
    assert isinstance(model, Model) and model.device == torch.device("cpu")
