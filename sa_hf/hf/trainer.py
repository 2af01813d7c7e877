"""A fixed path of ``sa_hf.hf.training.trainer``; the reason is in ``sa_hf/hf/__init__.py``."""

from sa_hf.hf.training.distillation import keep_teacher
from sa_hf.hf.training.trainer import SparseAttentionCallback, SparseTrainer, training_figures

__all__ = ["SparseAttentionCallback", "SparseTrainer", "keep_teacher", "training_figures"]
