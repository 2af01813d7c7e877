"""A fixed path of ``sa_hf.hf.forward.losses``; the reason is in ``sa_hf/hf/__init__.py``."""

from sa_hf.hf.forward.losses import auxiliary_losses, collected_losses

__all__ = ["auxiliary_losses", "collected_losses"]
