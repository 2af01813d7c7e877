"""Every architecture of the installed Transformers in tiny form, patched and held against its own eager attention.

``registry`` lists the model classes of the auto mappings, ``shrink`` makes a tiny model of each, ``inputs`` what it is
called with, ``reference`` its own eager attention under the pattern's pairs, ``check`` and ``generation`` compare,
``pool`` runs each in a process of its own, and ``report`` writes the table.
"""
