"""Helpers of labs with several training stages."""
from operator import itemgetter

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
