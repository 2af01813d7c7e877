"""What the operators say and ask about CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.compile(mode="reduce-overhead") records its graphs in a memory pool of its own and refuses tensors that outlive
# a run there, as the plans and lists do that the first call of a length makes: it runs these operators between its
# graphs. A graph recorded by hand after a first call (`torch.cuda.graph`) holds them.
OUTSIDE_COMPILED_GRAPHS = (torch.Tag.cudagraph_unsafe,)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may be read then, and what is made has no values yet, so that it
    must not be kept for later calls."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
