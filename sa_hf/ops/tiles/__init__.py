"""The engine of torch's operators: tiles by batched matrix products, on any device and in fp64, under every option.

It serves where no kernels do. Down the files: ``engine.py`` runs a part, ``batches.py`` says which tiles of scores a
part has, ``scores.py`` is the attention of one batch of them.
"""

from sa_hf.ops.tiles.engine import TileEngine

__all__ = ["TileEngine"]
