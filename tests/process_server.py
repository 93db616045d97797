"""Runs scripts in processes of their own without a start's seconds: they fork from one that has made the imports.

Each line of the standard input is a request: ``script``, ``arguments``, ``environment``, ``folder`` to run in, and the
files ``stdout`` and ``stderr``. The answer is a line with the exit code, negative for a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from types import ModuleType
from typing import Any, NoReturn

IMPORTS = (
    "torch.export",
    "torch._dynamo",
    "onnxruntime",
    "onnxscript",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "bitlower.tools.cli",
    "bitlower.tools.runs.flow",
    "bitlower.backends.onnx_qdq.translate.torchlib",
)


def main() -> None:
    """Answer until the standard input ends."""
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    """Become the process that ``python -c`` would start."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
        sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        sys.argv[:] = ["-c", *request["arguments"]]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(request["script"], "<script>", "exec"), sys.modules["__main__"].__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
