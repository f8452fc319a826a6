"""Config files and --key=value into typed dataclasses.

    python train.py [config/NAME.py ...] [--key=value ...]        later wins

The dataclasses of a script (TrainConfig in train.py, MiniCPMConfig in model.py) are the one list of its knobs. A config
file is plain assignments, arithmetic included. Every problem is found before any work starts, and each takes one line.
"""
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class BadInput(ValueError):
    """Something the user gave cannot be used. Each argument is one line: what is wrong, where, what to do."""
    exit_code = 2

    def __str__(self):
        return "\n".join(map(str, self.args))


def exits_cleanly(main):
    """Decorate a script's main(argv): bad input and failing disks become one line a problem and exit status 2,
    Ctrl-C one line and 130."""
    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except (BadInput, RuntimeError) as error:
            if not hasattr(error, "exit_code"):
                raise
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            print(f"{error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        raise SystemExit(2)
    return wrapper


def configure(argv, *classes, usage):
    """Read config files and options into one instance of each dataclass.

    argv     list of str: config files and --key=value, in the order in which they count
    classes  dataclasses with distinct field names; `problems(self)` may return a list of lines
    usage    text printed above the options by --help
    returns  (instances, given): given maps each name that was set to its value
    raises   BadInput with every problem found
    """
    knobs = {field.name: (cls, field) for cls in classes for field in dataclasses.fields(cls)}
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    if any(word in ("--help", "-h") for word in argv):
        print(usage.strip() + "\n")
        for cls in classes:
            print(help_text(cls, hints))
        raise SystemExit(0)
    given, problems, unread = {}, [], set()                              # unread: names whose values could not be had

    def accept(name, value, where):
        if name not in knobs:
            near = difflib.get_close_matches(name, knobs, n=1)
            unread.update(near)
            problems.append(f"{where}: unknown option" + (f"; did you mean --{near[0]}?" if near else "; --help lists them all"))
            return
        try:
            given[name] = coerce(value, hints[name])
        except ValueError as error:
            problems.append(f"{where} {error}")
            unread.add(name)

    for word in argv:
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if not equals or not text:
                problems.append(f"--{name} needs a value: --{name}=VALUE")
                unread.add(name)
            else:
                accept(name, text, f"--{name}")
        elif word.endswith(".py"):
            try:
                for name, value, line in read_config_file(word):
                    accept(name, value, f"{word}:{line}: {name}")
            except BadInput as error:
                problems.append(str(error))
                unread.update(knobs)
        else:
            problems.append(f"{word}: neither a config file (.py) nor --key=value")
    try:
        instances = build(classes, given)
    except BadInput as error:                                            # what only follows from an unread value is not said
        problems += [line for line in error.args if not unread.intersection(re.findall(r"--(\w+)", line))]
    if problems:
        raise BadInput(*problems)
    return instances, given


def must_be_positive(config, names):
    """Return one problem per field of a space-separated list that is set and not above 0."""
    values = {name: getattr(config, name) for name in names.split()}
    return [f"--{name}={value}: must be above 0" for name, value in values.items() if value is not None and value <= 0]


def must_not_be_negative(config, names):
    """Return one problem per field of a space-separated list that is set and below 0."""
    values = {name: getattr(config, name) for name in names.split()}
    return [f"--{name}={value}: must not be negative" for name, value in values.items() if value is not None and value < 0]


def build(classes, values):
    """One instance of each dataclass from a flat dict of values; raises BadInput with all that their checks find."""
    instances, problems = [], []
    for cls in classes:
        fields = [field.name for field in dataclasses.fields(cls)]
        instances.append(cls(**{name: value for name, value in values.items() if name in fields}))
        problems += getattr(instances[-1], "problems", list)()
    if problems:
        raise BadInput(*problems)
    return instances


def read_config_file(path):
    """[(name, value, line)] of a file of plain assignments. Relative paths count from here, then from the project."""
    found = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if found is None:
        have = sorted(p.name for p in (ROOT / "config").glob("*.py"))
        near = difflib.get_close_matches(Path(path).name, have, n=1)
        raise BadInput(f"{path}: no such config file" + (f"; did you mean config/{near[0]}?" if near else ""))
    try:
        tree = ast.parse(found.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError) as error:                           # ValueError: not UTF-8, or a null byte
        raise BadInput(f"{path}:{getattr(error, 'lineno', 1)}: not Python: {error}")
    names, out = {}, []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue                                                     # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise BadInput(f"{path}:{node.lineno}: a config file holds assignments 'name = value' only")
        try:
            value = eval(compile(ast.Expression(node.value), str(found), "eval"), {"__builtins__": {}}, names)
        except Exception as error:
            raise BadInput(f"{path}:{node.lineno}: {error}")
        names[node.targets[0].id] = value
        out.append((node.targets[0].id, value, node.lineno))
    return out


def coerce(value, hint):
    """A value from the command line (str) or a config file (any) as the type of its field; ValueError says what fits."""
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):                                # int | None: 'None' means unset
        if value is None or value == "None":
            return None
        return coerce(value, options[0])
    if typing.get_origin(hint) is typing.Literal:
        if value not in options:
            raise ValueError(f"is one of {', '.join(options)}, not {value!r}")
        return value
    if typing.get_origin(hint) is tuple:                                 # --rope_long_factor=1,1.5,2
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"takes numbers separated by commas, not {value!r}")
        return tuple(coerce(part, options[0]) for part in parts)
    if hint is bool:
        if value is True or value == "True":
            return True
        if value is False or value == "False":
            return False
        raise ValueError(f"takes True or False, not {value!r}")
    if hint is str:
        if not isinstance(value, str) or value == "":
            raise ValueError(f"takes text, not {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"takes {hint.__name__}, not {value!r}")
    if hint is int and isinstance(value, float):
        raise ValueError(f"takes int, not {value!r}")
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


def field_comments(cls):
    """{field: its trailing comment}, with the comment lines that continue it, from the source of the dataclass and its bases."""
    comments, last = {}, None
    for line in "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1])).splitlines():
        code, mark, comment = line.partition("#")
        name = code.partition(":")[0].strip()
        if mark and name in cls.__dataclass_fields__:
            comments[name], last = comment.strip(), name
        elif mark and not code.strip() and last:
            comments[last] += " " + comment.strip()
        else:
            last = None
    return comments


def help_text(cls, hints):
    """The options of one dataclass: name, type, default, comment."""
    comments, lines = field_comments(cls), [f"{cls.__name__}:"]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind = "|".join(map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else \
            hint.__name__ if isinstance(hint, type) else str(hint)
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        lines.append(f"  --{field.name}={kind}  (default {default})\n        {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines) + "\n"


def print_differences(*configs):
    """One line with every value that is not its dataclass's default."""
    different = [f"{field.name}={getattr(config, field.name)!r}" for config in configs
                 for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
    print("config: " + (" ".join(different) or "all defaults"))
