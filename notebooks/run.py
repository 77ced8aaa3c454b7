"""Execute every notebook and keep its outputs: `make notebooks`.

The text of a notebook lives in its `.py` file; the `.ipynb` beside it is made from it
and carries the outputs. A cell that raises ends the run with its traceback.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def run(source: Path) -> None:
    """Execute `source` and write the notebook beside it."""
    notebook = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        # Fixed names, so that a second run changes nothing that was not recomputed.
        cell["id"] = f"cell-{index}"
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(source.parent))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    print(f"{source.with_suffix('.ipynb')}: {len(notebook.cells)} cells passed")


def main(names: list[str]) -> int:
    """Run the notebooks called `names`, all of them if there are none."""
    folder = Path(__file__).parent
    sources = [folder / name for name in names] or sorted(folder.glob("[0-9]*.py"))
    for source in sources:
        run(source)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
