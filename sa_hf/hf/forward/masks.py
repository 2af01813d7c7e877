"""The mask side of the adapter: what a model asked for, kept instead of an n x n tensor.

Transformers builds one mask per forward through ``AttentionMaskInterface`` and hands it to every layer. Ours is a
:class:`MaskRequest`, the arguments of that call. Sparse layers read sequences, causality and the model's own window
from it; layers left dense have the original mask built from it, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
)

from sa_hf.errors import SparseAttentionError, UnsupportedModelError
from sa_hf.hf.forward.rules import MaskRules
from sa_hf.hf.state.inputs import ForwardInputs, handed_over
from sa_hf.layer import Blocks
from sa_hf.ops.parts import Band
from sa_hf.ops.sequences import PendingSequences, Sequences, WholeRows, whole_rows

OFFSETS = ("q_offset", "kv_offset")


class MaskRequest:
    """The arguments with which a model asked for its mask; passes through the model where a 4-D mask would.

    Attributes:
        query_offset: tokens in the cache before this call; ``key_offset``: tokens that the cache no longer holds.
        whole: the request that this one is the last queries of, or None.
        cuts: the model tells sequences apart by itself, so that a call may not.
        joined: what the model joined to its mask (``joined.py``), for layers that know it; ``unjoined``: the request
            without it.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        # A static cache hands out its length as a tensor that grows before the layers left dense build their mask.
        self.arguments: dict[str, Any] = {
            name: x.clone() if name in OFFSETS and isinstance(x, Tensor) else x for name, x in arguments.items()
        }
        self.query_length = _size(arguments["q_length"])
        self.query_offset = _size(arguments.get("q_offset", 0))
        self.key_offset = _size(arguments.get("kv_offset", 0))
        self.padding: Tensor | None = arguments.get("attention_mask")
        self.given = handed_over()
        self.whole: MaskRequest | None = None
        self.cuts = False
        self.joined: Tensor | MaskRequest | None = None
        self.unjoined = self
        self._dense: dict[tuple[str, int], Any] = {}
        self._sequences: dict[int, Sequences] = {}
        self._rules: MaskRules | None = None
        self._blocks: Blocks | None = None
        self._looked_at_blocks = False
        self._wide: MaskRequest | None = None
        self.settled: list[Any] = []  # steps of decoding that layers of this forward ran (``repeated``)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.arguments["batch_size"], 1, self.query_length, _size(self.arguments["kv_length"])

    def dim(self) -> int:
        return self.ndim

    def __getitem__(self, index: Any) -> Any:
        """The rows of the last queries, ``[:, :, -k:, :]``: layers that read the keys of others may run those alone
        (Gemma 4, by ``logits_to_keep``). ``[:, 0, 0, :]`` and ``[:, :, -1, :]`` are what hides padding, to add
        (Longformer, NLLB-MoE)."""
        all_of_it, function = slice(None), self.arguments["mask_function"]
        if index == (all_of_it, 0, 0, all_of_it) and function is bidirectional_mask_function:
            return self._row()
        last = function in (bidirectional_mask_function, causal_mask_function)  # whose last query reads all of the past
        if index == (all_of_it, all_of_it, -1, all_of_it) and last and not self.key_offset:
            return self._row()[:, None]
        rows = index[2] if isinstance(index, tuple) and len(index) == self.ndim else all_of_it
        start = getattr(rows, "start", None)
        if index != (all_of_it, all_of_it, rows, all_of_it) or rows != slice(start, None):
            raise UnsupportedModelError(
                f"the model takes the part {index} of its mask; a pattern can serve the whole, or the last queries, "
                "[:, :, -k:, :]. Keep such layers dense"
            )
        if not start:
            return self
        first = rows.indices(self.query_length)[0]
        part = MaskRequest(
            {**self.arguments, "q_offset": self.query_offset + first, "q_length": self.query_length - first}
        )
        part.given, part.whole = self.given, self.whole or self
        return part

    def for_queries(self, count: int) -> MaskRequest:
        """The same of so many queries, once for all layers."""
        if self._wide is None or self._wide.query_length != count:
            self._wide = MaskRequest({**self.arguments, "q_length": count})
            self._wide.given = self.given
        return self._wide

    def _row(self) -> Tensor:
        dtype, device = self.arguments.get("dtype", torch.float32), self.arguments.get("device")
        row = torch.zeros(self.shape[0], self.shape[-1], dtype=dtype, device=device)
        if self.padding is None:
            return row
        padding = torch.nn.functional.pad(self.padding, (0, max(0, row.shape[1] - self.padding.shape[1])))
        return row.masked_fill(padding[:, : row.shape[1]] == 0, torch.finfo(dtype).min)

    def contiguous(self) -> MaskRequest:
        """What ``generate`` calls on a mask that it builds ahead of the forward."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> MaskRequest:
        """Moved as a tensor would be: only the 2-D mask has a device. (Accelerate calls it between devices.)"""
        if self.padding is None:
            return self
        padding = self.padding.to(*args, **kwargs)
        if padding is self.padding:
            return self
        moved = MaskRequest({**self.arguments, "attention_mask": padding, "device": padding.device})
        moved.given, moved.whole = self.given, None if self.whole is None else self.whole.to(*args, **kwargs)
        return moved

    @property
    def causal(self) -> bool:
        return self._read().causal

    @property
    def band(self) -> Band:
        """The model's own window, without causality."""
        return self._read().band

    @property
    def chunk(self) -> int | None:
        """The tokens of the model's own chunks; None where it has none."""
        return self._read().chunk

    @property
    def blocks(self) -> Blocks | None:
        """Tokens that see each other beside what causality lets them see (those of one image); None where there are
        none, as in text alone. A device read, once."""
        if not self._looked_at_blocks:
            self._looked_at_blocks, rules = True, self._read()
            if rules.blocks is not None and bool((rules.blocks.ids >= 0).any()):
                self._blocks = rules.blocks
        return self._blocks

    def _read(self) -> MaskRules:
        if self._rules is None:
            self._rules = MaskRules.read(self.arguments["mask_function"])
        return self._rules

    def _is_known(self) -> bool:
        try:
            self._read()
        except UnsupportedModelError:
            return False
        return True

    def sequences(self, extra_tokens: int = 0) -> Sequences:
        """The sequences over every position so far; one device read per forward, shared by the layers."""
        if extra_tokens not in self._sequences:
            self._sequences[extra_tokens] = self._build_sequences().with_extra_tokens(extra_tokens)
        return self._sequences[extra_tokens]

    def _build_sequences(self) -> Sequences:
        batch, total = int(self.arguments["batch_size"]), self.query_offset + self.query_length
        padding = self.padding
        if padding is not None and padding.shape[-1] < total:
            raise SparseAttentionError(
                f"attention_mask has {padding.shape[-1]} columns, but {self.query_offset} cached and "
                f"{self.query_length} new tokens make {total}; give the mask of all of them"
            )
        if not self.causal:
            check_no_past(self.key_offset + self.shape[-1], total)
        padding = None if padding is None else padding[:, :total]
        ids = self._sequence_ids(batch, total)
        return Sequences.from_mask(batch, self.query_length, total, padding, ids)

    def _sequence_ids(self, batch: int, total: int) -> Tensor | None:
        if self.whole is not None:  # which knows whether there is a cache
            return self.whole._sequence_ids(batch, total)
        given, packed = self.given, self._read().packed
        said = said_ids(given, batch, total)
        if said is not None:
            return said
        if packed is not None:
            return packed.expand(batch, -1)
        if given is None or given.position_ids is None or not self.causal or self.padding is not None:
            return None
        positions = given.position_ids
        if self.query_offset or positions.dim() != 2 or positions.shape[-1] != total:
            return None
        # With a cache, where transformers cuts nothing, a restart begins a sequence and a gap does not.
        return (positions.diff(prepend=positions[:, :1] - 1) < 1).cumsum(-1).expand(batch, -1)

    def dense(self, implementation: str, extra_tokens: int = 0, given: ForwardInputs | None = None) -> Any:
        """The mask that the original attention would have got, within the packed sequences that sparse layers see;
        ``extra_tokens`` are seen by and see everything.

        Args: given: what the call was given about the sequences; None for cross-attention.

        Raises:
            SparseAttentionError: ``sequence_ids`` beside an attention that takes no mask of pairs.
        """
        key = implementation, extra_tokens
        if key not in self._dense:
            build = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
            mask = None if build is None else build(**self._packed_arguments(implementation, given))
            if extra_tokens and mask is not None:
                mask = with_extra_tokens(mask, extra_tokens, self.padding)
            self._dense[key] = mask
        return self._dense[key]

    def _packed_arguments(self, implementation: str, given: ForwardInputs | None) -> dict[str, Any]:
        batch, total = int(self.arguments["batch_size"]), self.query_offset + self.query_length
        ids = said_ids(given, batch, total)
        compiling = torch.compiler.is_compiling()  # without a cache, as it must be, the mask knows packed positions
        restarts = given is not None and given.position_ids is not None and self._is_known() and self.causal
        if ids is None and not compiling and restarts:
            # A restart of the positions counts with a cache, too, where Transformers' own mask would not see it.
            ids = None if self.sequences().is_full else self._sequence_ids(batch, total)
        if ids is None:
            return self.arguments
        if "flash" in implementation:  # finds packed positions by itself, and takes no mask of pairs
            if given is not None and given.sequence_ids is not None:
                raise SparseAttentionError(
                    f"sequence_ids do not reach layers left dense under attn_implementation={implementation!r}; load "
                    "the model with 'sdpa', or give restarting position_ids"
                )
            return self.arguments
        runs = _runs(ids.to(self.arguments["device"]), self.padding)
        # A static cache has more places than tokens so far.
        runs = torch.nn.functional.pad(runs, (0, max(0, self.key_offset + self.shape[-1] - total)), value=-1)
        function = and_masks(self.arguments["mask_function"], packed_sequence_mask_function(runs))
        kept = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return {**self.arguments, **kept, "mask_function": function}


