"""Stable Video Diffusion folders that hold a text encoder, too, and AID's modules beside the U-Net."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline

from models.folder import load_model, load_settings, part_folders, save_model
from models.methods import get_method
from models.modules.aid_unet import AIDUNetModules
from models.tiny import TEXT_DIM
from models.tiny_hunyuan import tiny_hunyuan_text
from models.tiny_svd import build_tiny_svd_folder
from tests.models.test_aid_svd import SMALL, L


def test_a_folder_brings_the_modules_back_and_plain_diffusers_opens_it(tmp_path):
    model = build_tiny_svd_folder(tmp_path / "base", text_length=L, texts=True)
    settings = copy.deepcopy(model.settings)
    settings.method, settings.method_params = "aid", SMALL
    method = get_method("aid", **SMALL)
    method.attach(model.backbone, seed=3)
    with torch.no_grad():
        for parameter in model.backbone.conditioner.parameters():
            parameter.add_(0.1)
    save_model(tmp_path / "aid", model, settings)
    again = load_model(tmp_path / "aid")
    assert isinstance(again.backbone.conditioner, AIDUNetModules)
    for (name, one), (_, other) in zip(
        model.backbone.state_dict().items(), again.backbone.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    first = load_model(tmp_path / "base", parts=("text", "image"))
    assert again.text.hash == first.text.hash and again.image_encoder.hash == first.image_encoder.hash
    assert (again.backbone.text_width, again.backbone.latent_scale, again.backbone.fps) == (TEXT_DIM, 0.5, 7.0)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "aid", local_files_only=True)
    theirs = pipeline.unet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.backbone.unet.state_dict().items())
    method.attach(again.backbone)  # training goes on
    with pytest.raises(ValueError, match="another method or size"):
        get_method("aid", **SMALL | {"width": 32}).attach(again.backbone)
    copied = load_model(tmp_path / "aid", parts=("backbone",))
    save_model(tmp_path / "copy", copied, settings, copy_parts_from=tmp_path / "aid")
    assert load_model(tmp_path / "copy").text.hash == first.text.hash
    assert part_folders(tmp_path / "copy")["text"] == ("text_encoder", "tokenizer")


def test_a_text_encoder_put_into_a_plain_folder_is_found(tmp_path):
    build_tiny_svd_folder(tmp_path / "plain")
    build_tiny_svd_folder(tmp_path / "other", texts=True)
    expected = load_model(tmp_path / "other", parts=("text",)).text.hash
    (tmp_path / "plain" / "shotloom.json").unlink()
    assert load_model(tmp_path / "plain").backbone.text_width is None and not load_model(tmp_path / "plain").has("text")
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "other" / name).rename(tmp_path / "plain" / name)
        if name == "text_encoder":
            with pytest.raises(FileNotFoundError, match="tokenizer is missing: the text of a model folder lies there"):
                load_model(tmp_path / "plain")
    model = load_model(tmp_path / "plain")
    assert model.text.hash == expected and model.backbone.text_width == model.text.dim
    assert load_settings(tmp_path / "plain").text_length == 77
    StableVideoDiffusionPipeline.from_pretrained(tmp_path / "plain", local_files_only=True)


@torch.no_grad()
def test_a_clip_reads_texts_too(tmp_path):
    """The paper's text encoder, whose table of positions cuts what is longer."""
    build_tiny_svd_folder(tmp_path / "m", text_length=100)
    parts = tiny_hunyuan_text().modules_by_folder
    clip, tokenizer = parts["text_encoder_2"], parts["tokenizer_2"]
    clip.save_pretrained(tmp_path / "m" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "m" / "tokenizer")
    model = load_model(tmp_path / "m")
    positions = clip.config.max_position_embeddings
    assert model.text.dim == model.backbone.text_width == clip.config.hidden_size and model.text.max_length == positions
    found = model.text.encode(["it falls", ""])
    for text, embedding in zip(["it falls", ""], found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert torch.allclose(embedding, clip(ids).last_hidden_state[0], atol=1e-6)
    with pytest.warns(UserWarning, match=f"over {positions} tokens"):
        assert len(model.text.encode(["it falls " * positions])[0]) == positions
    get_method("aid", **SMALL).attach(model.backbone)
    assert model.backbone.conditioner.dual_query.read_text.in_features == clip.config.hidden_size
