"""Write labs/README.md, the course, from the recorded results.

    python -m labs.course
"""
import importlib

from configurator import ROOT, BadInput, configure, exits_cleanly
from engine import metrics
from labs import runs

# The labs in their order, and what to do before each.
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

Each claim of the paper is a lab: one file that reads from top to bottom. It asks a question, runs
an experiment on train.py's loop, draws a figure, checks the claim, and ends with three exercises
that change a line. Write down what you expect, then run it:

```sh
python -m labs.mup_coordinates                 # results in labs/results, a figure in labs/figures
python -m labs.mup_coordinates --quick=True    # seconds: does it work on this machine?
python -m labs.mup_coordinates --draw=True     # trains nothing: draws the committed results
```

VS Code opens a file cell by cell (open the repository's folder), and so does Jupyter with jupytext
(with `%cd ..` in a first cell). [colab.ipynb](colab.ipynb) runs any lab on a free cloud machine.
A second run of a lab only draws: results are stored with the settings and the code they come from.
If you change either, what depends on it runs again. All numbers here come from two CPU cores, at
laptop scale: they show the sign and the shape of a claim, not its size at 2.4B. This page is
written by `python -m labs.course`.
"""


def modules():
    """Return {name: module} of the labs."""
    return {name: importlib.import_module(f"labs.{name}") for name in LABS}


def recorded(name, module):
    """Return (checks, stale, lines of the results file), or None if the results are incomplete."""
    config, settings = runs.LabConfig(draw=True), module.Settings()
    try:
        results, stale = module.experiment(settings, config)
    except BadInput:
        return None
    lines = metrics.read_jsonl(runs.path(name, "results", config))
    return module.checks(results, settings), stale, lines


def page():
    """Return the text of labs/README.md."""
    labs, checks, figures, outdated = [], [], [], []
    for name, module in modules().items():
        title = module.__doc__.splitlines()[0].removeprefix("Lab: ").rstrip(".")
        cost, holding = "not run yet", "-"
        if found := recorded(name, module):
            of_lab, stale, lines = found
            minutes = sum(line["seconds"] for line in lines) / 60
            cost = f"{len(lines)}, {minutes:.0f}"
            holding = f"{sum(check.holds for check in of_lab)} of {len(of_lab)}"
            checks += [(name, check) for check in of_lab]
            outdated += [name] if stale else []
        labs.append(f"| [{name}]({name}.py) | {title} | {LABS[name]} | {cost} | {holding} |")
        if (ROOT / "labs" / "figures" / f"{name}.png").exists():
            figures.append(f"![{name}](figures/{name}.png)\n")
    rows = [f"| {name} | {check.claim} | {check.ours} | {check.paper} | "
            f"{'yes' if check.holds else '**no**'} |" for name, check in checks]
    return "\n".join([
        TOP, "| lab | its question | first | runs, core minutes | checks that hold |",
        "|---|---|---|---|---|", *labs,
        f"\n{sum(check.holds for _, check in checks)} of {len(checks)} checks hold. Those that do "
        "not are shown too, and explained at the end of their lab.\n",
        "| lab | claim | here | paper | holds |", "|---|---|---|---|---|", *rows, "",
        *([f"Results of earlier code: {', '.join(outdated)}.\n"] if outdated else []), *figures])


@exits_cleanly
def main(argv):
    configure(argv, usage=__doc__)
    (ROOT / "labs" / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
