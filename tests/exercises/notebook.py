"""tutorial.md as a notebook: blocks that run become cells, all else, quotations too, is text.

    python tests/exercises/notebook.py tutorial.ipynb       then: jupyter lab tutorial.ipynb
"""
import json
import re
import sys
from pathlib import Path

TUTORIAL = Path(__file__).parents[2] / "tutorial.md"


def notebook(text):
    """Markdown -> a notebook as a dictionary (nbformat 4)."""
    cells = []
    for k, part in enumerate(re.split(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)):
        if part.strip():
            source = part.strip("\n").splitlines(keepends=True)
            code = dict(execution_count=None, outputs=[]) if k % 2 else {}
            cells.append(dict(cell_type="code" if k % 2 else "markdown", id=f"cell{k}",
                              metadata={}, source=source) | code)
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    return dict(nbformat=4, nbformat_minor=5, metadata=kernel, cells=cells)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(notebook(TUTORIAL.read_text()), indent=1))
