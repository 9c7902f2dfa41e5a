"""HunyuanVideo (2412.03603) with a noise level per latent frame, shot positions, attention rules and a text per shot.

The diffusers model itself runs, its parameters and state-dict keys unchanged. With one level per sample and one text it
is that model, call for call. Otherwise its blocks see rows: every latent frame is a row [n,D] with its own time, and so
is every text [L,D], so that the model's per-sample modulation is one per frame and per text, broadcast over their
tokens and never expanded to them. Text and video meet in the attention only, whose processor knows the clip. The
single-stream blocks, which join text and video before they modulate them, get a forward of their own for rows.

Text tokens are modulated, too, and a text has no level of its own. Its conditioning vector is the mean of those of the
frames that read it, or that of the highest level among them (`models.joint_attention.TextTime`): the clock of its shot,
as in HunyuanVideo's own image-to-video model, whose given frame is at time 0 and whose text is not. Where these frames
share a level both are one: the plain model's when all levels are equal, LCT's "a text shares its shot's time" when they
differ per shot. The token refiner keeps one time per text, the clock. A frame's vector adds the pooled text it reads.

In the diagonal mode (LCT 2503.10589, interleaved 3D RoPE) token i of a shot's text stands at (o+i, o+i, o+i) and its
video after the last valid text token; positions so differ between samples whose texts differ in length, and never
depend on padding or on the batch. Weights that were trained without text positions need tuning for it. LCT's global
prompt is a "dummy" segment with a shot and a text of its own before the others (`models.layout.with_story`); in the
other modes, where a shot sees its own text only, put it in front of each prompt.

B batch, F latent frames, C channels, H W latent size, n tokens per frame, N = F*n, G text groups, T text copies (see
joint_attention), L text tokens, D width, P width of the pooled text, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, get_args

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_hunyuan_video as plain_model
from torch import Tensor, nn

from models.attention import AttentionRule, group_sizes
from models.backbones.base import Backbone, BranchSites, Capabilities, LayerBranch
from models.backbones.inputs import as_context, check_inputs, shared_levels
from models.joint_attention import (
    JointPlan,
    TextPadding,
    TextTime,
    check_text_time,
    joint_attention,
    joint_plan,
    mean_over_readers,
    text_padding,
)
from models.layout import ClipLayout, Segment
from models.positions import PositionMode, interleaved_positions, position_ids, rope_tables
from models.process import FlowMatching
from models.text import TextContext, unpack_pooled

__all__ = ["HunyuanVideoBackbone", "TextContext"]


class HunyuanVideoBackbone(Backbone):
    """`transformer` is a diffusers HunyuanVideoTransformer3DModel for text to video; its blocks become ours in place.

    `embedded_guidance` is the guidance scale that distilled weights take as an input (config `guidance_embeds`); other
    weights do not see it. With `packed_text` contexts hold the pooled text as their first row and zeros for padding
    (`models.text.unpack_pooled`), which is how model folders, datasets and samplers hold them.
    """

    capabilities = Capabilities(
        per_frame_levels=True,
        position_modes=frozenset(get_args(PositionMode)),
        attention_rules=frozenset(get_args(AttentionRule)),
        text_per_shot=True,
        joint_text=True,
        layer_branch=True,
        reasons={
            "kv_cache": "HunyuanVideo joins text and frames in one attention; Shotloom does not keep its keys; use "
            "Wan, or CogVideoX 2B or 5B"
        },
    )
    # the linear layers of all attentions (the token refiner's, too) and of the double-stream blocks' feed-forwards
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def __init__(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        embedded_guidance: float = 6.0,
        *,
        packed_text: bool = False,
    ) -> None:
        super().__init__()
        model: Any = transformer
        config = model.config
        if config.patch_size_t != 1:
            raise ValueError(
                f"patch_size_t is {config.patch_size_t}: a level per latent frame needs a temporal patch of 1"
            )
        if config.image_condition_type is not None:
            raise ValueError(
                f"this is an image-to-video HunyuanVideo (image_condition_type {config.image_condition_type!r}); use a "
                "text-to-video one, which learns image conditions as clean frames (method fvdm)"
            )
        self.transformer = model
        self.process = FlowMatching()
        self.pixels_per_token = config.patch_size**2
        self.embedded_guidance = embedded_guidance if config.guidance_embeds else None
        self.packed_text = packed_text
        model.rope = _ClipInfo()
        model.context_embedder.register_forward_pre_hook(_text_times_and_mask)
        model.time_text_embed.register_forward_hook(model.rope.mean_vectors)
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        blocks[0].register_forward_pre_hook(_frames_as_rows)
        model.x_embedder.register_forward_hook(model.rope.add_patches)
        for block in model.transformer_blocks:
            block.__class__ = HunyuanVideoTransformerBlock
            block.norm1.register_forward_pre_hook(_first_times, with_kwargs=True)
            block.norm1_context.register_forward_pre_hook(_last_times, with_kwargs=True)
        model.norm_out.register_forward_pre_hook(_first_times, with_kwargs=True)
        for block in model.single_transformer_blocks:
            block.__class__ = HunyuanVideoSingleTransformerBlock
        for layer, block in enumerate(blocks):
            block.layer = layer
            block.attn.set_processor(_JointAttention())

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def sites(self) -> BranchSites:
        """Double-stream layers, then single-stream ones, whose output projection is a part of `proj_out`."""
        config, model = self.config, self.transformer
        width = config.num_attention_heads * config.attention_head_dim
        double = len(model.transformer_blocks)
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]

        def output(layer: int) -> tuple[Tensor, Tensor | None]:
            if layer < double:
                return blocks[layer].attn.to_out[0].weight, blocks[layer].attn.to_out[0].bias
            return blocks[layer].proj_out.weight[:, :width], None

        return BranchSites(
            tuple(block.attn for block in blocks), output, width, width, config.text_embed_dim, config.patch_size,
            "transformer.x_embedder", (".attn.add_", ".attn.norm_added_", ".attn.to_add_out."), text_padding="masked",
        )  # fmt: skip

    def read_text(self, text: TextContext | Tensor, frames: int) -> TextContext:
        context = as_context(text, frames)
        if self.packed_text and context.pooled is None:
            context = unpack_pooled(context, self.config.pooled_projection_dim)
        return context

    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W]
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # with pooled text, so a plain tensor is refused unless the pooled text is in it
        *,
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,
        attention_rule: AttentionRule = "full",
        branch: LayerBranch | None = None,  # what conditioning modules add to each layer
        patches: Tensor | None = None,  # what they add to the patch embedding, [B,D,F,h,w]
        text_time: TextTime = "max",  # of a text whose frames differ in level
    ) -> Tensor:
        """The predicted velocity, [B,C,F,H,W].

        With equal levels, one text and no layout this is, bit for bit, the diffusers model at timestep 1000 * level and
        guidance 1000 * embedded_guidance. Raises ValueError where x, levels, text and layout do not fit together.
        """
        batch, _, frames, height, width = x.shape
        layout = layout or ClipLayout((Segment("target", frames),))
        text = self.read_text(text, frames)
        patch = self.config.patch_size
        check_inputs(x, levels, text, layout, patch)
        check_text_time(text_time)
        if text.pooled is None:
            raise ValueError("HunyuanVideo is also conditioned on a pooled text: give TextContext(pooled=[B,G,P])")

        diagonal = position_mode == "diagonal"
        dummies = layout.is_dummy.nonzero().flatten().tolist()
        plan = joint_plan(group_sizes(layout), text.frame_text.tolist(), attention_rule, diagonal, dummies)
        copies = list(plan.text_groups)
        lengths = _lengths(text, copies)
        levels = shared_levels(levels)
        self.transformer.rope.mean = levels.ndim == 2 and text_time == "mean"
        plain = levels.ndim == 1 and len(copies) == 1 and not diagonal and not dummies and branch is None
        # the plain model works on padding, too
        tokens = text.embeddings.shape[2] if plain else max(length for row in lengths for length in row)
        embeddings, pooled = text.embeddings[:, copies, :tokens], text.pooled[:, copies]  # [B,T,L,D], [B,T,P]
        if not plain:
            levels = levels if levels.ndim == 2 else levels[:, None].expand(batch, frames)
            of_texts = [levels[:, list(read_by)].amax(dim=1) for read_by in plan.text_frames]
            levels = torch.cat([levels.flatten(), torch.stack(of_texts, dim=1).flatten()])  # [B*F+B*T]
            pooled = torch.cat([text.pooled[:, text.frame_text.tolist()].flatten(0, 1), pooled.flatten(0, 1)])
        times = self.process.to_model_time(levels)
        scale = self.embedded_guidance
        guidance = None if scale is None else torch.full_like(times, 1000.0 * scale)

        valid = (torch.arange(tokens) < torch.tensor(lengths)[:, :, None]).to(x.device)  # [B,T,L]
        grid = (height // patch, width // patch)
        rope = (tuple(self.config.rope_axes_dim), self.config.rope_theta)
        placed = _placed_texts(layout, plan) if diagonal else ()
        rotary = _rotary(
            [tuple(row) for row in lengths] if diagonal else [()],
            partial(_tables, layout, grid, position_mode, position_gap, rope, x.device, placed, tokens),
        )
        padding = None if plain else text_padding(lengths, valid)
        self.transformer.rope.clip = _Clip(batch, frames, plain, rotary, plan, padding, branch)
        self.transformer.rope.patches = patches
        text_rows = _TextRows(batch, times[-batch * len(copies) :], valid.flatten(0, 1))
        embeddings, pooled = embeddings.flatten(0, 1), pooled.flatten(0, -2)
        return self.transformer(x, times, embeddings, text_rows, pooled, guidance, return_dict=False)[0]


class _Clip:
    """What the blocks must know of the clip; reaches them as the model's own argument for the rotary tables.

    As an argument it is replayed when gradient checkpointing runs a block again. Neither a tuple nor a dataclass:
    FSDP's mixed precision looks into those and would make the rotary tables bfloat16.
    """

    def __init__(
        self,
        batch: int,
        frames: int,
        plain: bool,  # the diffusers model, call for call; else frames and texts are rows
        rotary: tuple[Tensor, Tensor],  # [1,N,d] each; diagonal: [1 or B,T*L+N,d], text first
        plan: JointPlan,
        padding: TextPadding | None,
        branch: LayerBranch | None = None,
    ) -> None:
        self.batch, self.frames, self.plain = batch, frames, plain
        self.rotary, self.plan, self.padding = rotary, plan, padding
        self.branch = branch

    def branch_of(self, layer: int, video: Tensor, times: Tensor) -> Tensor | float:
        """What the branch adds to a layer whose attention reads `video` [B*F,n,D]: rows like those, or 0."""
        if self.branch is None:
            return 0.0
        hidden = video.unflatten(0, (self.batch, self.frames))
        added = self.branch(layer, hidden, times[: len(video)], self.rotate)
        return 0.0 if added is None else added.flatten(0, 1).type_as(video)

    def rotate(self, x: Tensor) -> Tensor:
        """x [B,M,heads,d] by the positions of the clip's first M video tokens."""
        cos, sin = (table[:, : x.shape[1]] for table in self.rotary)
        return _rotate(x, (cos, sin))


