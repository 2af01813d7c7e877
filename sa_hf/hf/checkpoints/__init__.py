"""Checkpoints: a patched model saves and loads as any Transformers model does, and never loads dense in silence.

A patched model's class becomes a subclass of its own class under the same name, whose ``save_pretrained`` writes the
code that a load needs. In ``config.json`` it puts

- ``sa_hf``: the assignment of patterns to layers;
- ``auto_map``: the remote-code class for every Auto class of the architecture;
- ``attn_implementation``: a name that is never registered, so that a load without the code raises, with the remedy;
- ``architectures``: a name that Transformers has no class of, so that what makes models by that name (trl, of a path;
  ``pipeline``, as a last resort) does not find the dense one and goes by ``auto_map``.

Loading is ``AutoModelFor....from_pretrained(folder, trust_remote_code=True)``; ``pipeline`` and ``AutoConfig`` work
as well, and so do folders that other processes save again, with sa_hf installed or not.

What remains, beyond our reach:

- A load that overrides the field itself, ``attn_implementation="eager"`` (or "sdpa", ...) without
  ``trust_remote_code=True``, or that passes a fresh ``config=``, is dense. With trust the former raises.
- A class of your own is not in the Auto mappings: load it by ``sparse_class(MyModel).from_pretrained(folder)``.
- ``variant=`` saves leave the files of other variants in the folder; ``distributed_checkpoint=True`` (rank-local
  shards for resuming) is written in place, not all at once.
- An adapter of a patched model (see ``adapters.py``) names the place of its base, an absolute path: where that is
  moved, ``base_model_name_or_path`` in its config says the new one. ``dense_model.load_adapter(folder)`` with the
  oldest versions of Transformers (5.5), which look at no shapes, loads it onto a dense model; all others raise.
- Overwriting a checkpoint needs room for both until the new one is complete.
- From the hub, the first load of a checkpoint fetches its code, at most 20 files, and Transformers announces them; pin
  a ``revision`` to be sure of what runs.
- What a checkpoint carries loads, runs, trains, saves and unpatches (``model.unpatch_model()``); drawing, the tools and
  the command line need sa_hf itself.
"""
