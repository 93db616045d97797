"""What NVIDIA's compiler makes of a kernel's CUDA source: registers, spills, shared memory, instructions.

Needs ``nvcc`` and, for instructions, ``cuobjdump`` with ``nvdisasm`` (the packages ``nvidia-cuda-cuobjdump`` and
``nvidia-cuda-nvdisasm`` bring them). No GPU is needed. Fast arithmetic is not asked for: its division is not exact.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

REGISTERS = ("-maxrregcount=128", "-Xptxas", "--register-usage-level=10")
"""More registers than kernels take, used freely; by itself the assembler spills a few bytes of some, for more warps."""


def find_tool(name: str) -> str | None:
    """Where ``nvcc``, ``cuobjdump`` or ``nvdisasm`` is; None if nowhere."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    return str(packaged) if packaged.is_file() else shutil.which(name)