class _TextRows:
    """Stands in for the model's text mask, of which the model itself wants the sum only; an argument, as `_Clip` is."""

    def __init__(self, batch: int, times: Tensor, mask: Tensor) -> None:  # [B*T], bool [B*T,L]
        self.batch, self.times, self.mask = batch, times, mask

    def sum(self, dim: int, dtype: torch.dtype) -> Tensor:
        """[B]: valid text tokens of each sample, for the attention mask, which only the plain model reads."""
        return self.mask.unflatten(0, (self.batch, -1))[:, 0].sum(dim=dim, dtype=dtype)


class _ClipInfo(nn.Module):
    """Stands in for the model's rotary embedding and hands the clip at hand to its blocks. Holds no parameters."""

    clip: _Clip
    patches: Tensor | None = None  # [B,D,F,h,w]
    mean: bool = False  # texts take the mean of the conditioning vectors of the frames that read them

    def forward(self, hidden_states: Tensor) -> _Clip:
        return self.clip

    def add_patches(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the patch embedding [B,N,D]: what conditioning modules add to it."""
        return output if self.patches is None else output + self.patches.flatten(2).transpose(1, 2).type_as(output)

    def mean_vectors(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, None]) -> Any:
        """After the time embedding [B*F+B*T,D]: the vectors of the texts."""
        if not self.mean:
            return output
        frames = output[0][: self.clip.batch * self.clip.frames]
        of_texts = mean_over_readers(frames.unflatten(0, (self.clip.batch, -1)), self.clip.plan.text_frames)
        return torch.cat([frames, of_texts.flatten(0, 1)]), None


def _text_times_and_mask(refiner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the token refiner: the texts [B*T,L,D] with their own times and mask, not the times of all rows."""
    embeddings, _, rows = args
    return embeddings, rows.times, rows.mask


def _frames_as_rows(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the first block: the video tokens [B,N,D] as [B*F,n,D]."""
    hidden, text, times, mask, clip, *rest = args
    if not clip.plain:
        hidden = hidden.reshape(clip.batch * clip.frames, -1, hidden.shape[-1])
    return hidden, text, times, mask, clip, *rest


def _first_times(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Before the modulation of video: of the times of all rows those of the frames, which are the first."""
    video, *times = args
    return (video, *(t[: len(video)] for t in times)), {name: t[: len(video)] for name, t in kwargs.items()}


def _last_times(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Before the modulation of text: the times of the texts, which are the last."""
    return args, {name: times[-len(args[0]) :] for name, times in kwargs.items()}


class HunyuanVideoTransformerBlock(plain_model.HunyuanVideoTransformerBlock):
    """diffusers' double-stream block, named like it, with a branch beside its attention, added without a gate."""

    layer: int

    def forward(
        self,
        hidden_states: Tensor,  # [B*F,n,D]
        encoder_hidden_states: Tensor,  # [B*T,L,D]
        temb: Tensor,  # [B*F+B*T,D]
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        clip: _Clip = freqs_cis
        if clip.branch is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis)
        video, gate, *video_ff = self.norm1(hidden_states, emb=temb)
        text, text_gate, *text_ff = self.norm1_context(encoder_hidden_states, emb=temb)
        added = clip.branch_of(self.layer, video, temb)
        video_out, text_out = self.attn(hidden_states=video, encoder_hidden_states=text, image_rotary_emb=freqs_cis)
        video = hidden_states + gate[:, None] * video_out + added
        text = encoder_hidden_states + text_gate[:, None] * text_out
        return (
            _feed_forward(video, self.norm2, self.ff, *video_ff),
            _feed_forward(text, self.norm2_context, self.ff_context, *text_ff),
        )


def _feed_forward(x: Tensor, norm: nn.Module, layer: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """A modulated feed-forward layer and its skip, on rows [R,m,D] with modulations [R,D]."""
    return x + gate[:, None] * layer(norm(x) * (1 + scale[:, None]) + shift[:, None])


class HunyuanVideoSingleTransformerBlock(plain_model.HunyuanVideoSingleTransformerBlock):
    """diffusers' single-stream block for rows of different kinds, and named like it: sharding goes by the name.

    A branch beside the attention is added without its gate.
    """

    layer: int

    def forward(
        self,
        hidden_states: Tensor,  # [B*F,n,D]
        encoder_hidden_states: Tensor,  # [B*T,L,D]
        temb: Tensor,  # [B*F+B*T,D]
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        clip: _Clip = image_rotary_emb
        if clip.plain:
            return super().forward(hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)
        streams = hidden_states, encoder_hidden_states
        video, video_gate = self.norm(hidden_states, emb=temb[: len(hidden_states)])
        text, text_gate = self.norm(encoder_hidden_states, emb=temb[-len(encoder_hidden_states) :])
        added = clip.branch_of(self.layer, video, temb)
        attended = self.attn(hidden_states=video, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb)
        video, text = (
            stream + gate[:, None] * self.proj_out(torch.cat([out, self.act_mlp(self.proj_mlp(normed))], dim=2))
            for stream, gate, out, normed in zip(streams, (video_gate, text_gate), attended, (video, text), strict=True)
        )
        return video + added, text


class _JointAttention(plain_model.HunyuanVideoAttnProcessor2_0):
    """Attention over video and text: [B,N,D] and [B,L,D] as diffusers does it, or rows [B*F,n,D] and [B*T,L,D]."""

    def __call__(  # type: ignore[override]  # diffusers' own returns a pair, too
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        clip: _Clip | None = image_rotary_emb
        assert clip is not None and encoder_hidden_states is not None, "call the block through HunyuanVideoBackbone"
        if clip.plain:
            tables: Any = (clip.rotary[0][0], clip.rotary[1][0])
            both: Any = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, tables)
            return both
        own = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        video = _project(hidden_states, attn.heads, clip.batch, *own)
        text = _project(encoder_hidden_states, attn.heads, clip.batch, *(own if attn.add_q_proj is None else added))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, video, strict=True))
        query, key = _rotate(query, clip.rotary), _rotate(key, clip.rotary)

        attend = partial(dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config)
        text_tokens = text[0].shape[1]
        out = joint_attention(query, key, value, text_tokens, clip.plan, attend, clip.padding)
        text_out, video_out = out.flatten(2, 3).type_as(query).split([text_tokens, video[0].shape[1]], dim=1)
        video_out, text_out = video_out.reshape(hidden_states.shape), text_out.reshape(encoder_hidden_states.shape)
        if attn.to_out is not None:
            video_out = attn.to_out[1](attn.to_out[0](video_out))
        return video_out, text_out if attn.to_add_out is None else attn.to_add_out(text_out)


def _project(
    rows: Tensor, heads: int, batch: int, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of rows [B*R,m,D]: [B,R*m,heads,d] each."""
    query, key, value = (
        project(rows).reshape(batch, -1, rows.shape[-1]).unflatten(2, (heads, -1)) for project in (to_q, to_k, to_v)
    )
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The last tokens of x [B,T*L+N,heads,d], as many as the tables have, rotated as diffusers does: in float32."""
    cos, sin = rotary[0][:, :, None], rotary[1][:, :, None]
    still = x.shape[1] - cos.shape[1]
    moving = x[:, still:].float()
    even, odd = moving.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (moving * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin).type_as(x)
    return torch.cat([x[:, :still], rotated], dim=1) if still else rotated


def _lengths(text: TextContext, copies: list[int]) -> list[list[int]]:
    """Valid tokens of every text copy, B rows of T."""
    batch, _, tokens, _ = text.embeddings.shape
    return [[tokens] * len(copies)] * batch if text.lengths is None else text.lengths[:, copies].tolist()


def _placed_texts(layout: ClipLayout, plan: JointPlan) -> tuple[tuple[int, int], ...]:
    """Shot and text group of every text copy; a text that several shots read stands in the first."""
    shot_of = [shot for shot, frames in enumerate(layout.shot_slices) for _ in range(frames.start, frames.stop)]
    return tuple(
        (shot_of[read_by[0]], group) for read_by, group in zip(plan.text_frames, plan.text_groups, strict=True)
    )


def _rotary(
    lengths: list[tuple[int, ...]], tables: Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Rotary tables of samples with these text lengths, [1,M,d] where they have them in common, else [B,M,d]."""
    if len(set(lengths)) == 1:
        cos, sin = tables(lengths[0])
        return cos[None], sin[None]
    cos, sin = (torch.stack(parts) for parts in zip(*map(tables, lengths), strict=True))
    return cos, sin


@lru_cache(maxsize=4)  # the layout of a run rarely changes, and the tables of a long scene are large
@torch.inference_mode(False)  # tables first made while sampling must serve training, too
def _tables(
    layout: ClipLayout,
    grid: tuple[int, int],
    mode: PositionMode,
    gap: int,
    rope: tuple[tuple[int, int, int], float],  # head width over t, y, x; theta
    device: torch.device,
    texts: tuple[tuple[int, int], ...],  # shot and text group of each text copy that has positions
    tokens: int,
    lengths: tuple[int, ...],  # its valid tokens
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [N,d], or [T*L+N,d] where texts have positions."""
    positions = (
        interleaved_positions(layout, grid, texts, lengths, tokens)
        if mode == "diagonal"
        else position_ids(layout, grid, mode, gap)
    )
    return rope_tables(positions.to(device), *rope, frequencies=torch.float32)
