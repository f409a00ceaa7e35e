"""Tiny random models of (nearly) every architecture of transformers and timm, offline.

The shrinker starts from the default configuration of an architecture and rewrites it by rules on *attribute names and
values* (widths, depths, heads, experts, vocabularies, stage lists ...), not from a table of models. Original relations
between sizes are kept where the architectures need them, e.g. ``d_inner == 2 * hidden_size``. Several variants of the
shrunk configuration are tried in turn, and the first one that builds and runs forward wins; if none does, the error of
the first variant is raised with the errors of the others attached as notes.

Run as a script, ``python tiny_models.py table.tsv`` tries everything and writes one line per model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import transformers
from timm.models import model_entrypoint
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

Batch = dict[str, Tensor]

HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
FFN = 96
EXPERT_FFN = 32
EXPERTS = 4
VOCAB = 128
FIRST_WORD_ID = 32  # the ids below are left for special tokens, so that random text never hits one by accident
POSITIONS = 128
IMAGE = 64
WINDOW = 8
SEQUENCE = 12
TARGET_SEQUENCE = 6
LABELS = 3
MAX_STAGE_WIDTH = 128
MAX_LAYERS = 6


@dataclass
class TinyModel:
    """A tiny model in eval mode with a batch of two different examples."""

    name: str
    model: nn.Module
    batch: Batch

    def run(self, batch: Batch | None = None) -> Any:
        """Run forward on ``batch`` (default: the own one); an input named ``x`` is passed by position, as timm does."""
        batch = self.batch if batch is None else batch
        if "x" in batch:
            return self.model(batch["x"])
        return self.model(**batch)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def primary_output(output: Any) -> Tensor:
    """Return ``logits`` of a model output, or its first floating-point tensor."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensor = next(_float_tensors(output), None)
    if tensor is None:
        raise ValueError(f"no tensor in an output of type {type(output).__name__}")
    return tensor


def _float_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _float_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _float_tensors(item)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice that unusual sizes provoke (not the errors)."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _first_success(attempts: Sequence[tuple[str, Callable[[], Any]]]) -> Any:
    """Return the result of the first attempt that raises nothing; otherwise raise the first error, others as notes."""
    errors: list[tuple[str, Exception]] = []
    for label, attempt in attempts:
        try:
            return attempt()
        except TimeoutError:
            raise
        except Exception as error:
            errors.append((label, error))
    first = errors[0][1]
    for label, error in errors[1:]:
        first.add_note(f"{label}: {type(error).__name__}: {_one_line(error)}")
    raise first


def _one_line(error: BaseException, width: int = 160) -> str:
    return re.sub(r"\s+", " ", str(error))[:width]


# ---------------------------------------------------------------------------------------------------------------------
# Random weights
# ---------------------------------------------------------------------------------------------------------------------

