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
    "budget": "lr_transfer, scaling_law",
    "annealing": "wsd_vs_cosine; `data/instruct/prepare.py`",
    "continue_training": "wsd_vs_cosine; annealing",
    "preferences": "annealing",
    "upcycling": "wsd_vs_cosine; `model.py: MoE`",
    "long_context": "`model.py: rope_tables`",
    "serving": "`model.py: KVCache`",
}

CORES = 2                       # of the machine that the labs are sized for

TOP = """# The course

Each claim of the paper is a lab: one file that reads from top to bottom. It asks a question, runs
an experiment on train.py's loop, draws a figure, checks the claim, and ends with three exercises
that change a line. Write down what you expect, then run it:

```sh
python -m labs.mup_coordinates                 # results in labs/results, a figure in labs/figures
python -m labs.mup_coordinates --quick=True    # seconds: does it work on this machine?
python -m labs.mup_coordinates --draw=True     # trains nothing: draws the committed results
```

New here? [start.ipynb](start.ipynb) is the first hour: train, sample, decay, read the curves.
VS Code opens a file cell by cell (open the repository's folder), and so does Jupyter with jupytext
(with `%cd ..` in a first cell). [colab.ipynb](colab.ipynb) runs any lab on a free cloud machine.
A second run of a lab only draws: results are stored with the settings and the lab's code that they
come from. If you change either, what depends on it runs again; if you change another file, delete
the lab's results. After an exercise, `git restore labs/NAME.py labs/results labs/figures` brings
the lab back. All numbers here come from two CPU cores, at laptop scale: they show the sign and the
shape of a claim, not its size at 2.4B. Each check was set in [PREREGISTER.md](PREREGISTER.md),
which also has its history. [syllabus.md](syllabus.md) makes twelve weeks of the labs and of seven
[assignments](assignments/README.md). This page is written by `python -m labs.course`.
"""


def modules():
    """Return {name: module} of the labs."""
    return {name: importlib.import_module(f"labs.{name}") for name in LABS}


def recorded(name, module):
    """Return (checks, lines of the results file), or None if the results are incomplete."""
    config, settings = runs.LabConfig(draw=True), module.Settings()
    try:
        results = module.experiment(settings, config)
    except BadInput:
        return None
    lines = metrics.read_jsonl(runs.path(name, "results", config))
    return module.checks(results, settings), lines


def summary(verdicts, withdrawn, with_p, weak):
    """Return the paragraph above the table of checks, from the verdicts and three numbers."""
    hold = sum(verdict.endswith("holds") for verdict in verdicts)
    changed = sum(verdict.startswith("changed") for verdict in verdicts)
    return (f"Of {len(verdicts)} checks {hold} hold and {len(verdicts) - hold} do not; {changed} "
            f"of them were changed after seeing results, and {withdrawn} more were "
            f"withdrawn as badly asked. {with_p} checks compare seeds and say p, the chance of a "
            f"difference at least as large if there is none (one-sided t test; the largest p if a "
            f"check compares several pairs). A check holds by its own rule, not by p: {weak} of "
            f"those that hold have p above 0.05. With three seeds and one comparison, \"for every "
            f"seed\" holds by chance once in eight times. Why a check does not hold is explained "
            f"at the end of its lab.\n")


def page():
    """Return the text of labs/README.md."""
    labs, rows, verdicts, figures, outdated, with_p, weak = [], [], [], [], [], 0, 0
    for name, module in modules().items():
        title = module.__doc__.splitlines()[0].removeprefix("Lab: ").rstrip(".")
        cost, holding, registered = "incomplete", "-", runs.register(name)
        if found := recorded(name, module):
            checks, lines = found
            minutes = sum(line["seconds"] for line in lines) / 60
            cost = f"{len(lines)}, {minutes / CORES:.0f}"
            if name == "budget":                            # its runs come one after the other
                cost = f"{len(lines)}, {minutes:.0f} on one"
            holding = f"{sum(check.holds for check in checks)} of {len(checks)}"
            for check in checks:
                verdicts.append(runs.verdict(check, registered))
                p = "-" if check.p is None else f"{check.p:.2g}"
                with_p += check.p is not None
                weak += check.holds and check.p is not None and check.p > 0.05
                rows.append(f"| {name} | {check.claim} | {check.ours} | {p} | {check.paper} | "
                            f"{verdicts[-1].replace('does not hold', '**does not hold**')} |")
            outdated += [name] if runs.is_stale(name, module, runs.LabConfig()) else []
        rows += [f"| {name} | {claim} | - | - | - | {change} |"
                 for claim, (_, change) in registered.items() if change.startswith("badly asked")]
        labs.append(f"| [{name}]({name}.py) | {title} | {LABS[name]} | {cost} | {holding} |")
        if found and (ROOT / "labs" / "figures" / f"{name}.png").exists():
            figures.append(f"![{name}](figures/{name}.png)\n")
    return "\n".join([
        TOP, "| lab | its question | first | runs, minutes on two cores | checks that hold |",
        "|---|---|---|---|---|", *labs, "",
        summary(verdicts, len(rows) - len(verdicts), with_p, weak),
        "| lab | check | here | p | paper | verdict |", "|---|---|---|---|---|---|", *rows, "",
        *([f"Results of earlier code: {', '.join(outdated)}.\n"] if outdated else []), *figures])


@exits_cleanly
def main(argv):
    configure(argv, usage=__doc__)
    (ROOT / "labs" / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
