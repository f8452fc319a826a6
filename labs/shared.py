"""Helpers that several labs share: their stages, seeds, figures and command lines."""
from operator import itemgetter

import numpy as np

import train
from configurator import BadInput
from data.tokenizer import load_tokenizer
from engine import checkpoint
from labs import runs
from model import MiniCPM


def train_stage(lab, *config_files, **options):
    """Train one stage of a model with train.py and return its run folder.

    A finished stage is not trained again, an interrupted one continues. Raises BadInput if the
    loss diverges.
    """
    folder = runs.folder(lab, [config_files, options])
    if not runs.finish(train.main, *config_files, out_dir=folder, **options):
        raise BadInput(f"{folder}: the loss is NaN or infinite; lower this stage's learning_rate")
    return folder


def load_model(folder):
    """Return (model in evaluation mode, its tokenizer) of a run folder or checkpoint."""
    tokenizer = load_tokenizer(str(checkpoint.resolve(folder)))
    return MiniCPM.from_pretrained(folder).eval(), tokenizer


def group(jobs, results, *names):
    """Return {job[name], or a tuple of these for several names: [results, one per seed]}."""
    key, groups = itemgetter(*names), {}
    for job, result in zip(jobs, results):
        groups.setdefault(key(job), []).append(result)
    return groups


def spread(values, form=".1f"):
    """Return "mean (lowest to highest)" of the values of all seeds, or the mean if they agree."""
    mean, low, high = (format(f(values), form) for f in (np.mean, np.min, np.max))
    return mean if low == high else f"{mean} ({low} to {high})"


def bars(ax, x, values, style, label, center=np.mean):
    """Draw the center of values (seeds, points) over the seeds, and bars from lowest to highest."""
    middle = center(values, axis=0)
    ax.errorbar(x, middle, [middle - values.min(0), values.max(0) - middle], label=label, **style)


def save_figure(figure, path):
    """Add a legend to every axes with labelled curves, and write the figure."""
    for ax in figure.axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def run_lab(lab, argv, Settings, quick, usage, experiment, draw, checks):
    """Run a lab from its command line: the experiment, the figure, the checks.

    quick    settings under --quick=True
    """
    settings, config = runs.settings(argv, Settings, quick, usage)
    results, stale = experiment(settings, config)
    draw(results, settings, runs.path(lab, "figures", config), stale)
    runs.report(checks(results, settings), stale)
