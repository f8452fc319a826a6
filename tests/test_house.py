"""The house: five scripts and folders, and imports that point one way."""
import ast

from configurator import ROOT

# A module imports from its own row and from rows below it. Within a row: see SAME_ROW.
ROWS = [["labs"], ["tools"], ["family"], ["train", "sample"], ["model", "data"], ["engine"],
        ["configurator", "wsd"]]
SAME_ROW = {"labs", "tools", "family", "data", "engine"}    # folders whose files import each other
ALLOWED_ASIDE = {("wsd", "configurator")}


def row_of(name):
    return next((i for i, names in enumerate(ROWS) if name in names), None)


def imports_of(path):
    """The modules of the project that a file imports, with the line of each import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            if row_of(name.split(".")[0]) is not None:
                yield name.split(".")[0], node.lineno


def wrong_imports(root):
    wrong = []
    for path in [*root.glob("*.py"),
                 *(p for folder in ("data", "engine", "family", "tools", "labs")
                   for p in root.glob(f"{folder}/**/*.py"))]:
        owner = path.relative_to(root).parts[0].removesuffix(".py")
        for name, line in imports_of(path):
            if (owner, name) in ALLOWED_ASIDE or name == owner and owner in SAME_ROW:
                continue
            if row_of(name) <= row_of(owner):
                wrong.append(f"{path.relative_to(root)}:{line} imports {name}")
    return wrong


def test_imports_point_one_way(tmp_path):
    assert wrong_imports(ROOT) == []
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "x.py").write_text("def f():\n    from model import MiniCPM\n")
    assert wrong_imports(tmp_path) == ["engine/x.py:2 imports model"]


def test_the_model_imports_only_kernels_and_errors():
    top = ast.parse((ROOT / "model.py").read_text(encoding="utf-8")).body
    ours = [node.module
            for node in top if isinstance(node, ast.ImportFrom)
            and row_of(node.module.split(".")[0]) is not None]
    names = [alias.name
             for node in top if isinstance(node, ast.ImportFrom) and node.module == "engine"
             for alias in node.names]
    assert ours == ["configurator", "engine"] and names == ["ops"]


def test_the_top_holds_five_scripts():
    assert sorted(path.name for path in ROOT.glob(
        "*.py")) == ["configurator.py", "model.py", "sample.py", "train.py", "wsd.py"]


def test_every_script_exits_cleanly():
    """One line for an expected error, quiet in a closed pipe, any encoding: all by one decorator.
    """
    for path in [*ROOT.glob("*.py"),
                 *(p for folder in ("data", "family", "tools", "labs")
                   for p in ROOT.glob(f"{folder}/**/*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree):
            (main,) = [node
                       for node in tree if isinstance(node, ast.FunctionDef)
                       and node.name == "main"]
            assert [ast.unparse(each) for each in main.decorator_list] == ["exits_cleanly"], path


def test_the_loop_reads_top_to_bottom():
    """train() has no nested functions and stays in the reader's head."""
    (loop,) = [node for node in ast.parse((ROOT / "train.py").read_text(encoding="utf-8")).body
               if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert not [node
                for node in ast.walk(loop) if isinstance(node, (ast.FunctionDef, ast.Lambda))
                and node not in (loop, *loop.args.defaults)]
    assert loop.end_lineno - loop.lineno < 140
