"""A step compiled in a process of its own: where XLA does not know how, it ends its process.

``python -m jdml.plan.apart FILE`` is the other side: it reads a case and a layout from the file,
compiles, and leaves there what it found.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jdml.plan.program import Compiled, DoesNotFit

if TYPE_CHECKING:
    from jdml.plan.layout import Layout
    from jdml.plan.planner import Case


class Failed(RuntimeError):
    """The compiler raised an error of its own, or ended its process; the message says which."""


def compile_apart(case: "Case", layout: "Layout") -> Compiled | DoesNotFit | Failed:
    """``case.compile(layout)`` in another process, which may die of it.

    Raises:
      ValueError: this machine cannot compile for the topology.
    """
    # Whatever this process may import, the other one may.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "compiled")
        file.write_bytes(pickle.dumps((case, layout)))
        command = [sys.executable, "-m", "jdml.plan.apart", str(file)]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if ran.returncode:
            return Failed(_reason(ran.returncode, ran.stderr))
        found = pickle.loads(file.read_bytes())
    if isinstance(found, ValueError) and not isinstance(found, DoesNotFit):
        raise found
    return found


def _reason(code: int, errors: str) -> str:
    """How the process ended, and the first line in which it complained."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if "Check failed" in line or "Error" in line] or lines[-1:]
    ended = f"ended its process with signal {-code}" if code < 0 else "failed"
    return f"the compiler {ended}: {telling[-1][:300]}" if telling else f"the compiler {ended}"


def main(file: Path) -> None:
    import jax

    # A program compiled without its device can be written to JAX's cache and not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    case, layout = pickle.loads(file.read_bytes())
    try:
        found = case.compile(layout)
    except ValueError as error:
        found = error
    file.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
