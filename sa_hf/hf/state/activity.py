"""What patching puts on a model's attention modules, and whether it acts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sa_hf.errors import SparseAttentionError
from sa_hf.hf.state.inputs import ForwardInputs
from sa_hf.hf.state.recomputation import Forwards
from sa_hf.hf.state.threads import Running
from sa_hf.layer import LayerSpec

IMPLEMENTATION = "sparse_sa_hf"
# What a model runs inside dense(model) for a call that names its sequences.
PACKED = "packed_sa_hf"
# On an attention module, beside its child: PEFT may wrap and copy the child itself.
PLACE = "sa_hf_place"
# On a model, its Patch.
PATCH = "sa_hf_patch"


@dataclass(eq=False)
class Activity:
    """Whether a patched model's hooks act; off inside ``dense(model)``. ``traced`` is what the outer call was given,
    under torch.compile, which traces an attribute and no context variable. ``forwards`` are those in training;
    ``within`` is the outermost model's ``ModelForward`` while it runs; ``owner`` is the class of the model that is
    patched; ``collected`` takes the auxiliary losses where a caller adds them by itself (``collected_losses``);
    ``warned`` says that losses of unknown scale were warned about; ``blocks`` counts the ``dense(model)`` that are
    open, and ``implementations`` are those of the configs, by id, that the last of them brings back."""

    owner: str = "model"
    on: bool = True
    forwards: Forwards = field(default_factory=Forwards)
    within: Running = field(default_factory=Running)
    warned: bool = False
    blocks: int = 0
    implementations: dict[int, str] = field(default_factory=dict)
    traced: ForwardInputs | None = None
    collected: list[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside dense(model) is no part of that block, and nothing would ever switch it on again.
        left = {"traced": None, "collected": None, "within": Running(), "forwards": Forwards()}
        return {**vars(self), "on": True, "blocks": 0, "implementations": {}, **left}


@dataclass(eq=False)
class Place:
    """How one attention module runs. ``spec`` is None for cross-attention; ``index`` is the model's own number of its
    layer (``own_index``); ``conv`` is the ``ConvHook`` of a layer whose queries and keys are convolved."""

    spec: LayerSpec | None
    engine: str
    original: str
    activity: Activity
    extra_tokens: int = 0
    index: int | None = None
    conv: Any = None


class DenseMarker(nn.Module):
    """The ``sparse`` child of a layer that stays dense, and of cross-attention: no parameters, no buffers."""


def place_of(module: nn.Module) -> Place:
    """How an attention module of a patched model runs.

    Raises:
        SparseAttentionError: the module has none, so the model's patterns are missing.
    """
    place = getattr(module, PLACE, None)
    if not isinstance(place, Place) or getattr(module, "sparse", None) is None:
        raise SparseAttentionError(
            f"{type(module).__name__} is set to sparse attention but carries no pattern: the model was built from the "
            "config of a patched one. Load it by its Auto class with `trust_remote_code=True`, or call "
            "`sa_hf.patch_model(model, ...)`. A reference that a trainer makes of the model (trl) needs a saved sparse "
            "model, with `trust_remote_code=True` in the trainer's config; else give it "
            "`ref_model=copy.deepcopy(model)` (DPO, KTO), or train LoRA, which needs none; GRPO takes none: LoRA, or "
            "beta=0"
        )
    return place
