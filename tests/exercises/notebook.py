"""tutorial.md as a notebook: blocks that run become cells, all else, quotations too, is text.
Your pictures are shown below their cells and kept in runs/; the book's are in figures/.

    python tests/exercises/notebook.py tutorial.ipynb       then: jupyter lab tutorial.ipynb

Where the project is not beside the notebook, as in Colab, its first cell fetches it from where git
has this copy from, or from --address.
"""
import argparse
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FETCH = '''import os, subprocess, sys

if not os.path.exists("fudoki.py"):                 # fetches the project, and what it needs
    subprocess.run(["git", "clone", "--depth", "1", "{address}", "fudoki"], check=True)
    os.chdir("fudoki")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"],
                   check=True)
sys.path.insert(0, os.getcwd())
'''


def remote():
    """The address from which git has this copy, for everybody: https, or nothing."""
    found = subprocess.run(["git", "-C", str(ROOT), "remote", "get-url", "origin"],
                           capture_output=True, encoding="utf-8").stdout.strip()
    found = re.sub(r"^git@([^:/]+):", r"https://\1/", found)
    return found if found.startswith("https://") else ""


def notebook(text, address=""):
    """Markdown -> a notebook as a dictionary (nbformat 4)."""
    parts = re.split(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    if address:
        parts = ["", FETCH.format(address=address), *parts]

    cells = []
    for k, part in enumerate(parts):
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--address", help="of the project, for git clone (default: git's origin)")
    given = parser.parse_args()
    address = remote() if given.address is None else given.address
    book = notebook((ROOT / "tutorial.md").read_text("utf-8"), address)
    given.file.write_text(json.dumps(book, indent=1), "utf-8")
    print(f"{given.file}: {len(book['cells'])} cells, "
          + (f"fetches {address} where it is not beside it" if address else
             "to be opened in the project's folder"))
