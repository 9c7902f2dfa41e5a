"""CogVideoX (Yang et al., 2408.06072) with a noise level per latent frame, shot positions, attention rules, shot texts.

The diffusers model itself runs, its parameters and state-dict keys unchanged: 2B (sine positions added to the tokens),
5B (rotary) and 1.5 (rotary, pairs of latent frames as one token frame). With one level per sample its blocks compute
what they always did; only the attention processor is ours. Where frames differ in level, tokens go through the blocks
as [B,F,n,D] and texts as [B,T,L,D], so that a modulation [B,F,1,D] is broadcast over the tokens of a frame and never
expanded to them.

Text tokens are modulated, too, and a text has no level of its own. Its time is the mean of the time embeddings of the
frames that read it, or the time of the highest level among them (`models.joint_attention.TextTime`): the clock of its
shot, which given frames at level 0 leave where it is. Where these frames share a level both are its time: the plain
model's when all levels are equal, LCT's "a text shares its shot's time" when they differ per shot.

B batch, F token frames, C channels, H W latent size, n tokens per frame, N = F*n, T text copies (see joint_attention),
L text tokens, D width, E width of the time embedding, d width of a head.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import cogvideox_transformer_3d as plain_model
from torch import Tensor, nn

from models.attention import AttentionRule, group_sizes
from models.backbones.base import Backbone, BranchSites, Capabilities, LayerBranch, require
from models.backbones.cogvideox_positions import TextPlaces, rotary_tables, sine_table
from models.backbones.inputs import as_context, check_inputs, shared_levels
from models.joint_attention import (
    JointPlan,
    TextTime,
    check_text_time,
    joint_attention,
    joint_plan,
    mean_over_readers,
    seen_later,
)
from models.kv_cache import KeysValues, KVCache
from models.layout import ClipLayout, Segment
from models.positions import PositionMode
from models.process import Process
from models.text import TextContext

__all__ = ["CogVideoXBackbone", "TextContext"]


class CogVideoXBackbone(Backbone):
    """`transformer` is a diffusers CogVideoXTransformer3DModel for text to video; its blocks become ours in place."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        process: Process,  # of the weights: VPDiffusion that predicts v
    ) -> None:
        super().__init__()
        model: Any = transformer
        config = model.config
        image_parts = [name for name in ("ofs_embed_dim", "use_learned_positional_embeddings") if config[name]]
        if config.in_channels != config.out_channels or image_parts:
            raise ValueError(
                f"this is an image-to-video CogVideoX ({config.in_channels} channels in, {config.out_channels} out"
                f"{''.join(f', {name}' for name in image_parts)}); use a text-to-video one, which learns image "
                "conditions as clean frames (method fvdm)"
            )
        self.transformer = model
        self.process = process
        self.pair: int = config.patch_size_t or 1  # latent frames of one token frame
        self.pixels_per_token = self.pair * config.patch_size**2
        self.capabilities = _capabilities(self.pair, rotary=config.use_rotary_positional_embeddings)
        self._added_positions: _AddedPositions | None = None
        if not config.use_rotary_positional_embeddings:
            self._added_positions = _AddedPositions()
            model.patch_embed.use_positional_embeddings = False
            model.patch_embed.pos_embedding = None  # a large table of the contiguous positions; not a weight
            model.patch_embed.register_forward_hook(self._added_positions)
        self._added_patches = _AddedPatches()
        model.patch_embed.register_forward_hook(self._added_patches)
        self._mean_times = _MeanTimes()
        model.time_embedding.register_forward_hook(self._mean_times)
        for layer, block in enumerate(model.transformer_blocks):
            block.__class__ = CogVideoXBlock
            block.layer = layer
            block.attn1.set_processor(_JointAttention(layer))
        model.norm_out.register_forward_pre_hook(_frames_as_rows, with_kwargs=True)

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def sites(self) -> BranchSites:
        layers, config = tuple(block.attn1 for block in self.transformer.transformer_blocks), self.config
        return BranchSites(
            layers, lambda layer: (layers[layer].to_out[0].weight, layers[layer].to_out[0].bias),
            config.num_attention_heads * config.attention_head_dim, config.time_embed_dim, config.text_embed_dim,
            config.patch_size, "transformer.patch_embed", (".attn1.",), text_padding="read",
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,  # [B,C,F,H,W]
        levels: Tensor,  # [B] or [B,F], in [0, 1]
        text: TextContext | Tensor,  # or [B,L,D], one context for the whole clip
        *,
        layout: ClipLayout | None = None,  # None: one shot
        position_mode: PositionMode = "contiguous",
        position_gap: int = 4,  # latent frames
        attention_rule: AttentionRule = "full",
        branch: LayerBranch | None = None,  # what conditioning modules add to each layer
        patches: Tensor | None = None,  # what they add to the patch embedding, [B,D,F,h,w]
        cache: KVCache | None = None,  # shots that come before those of x
        append: bool = False,  # keep the shots of x, as they are here, in the cache
        text_time: TextTime = "max",  # of a text whose frames differ in level
    ) -> Tensor:
        """The model's prediction (v), [B,C,F,H,W]; here F counts latent frames.

        With equal levels, one text and no layout this is, bit for bit, the diffusers model at the time that the process
        gives the level, with the rotary tables of CogVideoXPipeline. With a cache it is what the same model says of x
        behind the shots that the cache holds, whose texts it sees, too, where texts have positions. Raises ValueError
        where x, levels, text, layout and cache do not fit together, and, for 1.5, where a pair of latent frames that
        share a token frame is told apart.
        """
        require(
            self.capabilities,
            position_mode=position_mode,
            attention_rule=attention_rule,
            layer_branch=branch is not None,
            kv_cache=cache is not None,
        )
        batch, _, frames, height, width = x.shape
        layout = layout or ClipLayout((Segment("target", frames),))
        text = as_context(text, frames)
        check_inputs(x, levels, text, layout, self.config.patch_size)
        check_text_time(text_time)
        reads = text.frame_text.tolist()
        if self.pair > 1:
            _check_pairs(levels, reads, group_sizes(layout), self.pair, position_gap)

        tokens = _token_frames(layout, self.pair)
        dummies = tokens.is_dummy.nonzero().flatten().tolist()
        plan = joint_plan(
            group_sizes(tokens), reads[:: self.pair], attention_rule, position_mode == "diagonal", dummies
        )
        contexts = text.embeddings[:, list(plan.text_groups)]  # [B,T,L,D]
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        placing = (position_mode, position_gap, grid)
        if cache is not None:
            if attention_rule != "group_causal" or len(plan.text_groups) != tokens.num_shots:
                raise ValueError(
                    f"a cache with attention_rule {attention_rule!r} and {len(plan.text_groups)} texts for "
                    f"{tokens.num_shots} shots: it takes group_causal, under which earlier shots stay what they were, "
                    "and a text per shot"
                )
            cache.check(batch, placing)
        elif append:
            raise ValueError("append=True without a cache to append to")
        rotary = self._place(x, tokens, grid, position_mode, position_gap // self.pair, plan, contexts.shape[2], cache)

        levels = shared_levels(levels)
        if branch is not None and levels.ndim == 1:  # a branch is called from the blocks that see frames
            levels = levels[:, None].expand(batch, frames)
        self._mean_times.of = None
        if levels.ndim == 2:
            levels = levels[:, :: self.pair]
            of_texts = [levels[:, list(read_by)].amax(dim=1, keepdim=True) for read_by in plan.text_frames]
            levels = torch.cat([levels, *of_texts], dim=1)  # [B,F+T]
            self._mean_times.of = (batch, plan.text_frames) if text_time == "mean" else None
        times = self.process.to_model_time(levels).flatten()
        own = tokens.num_frames * grid[0] * grid[1]  # video tokens
        clip = _Clip(batch, tokens.num_frames, len(plan.text_groups), rotary, plan, own, branch)
        clip.cache, clip.append, clip.text_seen_later = cache, append, position_mode == "diagonal"
        self._added_patches.patches = patches
        video = x.transpose(1, 2).contiguous()
        out = self.transformer(video, contexts.flatten(1, 2), times, image_rotary_emb=clip, return_dict=False)[0]
        if cache is not None and append:
            kept = [clip.kept[layer] for layer in range(len(self.transformer.transformer_blocks))]
            dummy = tuple(bool(tokens.is_dummy[frames].all()) for frames in tokens.shot_slices)
            cache.append(kept, group_sizes(tokens), placing, dummy)
        return out.transpose(1, 2)

    def _place(
        self,
        x: Tensor,
        tokens: ClipLayout,
        grid: tuple[int, int],
        mode: PositionMode,
        gap: int,
        plan: JointPlan,
        text_length: int,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Rotary tables, or None after the sine table has been laid out for the patch embedding.

        Behind a cache they are those of the whole scene, of which the rows of these texts and frames are returned.
        """
        config, past = self.config, len(cache.sizes) if cache is not None else 0
        own, own_text = tokens.num_frames * grid[0] * grid[1], len(plan.text_groups) * text_length
        if cache is not None and past:
            tokens = _behind_cache(cache, tokens)
        if self._added_positions is not None:
            table = sine_table(
                tokens, grid, mode, gap, config.num_attention_heads * config.attention_head_dim,
                config.spatial_interpolation_scale, config.temporal_interpolation_scale, x.dtype, x.device,
            )  # fmt: skip
            self._added_positions.table = table[-own:]
            return None
        places = TextPlaces()
        if mode == "diagonal":
            shot_of = [shot for shot, size in enumerate(group_sizes(tokens)[past:]) for _ in range(size)]
            first_readers = tuple(past + shot_of[read_by[0]] for read_by in plan.text_frames)
            places = TextPlaces(text_length, (*range(past), *first_readers), (0,) * past + plan.text_groups)
        base_grid = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        stretch = base_grid if config.patch_size_t is None else None
        tables = rotary_tables(tokens, grid, mode, gap, places, config.attention_head_dim, stretch, x.device)
        if not past:
            return tables
        before = past * text_length if mode == "diagonal" else 0
        texts = slice(before, before + own_text if mode == "diagonal" else 0)
        cos, sin = (torch.cat([table[texts], table[-own:]]) for table in tables)
        return cos, sin


def _capabilities(pair: int, rotary: bool) -> Capabilities:
    modes = set(get_args(PositionMode))
    reasons = {}
    if pair > 1:
        reasons["kv_cache"] = (
            f"CogVideoX 1.5 joins {pair} latent frames into one token, and shots one after another do not fill whole "
            "tokens; use CogVideoX 2B or 5B, or Wan"
        )
        reasons["layer_branch"] = (
            f"CogVideoX 1.5 joins {pair} latent frames into one token, and these modules know single frames: which are "
            "given, and the text of each; use CogVideoX 2B or 5B"
        )
    if not rotary:
        modes.remove("diagonal")
        reasons["diagonal"] = (
            "CogVideoX 2B adds a table of absolute sines to its video tokens and nothing to its text, so text and "
            "video cannot be interleaved; use time_gap"
        )
    return Capabilities(
        per_frame_levels=True,
        position_modes=frozenset(modes),
        attention_rules=frozenset(get_args(AttentionRule)),
        text_per_shot=True,
        joint_text=True,
        kv_cache=pair == 1,
        layer_branch=pair == 1,
        frames_per_token=pair,
        reasons=reasons,
    )


class _Clip:
    """What the blocks must know of the clip; reaches them as the model's own argument `image_rotary_emb`.

    As an argument it is replayed when gradient checkpointing runs a block again. Neither a tuple nor a dataclass:
    FSDP's mixed precision looks into those and would make the rotary tables bfloat16.
    """

    def __init__(
        self,
        batch: int,
        frames: int,
        texts: int,
        rotary: tuple[Tensor, Tensor] | None,  # [N,d] each, or [T*L+N,d] where the text has positions
        plan: JointPlan,
        video_tokens: int,
        branch: LayerBranch | None = None,
    ) -> None:
        self.batch, self.frames, self.texts, self.rotary, self.plan = batch, frames, texts, rotary, plan
        self.video_tokens, self.branch = video_tokens, branch
        self.cache: KVCache | None = None
        self.append, self.text_seen_later = False, False
        self.kept: dict[int, KeysValues] = {}  # per layer; the cache gets them when all layers have run

    def rotate(self, x: Tensor) -> Tensor:
        """x [B,M,heads,d] by the positions of the clip's first M video tokens; as it is where those are added (2B)."""
        if self.rotary is None:
            return x
        first = len(self.rotary[0]) - self.video_tokens
        cos, sin = (table[first : first + x.shape[1]] for table in self.rotary)
        return _rotate(x.transpose(1, 2), (cos, sin)).transpose(1, 2)


class _AddedPositions:
    """After the patch embedding: adds the table [N,D] to the video tokens, the last N. The text has no positions."""

    table: Tensor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
        text = tokens.shape[1] - len(self.table)
        return torch.cat([tokens[:, :text], tokens[:, text:] + self.table.to(tokens.dtype)], dim=1)


class _AddedPatches:
    """After the patch embedding: adds what conditioning modules have for the video tokens, [B,D,F,h,w]."""

    patches: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
        if self.patches is None:
            return tokens
        added = self.patches.flatten(2).transpose(1, 2).type_as(tokens)
        text = tokens.shape[1] - added.shape[1]
        return torch.cat([tokens[:, :text], tokens[:, text:] + added], dim=1)


class _MeanTimes:
    """After the time embedding, rows [B*(F+T),E]: texts get the mean of those of the frames that read them."""

    of: tuple[int, tuple[tuple[int, ...], ...]] | None = None  # B, and the readers of each text; None: as they are

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rows: Tensor) -> Tensor:
        if self.of is None:
            return rows
        batch, readers = self.of
        frames = rows.unflatten(0, (batch, -1))[:, : -len(readers)]
        return torch.cat([frames, mean_over_readers(frames, readers)], dim=1).flatten(0, 1)


class CogVideoXBlock(plain_model.CogVideoXBlock):
    """diffusers' block with a time per frame and per text, and named like it: sharding goes by the name.

    With one time per sample it is diffusers' own. A branch beside the attention is added without its gate.
    """

    layer: int

    def forward(
        self,
        hidden_states: Tensor,  # [B,N,D]; with a time per frame [B,F,n,D] after the first block
        encoder_hidden_states: Tensor,  # [B,T*L,D]; with a time per frame [B,T,L,D] after the first block
        temb: Tensor,  # [B,E] or [B*(F+T),E]
        image_rotary_emb: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        clip: _Clip = image_rotary_emb
        if len(temb) == clip.batch:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
        video = hidden_states.reshape(clip.batch, clip.frames, -1, hidden_states.shape[-1])
        text = encoder_hidden_states.reshape(clip.batch, clip.texts, -1, hidden_states.shape[-1])
        times = temb.unflatten(0, (clip.batch, -1))  # [B,F+T,E]

        video_in, text_in, video_gate, text_gate = _modulate(self.norm1, video, text, times)
        video_out, text_out = self.attn1(
            hidden_states=video_in, encoder_hidden_states=text_in, image_rotary_emb=image_rotary_emb
        )
        added = None
        if clip.branch is not None:
            added = clip.branch(self.layer, video_in, times[:, : clip.frames].flatten(0, 1), clip.rotate)
        video, text = video + video_gate * video_out, text + text_gate * text_out
        video = video if added is None else video + added.type_as(video)

        video_in, text_in, video_gate, text_gate = _modulate(self.norm2, video, text, times)
        return video + video_gate * self.ff(video_in), text + text_gate * self.ff(text_in)


def _modulate(norm: Any, video: Tensor, text: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CogVideoXLayerNormZero per frame and per text: video [B,F,n,D], text [B,T,L,D], gates [B,F,1,D], [B,T,1,D]."""
    frames = video.shape[1]
    modulation = norm.linear(norm.silu(times))[:, :, None]  # [B,F+T,1,6D]
    shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=-1)
    video = norm.norm(video) * (1 + scale[:, :frames]) + shift[:, :frames]
    text = norm.norm(text) * (1 + text_scale[:, frames:]) + text_shift[:, frames:]
    return video, text, gate[:, :frames], text_gate[:, frames:]


def _frames_as_rows(
    norm_out: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the last modulation: [B,F,n,D] as [B*F,n,D], each row with its frame's time; [B,N,D] as it is."""
    (video,), times = args, kwargs["temb"]
    if video.ndim == 4:
        batch, frames = video.shape[:2]
        video, times = video.flatten(0, 1), times.unflatten(0, (batch, -1))[:, :frames].flatten(0, 1)
    return (video,), {"temb": times}


class _JointAttention:
    """Attention over text and video: [B,T*L,D] and [B,N,D], or [B,T,L,D] and [B,F,n,D], in and out."""

    _attention_backend = None  # set by set_attention_backend

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: _Clip | None = None,
    ) -> tuple[Tensor, Tensor]:
        clip = image_rotary_emb
        assert clip is not None, "the block was called without its clip: call it through CogVideoXBackbone"
        text = encoder_hidden_states.reshape(clip.batch, -1, hidden_states.shape[-1])  # [B,T*L,D]
        joint = torch.cat([text, hidden_states.reshape(clip.batch, -1, hidden_states.shape[-1])], dim=1)

        # heads before tokens, as in diffusers: layer norm leaves them so in memory
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)  # [B,heads,T*L+N,d]
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if clip.rotary is not None:
            query, key = _rotate(query, clip.rotary), _rotate(key, clip.rotary)

        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        past = None if clip.cache is None else clip.cache.past(self.layer, clip.batch)
        if clip.append:
            key_later, value_later = (
                seen_later(x, text.shape[1], clip.plan, clip.text_seen_later).detach() for x in (key, value)
            )
            clip.kept[self.layer] = key_later, value_later
        out = joint_attention(query, key, value, text.shape[1], clip.plan, attend, past=past)
        out = out.flatten(2, 3).type_as(query)
        out = attn.to_out[1](attn.to_out[0](out))
        text, video = out.split([text.shape[1], out.shape[1] - text.shape[1]], dim=1)
        return video.reshape(hidden_states.shape), text.reshape(encoder_hidden_states.shape)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The last tokens of x [B,heads,T*L+N,d], as many as the tables have rows, rotated by diffusers' function."""
    plain = x.shape[2] - len(rotary[0])
    rotate: Any = apply_rotary_emb
    rotated = rotate(x[:, :, plain:], rotary)
    return torch.cat([x[:, :, :plain], rotated], dim=2) if plain else rotated


def _token_frames(layout: ClipLayout, pair: int) -> ClipLayout:
    """The shots in token frames, `pair` latent frames each."""
    dummies = layout.is_dummy
    return ClipLayout(
        tuple(
            Segment("dummy" if dummies[frames].all() else "target", (frames.stop - frames.start) // pair, i, i)
            for i, frames in enumerate(layout.shot_slices)
        )
    )


def _behind_cache(cache: KVCache, tokens: ClipLayout) -> ClipLayout:
    """The layout of the shots that a cache holds and those of `tokens` after them; each with a text of its own."""
    roles = ["dummy" if dummy else "target" for dummy in cache.dummies]
    held = [Segment(role, size, i, i) for i, (role, size) in enumerate(zip(roles, cache.sizes, strict=True))]  # type: ignore[arg-type]
    past = len(held)
    own = [
        replace(segment, shot_id=past + segment.shot_id, text_id=past + segment.text_id) for segment in tokens.segments
    ]
    return ClipLayout((*held, *own))


def _check_pairs(levels: Tensor, reads: list[int], shots: tuple[int, ...], pair: int, gap: int) -> None:
    """CogVideoX 1.5: latent frames that share a token frame cannot be told apart."""
    why = f"CogVideoX 1.5 joins {pair} latent frames into one token frame"
    if any(size % pair for size in shots):
        raise ValueError(
            f"the shots have {list(shots)} latent frames, but {why}: give each a multiple of {pair}, more of its first "
            "frame in front (models.patches)"
        )
    if gap % pair:
        raise ValueError(f"position_gap is {gap} latent frames, but {why}: give a multiple of {pair}")
    texts = torch.tensor(reads).unflatten(0, (-1, pair))
    if bool((texts != texts[:, :1]).any()):
        raise ValueError(f"frame_text is {reads}, but {why}: the frames of a pair must read one text")
    if levels.ndim == 2:
        paired = levels.unflatten(1, (-1, pair))
        if bool((paired != paired[..., :1]).any()):
            raise ValueError(f"levels differ inside a pair of frames, but {why}: give both one level")