_MATRIX_NAME = re.compile(r"weight|proj|expert|kernel|gate_up|down|w\d", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv\dd", re.IGNORECASE)
_TRIVIAL = 1e-2


def randomize_weights(model: nn.Module, seed: int) -> None:
    """Fill ``model`` with seeded weights such that no bias, gain or statistic keeps its trivial initial value."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen and parameter.is_floating_point():
                    seen.add(id(parameter))
                    _randomize_parameter(module, name, parameter, generator)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(0.1 * _randn(buffer, generator))
                elif name == "running_var":
                    buffer.copy_(1 + 0.3 * _randn(buffer, generator).abs())


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


def _randomize_parameter(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    noise = _randn(parameter, generator)
    if parameter.ndim < 2 or parameter.numel() == max(parameter.shape):
        # Vectors (biases, gains, decay rates) may carry a meaning in their initial value: jitter around it. Gains that
        # start near zero (LayerScale, gates, zero-centred norms) would switch their branch off, so they are lifted.
        lift = 0.3 if "bias" not in name and parameter.abs().max() < _TRIVIAL else 0.0
        parameter.add_(lift + 0.1 * noise)
    elif isinstance(module, nn.Embedding):
        parameter.copy_(0.5 * noise)
    elif isinstance(module, nn.Linear):
        parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    elif parameter.ndim > 2 and _CONVOLUTION.search(type(module).__name__):
        # He's gain, or the signal of deep convolutional networks with rectifiers fades beneath the biases.
        parameter.copy_(noise * math.sqrt(2 / parameter[0].numel()))
    elif _MATRIX_NAME.search(name):
        # Stacked expert weights and the like, orientation unknown: the smaller dimension errs to larger activations.
        parameter.copy_(noise / math.sqrt(max(parameter.shape[-2:])))
    elif parameter.abs().max() < _TRIVIAL:
        parameter.copy_(0.1 * noise)  # zero-initialized tokens and position tables
    else:
        parameter.add_(0.02 * noise)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: configuration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Facts:
    """Sizes of the original configuration that the rules compare with, and the layers that are kept."""

    hidden: int
    heads: int
    head_dim: int
    layers: int
    kept: list[int]
    stage_scale: float
    original: Mapping[str, Any]


class _TokenIds:
    """Maps original special token ids into the shrunk vocabulary, equal ids to equal ids."""

    def __init__(self) -> None:
        self.table: dict[int, int] = {}

    def __call__(self, key: str, token: int) -> int:
        """Return the new id of ``token``, named ``key`` in the configuration."""
        if token < 0:
            return token  # a marker, not an id
        fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if key in fixed:
            self.table.setdefault(token, fixed[key])
            return fixed[key]
        if token not in self.table:
            self.table[token] = min(3 + len(self.table), FIRST_WORD_ID - 1)
        return self.table[token]


_TOKEN_ID = re.compile(r"(.+_)?token_(id|index)|(pad|bos|eos|unk|mask)_index")
_LAYERS = re.compile(
    r"(n|num|conf_num)_((hidden|encoder|decoder|global|self_attention)_)*(layers?|blocks)|depth|[lxr]_layers"
    r"|(t2u_|speech_)?(encoder|decoder)_layers|num_self_attends_per_block|num_layers_per_stack"
)
_INDEX_LIST = re.compile(r".*(_indices|_indexes|_idxs|_layer_ids|_only_layers|_layers)")
_DEPTH_LIST = re.compile(r"depths?|.*(num_blocks|block_repeats|attn_blocks|numb_of_layers)|block_sizes|num_layers")
_WIDTH_LIST = re.compile(r"(.*_)?(hidden_sizes|channels|embed_dims?|unit_dims|conv_dim|conv_channel_size|tdnn_dim)")

_Rule = Callable[[str, int, _Facts], int]


def _const(size: int) -> _Rule:
    return lambda key, value, facts: size


def _cap(size: int) -> _Rule:
    return lambda key, value, facts: min(value, size)


def _width(key: str, value: int, facts: _Facts) -> int:
    """Keep a small integer ratio to the hidden size; other widths become the hidden size at most."""
    heads = facts.original.get("num_heads")
    if key == "embed_dim" and _is_ints(heads):
        return heads[0] * 8  # the first stage of a pyramid whose heads have equal widths
    if value % facts.hidden == 0 and value // facts.hidden <= 8:
        return value // facts.hidden * HIDDEN
    if facts.hidden % value == 0 and facts.hidden // value <= 16:
        return HIDDEN // (facts.hidden // value)
    return min(value, HIDDEN)


def _layers(key: str, value: int, facts: _Facts) -> int:
    stages = [v for k, v in facts.original.items() if _DEPTH_LIST.fullmatch(k) and isinstance(v, (list, tuple))]
    if any(len(depths) == value for depths in stages):
        return value  # a number of stages
    return len(facts.kept) if value == facts.layers else min(value, 2)


def _kv_heads(key: str, value: int, facts: _Facts) -> int:
    return HEADS if value >= facts.heads else min(value, 2)


def _linear_value_heads(key: str, value: int, facts: _Facts) -> int:
    return HEADS if value > facts.original.get("linear_num_key_heads", value) else 2


def _head_dim(key: str, value: int, facts: _Facts) -> int:
    """Keep ``heads * head_dim == 2 * hidden`` and the sums of split (rotary and plain) head dimensions."""
    original = facts.original
    parts = (original.get("qk_nope_head_dim"), original.get("qk_rope_head_dim"))
    if key in ("head_dim", "qk_head_dim") and all(parts):
        return HEAD_DIM // 2 if value == parts[1] else HEAD_DIM + HEAD_DIM // 2
    if value * facts.heads == 2 * facts.hidden and not _is_state_space(facts):
        return 2 * HEAD_DIM
    return HEAD_DIM


def _is_state_space(facts: _Facts) -> bool:
    return "state_size" in facts.original and "expand" in facts.original


def _inner_heads(key: str, value: int, facts: _Facts) -> int:
    """Heads of a state-space mixer: expanded width / head dimension."""
    expand = facts.original.get("mamba_expand", facts.original.get("expand", 2))
    return int(expand) * HIDDEN // HEAD_DIM if value >= 8 else value


def _num_heads(key: str, value: int, facts: _Facts) -> int:
    return _inner_heads(key, value, facts) if _is_state_space(facts) else HEADS


def _window(key: str, value: int, facts: _Facts) -> int:
    """Windows of a pyramid have to fit into its last stage of 2 x 2 patches."""
    is_pyramid = any(_DEPTH_LIST.fullmatch(name) and _is_ints(item) for name, item in facts.original.items())
    return min(value, 2 if is_pyramid else WINDOW)


def _generic_width(key: str, value: int, facts: _Facts) -> int:
    return _width(key, value, facts) if value >= 128 else value


# The first rule whose pattern matches the whole attribute name decides.
_INT_RULES: list[tuple[re.Pattern[str], _Rule]] = [
    (re.compile(pattern), rule)
    for pattern, rule in [
        (r"type_vocab_size|.*_type_vocab_size", _cap(VOCAB)),
        (r"(.*_)?vocab(_size.*)?|codebook_size|num_hash_buckets", _cap(VOCAB)),
        (r"num_qa_labels|num_codevectors_per_group|num_centroids|num_object_labels|num_attr_labels", _cap(16)),
        # depth
        (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", _const(0)),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers|num_adapter_layers", _cap(1)),
        (r"moe_layer_end_index", lambda key, value, facts: len(facts.kept) - 1),
        (r"attn_layer_period|.*_sparse_step|expert_layer_period|num_sparse_(en|de)coder_layers", _cap(2)),
        (r"attn_layer_offset|expert_layer_offset", _cap(1)),
        (_LAYERS.pattern, _layers),
        # heads
        (r"(.*_)?(num_)?(kv|key_value|kv_n)_heads|kv_n_heads|num_query_groups", _kv_heads),
        (r"linear_num_key_heads", _const(2)),
        (r"linear_num_value_heads", _linear_value_heads),
        (r"mamba_n_heads|mamba_num_heads", _inner_heads),
        (r"n_mamba_heads", _inner_heads),
        (r"num_heads", _num_heads),
        (r"(.*_)?heads|n_head", _const(HEADS)),
        (r"qk_rope_head_dim|rotary_dim|rope_head_dim", _const(HEAD_DIM // 2)),
        (r"mamba_d_ssm", lambda key, value, facts: 8 * HEAD_DIM),
        (r"mamba_d_head|mamba_head_?dim", _const(HEAD_DIM)),
        (r"(.*_)?head_dim|d_kv|dim_head|d_head|attention_head_size|kv_channels", _head_dim),
        # state spaces and linear attention
        (r"mamba_d_state|state_size|ssm_state_size", _const(16)),
        (r"mamba_dt_rank|time_step_rank", _const(HIDDEN // 16)),
        (r"mamba_n_groups|n_groups|mamba_ngroups", _cap(2)),
        # experts
        (r"zero_expert_num", _const(2)),
        (r"(.*_)?(num|n)_(local_|routed_)?experts|moe_num_experts", _const(EXPERTS)),
        (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", _cap(2)),
        (r"n_group|num_expert_group", _cap(2)),
        (r"topk_group|(n|num|moe_num)_shared_experts", _cap(1)),
        (r"expert_capacity", _const(POSITIONS)),
        # feed-forward widths
        (r"(.*_)?(moe|expert|experts)_(.*_)?(intermediate|hidden|ffn_hidden)_size|expert_ffn_hidden_size", _cap(32)),
        (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(hidden_)?(dim|size)|d_ff|dff|dim_ff|feed_forward_size", _cap(FFN)),
        (r"mlp_dim|shared_experts?_intermediate_size", _cap(FFN)),
        # low ranks
        (r"q_lora_rank", _cap(32)),
        (r"(.*_)?(rank|lowrank)", _cap(16)),
        # windows and positions
        (
            r"sliding_window(_size)?|attention_window(_size)?|attention_chunk_size|local_attention|keep_window",
            _cap(WINDOW),
        ),
        (r"chunk_size|mamba_chunk_size|index_block_size|(local|lsh)_attn_chunk_length", _cap(WINDOW)),
        (r"index_topk|global_block_size", _cap(4)),
        (r"local_radius", _cap(3)),
        (r"(.*_)?max_((source|target|encoder|decoder)_)?position(s|_embeddings)|n_positions|n_ctx", _cap(POSITIONS)),
        (r"max_seq_len|model_max_length|context_length|max_(en|de)coder_position_embeddings", _cap(POSITIONS)),
        (r"image_size|crop_size", _cap(IMAGE)),
        (r"window_size", _window),
        # widths
        (r"coordinate_size", _const(10)),  # 4 coordinates and 2 shapes make up the hidden size
        (r"shape_size", _const((HIDDEN - 40) // 2)),
        (r"groups_width", _cap(8)),
        (r"hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|d_latents|lru_width", _width),
        (r"image_size|max_length|.*(chunk|patch|kernel|window|unit|feat|input|image)_size", lambda k, v, f: v),
        (r".*(_dim|_size|_width|_channels|_filters|_hidden|hidden_size_.*|_scalar_dim)", _generic_width),
    ]
]


def _shrink_int(key: str, value: int, facts: _Facts) -> int:
    """Return the shrunk value of the integer attribute ``key``; zero and negative values are switches and stay."""
    if value <= 0:
        return value
    for pattern, rule in _INT_RULES:
        if pattern.fullmatch(key):
            return rule(key, value, facts)
    return value


def shrink_widths(
    widths: Sequence[int], heads: Sequence[int] | None = None, multiple: int = 8, scale: float | None = None
) -> list[int]:
    """Scale a stage list of widths to at most ``MAX_STAGE_WIDTH``, keeping equal widths equal and heads dividing."""
    scale = min(1.0, MAX_STAGE_WIDTH / max(widths)) if scale is None else scale
    units = [multiple] * len(widths)
    if heads is not None and len(heads) == len(widths):
        units = [math.lcm(multiple, h) if w % h == 0 else multiple for w, h in zip(widths, heads, strict=True)]
    if scale == 1.0:
        return list(widths)
    return [
        width if width < multiple else max(unit, round(width * scale / unit) * unit)
        for width, unit in zip(widths, units, strict=True)
    ]


def _is_ints(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(type(item) is int for item in value)  # no bools
    )


def _kept_layers(values: Mapping[str, Any], layers: int) -> list[int]:
    """Choose layers so that every value of every per-layer list, and membership of every index list, still occurs."""
    kept: set[int] = set()
    for key, value in values.items():
        if not isinstance(value, (list, tuple)):
            continue
        if len(value) == layers and not _DEPTH_LIST.fullmatch(key):
            kept |= {value.index(item) for item in value}
        elif _is_ints(value) and _INDEX_LIST.fullmatch(key) and min(value) >= 0:
            kept.add(value[0])
            kept |= set(next(([i] for i in range(layers) if i not in value), []))
    kept = {index for index in kept if index < layers}
    for index in range(layers):
        if len(kept) >= 2:
            break
        kept.add(index)
    return sorted(kept)[:MAX_LAYERS]


def _first_int(config: PretrainedConfig, names: Sequence[str], default: int) -> int:
    for name in names:
        # Not getattr: configurations with different layers refuse it for attributes that vary.
        value = vars(config).get(config.attribute_map.get(name, name))
        if type(value) is int and value > 0:
            return value
    return default


def _facts(config: PretrainedConfig) -> _Facts:
    hidden = _first_int(config, ["hidden_size", "d_model", "n_embd", "embed_dim", "dim"], 768)
    heads = _first_int(config, ["num_attention_heads", "num_heads", "n_head", "encoder_attention_heads"], 12)
    layers = _first_int(config, ["num_hidden_layers", "num_layers", "n_layer", "encoder_layers"], 12)
    values = _attributes(config)
    return _Facts(
        hidden=hidden,
        heads=heads,
        head_dim=_first_int(config, ["head_dim", "d_kv", "attention_head_size"], max(1, hidden // heads)),
        layers=layers,
        kept=_kept_layers(values, layers),
        stage_scale=_stage_scale(values),
        original=values,
    )


def _stage_scale(values: Mapping[str, Any]) -> float:
    """One scale for all stage widths of a configuration: input and output widths of stages have to fit together."""
    if "width_coefficient" in values:
        return 1.0  # the widths are scaled by that
    widths = [max(value) for key, value in values.items() if _WIDTH_LIST.fullmatch(key) and _is_ints(value)]
    return min([1.0, *(MAX_STAGE_WIDTH / width for width in widths)])


def _attributes(config: PretrainedConfig) -> dict[str, Any]:
    skipped = {"id2label", "label2id", "dtype", "torch_dtype", "transformers_version", "architectures"}
    return {key: value for key, value in vars(config).items() if not key.startswith("_") and key not in skipped}


def _shrink_sequence(key: str, value: Sequence[Any], facts: _Facts, scale_stages: bool) -> Sequence[Any]:
    """Shrink a list attribute: per-layer lists, layer indices, stage depths, stage widths, or a pair of sizes."""
    kind = type(value)
    if _is_ints(value):
        if "image_size" in key:
            return kind(min(item, IMAGE) for item in value)
        if _DEPTH_LIST.fullmatch(key):
            return kind(min(item, 2) for item in value) if scale_stages else value
        if sum(value) == facts.hidden and len(value) > 1 and all(item * HIDDEN % facts.hidden == 0 for item in value):
            return kind(item * HIDDEN // facts.hidden for item in value)  # the parts of an embedding
        if _WIDTH_LIST.fullmatch(key):
            if not scale_stages:
                return value
            heads = facts.original.get("num_heads", facts.original.get("num_attention_heads"))
            multiple = facts.original.get("num_groups", 8)
            return kind(shrink_widths(value, heads if _is_ints(heads) else None, multiple, facts.stage_scale))
        if key == "attention_window":
            return kind(WINDOW for _ in facts.kept)
    if len(value) == facts.layers:
        return kind(value[index] for index in facts.kept)
    if _is_ints(value) and _INDEX_LIST.fullmatch(key) and min(value) >= 0:
        return kind(new for new, old in enumerate(facts.kept) if old in value)
    return value


def _shrink_dict(value: Mapping[str, Any], facts: _Facts) -> dict[str, Any]:
    """Shrink the sections of multi-axis rotary embeddings inside (nested) rope parameters."""
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            result[key] = _shrink_dict(item, facts)
        elif key.endswith("mrope_section") and _is_ints(item):
            scaled = [max(1, section * HEAD_DIM // facts.head_dim) for section in item]
            scaled[0] += max(0, sum(item) * HEAD_DIM // facts.head_dim - sum(scaled))
            result[key] = scaled
        else:
            result[key] = item
    return result


@dataclass(frozen=True)
class _Variant:
    """One way to make the shrunk configuration.

    Attributes:
        construct: by the constructor of its class, which derives further attributes; otherwise in place.
        scale_stages: shrink the lists of stage depths and widths.
        fill: give values to attributes that are None by default but that some architectures require.
    """

    construct: bool
    scale_stages: bool
    fill: bool = False


_VARIANTS = [
    _Variant(construct=True, scale_stages=True),
    _Variant(construct=False, scale_stages=True),
    _Variant(construct=True, scale_stages=True, fill=True),
    _Variant(construct=True, scale_stages=False),
    _Variant(construct=False, scale_stages=False),
]

_FILL = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": EXPERT_FFN,
    "vocab_size": VOCAB,
    "sliding_window": WINDOW,
}


def _fill(config: PretrainedConfig) -> dict[str, Any]:
    """Return values for attributes left None, and sections of multi-axis rotary embeddings that code defaults."""
    changes: dict[str, Any] = {key: v for key, v in _FILL.items() if vars(config).get(key, v) is None}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope and "mrope_section" not in rope:
        half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        changes["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return changes


def _overrides(config: PretrainedConfig, variant: _Variant, tokens: _TokenIds) -> dict[str, Any]:
    """Return the attributes of ``config`` to change and their new values, sub-configurations included."""
    facts = _facts(config)
    changes: dict[str, Any] = {}
    for key, value in facts.original.items():
        if isinstance(value, PretrainedConfig):
            changes[key] = _shrink_config(value, variant, tokens, nested=True)
        elif _TOKEN_ID.fullmatch(key):
            if type(value) is int:
                changes[key] = tokens(key, value)
            elif _is_ints(value):
                changes[key] = type(value)(sorted({tokens(key, item) for item in value}))
        elif type(value) is int:
            changes[key] = _shrink_int(key, value, facts)
        elif isinstance(value, (list, tuple)):
            changes[key] = _shrink_sequence(key, value, facts, variant.scale_stages)
        elif isinstance(value, dict):
            changes[key] = _shrink_dict(value, facts)
    if "width_coefficient" in facts.original:
        changes |= {"width_coefficient": 0.25, "hidden_dim": 320}  # the head has 1280 channels, scaled
    if variant.fill:
        changes |= _fill(config)
    changes = {
        key: value
        for key, value in changes.items()
        if isinstance(value, PretrainedConfig) or value != facts.original[key]
    }
    if "vocab_size" in facts.original and facts.original.get("pad_token_id") is None:
        changes["pad_token_id"] = tokens(
            "pad_token_id", 0
        )  # sequence classification of decoders needs one for a batch of two
    return changes


def _shrink_config(config: PretrainedConfig, variant: _Variant, tokens: _TokenIds, nested: bool) -> PretrainedConfig:
    changes = _overrides(config, variant, tokens)
    if not variant.construct:
        result = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(result, key, value)
        return result
    if nested:
        # A parent may have given its sub-configuration other values than the defaults of the class.
        defaults = _attributes(type(config)())
        own = {k: v for k, v in _attributes(config).items() if k in defaults and v != defaults[k]}
        changes = own | changes
    return type(config)(**changes)


def _all_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in _attributes(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _all_configs(value)


def tiny_config(model_type: str, variant: _Variant = _VARIANTS[0]) -> PretrainedConfig:
    """Return the shrunk default configuration of ``model_type``."""
    config = _shrink_config(CONFIG_MAPPING[model_type](), variant, _TokenIds(), nested=False)
    for part in _all_configs(config):
        part.dtype = None  # some defaults ask for bfloat16
        if hasattr(part, "use_cache"):
            part.use_cache = False
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # usually comes with the generation configuration of a checkpoint
    if config.architectures is None:
        config.architectures = []  # looked up where a model type has several classes for a head
    if getattr(config, "languages", None):
        config.default_language = config.languages[0]  # chooses the adapters
    return config


# ---------------------------------------------------------------------------------------------------------------------
# transformers: batches
# ---------------------------------------------------------------------------------------------------------------------

_HEADS: dict[str, tuple[str, str]] = {
    "CausalLM": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "SequenceClassification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "MaskedLM": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "ImageClassification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "Seq2SeqLM": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "TokenClassification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "QuestionAnswering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    "MultipleChoice": ("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"),
    "NextSentencePrediction": (
        "AutoModelForNextSentencePrediction",
        "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    ),
    "AudioClassification": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "VideoClassification": ("AutoModelForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    "ImageTextToText": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
}


def transformers_pairs() -> list[tuple[str, str]]:
    """Return all (head, model type) pairs of the Auto mappings covered here."""
    return [
        (head, model_type)
        for head, (_, mapping) in _HEADS.items()
        for model_type in getattr(modeling_auto, mapping)
        if model_type in CONFIG_MAPPING
    ]


def _config_int(config: PretrainedConfig, names: Sequence[str], default: int) -> int:
    """Return the first of the integer attributes ``names`` found in the configuration or its parts."""
    for part in _all_configs(config):
        value = _first_int(part, names, 0)
        if value:
            return value
    return default


def _words(shape: Sequence[int], vocab: int, generator: torch.Generator) -> Tensor:
    return torch.randint(min(FIRST_WORD_ID, vocab // 2), vocab, tuple(shape), generator=generator)


def _text_batch(
    head: str, config: PretrainedConfig, parameters: set[str], required: set[str], generator: torch.Generator
) -> Batch:
    vocab = _config_int(config, ["vocab_size", "src_vocab_size"], VOCAB)
    shape = (2, 2, SEQUENCE) if head == "MultipleChoice" else (2, SEQUENCE)
    batch = {"input_ids": _words(shape, vocab, generator)}
    eos = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and type(eos) is int:
        batch["input_ids"][..., -1] = eos  # sentence representations are read off there
    separator = getattr(config, "sep_token_id", None)
    if head in ("QuestionAnswering", "MultipleChoice") and type(separator) is int:
        batch["input_ids"][..., [3, 4, -1]] = separator  # question </s></s> context </s>
    if "attention_mask" in parameters:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    if head in ("Seq2SeqLM", "ImageTextToText") and getattr(config, "is_encoder_decoder", False):
        target_vocab = _config_int(config, ["decoder_vocab_size", "tgt_vocab_size", "vocab_size"], VOCAB)
        batch["decoder_input_ids"] = _words((2, TARGET_SEQUENCE), target_vocab, generator)
    if "bbox" in parameters:
        batch["bbox"] = _boxes(config, shape, generator)
    if "visual_feats" in parameters and "visual_pos" in parameters:
        batch["visual_feats"] = torch.randn(2, 4, config.visual_feat_dim, generator=generator)
        batch["visual_pos"] = torch.rand(2, 4, config.visual_pos_dim, generator=generator)
    if "pixel_values" in required:
        batch["pixel_values"] = _pixels(config, False, generator)
    return batch


def _boxes(config: PretrainedConfig, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Bounding boxes of the tokens: integer corners within the 2D position table, or floats if there is none."""
    if not hasattr(config, "max_2d_position_embeddings"):
        return torch.rand(*shape, getattr(config, "dim_bbox", 4), generator=generator)
    corners = torch.randint(0, config.max_2d_position_embeddings // 2, (*shape, 2), generator=generator)
    sizes = torch.randint(0, config.max_2d_position_embeddings // 2 - 1, (*shape, 2), generator=generator)
    return torch.cat([corners, corners + sizes], dim=-1)


def _pixels(config: PretrainedConfig, frames: bool, generator: torch.Generator) -> Tensor:
    size = next((part.image_size for part in _all_configs(config) if getattr(part, "image_size", None)), IMAGE)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = _config_int(config, ["num_channels", "in_chans"], 3)
    lead = (2, _config_int(config, ["num_frames", "frames_per_clip"], 4)) if frames else (2,)
    return random_images((*lead, channels, height, width), generator)


def random_images(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Coarse patterns with some noise: pure noise would average out alike in all examples."""
    *lead, channels, height, width = shape
    coarse = torch.randn(math.prod(lead), channels, 4, 4, generator=generator)
    pattern = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return pattern.reshape(shape) + 0.3 * torch.randn(shape, generator=generator)


def _audio_shapes(config: PretrainedConfig) -> list[tuple[int, ...]]:
    """Shapes of audio inputs in use: waveforms, (frames, mel bins), (mel bins, frames of a fixed-length window)."""
    mels = _config_int(config, ["num_mel_bins", "feature_projection_input_dim", "input_dim", "input_feat_size"], 80)
    window = _config_int(config, ["max_length"], 128)
    positions = _config_int(config, ["max_source_positions"], 64)
    spectrogram = (2, 1, _config_int(config, ["spec_size"], 256), mels)
    return [(2, 4000), (2, window, mels), (2, 64, mels), (2, mels, 2 * positions), spectrogram]


def _candidate_batches(head: str, config: PretrainedConfig, model: nn.Module, seed: int) -> list[Batch]:
    """Return batches of the kinds that the forward of ``model`` may take, the most likely one first."""
    generator = torch.Generator().manual_seed(seed)
    signature = inspect.signature(model.forward).parameters
    parameters = set(signature)
    required = {name for name, parameter in signature.items() if parameter.default is inspect.Parameter.empty}
    main = getattr(model, "main_input_name", "input_ids")
    if ("Audio" not in head and "Image" not in head and "Video" not in head) or head == "ImageTextToText":
        main = "input_ids" if "input_ids" in parameters else main
    if main == "input_ids":
        return [_text_batch(head, config, parameters, required, generator)]
    if "pixel" in main:
        return [{main: _pixels(config, "Video" in head or "video" in main, generator)}]
    if "Audio" in head:
        return [{main: torch.randn(shape, generator=generator)} for shape in _audio_shapes(config)]
    vocab = _config_int(config, ["vocab_size"], VOCAB)
    if head == "ImageClassification":
        return [{main: _pixels(config, False, generator)}]
    return [{main: _words((2, SEQUENCE), vocab, generator), "attention_mask": torch.ones(2, SEQUENCE)}]


def tiny_transformers(head: str, model_type: str, seed: int = 0) -> TinyModel:
    """Build the tiny model of ``model_type`` with the given head; it has run forward once when this returns.

    Args:
        head: a head of :func:`transformers_pairs`, e.g. ``"CausalLM"``.
        model_type: a model type of transformers, e.g. ``"llama"``.
        seed: seed of weights and inputs.

    Raises:
        Exception: the error of the first variant tried, if no variant builds and runs.
    """
    attempts = [
        (str(variant), functools.partial(_build_transformers, head, model_type, seed, variant)) for variant in _VARIANTS
    ]
    with _quiet():
        return _first_success(attempts)


def _build_transformers(head: str, model_type: str, seed: int, variant: _Variant) -> TinyModel:
    auto_class = getattr(transformers, _HEADS[head][0])
    config = tiny_config(model_type, variant)
    if head == "CausalLM" and "is_decoder" in vars(config):
        config.is_decoder = True  # causal attention in architectures made for encoding
    config.num_labels = 2 if head == "QuestionAnswering" else LABELS  # start and end
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
    model = model.float().eval()
    randomize_weights(model, seed)
    candidates = [
        TinyModel(f"{head}/{model_type}", model, batch) for batch in _candidate_batches(head, config, model, seed + 1)
    ]
    return _first_success(
        [
            (str({k: tuple(v.shape) for k, v in tiny.batch.items()}), functools.partial(_tried, tiny))
            for tiny in candidates
        ]
    )


def _calibrate_batch_norms(tiny: TinyModel) -> None:
    """Take the statistics of batch normalizations from the batch; random ones let the signal of deep networks fade."""
    norms = [
        module
        for module in tiny.model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        tiny.run()
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
            # Towards the mean over channels: nearly constant channels would amplify rounding errors.
            norm.running_var.lerp_(norm.running_var.mean(), 0.5).clamp_(min=1e-2)


def _tried(tiny: TinyModel) -> TinyModel:
    """Return ``tiny`` if its forward gives a finite output for two examples."""
    with torch.no_grad():
        _calibrate_batch_norms(tiny)
        output = primary_output(tiny.run())
    if not torch.isfinite(output).all():
        raise ValueError("the output is not finite")
    return tiny


# ---------------------------------------------------------------------------------------------------------------------
# timm
# ---------------------------------------------------------------------------------------------------------------------

_FAMILY = re.compile(
    r"(?:(?:legacy|tf|test|gc|eca|ese|nf|dm|hieradet|resnetv2|vit)_)*(?:[a-z]+_(?=vit))?[a-z]+(?:v\d)?"
)
_SIZE_WORDS = [
    {"test", "zepto"},
    {"atto", "a"},
    {"femto", "f"},
    {"pico", "p", "n0"},
    {"nano", "n", "xxs", "xx", "xxt", "xxtiny"},
    {"xs", "xtiny", "x", "mi"},
    {"tiny", "t", "ti", "extratiny"},
    {"mini", "little"},
    {"small", "s", "s12"},
    set(),  # no size in the name
    {"base", "b", "medium", "m", "betwixt", "mediumd", "wee"},
    {"large", "l"},
    {"xlarge", "xl", "so150m", "so400m", "huge", "h"},
    {"giant", "g", "gigantic", "enormous", "xxlarge", "xxl"},
]


def _size_key(name: str) -> tuple[int, int, int, int, str]:
    """Order architectures of a family by the size that their names suggest."""
    words = set(name.replace(".", "_").split("_"))
    rank = next((i for i, sizes in enumerate(_SIZE_WORDS) if sizes & words), 9)
    number = next((int(n) for n in re.findall(r"\d+", name)), 0)
    cfg = timm.get_pretrained_cfg(name)
    resolution = cfg.input_size[-1] if cfg is not None else 224
    return rank, number, resolution, len(name), name


def timm_families() -> list[str]:
    """Return the (presumably) smallest architecture of every family, i.e. name prefix within a module of timm."""
    families: dict[tuple[str, str], list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            if re.search(r"_\d+b_", name):
                continue  # billions of parameters
            prefix = _FAMILY.match(name)
            families.setdefault((module, prefix.group() if prefix else name), []).append(name)
    return [min(names, key=_size_key) for names in families.values()]


@dataclass(frozen=True)
class _TimmVariant:
    """How much of the architecture is shrunk (``"all"``, ``"depth"`` or ``"none"``) and the input resolution."""

    shrink: str
    resolution: int | None  # None is the default of the architecture


_TIMM_VARIANTS = [
    _TimmVariant(shrink, resolution)
    for shrink, resolution in [
        ("all", 64),
        ("all", 128),
        ("all", None),
        ("depth", 64),
        ("depth", 128),
        ("depth", None),
        ("none", 64),
        ("none", 128),
        ("none", None),
    ]
]

_TIMM_DEPTH = re.compile(
    r"depths?|layers|num_blocks|num_layers|stages|depth_list|serial_depths|block_config|k_sec|levels|d|"
    r"depth_token_only|num_blocks_list|stage_repeats|(layer|block)_per_(block|stage)"
)
_TIMM_WIDTH = re.compile(
    r"embed_dims?|dims?|widths?|channels|hidden_sizes|width_list|base_dims|stem_width|c|"
    r"num_features|out_features|stem_size|.*_chs|.*_widths"
)
_TIMM_GROUP_SIZE = re.compile(r"gs|group_size")
_TIMM_HEADS = re.compile(r"num_heads|heads|num_heads_outer")
_TIMM_FACTORS = re.compile(r"width_factor|widen_factor|scale|width_mult|width")


def _shrink_timm_width(width: Any, heads: Any) -> Any:
    if type(width) is int:
        if type(heads) is int and width % heads == 0 and width > heads:
            return min(heads, HEADS) * min(width // heads, HEAD_DIM)
        if _is_ints(heads):
            return heads[0] * 8  # the first stage of a pyramid whose heads have equal widths
        return min(width, HIDDEN)
    if _is_ints(width):
        return type(width)(shrink_widths(width, heads if _is_ints(heads) else None))
    return width


def _shrink_timm_depth(depth: Any) -> Any:
    if type(depth) is int:
        return min(depth, 2)
    if isinstance(depth, (list, tuple)):
        return type(depth)(_shrink_timm_depth(item) for item in depth)
    return depth


def _shrink_timm_args(arguments: Mapping[str, Any], widths: bool) -> dict[str, Any]:
    """Return the arguments of a timm architecture that change, nested configuration dataclasses included."""
    heads_key = next((key for key in arguments if _TIMM_HEADS.fullmatch(key)), None)
    heads = arguments.get(heads_key) if heads_key else None
    changes: dict[str, Any] = {}
    for key, value in arguments.items():
        if key == "block_args" and isinstance(value, list):
            changes[key] = [stage[:1] if isinstance(stage, list) else stage for stage in value]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type) and "pretrained" not in key:
            changes[key] = _shrink_timm_dataclass(value, widths)
        elif isinstance(value, dict) and key in ("model_cfg", "block_cfg"):
            changes[key] = value | _shrink_timm_args(value, widths)
        elif isinstance(value, (list, tuple)) and value and all(dataclasses.is_dataclass(item) for item in value):
            changes[key] = type(value)(_shrink_timm_dataclass(item, widths) for item in value)
        elif _TIMM_DEPTH.fullmatch(key):
            changes[key] = _shrink_timm_depth(value)
        elif not widths:
            continue
        elif key == "round_chs_fn" and isinstance(value, functools.partial):
            multiplier = value.keywords.get("multiplier", 1.0)
            changes[key] = functools.partial(value.func, **{**value.keywords, "multiplier": multiplier / 4})
        elif _TIMM_WIDTH.fullmatch(key):
            changes[key] = _shrink_timm_width(value, heads)
        elif _TIMM_GROUP_SIZE.fullmatch(key) and type(value) is int:
            changes[key] = min(value, 8)
        elif key == "model_cfg" and isinstance(value, list):
            changes[key] = [min(item, HIDDEN) if isinstance(item, int) else item for item in value]
        elif key == heads_key and type(value) is int:
            changes[key] = min(value, HEADS)
        elif _TIMM_FACTORS.fullmatch(key) and isinstance(value, float):
            changes[key] = value / 4
    return changes


def _shrink_timm_dataclass(value: Any, widths: bool) -> Any:
    names = [field.name for field in dataclasses.fields(value) if field.init]
    arguments = {name: getattr(value, name) for name in names}
    return dataclasses.replace(value, **_shrink_timm_args(arguments, widths))


def _class_defaults(model_class: Callable[..., nn.Module]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(model_class).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def _build_timm(name: str, seed: int, variant: _TimmVariant) -> TinyModel:
    """Build ``name`` with the arguments of its architecture shrunk on their way to timm's builder."""
    module = sys.modules[model_entrypoint(name).__module__]
    original: Callable[..., nn.Module] = module.build_model_with_cfg

    def shrunk_builder(model_cls: Callable[..., nn.Module], variant_name: str, *args: Any, **kwargs: Any) -> nn.Module:
        defaults = _class_defaults(model_cls)
        if variant.shrink != "none":
            kwargs.update(_shrink_timm_args(defaults | kwargs, widths=variant.shrink == "all") | {})
        if variant.resolution is not None and "img_size" in defaults:
            kwargs["img_size"] = variant.resolution
        return original(model_cls, variant_name, *args, **kwargs)

    with mock.patch.object(module, "build_model_with_cfg", shrunk_builder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False)
    model = model.float().eval()
    randomize_weights(model, seed)
    channels, *default_size = model.pretrained_cfg["input_size"] if model.pretrained_cfg else (3, 224, 224)
    size = default_size if variant.resolution is None else [variant.resolution] * 2
    generator = torch.Generator().manual_seed(seed + 1)
    return _tried(TinyModel(name, model, {"x": random_images((2, channels, *size), generator)}))


def tiny_timm(name: str, seed: int = 0) -> TinyModel:
    """Build the timm architecture ``name``, shrunk as far as its arguments allow; it has run forward once.

    Args:
        name: an architecture name of timm.
        seed: seed of weights and inputs.

    Raises:
        Exception: the error of the first variant tried, if no variant builds and runs.
    """
    attempts = [(str(variant), functools.partial(_build_timm, name, seed, variant)) for variant in _TIMM_VARIANTS]
    with _quiet():
        return _first_success(attempts)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and the sweep
# ---------------------------------------------------------------------------------------------------------------------


def try_build(build: Callable[[], TinyModel]) -> tuple[TinyModel | None, str]:
    """Call ``build``; return the model and an empty reason, or None and the reason in one line."""
    try:
        return build(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {_one_line(error)}"


def _example(batch: Batch, index: int) -> Batch:
    return {key: value[index : index + 1] for key, value in batch.items()}


def is_deterministic(tiny: TinyModel) -> bool:
    """Whether two runs give equal outputs."""
    with torch.no_grad():
        return torch.equal(primary_output(tiny.run()), primary_output(tiny.run()))


def example_interaction(tiny: TinyModel) -> float:
    """Largest difference, relative to the output's scale, between an example run alone and in the batch."""
    with torch.no_grad():
        together = primary_output(tiny.run())
        alone = [primary_output(tiny.run(_example(tiny.batch, index))) for index in range(2)]
    if any(output.shape[1:] != together.shape[1:] for output in alone):
        return math.inf
    scale = max(1.0, together.abs().max().item())
    return max((output[0] - together[index]).abs().max().item() for index, output in enumerate(alone)) / scale


def is_sensitive(tiny: TinyModel) -> bool:
    """Whether the two (different) examples have different outputs, i.e. the model is not trivially constant."""
    with torch.no_grad():
        output = primary_output(tiny.run())
    return (output[0] - output[1]).abs().max().item() > 1e-4 * output.abs().max().item()


def to_double(tiny: TinyModel) -> TinyModel:
    """Return a copy in float64, float inputs cast."""
    batch = {key: value.double() if value.is_floating_point() else value for key, value in tiny.batch.items()}
    model = copy.deepcopy(tiny.model).double()
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")  # grouped matrix products have no float64
    return TinyModel(tiny.name, model, batch)


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def on_alarm(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _notes(tiny: TinyModel, build: Callable[[], TinyModel]) -> list[str]:
    """Return what a test of attributions should know of a model that runs."""
    notes = []
    if not is_deterministic(tiny):
        notes.append("not deterministic")
    interaction = example_interaction(tiny)
    if not interaction <= 1e-4:
        notes.append(f"examples interact ({interaction:.1e})")
    if not is_sensitive(tiny):
        notes.append("same output for both examples")
    try:
        with torch.no_grad():
            if not torch.isfinite(primary_output(to_double(tiny).run())).all():
                raise ValueError("the output is not finite")
    except TimeoutError:
        raise
    except Exception as error:
        notes.append(f"no float64 ({type(error).__name__}: {_one_line(error, 80)})")
    with torch.no_grad():
        if not torch.equal(primary_output(tiny.run()), primary_output(build().run())):
            notes.append("not reproducible")
    if tiny.num_parameters > 10_000_000:
        notes.append("large")
    return notes


def _sweep_line(name: str, build: Callable[[], TinyModel], limit: int) -> tuple[str, str, float, int, str]:
    """Return name, "ok" or the reason, seconds of the build with its first forward, parameters, and notes."""
    start = time.perf_counter()
    seconds = None
    parameters = 0
    notes: list[str] = []
    try:
        with _time_limit(limit):
            tiny = build()
            seconds = time.perf_counter() - start
            parameters = tiny.num_parameters
            notes = _notes(tiny, build)
        result = "ok"
    except Exception as error:
        result = f"{type(error).__name__}: {_one_line(error)}"
    return name, result, seconds or time.perf_counter() - start, parameters, "; ".join(notes)


def main() -> None:
    """Try every pair and every family; write a table with one line per model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("table", type=Path, help="path of the table to write (tab-separated)")
    parser.add_argument("--limit", type=int, default=20, help="seconds per model")
    parser.add_argument("--only", default="", help="regular expression on the names")
    parser.add_argument("--library", choices=["transformers", "timm"], help="default: both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs: list[tuple[str, str, Callable[[], TinyModel]]] = []
    if arguments.library != "timm":
        for head, model_type in transformers_pairs():
            jobs.append((head, f"{head}/{model_type}", functools.partial(tiny_transformers, head, model_type)))
    if arguments.library != "transformers":
        jobs.extend(("timm", name, functools.partial(tiny_timm, name)) for name in timm_families())
    done: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    with arguments.table.open("w") as table:
        for group, name, build in jobs:
            if not re.search(arguments.only, name):
                continue
            line = _sweep_line(name, build, arguments.limit)
            tried[group] += 1
            done[group] += line[1] == "ok"
            print(line[0], line[1], f"{line[2]:.2f}", line[3], line[4], sep="\t", file=table, flush=True)
    for group in tried:
        print(f"{group}: {done[group]} / {tried[group]} ok")


if __name__ == "__main__":
    main()
