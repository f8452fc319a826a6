"""Config files and --key=value into typed dataclasses.

    python train.py [config/NAME.py ...] [--key=value ...]        later wins

The dataclasses of a script (TrainConfig in train.py, MiniCPMConfig in model.py) are the one list of
its options. A config file is plain assignments, arithmetic included. All problems are found before
any work starts, and each takes one line.
"""
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LFS_POINTER = b"version https://git-lfs"


class BadInput(ValueError):
    """Something the user gave cannot be used. Each argument is one line: what, where, remedy."""
    exit_code = 2

    def __str__(self):
        return "\n".join(map(str, self.args))


def exits_cleanly(main):
    """Decorate a script's main(argv): expected errors become one line each and an exit status.

    2 for bad input and failing disks, 130 for Ctrl-C, 141 without a line if nobody reads the output
    any more (`| head`), else the exit_code of the exception.
    """
    @functools.wraps(main)
    def wrapper(argv=None):
        accept_any_text()
        try:
            result = main(sys.argv[1:] if argv is None else argv)
            print(end="", flush=True)   # here, where errors of the output are caught
            return result
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            raise SystemExit(141) from None         # as of a process that SIGPIPE ends
        except Exception as error:
            exit_code, message = expected_error(error)
            if exit_code is None:
                raise
            print(message, file=sys.stderr)
            raise SystemExit(exit_code) from None
        finally:
            discard_unwritable()
    return wrapper


def accept_any_text():
    """Let text that the standard streams cannot encode or decode pass through them.

    Output gets a backslash escape for what its encoding lacks. Bytes of input that are not UTF-8
    become lone surrogates, which data.tokenizer.check_utf8 refuses.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure") and stream.errors != errors:
            stream.reconfigure(errors=errors)       # (that of stderr is backslashreplace always)


def discard_unwritable():
    """Discard output that cannot be written, which the interpreter would complain about at exit."""
    for stream in filter(None, (sys.stdout, sys.stderr)):      # None: closed from the start
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def expected_error(error):
    """Return (exit status, message) of bad input or a failing disk; (None, None) for a bug."""
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and (error.filename or error.errno):
        return 2, f"{error.filename or 'writing'}: {error.strerror or error}"
    return None, None


def no_output(*words):
    """Stand in for print where nothing is to be said."""


def refuse_lfs_pointer(path):
    """Raise BadInput if a file is the pointer that git leaves for a file of git-lfs."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadInput(f"{path}: is a git-lfs pointer, not the file itself; run git lfs pull "
                           f"in {Path(path).parent}")


# ---- from the command line to dataclasses

def configure(argv, *classes, usage, check_later=lambda given: ()):
    """Read config files and options into one instance of each dataclass.

    argv     list of str: config files and --key=value, in the order in which they count
    classes  dataclasses with distinct field names; their problems() may return a list of lines
    usage    text that --help prints above the options
    check_later  check_later(given) -> classes whose problems() are not asked for here, because the
             caller completes their values first
    returns  (instances, given): given maps each name that was set to its value
    raises   BadInput with every problem found
    """
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    if "--help" in argv or "-h" in argv:
        print("\n".join([usage.strip(), "", *[help_text(cls, hints) for cls in classes]]),
              flush=True)
        raise SystemExit(0)
    given, problems = {}, []
    unread = set()      # options that could not be read; problems caused by them are not reported
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}

    for where, name, value in settings(argv, problems, unread, names):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            unread.update(near)
            hint = f"did you mean --{near[0]}?" if near else "--help lists them all"
            problems.append(f"{where}: unknown option; {hint}")
            continue
        try:
            given[name] = coerce(value, hints[name])
        except ValueError as error:
            problems.append(f"{where} {error}")
            unread.add(name)
    try:
        instances = build(classes, given, check_later(given))
    except BadInput as error:                              # leave out problems caused by those
        problems += [line for line in error.args
                     if not unread.intersection(re.findall(r"--(\w+)", line))]
    if problems:
        raise BadInput(*problems)
    return instances, given


def settings(argv, problems, unread, names):
    """Yield (where, name, value) of all settings of a command; extends problems and unread."""
    for word in argv:
        if word.startswith("--"):
            name, _, text = word[2:].partition("=")
            if text:
                yield f"--{name}", name, text
            else:
                problems.append(f"--{name} needs a value: --{name}=VALUE")
                unread.add(name)
        elif word.endswith(".py"):
            try:
                for name, value, line in read_config_file(word):
                    yield f"{word}:{line}: {name}", name, value
            except BadInput as error:
                problems.append(str(error))
                unread.update(names)
        else:
            problems.append(f"{word}: neither a config file (.py) nor --key=value")


def build(classes, values, unchecked=()):
    """Return one instance of each dataclass from a flat dict. BadInput lists all problems, but for
    the classes that are left unchecked."""
    instances, problems = [], []
    for cls in classes:
        fields = [field.name for field in dataclasses.fields(cls)]
        instance = cls(**{name: value for name, value in values.items() if name in fields})
        if cls not in unchecked and hasattr(instance, "problems"):
            problems += instance.problems()
        instances.append(instance)
    if problems:
        raise BadInput(*problems)
    return instances


