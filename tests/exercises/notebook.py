"""tutorial.md as a notebook: blocks that run become cells, all else, quotations too, is text.
Your pictures are shown below their cells and kept in runs/; the book's are in figures/.

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
        saved = re.findall(r'"(runs/\w+\.png)"', part) if k % 2 else []
        if part.strip():
            shown = "".join(f'\nfrom IPython.display import Image\nImage("{file}")'
                            for file in saved)
            source = (part.strip("\n") + shown).splitlines(keepends=True)
            code = dict(execution_count=None, outputs=[]) if k % 2 else {}
            cells.append(dict(cell_type="code" if k % 2 else "markdown", id=f"cell{k}",
                              metadata={}, source=source) | code)
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    return dict(nbformat=4, nbformat_minor=5, metadata=kernel, cells=cells)


if __name__ == "__main__":
    book = notebook(TUTORIAL.read_text("utf-8"))
    Path(sys.argv[1]).write_text(json.dumps(book, indent=1), "utf-8")
