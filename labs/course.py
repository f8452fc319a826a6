"""Write labs/README.md, the course, from the result files.

    python -m labs.course
"""
import ast
import importlib

from configurator import ROOT, BadInput, configure, exits_cleanly
from engine import metrics
from labs import runs

# In this order; what to have done before.
LABS = {
    "mup_coordinates": "`python train.py`, `model.py: mup_table`",
    "lr_transfer": "mup_coordinates",
    "batch_size": "lr_transfer",
    "wsd_vs_cosine": "`python wsd.py`, which draws the schedules",
    "decay_dynamics": "wsd_vs_cosine",
    "scaling_law": "wsd_vs_cosine",
    "annealing": "wsd_vs_cosine; `data/instruct/prepare.py`",
    "preferences": "annealing",
    "upcycling": "wsd_vs_cosine; `model.py: MoE`",
    "long_context": "`model.py: rope_tables`",
    "serving": "`model.py: KVCache`",
}

TOP = """# The course

Every claim of the paper as a lab: one file that reads from top to bottom, the question first, then the experiment on train.py's loop, the figure,
the checks, and three exercises that change a line. Write down what you expect, then run it:

```sh
python -m labs.mup_coordinates                 # results in labs/results, the figure in labs/figures; a second call only draws
python -m labs.mup_coordinates --quick=True    # seconds: whether it works here
python -m labs.mup_coordinates --draw=True     # from the committed results, also where the code has changed since
```

A file opens cell by cell in VS Code (open the repository's folder) and, by jupytext, in Jupyter (`%cd ..` in a first cell);
[colab.ipynb](colab.ipynb) runs any of them on a free cloud machine. Results are kept by the settings
and the code that they come from: change either, and what it affects runs again. All numbers here are of two cores of one CPU at laptop scale: they show
the sign and the shape of a claim, not its size at 2.4B. `python -m labs.course` writes this page from the results.
"""


def modules():
    """{name: module} of the labs that are there."""
    return {name: importlib.import_module(f"labs.{name}") for name in LABS if (ROOT / "labs" / f"{name}.py").exists()}


def found(module):
    """(checks, stale, core minutes, runs) of the committed results; None where they are not complete."""
    name, config = module.__name__.rpartition(".")[2], runs.LabConfig(draw=True)
    settings = module.Settings()
    try:
        results, stale = module.experiment(settings, config)
    except BadInput:
        return None
    lines = metrics.read_jsonl(runs.path(name, "results", config))
    return module.checks(results, settings), stale, sum(line["seconds"] for line in lines) / 60, len(lines)


def page():
    labs = {name: (module, found(module)) for name, module in modules().items()}
    out, table = [TOP, "| lab | it asks | first | runs, core minutes | checks that hold |\n|---|---|---|---|---|"], []
    for name, (module, result) in labs.items():
        title = ast.get_docstring(ast.parse((ROOT / "labs" / f"{name}.py").read_text(encoding="utf-8"))).splitlines()[0]
        cost = f"{result[3]}, {result[2]:.0f} | {sum(check.holds for check in result[0])} of {len(result[0])}" if result else "not run yet | -"
        out.append(f"| [{name}]({name}.py) | {title.removeprefix('Lab: ').rstrip('.')} | {LABS[name]} | {cost} |")
        table += [f"| {name} | {c.claim} | {c.ours} | {c.paper} | {'yes' if c.holds else '**no**'} |" for c in (result[0] if result else ())]
    checks = [check for _, result in labs.values() if result for check in result[0]]
    out.append(f"\n{sum(c.holds for c in checks)} of {len(checks)} checks hold. What does not is shown, and explained at the end of its lab.\n")
    out.append("| lab | claim | here | paper | holds |\n|---|---|---|---|---|\n" + "\n".join(table) + "\n")
    stale = [name for name, (_, result) in labs.items() if result and result[1]]
    if stale:
        out.append(f"Of earlier code: {', '.join(stale)}.\n")
    out += [f"![{name}](figures/{name}.png)\n" for name in labs if (ROOT / "labs" / "figures" / f"{name}.png").exists()]
    return "\n".join(out)


@exits_cleanly
def main(argv):
    configure(argv, usage=__doc__)
    (ROOT / "labs" / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
