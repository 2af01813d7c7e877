"""The only folder that touches Transformers' attention, in six rooms, each of which knows those below it alone:

``training`` (parameter groups, ``SparseTrainer``); ``patching`` (where a pattern can go, the proof that it is reached,
putting it there); ``checkpoints`` (what lies in a folder); ``forward`` (from the outer call to what a pattern is
given); ``caches`` (what layers keep from token to token); ``state`` (what is known of a model and kept on it).

Whoever follows a call goes down them once:

- ``patch_model``: ``patching/patch.py`` reads the pattern (``state/assignment.py``) and finds the layers
  (``patching/families.py``); ``sparse_model.py`` gives the model the class that saves it, and ``attach.py`` checks each
  layer, has ``probe.py`` prove that it is reached, builds the patterns and hooks them up: ``state/patch.py`` is left.
- One forward: ``forward/outer.py`` begins it and counts it; ``masks.py`` keeps what the model asks for as its mask;
  ``layer_input.py`` takes what a layer is called with; ``adapter.py`` runs the pattern; ``losses.py`` adds its losses.
- One decode step: the same, where ``forward/keys.py`` puts keys at their slots, ``caches/layer.py`` remembers what a
  pattern keeps of each token, and ``caches/sparse.py`` drops what none can read.
- One save: ``patching/sparse_model.py`` (its ``save_pretrained``), ``checkpoints/publish.py`` (all files at once),
  ``flatten.py`` (the code), ``card.py``; an adapter goes by ``adapters.py``.

Four files here only re-export, under paths that stay: ``trainer`` is public, ``saving`` is what the code in checkpoints
imports, from 0.1.0 on, and errors and model cards name ``losses`` and ``centroids``.
"""
