"""The errors sa_hf raises: each message holds the value, the rule and the nearest valid choice."""

from __future__ import annotations


class SparseAttentionError(ValueError):
    """Base of every error of this package; a ``ValueError``."""


class UnsupportedModelError(SparseAttentionError):
    """The model's attention cannot be replaced exactly; the message says why. The model stays as it was."""


class NotStaticError(SparseAttentionError):
    """The pattern depends on data or learned state, so it has no mask of its own."""


class ConfigVersionError(SparseAttentionError):
    """The config was written by a newer sa_hf than this one; the message names what is unknown."""
