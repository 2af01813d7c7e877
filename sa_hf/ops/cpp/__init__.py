"""The C++ engine: kernels for the CPU, compiled by the machine's own compiler at first use.

Down the files: ``engine.py`` what it serves, ``kernels.py`` from tensors to the fields of a call, ``rows.py`` those
tensors, ``call.py`` the fields, ``build.py`` the compiler; ``kernels.cpp`` is what Python calls, ``passes.h`` and
``offsets.h`` the two passes, ``operands.h`` what they multiply, in fp32, and ``units.h`` in bfloat16 by the machine's
own units, ``tiles.h`` which scores there are, ``elements.h`` rows of 16 and of 32 bits, ``vectors.h`` the arithmetic.
``decode.h`` (``steps.py``) is a step of decoding.
"""

from sa_hf.ops.cpp.engine import CppEngine

__all__ = ["CppEngine"]