def check_no_past(keys: int, total: int) -> None:
    """That a layer which is not causal reads the keys of its own tokens: positions of other keys would be unknown.

    Args: keys: how many there are, or the columns of the mask; total: the tokens so far.

    Raises:
        SparseAttentionError: a cache or prefix on a bidirectional stack, or a mask of another width.
    """
    if keys != total:
        raise SparseAttentionError(
            f"{keys} keys (or columns of attention_mask) for {total} tokens in a layer that is not causal: a pattern "
            f"has no positions for a past there. A cache or prefix (prefix tuning) on a bidirectional stack is not "
            f"supported; use LoRA or prompt tuning, and an attention_mask [batch, {total}]"
        )


def traced_sequences(
    request: MaskRequest, given: ForwardInputs | None, causal: bool, extra_tokens: int
) -> Sequences | WholeRows | PendingSequences:
    """The sequences of a call that torch.compile traces: what needs a device read waits for the operator.

    Raises:
        UnsupportedModelError: a mask of the model's own beside causality and its window, or a cache.
    """
    arguments = request.arguments
    function, config = arguments["mask_function"], arguments.get("config")
    plain = function is causal_mask_function or function is bidirectional_mask_function
    joined = plain or function.__qualname__ == "and_masks.<locals>.and_mask"
    if not joined or arguments.get("use_vmap") or getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(
            "under torch.compile a model's mask may be causality, its window and padding; this one joins others: "
            "run it uncompiled"
        )
    batch, length = _size(arguments["batch_size"]), request.query_length
    if not causal:
        check_no_past(request.shape[-1], length)
    if request.query_offset or request.key_offset:
        raise UnsupportedModelError("a cache does not pass through fullgraph compilation; compile with use_cache=False")
    ids = said_ids(given, batch, length)
    if ids is None and causal and given is not None and given.position_ids is not None and request.padding is None:
        positions = given.position_ids
        ids = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1).expand(batch, -1)
    if ids is None and request.padding is None:
        return whole_rows(batch, length, length, extra_tokens)
    total = length + extra_tokens
    return PendingSequences(batch, total, total, request.padding, ids, extra_tokens)


