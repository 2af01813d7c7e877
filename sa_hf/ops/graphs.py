"""What the operators say and ask about graphs: those of torch.compile, and CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

# torch.compile(mode="reduce-overhead") records its graphs in a memory pool of its own and refuses tensors that outlive
# a run there, as the plans and lists do that the first call of a length makes: it runs these operators between its
# graphs.
OUTSIDE_COMPILED_GRAPHS = (torch.Tag.cudagraph_unsafe,)


def tracing() -> bool:
    """Whether a graph is being recorded (torch.compile, torch.export, make_fx): registered operators belong into it."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def eager(*inputs: Tensor | None) -> bool:
    """Whether a call may run as plain Python: no trace, mode or subclass has to see a registered operator.

    Calling one by its name may take the host as long as a sparse kernel takes the device.
    """
    # No public name: modes that intercept operators (fake tensors, flop counters).
    if tracing() or torch._C._len_torch_dispatch_stack():
        return False
    return all(x is None or (type(x) in (Tensor, Parameter) and not x.is_meta) for x in inputs)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may be read then, and what is made has no values yet, so that it
    must not be kept for later calls."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


# A graph recorded by hand (`torch.cuda.graph`) knows the addresses of what was made before it, and does not keep it
# alive; the caches that do are bounded.
_HELD: dict[int, object] = {}


def hold(x: Tensor, *used: object) -> None:
    """Keep for good what a launch on ``x`` uses, if a CUDA graph is being captured: it may be replayed at any time."""
    if capturing(x):
        _HELD.update((id(thing), thing) for thing in used)


def settled(x: Tensor) -> Tensor:
    """``x``, waited for, and all that the stream made before: a cache's tensors may be read from another one."""
    if x.is_cuda and not capturing(x):
        torch.cuda.current_stream(x.device).synchronize()
    return x
