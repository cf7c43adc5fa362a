"""Run the notebooks' scripts, and write them with their outputs as .ipynb files beside them.

  python notebooks/build.py              all three (pip install -r requirements-dev.txt)
  python notebooks/build.py 1_method     one of them
"""
import hashlib
import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def code_hash():
    """SHA-256 of the code that the notebooks show and run: checks.py, and the *.py files above."""
    digest = hashlib.sha256()
    files = [*HERE.parent.glob("*.py"), HERE / "checks.py"]
    for path in sorted(path for path in files if path.name != "test_all.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(script):
    """Execute a script from a fresh kernel, in its folder. Raises nbclient's CellExecutionError."""
    began = time.time()
    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=1800, kernel_name="python3",
                   resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)    # times of day, which git would show as changes
    notebook.metadata["nanoa2mim"] = dict(code=code_hash())
    path = script.with_suffix(".ipynb")
    jupytext.write(notebook, path)
    print(f"{path.name}: {time.time() - began:.0f} s, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    for script in sorted(HERE.glob("[0-9]_*.py")):
        if script.stem in (sys.argv[1:] or [script.stem]):
            build(script)
