"""The only folder that touches Transformers' attention, in six rooms, each of which knows those below it alone:

``training`` (parameter groups, ``SparseTrainer``); ``patching`` (where a pattern can go, the proof that it is reached,
putting it there); ``checkpoints`` (what lies in a folder); ``forward`` (from the outer call to what a pattern is
given); ``caches`` (what layers keep from token to token); ``state`` (what is known of a model and kept on it).

Whoever follows a call goes down them once:

- ``patch_model``: ``patching/patch.py`` reads the pattern (``state/assignment.py``) and finds the layers
  (``patching/families.py``); ``sparse_model.py`` gives the model the class that saves it, and ``attach.py`` checks each
  layer, has ``probe.py`` prove that it is reached, builds the patterns and hooks them up: ``state/patch.py`` is left.
  ``unpatch_model`` is in ``sparse_model.py`` as well, which a checkpoint carries.
- One forward: ``forward/outer.py`` begins it and counts it; ``masks.py`` keeps what the model asks for as its mask;
  ``layer_input.py`` takes what a layer is called with; ``adapter.py`` runs the pattern; ``losses.py`` adds its losses.
  Below: the pattern is a ``config.SparseAttention`` that is given ``layer.AttentionInputs``; a static one is run by
  ``patterns/static.py``, as an operator (``patterns/custom_op.py``), and goes down ``sa_hf/ops``.
- One decode step: the same, where ``forward/keys.py`` puts keys at their slots, ``caches/layer.py`` remembers what a
  pattern keeps of each token, and ``caches/sparse.py`` drops what none can read. Below: ``patterns/steps.py`` says
  which calls are steps and what their rows read, ``ops/decode.py`` runs them.
- One save: ``patching/sparse_model.py`` (its ``save_pretrained``), ``checkpoints/auto.py`` (what config.json says),
  ``publish.py`` (all files at once), ``flatten.py`` (the code), ``card.py``; an adapter goes by ``adapters.py``.
- One load: ``sparse_model.py`` (``remote_attribute``, then the class's constructor), ``checkpoints/loaded.py``.

Words:

===========  =======================================================================================================
stack        "encoder" or "decoder": self-attention layers in order; a tower ("vision", "audio") is one beside them
site         one self-attention layer: its module's name, its stack, its shape (``state/sites.py``)
bystander    an attention module that gets no pattern, but is asked through the same config (cross-attention)
entry        what an assignment gives a layer: a config, or ``{"heads": {range: config}}``
child        the ``sparse`` module of a site, a marker where it stays dense; a leaf is one, or one part of a mixture
place        beside the child: how the site runs (``state/activity.py``)
patch        what was done to a model, kept on it to be undone; its activity says whether the hooks act now
request      what a model asked for as its mask, in the place of a mask (``forward/masks.py``)
given        what the model's outer call said of its sequences (``state/inputs.py``)
asking       attention that is led to Transformers' interface, which it does not ask by itself (``patching/asking*``)
===========  =======================================================================================================

Four files here only re-export, under paths that stay: ``trainer`` is public, ``saving`` is what the code in checkpoints
imports, from 0.1.0 on, and errors and model cards name ``losses`` and ``centroids``.
"""
