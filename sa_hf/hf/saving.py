"""A fixed path of ``sa_hf.hf.patching.sparse_model``; the reason is in ``sa_hf/hf/__init__.py``."""

from sa_hf.hf.patching.sparse_model import remote_attribute, sparse_class

__all__ = ["remote_attribute", "sparse_class"]
