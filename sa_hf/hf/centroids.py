"""A fixed path of ``sa_hf.hf.forward.centroids``; the reason is in ``sa_hf/hf/__init__.py``."""

from sa_hf.hf.forward.centroids import update_centroids

__all__ = ["update_centroids"]
