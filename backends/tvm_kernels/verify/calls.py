"""The kernels that a library calls, counted in its code, against what the Program's operators became."""

from __future__ import annotations

from bitlower.backends.tvm_kernels.library.library import Code
from bitlower.ir import CheckError


def compared_calls(code: Code) -> dict[str, dict[str, int]]:
    """How often one run calls kernels of each family: ``expected``, and ``found`` in the code.

    Raises:
        CheckError: the numbers differ.
    """
    expected, counted = (dict(sorted(counts.items())) for counts in (code.operators.calls, code.kernel_calls()))
    if expected != counted:
        raise CheckError(
            f"the library calls the kernels {_listed(counted)}, where its program needs {_listed(expected)}"
        )
    return {"expected": expected, "found": counted}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "none"