def must_be_positive(config, names):
    """Return one problem per field of a space-separated list that is set and not above 0."""
    return [f"--{name}={getattr(config, name)}: must be above 0" for name in names.split()
            if getattr(config, name) is not None and getattr(config, name) <= 0]


def must_not_be_negative(config, names):
    """Return one problem per field of a space-separated list that is set and below 0."""
    return [f"--{name}={getattr(config, name)}: must not be negative" for name in names.split()
            if getattr(config, name) is not None and getattr(config, name) < 0]


def read_config_file(path):
    """Return [(name, value, line)] of a file of plain assignments.

    A relative path counts from the current folder, then from the project.
    """
    found = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if found is None:
        have = sorted(p.name for p in (ROOT / "config").glob("*.py"))
        near = difflib.get_close_matches(Path(path).name, have, n=1)
        hint = f"; did you mean config/{near[0]}?" if near else ""
        raise BadInput(f"{path}: no such config file{hint}")
    try:
        tree = ast.parse(found.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError) as error:             # ValueError: not UTF-8, or a null byte
        raise BadInput(f"{path}:{getattr(error, 'lineno', 1)}: not Python: {error}")
    names, assignments = {}, []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue                                       # a docstring
        is_assignment = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not is_assignment or not isinstance(node.targets[0], ast.Name):
            raise BadInput(f"{path}:{node.lineno}: a config file holds assignments "
                           "'name = value' only")
        code = compile(ast.Expression(node.value), str(found), "eval")
        try:
            value = eval(code, {"__builtins__": {}}, names)
        except Exception as error:
            raise BadInput(f"{path}:{node.lineno}: {error}")
        names[node.targets[0].id] = value
        assignments.append((node.targets[0].id, value, node.lineno))
    return assignments


# ---- types

def coerce(value, hint):
    """Return a value from the command line (str) or a config file (any) as the type of its field.

    Raises ValueError that says what the field takes.
    """
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):                  # int | None: 'None' means unset
        return None if value in (None, "None") else coerce(value, options[0])
    if typing.get_origin(hint) is typing.Literal:
        if value not in options:
            raise ValueError(f"is one of {', '.join(options)}, not {value!r}")
        return value
    if typing.get_origin(hint) is tuple:                   # --rope_long_factor=1,1.5,2
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"takes numbers separated by commas, not {value!r}")
        return tuple(coerce(part, options[0]) for part in parts)
    if hint is bool:
        if not isinstance(value, bool) and value not in ("True", "False"):
            raise ValueError(f"takes True or False, not {value!r}")
        return value in (True, "True")
    if hint is str:
        if not isinstance(value, str) or value == "":
            raise ValueError(f"takes text, not {value!r}")
        return value
    return coerce_number(value, hint)


def coerce_number(value, hint):
    """Return a value as an int or a finite float; a float is never taken for an int."""
    wrong_type = isinstance(value, bool) or not isinstance(value, (str, int, float))
    if wrong_type or hint is int and isinstance(value, float):
        raise ValueError(f"takes {hint.__name__}, not {value!r}")
    try:
        number = hint(value)
        finite = math.isfinite(number)
    except ValueError:
        raise ValueError(f"takes {hint.__name__}, not {value!r}") from None
    except OverflowError:
        raise ValueError("takes a number below 1e308") from None
    if not finite:
        raise ValueError(f"takes a finite number, not {value!r}")
    return number


# ---- help

def field_comments(cls):
    """Return ({field: its comment}, {field: title of the section that begins with it}).

    They are read from the source of the dataclass and its bases. A comment line continues the
    comment of the field above; one that begins with ---- opens a section.
    """
    comments, sections = {}, {}
    field = title = None
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    for line in source.splitlines():
        code, _, comment = line.partition("#")
        name, comment = code.partition(":")[0].strip(), comment.strip()
        if name in cls.__dataclass_fields__:
            field, comments[name] = name, comment
            if title:
                sections[name], title = title, None
        elif comment.startswith("----"):
            title = comment.strip("- ")
        elif comment and not code.strip() and field:
            comments[field] = f"{comments[field]} {comment}".strip()
        else:
            field = None
    return comments, sections


def help_text(cls, hints):
    """Return the options of a dataclass, by sections: name, type, default, comment."""
    comments, sections = field_comments(cls)
    lines = [f"{cls.__name__}:"]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            kind = "|".join(map(str, typing.get_args(hint)))
        else:
            kind = hint.__name__ if isinstance(hint, type) else str(hint)
        if field.name in sections:
            lines.append(f"\n  -- {sections[field.name]}")
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        lines.append(f"  --{field.name}={kind}  (default {default})")
        lines.append(f"        {comments.get(field.name, '')}")
    return "\n".join(lines) + "\n"


def print_differences(*configs):
    """Print one line with every value that differs from its default."""
    different = [f"{field.name}={getattr(config, field.name)!r}" for config in configs
                 for field in dataclasses.fields(config)
                 if getattr(config, field.name) != field.default]
    print("config: " + (" ".join(different) or "all defaults"))
