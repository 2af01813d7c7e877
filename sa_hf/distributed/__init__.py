"""Attention over sequences that several processes share."""

from sa_hf.distributed.sequence_parallel import sequence_parallel_longnet

__all__ = ["sequence_parallel_longnet"]
