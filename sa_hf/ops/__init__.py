"""Tensors in, tensors out: sparse attention by plans of parts. Nothing here knows a pattern's config or Transformers.

The way down: ``attend`` (static plans) or ``planned`` (plans made from data) take the sequences of a batch;
``choice`` picks the engine; ``run`` takes it through the parts of a plan; ``engine`` says what an engine is, and merges
what the parts give. ``reference`` is the dense fp64 oracle, ``decode`` serves a few new queries over listed positions;
the C++ kernel takes them over ``reads``, too (``cpp/steps``).

Engines, by folder and by the name that users give and errors say:

==========  ==================  ========================================================================================
folder      ``engine=``         runs
==========  ==================  ========================================================================================
``triton``  ``"triton"``        on a GPU (and, interpreted, on a CPU)
``cpp``     ``"native"``        on a CPU, compiled at first use; ``"native"`` falls to the tiles where it does not serve
``tiles``   ``"torch"``         torch's operators on any device, in fp64 too
(none)      ``"auto"``          the first of these that serves, by its ``unsupported`` (decoding: ``cannot_decode``)
==========  ==================  ========================================================================================

Words:

============  ======================================================================================================
position      a token's place in its own sequence, from 0; causality, distances, dropout and spans are about positions
plan          the parts whose multiset union is a pattern at one shape (``parts``)
part          a rectangle of query slots x key slots that an engine runs at once: blocks, segments or offsets
slot          a row of a part: a position in natural or gathered order, or empty (-1); ``slots`` brings them together
              and puts them back
tile          ``block_q x block_k`` pairs of slots; a block list (``layout``) names the tiles of each row of tiles
lane          one head of one sequence of the batch, ``batch * heads + head``; query heads of a group share a key lane
              (``lanes``); in ``vectors.h`` also a number of a vector
group         sequences of equal shape, stacked (``attend.BatchGroup``, ``grouped.Group``); in the kernels the query
              heads of one key head, each a member
piece         some heads of some rows of a part, as a CPU holds at a time where slots are gathered (``pieces``); in
              the C++ kernels also one of the sums that a key lane's gradients are added up in
unit          in the C++ kernels the number of a tile's block or segment, and the machine's own circuits for products
              (``units.h``); in Triton's sums the step of fixed-point numbers
means         a position that stands in several slots, each a softmax of its own, gets their mean (``means``; Routing)
gate          a factor of a probability before it is normalised: spans in the kernels, a learned mask in ``gated``
term          what a query, or a key, adds to a score by the distance to the other side: a row of numbers for each
              token, by buckets of distances (DeBERTa; ``parts.DistanceTerm``)
sink          a logit of a head in the softmax's denominator that gives no value; joins merged parts (``sinks``)
width         of values, where it is not the keys': zeros bring both to one around an operator (``widths``)
rule          makes a plan from data, by a name that an operator's arguments can carry (``planned``); Routing's rule
              "members" is named for the tokens of a cluster
reads, runs   of a decoding step: what each row reads, as runs ``(first, end, step)`` of positions (``reads``)
============  ======================================================================================================

Around them: ``sequences`` (where those of a batch stand in its rows), ``counts`` (the pairs that a plan keeps),
``data_layout`` (block lists made from data), ``random`` (bits of dropout), ``transforms`` (autograd, ``torch.func``),
``graphs`` (torch.compile, CUDA graphs), ``host`` (a caller's default device and autocast), ``memory`` (freed memory on
a CPU).

What repeats to the bit, strongest first (same machine, same versions, same inputs):

==========================================  ==========  ==========  ==========  =================================
guarantee                                   cpp         triton      tiles       shown by
==========================================  ==========  ==========  ==========  =================================
the dropout mask, everywhere                yes         yes         yes         ``tests/ops/test_dropout_bits.py``
output and gradients, twice                 yes         yes         yes         ``test_cpu_engines.py``,
                                                                                ``triton/kernels/test_block.py``
the output, whatever the number of threads  yes         no threads  no          ``test_cpu_kernels.py``: the queries
                                                                                of a tile are one thread's
gradients, whatever the number of threads   no          no threads  no          key lanes are cut into pieces by it
==========================================  ==========  ==========  ==========  =================================

Between engines, results agree to rounding; what a later token holds changes no bit of an earlier row in ``cpp``.
"""
