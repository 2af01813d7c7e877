"""The C++ engine: kernels for the CPU, compiled by the machine's own compiler at first use.

Down the files: ``engine.py`` what it serves, ``kernels.py`` from tensors to the fields of a call, ``call.py`` those
fields, ``build.py`` the compiler; ``kernels.cpp`` is what Python calls, ``passes.h`` and ``offsets.h`` the two passes,
``tiles.h`` which scores there are, ``vectors.h`` the arithmetic.
"""

from sa_hf.ops.cpp.engine import CppEngine

__all__ = ["CppEngine"]
