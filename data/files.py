"""Local files to records: the one reader of --input, --pairs and --questions_file.

.txt, .md       one document
.jsonl, .json   one JSON object per line, or one JSON list of objects
.parquet        one object per row; an empty cell is null

Text is UTF-8, with or without a byte order mark, or UTF-16 with one (as PowerShell writes it).
"""
import codecs
import io
import json
from pathlib import Path

from configurator import ROOT, BadInput, refuse_lfs_pointer

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")       # of running text: read_texts
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")           # of conversations: raw_records


def find_file(name):
    """Return the path of a file or folder that is named from here or from the project."""
    return next((path for path in (Path(name), ROOT / name) if path.exists()), Path(name))


def find_files(inputs, suffixes):
    """Return the files with these suffixes in a comma-separated list of files and folders.

    Raises BadInput if one of the list is missing or has none.
    """
    files = []
    names = [part.strip() for part in inputs.split(",")]
    if not all(names):
        raise BadInput(f"--input={inputs}: has an empty name before or after a comma")
    for path in map(find_file, names):
        if not path.exists():
            raise BadInput(f"--input: {path}: no such file or folder")
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        found = [p for p in found if p.suffix.lower() in suffixes]
        if not found:
            raise BadInput(f"--input: {path}: no {', '.join(suffixes)} file there")
        files += found
    return files


def read_texts(path):
    """Yield the texts of a file: all of it (.txt, .md), or the field text of each record.

    Empty texts are left out. BadInput names the place of what cannot be read.
    """
    if path.suffix.lower() not in RECORD_SUFFIXES:
        texts = [(path, {"text": read_text(path)})]
    else:
        texts = raw_records(path, ["text"])
    for place, source in texts:
        try:
            text = decode(source)["text"] or ""
            text.encode("utf-8")        # a JSON escape can be half of a surrogate pair
        except UnicodeDecodeError as error:
            raise BadInput(f"{place}: {error}; convert it or leave it out") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{place}: not a JSON object with a field 'text' of valid "
                           "text") from None
        if text.strip():
            yield text


def read_text(path):
    """Return the text of a file, with line ends as \\n."""
    try:
        with io.TextIOWrapper(open_text(path), encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason}); convert it or leave it "
                       "out") from None


def open_text(path):
    """Open a file as a stream of UTF-8 bytes without a byte order mark.

    Raises BadInput if the file is missing or is only a pointer to one, UnicodeDecodeError if it is
    UTF-16 with a fault.
    """
    if not path.is_file():
        raise BadInput(f"{path}: " + ("is not a file" if path.exists() else "no such file"))
    refuse_lfs_pointer(path)
    file = open(path, "rb")
    start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BytesIO((start + file.read()).decode("utf-16").encode("utf-8"))
    file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
    return file


def raw_records(path, columns=None):
    """Yield (place in the file, record): lines as bytes, the objects of a JSON list, or rows.

    columns: the only columns that are read from a .parquet file; unset: all
    """
    if path.suffix.lower() == ".parquet":
        yield from parquet_rows(path, columns)
        return
    try:
        with open_text(path) as file:
            start = file.tell()
            is_list = file.read(4096).lstrip().startswith(b"[")
            file.seek(start)
            if not is_list:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", line
                return
            records = json.loads(file.read())
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        raise BadInput(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise BadInput(f"{path}: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not {error.encoding} ({error.reason} at byte "
                       f"{error.start})") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, item {number}", record


def decode(source):
    """Return the object of a raw record; ValueError says what is wrong."""
    try:
        record = json.loads(source) if isinstance(source, bytes) else source
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def parquet_rows(path, columns=None):
    """Yield (place in the file, row as a dict) of a .parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    open_text(path).close()                                 # there is such a file, not a pointer
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            missing = [name for name in columns or () if name not in names]
            if missing:
                raise BadInput(f"{path}: has no column {missing[0]!r}; it has {', '.join(names)}")
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"{path}: cannot be read as .parquet ({reason})") from None
