"""SparseBERT: a learned attention mask (Shi et al. 2021, ICML, arXiv 2102.12871), the differentiable attention mask.

One logit per head and distance (structured, a Toeplitz mask) or per head and pair (unstructured). In training the gate
``m = sigmoid((logit + g1 - g2) / temperature)``, ``g`` Gumbel noise, hard by straight-through or soft, multiplies the
attention probabilities, which are normalised again, so that dropped keys still receive a gradient; the loss gains
``density_coef * mean(m)``. In evaluation a pair is kept iff its logit is above 0. A row with nothing kept keeps its own
key. The search is dense, as in the paper; frozen (``freeze_masks``) the mask runs sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sa_hf.config import (
    SparseAttention,
    SparseAttentionConfig,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    register_pattern,
)
from sa_hf.errors import NotStaticError, SparseAttentionError
from sa_hf.layer import AttentionInputs, LayerSpec
from sa_hf.ops.cpp.steps import PreparedStep
from sa_hf.ops.gated import gated_attention, rows_by_distance
from sa_hf.ops.graphs import eager
from sa_hf.ops.grouped import Group, key_places, map_groups
from sa_hf.ops.parts import Band
from sa_hf.ops.planned import planned_attention
from sa_hf.ops.sequences import Sequences, refuse_open_length
from sa_hf.patterns.frozen_mask import FROZEN_MASK, distance_reads, mask_step
from sa_hf.patterns.learned import LearnedAttention, gathered
from sa_hf.patterns.static import score_options
from sa_hf.patterns.steps import is_step_in_place

INITIAL_LOGIT = 4.0  # kept with probability 0.98 under the noise: training starts from the pretrained function
# mask_length ** 2 logits per head: 4096 are 805 MB for 12 heads.
MAX_UNSTRUCTURED_LENGTH = 4096


@register_pattern
@dataclass(frozen=True, kw_only=True)
class SparseBertAttentionConfig(SparseAttentionConfig):
    """A learned attention mask.

    Args:
        structure: "structured", a logit per head and distance, or "unstructured", per head and pair.
        mask_length: distances (structured) or positions (unstructured) that have a logit. Structured masks drop the
            distances from it on; an unstructured one refuses longer inputs.
        share_layers: one mask for all layers of a stack.
        temperature: of the relaxed sample, > 0.
        hard: sample 0 or 1 with a straight-through gradient; else the relaxed sample itself.
        density_coef: weight of the mean gate in the loss, >= 0.
        frozen: the mask is fixed and runs sparse; set by ``freeze_masks``.
    """

    name: ClassVar[str] = "sparsebert"

    structure: str = "structured"
    mask_length: int = 512
    share_layers: bool = True
    temperature: float = 1.0
    hard: bool = True
    density_coef: float = 20.0
    frozen: bool = False

    def validate(self) -> None:
        check_choice(self, "structure", ("structured", "unstructured"))
        check_integer(self, "mask_length", minimum=1, maximum=2**20 if self.structured else MAX_UNSTRUCTURED_LENGTH)
        check_bool(self, "share_layers")
        check_number(self, "temperature", minimum=1e-6)
        check_bool(self, "hard")
        check_number(self, "density_coef", minimum=0.0)
        check_bool(self, "frozen")

    @property
    def structured(self) -> bool:
        return self.structure == "structured"

    def mask(self, length: int, num_heads: int = 1, layer_idx: int = 0, causal: bool = False) -> Tensor:
        if self.frozen:
            raise NotStaticError(
                "the frozen mask is stored in the model, not in its config: use `mask(length)` of the layer's "
                "`sparse` module"
            )
        return super().mask(length, num_heads, layer_idx, causal)

    def build(self, spec: LayerSpec) -> SparseBertAttention:
        return SparseBertAttention(self, spec)


class SparseBertAttention(LearnedAttention):
    """The mask of one layer, or its view of the one that the layers of a stack share.

    State: ``logits`` fp32 ``[H, mask_length]`` or ``[H, mask_length, mask_length]``; frozen, ``kept`` bool of that
    shape. A shared mask belongs to the first layer alone; the others hold neither.
    """

    config: SparseBertAttentionConfig
    logits: nn.Parameter | None
    kept: Tensor | None

    def __init__(self, config: SparseBertAttentionConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        shape = (len(self.heads), *[config.mask_length] * (1 if config.structured else 2))
        if config.frozen:
            self.register_parameter("logits", None)
            self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=spec.device))
        else:
            self.logits = nn.Parameter(torch.full(shape, INITIAL_LOGIT, dtype=torch.float32, device=spec.device))
            self.register_buffer("kept", None)
        # In a tuple, so that it does not become a child: the first layer alone saves the mask.
        self._owner: tuple[SparseBertAttention, ...] = ()
        self._tied: tuple[SparseBertAttention, ...] = ()  # the owner alone: the other layers that read its mask
        self._layers_averaged = 1
        self._table: Tensor | None = None  # of an owner: the mask as last evaluated
        self._sequences: Sequences | None = None
        self._seen: list[tuple[int, int, int]] = []  # (sequences, query length, key length) of the forward
        self._band = Band()  # of the forward

    # -- sharing ---------------------------------------------------------------------------------------------------

    def tie(self, layers: Sequence[SparseAttention]) -> None:
        """Share the first layer's mask (``share_layers``), or average the density loss over the layers."""
        if not self.config.share_layers:
            self._layers_averaged = len(layers)
            return
        first = layers[0]
        if first is self:
            self._take_over()
            self._tied = tuple(layer for layer in layers[1:] if isinstance(layer, SparseBertAttention))
        if first is self or not isinstance(first, SparseBertAttention):
            return
        if len(first.heads) != len(self.heads):
            raise SparseAttentionError(
                f"sparsebert.share_layers=True: layer {self.spec.layer_idx} has {len(self.heads)} heads, layer "
                f"{first.spec.layer_idx} has {len(first.heads)}; use share_layers=False"
            )
        self.register_parameter("logits", None)
        self.register_buffer("kept", None)
        self._owner, self._tied = (first,), ()

    def _take_over(self) -> None:
        """Own the mask, where the layer that owned it has left the stack."""
        if self._owner:
            owner = self.owner
            self.logits = None if owner.logits is None else nn.Parameter(owner.logits.detach().clone())
            self.kept = None if owner.kept is None else owner.kept.clone()
            self._owner = ()

    @property
    def owner(self) -> SparseBertAttention:
        """The module that holds the mask."""
        return self._owner[0] if self._owner else self

    @property
    def draws_by_forward(self) -> bool:
        return not self.config.frozen

    def _held(self) -> tuple[Any, Tensor | None]:
        """The owner's ``logits`` and ``kept``; where Accelerate keeps them on the CPU or on disk while the owner does
        not run, brought in for this call."""
        owner = self.owner
        logits, kept = owner.logits, owner.kept
        away = (logits is not None and logits.is_meta) or (kept is not None and kept.is_meta)
        hook: Any = getattr(owner, "_hf_hook", None)
        if away and hook is not None:
            hook.pre_forward(owner)
            logits, kept = owner.logits, owner.kept
            hook.post_forward(owner, None)
        return logits, kept

    # -- the gate --------------------------------------------------------------------------------------------------

    def gate(self) -> Tensor:
        """The gate of every logit, fp32 in its shape: a sample in training, 0 or 1 in evaluation."""
        owner, (held, kept) = self.owner, self._held()
        if kept is not None:
            return kept.float()
        logits = _whole(held).float()
        if not self.training:
            return (logits.detach() > 0).float()
        # Parts of a mixture by heads that run the same config in a layer draw apart.
        streams = (2 * owner.heads[0], 2 * owner.heads[0] + 1)
        place = {"layer": owner.spec.layer_idx, "steps_back": self.steps_back}
        uniform = [owner.uniform(logits.numel(), stream=s, **place) for s in streams]
        first, second = (-torch.log(-torch.log(u)) for u in uniform)
        noise = (first - second).float().view_as(logits)
        soft = torch.sigmoid((logits + noise) / self.config.temperature)
        return (soft > 0.5).float() + (soft - soft.detach()) if self.config.hard else soft

    def keep_table(self) -> Tensor:
        """Which logits are kept in evaluation, bool ``[H, mask_length(, mask_length)]``."""
        logits, kept = self._held()
        return kept if kept is not None else _whole(logits).detach() > 0

    def mask(self, length: int) -> Tensor:
        """The pairs that evaluation keeps for one sequence, bool ``[H, length, length]``."""
        self._check_length(length)
        band = self.spec.band.causal_if(self.spec.causal)
        rows = self._gate_rows(self.keep_table().float(), 0, length, length, band) > 0
        own = torch.eye(length, dtype=torch.bool, device=rows.device)
        return rows | (own & ~rows.any(-1, keepdim=True))

    def _check_length(self, length: int) -> None:
        if not self.config.structured and length > self.config.mask_length:
            raise SparseAttentionError(
                f"a sequence of {length} tokens is longer than mask_length={self.config.mask_length} of the "
                "unstructured learned mask; use structure='structured' or a larger mask_length"
            )

    def _gate_rows(self, gate: Tensor, begin: int, end: int, key_length: int, band: Band) -> Tensor:
        """The gate of the query positions ``[begin, end)``, ``[H, end - begin, key_length]``; 0 where not allowed."""
        i = torch.arange(begin, end, device=gate.device)[:, None]
        j = torch.arange(key_length, device=gate.device)[None, :]
        allowed = band.contains(i, j)
        if self.config.drop_diagonal:
            allowed = allowed & (i != j)
        if not self.config.structured:
            return gate[:, begin:end, :key_length] * allowed
        allowed = allowed & ((i - j).abs() < self.config.mask_length)
        distance = torch.arange(1 - key_length, key_length, device=gate.device).abs()
        diagonals = gate.index_select(1, distance.clamp(max=self.config.mask_length - 1))
        return rows_by_distance(diagonals, begin, end, key_length) * allowed

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: AttentionInputs) -> Tensor:
        band = inputs.band.causal_if(inputs.causal)
        for _, _, key_length in inputs.sequences.shapes:
            self._check_length(key_length)
        _, kept = self._held()
        if kept is None and not self._evaluates_sparsely(inputs):
            refuse_open_length(inputs.sequences)
        if not torch.compiler.is_exporting():  # sizes of a trace mean nothing after it
            self._note(inputs, band)
        options = score_options(inputs, self.heads)
        if kept is None and self._evaluates_sparsely(inputs):
            kept = self._evaluated()
        kept = None if kept is None else kept.to(inputs.query.device)  # the owner's may be another one's
        if kept is not None and self._in_place(inputs):
            return mask_step(inputs, kept, band, options, self.config.drop_diagonal)
        gate = self.gate().to(inputs.query.device) if kept is None else kept

        def attend_group(group: Group) -> Tensor:
            if kept is not None:
                return planned_attention(
                    group.query, group.key, group.value, FROZEN_MASK, group.options, inputs.engine,
                    tensors=(kept,), numbers=[*band, int(self.config.drop_diagonal)],
                )  # fmt: skip

            def rows(begin: int, end: int) -> Tensor:
                return self._gate_rows(gate, begin, end, group.key.shape[2], band)

            return gated_attention(group, rows, (gate,))

        return map_groups(inputs.query, inputs.key, inputs.value, inputs.sequences, options, attend_group)

    def _note(self, inputs: AttentionInputs, band: Band) -> None:
        self._sequences, self._seen, self._band = inputs.sequences, [*inputs.sequences.shapes], band
        inputs.note(self, inputs.sequences)

    def repeated(self, earlier: SparseAttention, step: PreparedStep, inputs: AttentionInputs) -> PreparedStep | None:
        if self.training or not self.config.structured:
            return None
        band = inputs.band.causal_if(inputs.causal)
        _, kept = self._held()
        kept = (self._evaluated() if kept is None else kept).to(inputs.query.device)
        self._note(inputs, band)
        return step.relisted(distance_reads(inputs.sequences, kept, band, self.config.drop_diagonal))

    def _evaluates_sparsely(self, inputs: AttentionInputs) -> bool:
        """Whether the mask, though not frozen, runs as if it were: in evaluation no gradient reaches it. Not where the
        inputs want one: the dense search can be differentiated twice."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.query, inputs.key, inputs.value)):
            return False
        plain = eager(inputs.query, inputs.key) and not torch._C._are_functorch_transforms_active()
        return not self.training and plain and inputs.query.device.type == "cpu"

    def _evaluated(self) -> Tensor:
        """:meth:`keep_table` as one tensor for as long as it stays the same: plans and lists are kept for it."""
        owner, table = self.owner, self.keep_table()
        known = owner._table
        if known is None or known.device != table.device or not torch.equal(known, table):
            owner._table = known = table
        return known

    def _in_place(self, inputs: AttentionInputs) -> bool:
        served = self.config.structured or inputs.sequences.is_full
        return not self.training and served and is_step_in_place(inputs)

    def reads_listed_keys(self, inputs: AttentionInputs) -> bool:
        return self._in_place(inputs)

    def expired_keys(self, noted: Sequences | None = None) -> Tensor | None:
        sequences = self._sequences if noted is None else noted
        if self.training or sequences is None:
            return None
        table = self.keep_table().any(0)
        position, length = key_places(sequences, table.device)
        size = self.config.mask_length
        if self.config.structured:
            kept = torch.nonzero(table).flatten()
            farthest = int(kept[-1]) if len(kept) else 0
            return (length - position > farthest) | (position < 0)
        # Row n of ``later``: which keys some query at position n or later keeps.
        later = torch.nn.functional.pad(table.flip(0).cummax(0).values.flip(0), (0, 0, 0, 1))
        return ~later[length.clamp(max=size), position.clamp(0, size - 1)] | (position < 0)

    # -- losses, figures, freezing ---------------------------------------------------------------------------------

    def aux_losses(self) -> dict[str, Tensor]:
        """``sparsebert_density``: made here and not in the forward, so it lives outside of any checkpointed region."""
        return self._losses(self.config.density_coef)

    @torch.no_grad()
    def unscaled_losses(self) -> dict[str, Tensor]:
        return self._losses(1.0)

    def _losses(self, coefficient: float) -> dict[str, Tensor]:
        if self._owner or self.config.frozen or not self._seen:
            return {}
        # A shared logit counts with the pairs that any layer reads through it: in a model that slides in its first
        # layer, others read further than the owner does.
        bands = [layer._band for layer in (self, *self._tied) if layer._seen]
        gate = self.gate()
        density = self._density(gate if coefficient else gate.detach(), _any_of(bands))
        return {"sparsebert_density": coefficient * density / self._layers_averaged}

    def _density(self, gate: Tensor, band: Band) -> Tensor:
        """Mean gate over the heads and the pairs of the last forward that lie in a band and have a logit."""
        pairs = self._pairs(gate.device, band)
        return (gate * pairs).sum() / (pairs.sum() * len(self.heads)).clamp(min=1)

    def _pairs(self, device: torch.device, band: Band) -> Tensor:
        """How many pairs of the last forward in a band each logit stands for, fp32 ``[mask_length(, mask_length)]``."""
        length = self.config.mask_length
        if not self.config.structured:
            total = torch.zeros(length, length, dtype=torch.float32, device=device)
            at = torch.arange(length, device=device)
            for sequences, n_q, n_k in self._last_lengths():
                rows = slice(n_k - n_q, n_k)
                total[rows, :n_k] += sequences * band.contains(at[rows, None], at[None, :n_k]).float()
            return total.fill_diagonal_(0) if self.config.drop_diagonal else total
        distance = torch.arange(length, device=device)
        total = torch.zeros(length, dtype=torch.float32, device=device)
        for sequences, n_q, n_k in self._last_lengths():
            behind = (n_k - distance.clamp(min=n_k - n_q)).clamp(min=0) * band.contains(distance, distance * 0)
            ahead = (n_q - distance).clamp(min=0) * band.contains(distance * 0, distance) * (distance > 0)
            total += sequences * (behind + ahead)
        if self.config.drop_diagonal:
            total[0] = 0
        return total

    def figures(self) -> dict[str, float]:
        """``mask_density`` over the pairs of the last forward, before any over those of ``mask_length`` tokens."""
        with torch.no_grad():
            return {"mask_density": float(self._density(self.keep_table().float(), self._last_band()))}

    def _last_band(self) -> Band:
        return self._band if self._seen else self.spec.band.causal_if(self.spec.causal)

    def _last_lengths(self) -> list[tuple[int, int, int]]:
        """(sequences, query length, key length) of the last forward; before any, one of ``mask_length`` tokens."""
        return self._seen or [(1, self.config.mask_length, self.config.mask_length)]

    def density(self, length: int) -> float:
        """Pairs that evaluation keeps at a length, over the pairs of dense attention."""
        kept = int(self.mask(length).sum())
        dense = length * (length + 1) // 2 if self.spec.causal else length**2
        return kept / (dense * len(self.heads))

    def freeze(self) -> None:
        """Fix the mask at what evaluation keeps now; from here on it runs sparse. Does nothing when frozen already."""
        if self.config.frozen:
            return
        if not self._owner:
            kept = self.keep_table()
            self.register_parameter("logits", None)
            self.register_buffer("kept", kept)
        self.config = replace(self.config, frozen=True)


def _any_of(bands: Sequence[Band]) -> Band:
    """The pairs of any of some bands; each holds the own position, so those make one band."""
    lefts, rights = zip(*bands, strict=True)
    return Band(*(None if None in side else max(side) for side in (lefts, rights)))


def _whole(logits: Any) -> Tensor:
    if logits is None:
        raise RuntimeError("the shared mask has lost its owner: tie the layers of the stack again")
    return gathered(logits)
