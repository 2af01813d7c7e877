"""``sparse_attention``: the bare operator."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_hf.config import SparseAttentionConfig
from sa_hf.errors import NotStaticError, SparseAttentionError
from sa_hf.layer import AttentionInputs, Geometry, LayerSpec
from sa_hf.ops.host import with_host_defaults
from sa_hf.ops.parts import Band
from sa_hf.ops.reference import dense_attention
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.base import StaticPatternConfig, default_scale, dense_multiplicity
from sa_hf.patterns.block_topk import BlockTopKAttentionConfig
from sa_hf.patterns.custom_op import layer_key, static_attention
from sa_hf.patterns.static import static_options


@with_host_defaults
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    *,
    causal: bool = False,
    layer_idx: int = 0,
    attention_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """Sparse attention of a pattern without learned state over a batch of sequences; differentiable.

    Args:
        query: ``[batch, num_heads, query_length, head_dim]``, a floating dtype. ``query_length < key_length`` means
            the last ``query_length`` positions.
        key, value: ``[batch, num_key_value_heads, key_length, head_dim]``.
        config: a pattern without learned state.
        attention_mask: ``[batch, key_length]``, 1 real and 0 padding, on either side or inside.
        sequence_ids: ``[batch, key_length]``; equal neighbours are one packed sequence.
        scale: of the query-key product; None is ``head_dim ** -0.5``.
        dropout: probability of dropping an attention probability.
        engine: "auto", "triton", "native", "torch", or "reference" (the dense fp64 oracle).

    Returns:
        ``[batch, num_heads, query_length, head_dim]``; rows of padding are 0.

    Raises:
        NotStaticError: the pattern has learned state; it runs through its patched layer.
        SparseAttentionError: shapes, dtypes or values that do not fit together.
    """
    if not isinstance(config, SparseAttentionConfig):
        raise SparseAttentionError(f"config must be a SparseAttentionConfig, not {type(config).__name__}")
    chooses = isinstance(config, BlockTopKAttentionConfig) and not config.indexer
    if not chooses and not isinstance(config, StaticPatternConfig):
        raise NotStaticError(
            f"pattern {config.name!r} has learned state: use patch_model(model, config); sparse_attention serves "
            "the static patterns, and block_topk without its indexer"
        )
    check_inputs(query, key, value, scale, dropout)
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or layer_idx < 0:
        raise SparseAttentionError(f"layer_idx={layer_idx!r} must be an integer >= 0; nearest: 0")
    kernel = getattr(config, "conv_kernel_size", 1)
    if kernel > 1:
        raise NotStaticError(
            f"{config.name}.conv_kernel_size={kernel} makes queries and keys by learned taps over the layer's "
            "input: use patch_model, or conv_kernel_size=1 on queries and keys that are made already"
        )
    if config.extra_tokens:
        raise SparseAttentionError(
            f"{config.name} with {config.extra_tokens} extra tokens needs a model that carries them: use patch_model"
        )
    batch, heads, n_q, head_dim = query.shape
    sequences = Sequences.from_mask(batch, n_q, key.shape[2], attention_mask, sequence_ids)
    scale = default_scale(head_dim) if scale is None else float(scale)
    inputs = AttentionInputs(query, key, value, sequences, causal, scale, dropout=dropout, engine=engine)
    if not isinstance(config, StaticPatternConfig):
        spec = LayerSpec(layer_idx, layer_idx + 1, heads, key.shape[1], head_dim, heads * head_dim, causal)
        out: Tensor = config.build(spec)(inputs)
        return out
    if engine == "reference":
        return _oracle(inputs, config, layer_idx)
    all_heads = tuple(range(heads))
    layer = layer_key(config, all_heads, heads, layer_idx, causal, Band(), engine)
    return static_attention(query, key, value, sequences, layer, static_options(query, scale, dropout, all_heads))


def check_inputs(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> None:
    """Raise ``SparseAttentionError`` where the tensors and options of a call do not fit together."""
    for label, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.dtype.is_floating_point:
            raise SparseAttentionError(
                f"{label} must be a floating tensor [batch, heads, length, head_dim], not {_shown(x)}"
            )
        if min(x.shape) < 1:
            raise SparseAttentionError(f"{label} {tuple(x.shape)} has an empty dimension; each must be >= 1")
    if key.shape != value.shape:
        raise SparseAttentionError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape")
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise SparseAttentionError(
            "query, key and value must share dtype and device, not "
            f"{[(str(x.dtype), str(x.device)) for x in (query, key, value)]}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise SparseAttentionError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must share batch and head_dim"
        )
    if query.shape[1] % key.shape[1]:
        raise SparseAttentionError(
            f"num_heads={query.shape[1]} must be a multiple of num_key_value_heads={key.shape[1]}"
        )
    if scale is not None and not (isinstance(scale, int | float) and scale > 0):
        raise SparseAttentionError(f"scale={scale!r} must be a positive number, or None for head_dim ** -0.5")
    if not 0 <= dropout < 1:
        raise SparseAttentionError(f"dropout={dropout!r} must lie in [0, 1)")


def _shown(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _oracle(inputs: AttentionInputs, config: StaticPatternConfig, layer_idx: int) -> Tensor:
    """The dense fp64 oracle, sequence by sequence."""
    options = static_options(inputs.query, inputs.scale, inputs.dropout)
    heads = inputs.query.shape[1]
    seqs = inputs.sequences
    query, key, value = inputs.query, inputs.key, inputs.value
    if seqs.key_gather is not None and seqs.query_gather is not None:  # both or none
        query = query.gather(2, seqs.query_gather[:, None, :, None].expand_as(query))
        key, value = (x.gather(2, seqs.key_gather[:, None, :, None].expand_as(x)) for x in (key, value))
    out = torch.zeros_like(query)
    for index, s in enumerate(seqs.spans):
        geometry = Geometry(
            s.key_length, s.query_length, tuple(range(heads)), heads, layer_idx, inputs.causal, inputs.band
        )  # fmt: skip
        counts = dense_multiplicity(config, geometry).to(query.device)
        row = slice(s.row, s.row + 1)
        rows = slice(s.query_start, s.query_start + s.query_length)
        keys = slice(s.key_start, s.key_start + s.key_length)
        part = options.with_tensors(sequence_ids=torch.tensor([index], device=query.device))
        one, _ = dense_attention(query[row, :, rows], key[row, :, keys], value[row, :, keys], counts, part)
        filled = torch.zeros_like(query)
        filled[row, :, rows] = one
        out = out + filled
    if seqs.query_gather is not None:
        out = torch.zeros_like(out).scatter(2, seqs.query_gather[:, None, :, None].expand_as(out), out)
    return out
