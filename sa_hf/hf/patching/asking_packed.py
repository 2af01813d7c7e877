"""Attention over one row of packed patches (Qwen's, GLM's and their kin's towers), asking the interface once.

These layers are given the lengths of the sequences in their row, an image's patches or a window of them, and call the
interface for each. Under a pattern they call it once, with all sequences in a mask request.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from sa_hf.hf.forward.layer_input import LayerCall
from sa_hf.hf.forward.ready_masks import packed_request
from sa_hf.hf.patching.asking_base import AskingSparse

LENGTHS = "cu_seqlens"


def cuts_its_row(attention: Any) -> bool:
    """Whether an attention module's ``forward`` cuts its tokens by ``cu_seqlens`` and asks the interface for each
    part."""
    code = getattr(inspect.unwrap(attention.forward), "__code__", None)
    return code is not None and LENGTHS in code.co_varnames[: code.co_argcount] and _asks_by_parts(attention, code)


def _asks_by_parts(attention: Any, code: Any) -> bool:
    source = inspect.getsource(inspect.unwrap(attention.forward))
    return "ALL_ATTENTION_FUNCTIONS" in code.co_names and "torch.split(" in source


class AskingPacked(AskingSparse):
    """An attention that is given ``hidden_states [tokens, width]`` (or with a batch of 1) and ``cu_seqlens``."""

    def asked(self: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(self.own.forward).parameters)[2:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        call, lengths = given["sparse_call"], given.get(LENGTHS)
        if lengths is None or given.get("attention_mask") is not None:
            return self.own.forward(self, hidden_states, **given)
        if isinstance(call, LayerCall) and hidden_states.dim() == 2:
            call.hidden_states = hidden_states[None]
        call.cut = packed_request(lengths, hidden_states)
        given[LENGTHS] = lengths.new_tensor([0, hidden_states.shape[-2]])
        return self.own.forward(self, hidden_states, **given)