def with_extra_tokens(mask: Tensor, count: int, padding: Tensor | None) -> Tensor:
    """A dense mask ``[B, 1, n, n]`` (bool or additive) with ``count`` tokens in front: all see them, they see all that
    is not padding."""
    seen = mask.dtype == torch.bool
    mask = torch.nn.functional.pad(mask, (count, 0, count, 0), value=seen)
    if padding is not None:
        hidden = ~padding[:, None, None, : mask.shape[-1] - count].bool()
        mask[:, :, :count, count:] = ~hidden if seen else hidden * torch.finfo(mask.dtype).min
    return mask


def said_ids(given: ForwardInputs | None, batch: int, total: int) -> Tensor | None:
    """The sequences that a call names outright, ``sequence_ids [batch, total]``; None where it does not.

    Raises:
        SparseAttentionError: ids that are no tensor, ids or lengths of another shape.
    """
    if given is not None and given.sequence_ids is not None:
        if not isinstance(given.sequence_ids, Tensor):
            raise SparseAttentionError(
                f"sequence_ids is a {type(given.sequence_ids).__name__}; it must be a tensor [batch, length] = "
                f"[{batch}, {total}], e.g. torch.tensor([[0, 0, 1]])"
            )
        if tuple(given.sequence_ids.shape) != (batch, total):
            raise SparseAttentionError(
                f"sequence_ids has shape {tuple(given.sequence_ids.shape)}; it must be [batch, length] = "
                f"[{batch}, {total}]"
            )
        return given.sequence_ids
    if given is not None and given.cu_seq_lens is not None:
        return ids_from_lengths(given.cu_seq_lens, batch, total)
    return None


def _runs(ids: Tensor, padding: Tensor | None) -> Tensor:
    """Ids ``[batch, length]`` as runs: equal neighbours, padding cut out, have one number."""
    if padding is not None:
        slots = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.gather(1, torch.where(padding[:, : ids.shape[1]].bool(), slots, 0).cummax(1).values)
    return (ids.diff(dim=1, prepend=ids[:, :1]) != 0).cumsum(1)


def ids_from_lengths(cu_seq_lens: Tensor, batch: int, total: int) -> Tensor:
    """``sequence_ids [1, total]`` from cumulative lengths ``[0, n0, n0 + n1, ...]`` over a flattened batch."""
    if batch != 1:
        raise SparseAttentionError(
            f"cu_seq_lens_q describes one flattened row, but the batch has {batch}; flatten it to 1"
        )
    slots = torch.arange(total, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].contiguous(), slots, right=True)[None]


def _size(x: Any) -> int:
    """A length or place that transformers hands out as a number or a tensor; one that torch.export leaves open stays
    so."""
    size: int = x if isinstance(x, torch.SymInt) else int(x)  # type: ignore[assignment]
    return size
