"""The default corpus: the Python source of the installed torch package. No download.

    python data/pytorch/prepare.py [--tokenizer=bpe4096] [--overwrite=True]

A document is a file. Files that torch's build generates and one long table are left out, and line
ends are normalized. About 3.5 % of the files are held out, by a hash of their path.
"""
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import BadInput, configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, held_out, prepare  # noqa: E402

LEFT_OUT = ("version.py", "sparse/_triton_ops_meta.py", "testing/_internal/generated/")
VAL_SHARE = 0.035


def documents(root=None):
    """Yield (split, text) of each .py file below root (default: the torch package), by path."""
    if root is None:
        spec = importlib.util.find_spec("torch")                         # does not import it
        if spec is None or not spec.submodule_search_locations:
            raise BadInput("torch is not installed: pip install -r requirements.txt")
        root = spec.submodule_search_locations[0]
    skipped = 0
    for path in sorted(p.relative_to(root).as_posix() for p in Path(root).rglob("*.py")):
        if path.startswith(LEFT_OUT):
            continue
        try:
            text = (Path(root) / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        if text.strip():
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            yield "val" if held_out(path, VAL_SHARE) else "train", text
    if skipped:
        print(f"skipped {skipped} files that are not UTF-8")


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, PrepareOptions, usage=__doc__)
    prepare("pytorch", documents(), options)


if __name__ == "__main__":
    main()
