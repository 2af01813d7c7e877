"""Attention with an indexer of its own, which chooses the keys of each query (DeepSeek Sparse Attention, DeepSeek-AI
2025), asking the interface.

It chooses ``index_topk`` keys, so up to that many tokens it chooses all: there the pattern alone says what is read, and
the indexer is left out. Beyond, both would choose, which no pattern knows.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.forward.layer_input import LayerCall
from sa_hf.hf.forward.masks import MaskRequest
from sa_hf.hf.patching.asking_base import Asking, AskingSparse, asks, left_dense

# What an indexer gives in the place of chosen keys. Models take it as such, and hand it on to later layers that share
# them; the adapter takes it for nothing.
_ALL = False
_SHARED = "prev_topk_indices"


class _Whole(MaskRequest):
    """A request of which an indexer is handed itself, ``mask[:, 0]``, and no mask of all pairs."""

    def __getitem__(self, index: Any) -> Any:
        all_of_it = slice(None)
        return self if index in ((all_of_it, 0), (all_of_it, 0, all_of_it, all_of_it)) else super().__getitem__(index)


class AskingIndexed(AskingSparse):
    """The attention of DeepSeek-V3.2 and of those after it; one left dense chooses its keys by itself."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (asks(self) and left_dense(self)):
            return super().forward(hidden_states, *args, **kwargs)
        if kwargs.get(_SHARED) is _ALL and self.indexer is None:
            raise SparseAttentionError(
                f"layer {self.layer_idx} reads the keys that an earlier layer's indexer chooses, and that layer has a "
                "pattern, which chooses none; give both a pattern, or keep both dense"
            )
        made = {name: x.dense("eager", given=x.given) for name, x in kwargs.items() if isinstance(x, MaskRequest)}
        return self.own.forward(self, hidden_states, *args, **{**kwargs, **made})

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, MaskRequest):
            if isinstance(kwargs.get("sparse_call"), LayerCall):  # the probe's is of few tokens
                self._check(mask.query_offset + mask.query_length)
            whole = copy.copy(mask)
            whole.__class__ = _Whole
            kwargs = {**kwargs, "attention_mask": whole}
        if _SHARED in kwargs:
            kwargs[_SHARED] = _ALL
        return self.own.forward(self, hidden_states, *args, **kwargs)

    def _check(self: Any, tokens: int) -> None:
        most = self.config.index_topk
        if tokens > most and (self.indexer is not None or hasattr(self, "skip_topk")):
            raise SparseAttentionError(
                f"over {tokens} tokens {type(self).__name__} reads the index_topk={most} keys that its indexer "
                f"chooses, which no pattern knows; load the model with index_topk={tokens}, so that the pattern alone "
                "says which keys are read, or give fewer tokens"
            )


class AskingIndexer(Asking):
    """What chooses the keys: all, where it is handed a mask that was not made."""

    asks_interface = False

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, MaskRequest) for x in (*args, *kwargs.values())):
            return _ALL
        return self.own.forward(self, hidden_states, *args, **kwargs)


_MODELS = ("AXK2", "DeepseekV32", "Dots3NoteText", "GlmMoeDsa", "HYV4", "HYV4VL", "MistralLarge4Text")
INDEXED: dict[str, Any] = {
    **{f"{model}Attention": AskingIndexed for model in _MODELS},
    **{f"{model}Indexer": AskingIndexer for model in _MODELS},
}
