"""What a mask function of Transformers means: causality, a window, chunks, packed sequences, blocks of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from sa_hf.errors import UnsupportedModelError
from sa_hf.layer import Blocks
from sa_hf.ops.parts import Band


@dataclass(frozen=True, eq=False)
class MaskRules:
    """What a mask function means: the pairs inside ``band`` and ``chunk``, of the past alone where ``causal``, and of
    one sequence where ``packed [batch, length]`` numbers them; and beside them those of ``blocks``."""

    causal: bool = False
    band: Band = Band()
    chunk: int | None = None
    packed: Tensor | None = None
    blocks: Blocks | None = None

    @classmethod
    def read(cls, function: Callable[..., Any]) -> MaskRules:
        """Read transformers' mask closures; every piece must be one that is understood.

        Raises:
            UnsupportedModelError: another union of masks, or a function of the model's own.
        """
        if function is causal_mask_function:
            return cls(causal=True)
        if function is bidirectional_mask_function:
            return cls()
        kind = function.__qualname__
        cells = getattr(function, "__closure__", None) or ()
        held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
        if kind == "and_masks.<locals>.and_mask":
            return cls._joined([cls.read(part) for part in held["mask_functions"]])
        if kind == "or_masks.<locals>.or_mask":
            return cls._united([cls.read(part) for part in held["mask_functions"]])
        if kind == "blockwise_overlay.<locals>.inner_mask":
            return cls(blocks=Blocks(held["block_sequence_ids"]))
        if kind == "sliding_window_overlay.<locals>.inner_mask":
            return cls(band=Band(int(held["sliding_window"]) - 1, None))
        if kind == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
            return cls(band=Band(int(held["sliding_window"]), int(held["sliding_window"])))
        if kind == "chunked_overlay.<locals>.inner_mask":  # counted from the first token, as positions are
            return cls(band=Band(int(held["chunk_size"]) - 1, None), chunk=int(held["chunk_size"]))
        if kind == "packed_sequence_mask_function.<locals>.inner_mask":
            return cls(packed=held["packed_sequence_mask"])
        if kind == "remap_positions_for_packed_sequence.<locals>.inner_mask":
            return cls.read(held["mask_function"])  # positions inside each sequence are what ours are, too
        if kind == "_bidirectional_window_overlay.<locals>.inner_mask":  # Gemma 3's, whose bound is exclusive
            return cls(band=Band(int(held["sliding_window"]) - 1, int(held["sliding_window"]) - 1))
        if kind == "sliding_window_mask_function.<locals>.inner_mask" and held.get("is_causal") is False:
            window = int(held["sliding_window"])  # T5Gemma 2's, over both sides
            return cls(band=Band((window + 1) // 2 - 1, window // 2))
        if _is_everything(function):
            return cls()
        raise _unknown(kind.split(".")[0])

    @classmethod
    def _joined(cls, parts: list[MaskRules]) -> MaskRules:
        """All of several at once. Of a union its window and sequences hold for the blocks, too."""
        causal, band, chunk, packed, blocks = False, Band(), None, None, None
        for part in parts:
            causal, band = causal or part.causal, band.intersect(part.band)
            packed = packed if part.packed is None else part.packed
            chunk = part.chunk if chunk is None else chunk
            blocks = part.blocks if blocks is None else blocks
        if blocks is not None:
            others = [part for part in parts if part.blocks is None]
            if len(others) < len(parts) - 1 or any(part.causal or part.chunk is not None for part in others):
                raise _unknown("and_masks")
            for part in others:
                blocks = Blocks(blocks.ids, blocks.band.intersect(part.band))
        return cls(causal, band, chunk, packed, blocks)

    @classmethod
    def _united(cls, parts: list[MaskRules]) -> MaskRules:
        """Any of several: one that holds the others (a bidirectional Gemma 3), or causality (in a window or not) and
        blocks."""
        for part in parts:
            if all(part._holds(other) for other in parts):
                return part
        plain = [part for part in parts if part.blocks is None]
        joined = [part for part in parts if part.blocks is not None]
        if len(plain) != 1 or len(joined) != 1 or not plain[0].causal or joined[0].causal or plain[0].chunk is not None:
            raise _unknown("or_masks")
        return cls(True, plain[0].band, None, plain[0].packed, joined[0].blocks)

    def _holds(self, other: MaskRules) -> bool:
        """Whether every pair of another one is a pair of this one."""
        if self is other:
            return True
        plain = not self.causal and self.chunk is None and self.packed is None and self.blocks is None
        near, far = self.band, Band(other.band.left, 0 if other.causal else other.band.right)
        return plain and other.blocks is None and near.intersect(far) == far


def _is_everything(function: Callable[..., Any]) -> bool:
    """Whether a mask function gives one answer for all pairs, and that is yes."""
    places = torch.arange(2)
    try:
        found = function(0, 0, places[:, None], places[None, :])
    except Exception:  # whatever a model's own function raises where it is not called as it expects
        return False
    return isinstance(found, Tensor) and found.dim() == 0 and bool(found)


def _unknown(kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's mask uses {kind!r} in a way that a sparse pattern cannot be combined with exactly (a union of "
        "masks, or a function of the model's own); keep such layers dense"
    )
