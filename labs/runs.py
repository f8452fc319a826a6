"""What the labs share: the command line, cached results, training runs, figures and checks.

A lab keeps its results in labs/results/NAME.jsonl and computes only what is missing there. A
result is valid for its arguments, the source code of its experiment function and of what that uses
in the lab's file, the version of torch, and the numerics of the project as tests/golden.json
records them (see code_key). A change of other files invalidates no result unless it changes these
numbers: to measure such a change, delete the lab's results.
"""
import ast
import copy
import dataclasses
import glob
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t

import train
from configurator import ROOT, BadInput, configure
from data.corpus import prepare_missing
from data.dataset import open_data
from data.tokenizer import load_tokenizer
from engine import checkpoint, metrics
from engine.run import NonFinite, RunState, is_finished
from model import MiniCPM, MiniCPMConfig, init_weights

NON_FINITE = 3                  # exit status of train.py after a NaN or infinite loss or gradient


# ---- the command line

@dataclass
class LabConfig:
    quick: bool = False         # True: small settings that take seconds; files go to out/labs
    draw: bool = False          # True: train nothing, draw the recorded results, even if outdated
    rekey: bool = False         # True: train nothing, mark the recorded results as up to date. For
                                # a change of an experiment's code that leaves its numbers alone
    workers: int = 0            # parallel runs, one thread each; 0: one per core

    def __post_init__(self):
        self.draw = self.draw or self.rekey

    def problems(self):
        if self.workers < 0:
            return [f"--workers={self.workers}: must not be negative"]
        return []


def settings(argv, Settings, quick, usage):
    """Parse a lab's command line into (Settings, LabConfig).

    quick   dict of the settings under --quick=True, unless the command line gives others
    raises  BadInput if an option is unknown, impossible or an empty list
    """
    if "ipykernel" in sys.modules and argv == sys.argv[1:]:
        argv = []                                   # in a notebook: the kernel's own options
    (chosen, config), given = configure(argv, Settings, LabConfig, usage=usage)
    if config.quick:
        own = {name: value for name, value in given.items() if hasattr(chosen, name)}
        chosen = Settings(**{**quick, **own})
    empty = [name for name, value in vars(chosen).items() if value == ()]
    if empty:
        raise BadInput(*(f"--{name}: needs a value" for name in empty))
    return chosen, config


def main(lab, argv, Settings, quick, usage, experiment, draw, checks, slide=None):
    """Run a lab: its experiment, figure, slide and checks. Returns (results, settings).

    lab              name of the lab
    Settings, quick  as in settings()
    usage            text that --help prints above the options
    experiment       experiment(settings, config) -> results
    draw             draw(results, settings) -> a matplotlib figure, None if there is no result
    checks           checks(results, settings) -> list of Check
    slide            slide(ax, results, settings) draws the lab's one message for a projector and
                     returns it in words, the title
    """
    chosen, config = settings(argv, Settings, quick, usage)
    results = experiment(chosen, config)
    stale = config.draw and is_stale(lab, sys.modules[experiment.__module__], config)
    name = lab
    if chosen != Settings() and not config.quick:       # the committed figures show the defaults
        name, config = f"{lab}_own", dataclasses.replace(config, quick=True)
    drawing = draw(results, chosen)
    if drawing:
        save_figure(drawing, path(name, "figures", config), stale, legend_size=7)
    if drawing and slide:
        with plotting().rc_context(SLIDE):
            page, ax = plotting().subplots(layout="constrained")
            page.suptitle(slide(ax, results, chosen))
            save_figure(page, path(f"{name}_slide", "figures", config), stale, legend_size=18)
    report(lab, checks(results, chosen), stale)
    return results, chosen


def save_figure(drawing, file, stale, legend_size):
    """Write a figure; labelled curves get a legend, results of earlier code a note."""
    if stale:
        drawing.suptitle(f"{drawing.get_suptitle()} [results of earlier code]")
    for ax in drawing.axes:
        if ax.get_legend() is None and ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=legend_size)
    drawing.savefig(file)
    plotting().close(drawing)
    print(f"drew {file}")


def path(lab, kind, config):
    """Return the path of a lab's "results" or "figures", in a folder that exists."""
    folder = ROOT / "out" / "labs" if config.quick else ROOT / "labs" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}"


# ---- cached results

def collect(lab, work, jobs, config):
    """Return [work(**job) for each job], running only the jobs without a valid result.

    work    the experiment: a function at the top level of a lab that returns a JSON value
    jobs    list of dicts: keyword arguments of work, JSON values too
    raises  BadInput if --draw=True and a job has no result; one of earlier code is accepted then
    """
    file, code = path(lab, "results", config), code_key(work)
    if config.rekey:
        recorded = cached_results(lab, work, config).values()
        save_results(file, [{**line, "code": code} for line in recorded])
    if not config.draw:
        lock_folder = file.with_name(f".{file.stem}")
        lock_folder.mkdir(parents=True, exist_ok=True)
        with checkpoint.lock(lock_folder):          # one process per results file
            missing = missing_jobs(lab, work, jobs, config)
            for key, result, seconds in run(work, missing, config.workers or os.cpu_count()):
                save_results(file, [{"work": work.__name__, "job": missing[key], "code": code,
                                     "seconds": round(seconds, 1), "result": result}])
    known = cached_results(lab, work, config)
    lines = [known.get(job_key(job)) for job in jobs]
    if None in lines:
        raise BadInput(f"{file}: lacks {lines.count(None)} of {len(jobs)} results; run the lab "
                       f"without --draw=True to compute them")
    return [line["result"] for line in lines]


def is_stale(lab, module, config):
    """Return whether a result of a lab comes from earlier code of its experiment functions."""
    recorded = {(line["work"], line["code"])
                for line in metrics.read_jsonl(path(lab, "results", config))}
    return any(not hasattr(module, work) or code != code_key(getattr(module, work))
               for work, code in recorded)


def missing_jobs(lab, work, jobs, config):
    """Return {key: job} of the jobs that have no result of the present code."""
    code, known = code_key(work), cached_results(lab, work, config)
    valid = {key for key, line in known.items() if line["code"] == code}
    return {job_key(job): job for job in jobs if job_key(job) not in valid}


def cached_results(lab, work, config):
    """Return {key: line} of the recorded results of an experiment function."""
    lines = metrics.read_jsonl(path(lab, "results", config))
    return {job_key(line["job"]): line for line in lines if line["work"] == work.__name__}


def save_results(file, new):
    """Add result lines to a file, each in the place of the earlier result of its job."""
    lines = {(line["work"], job_key(line["job"])): line
             for line in [*metrics.read_jsonl(file), *new]}
    temporary = file.with_suffix(".tmp")
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def job_key(job):
    return json.dumps(job, sort_keys=True)


def code_key(work):
    """Return a hash of what the results of an experiment function depend on besides its arguments.

    That is its source code and that of the functions and constants of its file that it uses, the
    version of torch, and the golden numbers. Docstrings, comments and line breaks do not count.
    """
    parts, names = {}, [work.__name__]
    while names:
        name = names.pop()
        value = work.__globals__.get(name)
        if name not in parts and inspect.isfunction(value) and value.__module__ == work.__module__:
            tree = ast.parse(inspect.getsource(value))
            if ast.get_docstring(tree.body[0]) is not None:
                del tree.body[0].body[0]
            parts[name] = ast.unparse(tree)
            names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        elif isinstance(value, (bool, int, float, str, tuple, list, dict)):
            parts[name] = repr(value)
    version = torch.__version__.partition("+")[0]
    key = json.dumps([parts, version, numerics_digest()], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def numerics_digest():
    """Return the sha256 of the golden numbers, which cover every path that the labs use."""
    golden = (ROOT / "tests" / "golden.json").read_bytes()
    return hashlib.sha256(golden.replace(b"\r\n", b"\n")).hexdigest()


# ---- running jobs

def run(work, jobs, workers):
    """Yield (key, work(**job), seconds of a core) of jobs {key: job}, printing a line for each one
    that has finished."""
    workers = min(workers, len(jobs))
    if workers > 1 and not getattr(sys.modules["__main__"], "__file__", None):
        print("one run at a time: parallel runs need a lab started as python -m labs.NAME")
        workers = 1
    if workers > 1:
        results = run_in_processes(work, jobs, workers)
    else:
        results = (timed(key, work, job) for key, job in jobs.items())
    for n, (key, result, seconds) in enumerate(results, 1):
        arguments = " ".join(f"{name}={value}" for name, value in jobs[key].items())
        print(f"[{n}/{len(jobs)}] {arguments[:160]}: {seconds:.0f} s", flush=True)
        yield key, result, seconds


def run_in_processes(work, jobs, workers):
    """Yield (key, result, seconds) of jobs that run in `workers` processes with one thread each."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, init_worker)
    try:
        futures = [pool.submit(timed_in_worker, key, work, job) for key, job in jobs.items()]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise BadInput("the process of a run was killed (if it ran out of memory, give "
                       "--workers=1); the same command continues") from None
    except BaseException:                           # Ctrl-C among them
        for process in multiprocessing.active_children():
            process.terminate()                     # train.py saves its run, then ends
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def init_worker():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the lab, which ends its workers


def timed(key, work, job):
    start = time.process_time()         # of the cores: what else the machine does counts little
    return key, work(**job), time.process_time() - start


def timed_in_worker(key, work, job):
    try:
        return timed(key, work, job)
    except KeyboardInterrupt:                       # terminated and saved: take no other job
        os._exit(130)


# ---- training runs

def prepare(config, **knobs):
    """Prepare the corpora of these train.py options, if missing, before parallel runs need them."""
    if not config.draw:
        train_config = train.TrainConfig(**{"data": "pytorch", "tokenizer": "bytes", **knobs})
        prepare_missing(train_config, load_tokenizer(train_config.tokenizer))


def options(**knobs):
    """Return ["--name=value", ...]."""
    return [f"--{name}={value}" for name, value in knobs.items()]


def shape(width, head=32):
    """Return the options of a model of this width, with heads of size `head`."""
    return dict(n_embd=width, n_head=max(1, width // head), n_ff=width * 5 // 2)


def build(config_file, **knobs):
    """Return (config, model, batches, validate) of `python train.py CONFIG_FILE --name=value ...`.

    The model has its initial weights; batches and validate are those of data.dataset.open_data.
    """
    arguments = [config_file, "--quiet=True", *options(**knobs)]
    config, architecture, _ = train.read_config(arguments)
    tokenizer = load_tokenizer(config.tokenizer)
    batches, validate, _ = open_data(config, tokenizer)
    model = MiniCPM(dataclasses.replace(architecture, vocab_size=tokenizer.n_vocab))
    init_weights(model, config.seed)
    return config, model, batches, validate


def begin(config_file, **knobs):
    """Return (model, updates, validate) of the same command.

    updates   the generator of train.train: iterate over it to train the model
    validate  validate() -> {"val_loss": nats per token, "val_bpb": bits per byte} of the model
    """
    config, model, batches, validate = build(config_file, **knobs)
    updates = train.train(config, batches, train.language_loss, model)
    return model, updates, lambda: validate(model.eval())


def decayed_model(config, batches, update, end):
    """Return a copy of the model of an Update, trained on with a decay from there to step `end`."""
    model = copy.deepcopy(update.model)
    tensors = checkpoint.optimizer_state(update.optimizer).items()
    state = RunState(step=update.step, samples_seen=update.step * config.batch_size, max_steps=end,
                     decay_steps=end - update.step, plan=[[0, config.data]])
    for _ in train.train(config, batches, train.language_loss, model, state,
                         [(name, tensor.clone()) for name, tensor in tensors]):
        pass
    return model


def decay_losses(config, model, batches, validate, warmup_steps, branches):
    """Train a trunk at the peak learning rate, from which decays branch.

    config ... validate   as build() returns them
    branches              [(first update of a decay, its last), ...]
    returns               [held-out loss after each decay], None for those that the trunk did not
                          reach because it diverged
    """
    steps, losses = max(start for start, _ in branches), [None] * len(branches)
    config = dataclasses.replace(config, max_steps=steps, decay_steps=0,
                                 warmup_steps=min(warmup_steps, steps))
    try:
        for update in train.train(config, batches, train.language_loss, model):
            for i, (start, end) in enumerate(branches):
                if start == update.step:
                    decayed = decayed_model(config, batches, update, end)
                    losses[i] = validate(decayed.eval())["val_loss"]
    except NonFinite:
        pass
    return losses


def folder(lab, job):
    """Return the folder for the checkpoints of a job, as str.

    It is the same for the same job, numerics and config files, so an interrupted run continues.
    """
    config_files = sorted((ROOT / "config").glob("*.py"))
    configs = "".join(file.read_text(encoding="utf-8") for file in config_files)
    digest = hashlib.sha256((job_key(job) + numerics_digest() + configs).encode()).hexdigest()
    return str(ROOT / "out" / "labs" / lab / digest[:12])


def finish(script, *words, out_dir, **knobs):
    """Run the main function of a script (train.main, dpo.main) until the run in out_dir is done.

    A run that is done is not repeated. Returns False if the loss became NaN or infinite, else True.
    raises  KeyboardInterrupt if a signal stopped the run, which has saved its state
    """
    if run_is_done(out_dir):
        return True
    try:
        script([*words, "--quiet=True", *options(out_dir=out_dir, **knobs)])
    except SystemExit as error:
        if error.code != NON_FINITE:
            raise
        return False
    if not run_is_done(out_dir):
        raise KeyboardInterrupt
    return True


def run_is_done(out_dir):
    """Return whether the run in out_dir has made its last update and its last evaluation."""
    if not checkpoint.checkpoints(out_dir):
        return False
    meta = checkpoint.read_meta(checkpoint.resolve(out_dir))
    return is_finished(out_dir, RunState(**meta["run"]))


def train_stage(lab, *config_files, **options):
    """Train one stage of a model with train.py and return its run folder.

    A finished stage is not trained again, an interrupted one continues. Raises BadInput if the
    loss diverges.
    """
    out_dir = folder(lab, [config_files, options])
    if not finish(train.main, *config_files, out_dir=out_dir, **options):
        raise BadInput(f"{out_dir}: the loss is NaN or infinite; lower this stage's learning_rate")
    return out_dir


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


def read_run_folders(pattern):
    """Read the reader's own runs, given as a glob pattern of run folders or their metrics.jsonl.

    returns  [(folder, options of train.py as dict, MiniCPMConfig, lines of metrics.jsonl), ...]
    raises   BadInput if nothing matches, or a folder lacks its config.json
    """
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    folders = {match.parent for match in matches if match.name == "metrics.jsonl"}
    folders |= {match for match in matches if (match / "metrics.jsonl").is_file()}
    if not folders:
        raise BadInput(f"--runs={pattern}: no folder with a metrics.jsonl; give run folders of "
                       f"train.py, in quotes: --runs='out/sweep/*'")
    found = []
    for folder in sorted(folders):
        file = folder / "config.json"
        meta = checkpoint.read_json(file) if file.is_file() else {}
        if not {"train", "model"} <= meta.keys():
            raise BadInput(f"{folder}: metrics.jsonl without the config.json that train.py writes, "
                           f"so batch size and model size are unknown")
        model_config = checkpoint.model_config_of(MiniCPMConfig, meta, folder)
        lines = metrics.read_jsonl(folder / "metrics.jsonl")
        found.append((folder, meta["train"], model_config, lines))
    return found


# ---- checks

@dataclass
class Check:
    """A statement about a lab's results, and whether they bear it out."""
    claim: str                  # with its threshold, as in labs/PREREGISTER.md
    ours: str                   # what was measured, with its spread over the seeds
    holds: bool
    p: float | None = None      # p_value of what it compares over seeds
    paper: str = "-"            # the paper's number, if it has one


def register(lab):
    """Return {claim: (date it was set, what changed since)} of labs/PREREGISTER.md for a lab."""
    file = ROOT / "labs" / "PREREGISTER.md"             # students may have a copy without it
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    section = text.partition(f"\n## {lab}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    return {claim: (date, change) for claim, date, change in rows[1:]}      # the first: the head


def verdict(check, registered):
    """Return the verdict on a check as a word or two; registered as register() returns it."""
    change = registered.get(check.claim, ("", ""))[1]
    changed = "changed after seeing, " if change.startswith("changed after seeing") else ""
    return changed + ("holds" if check.holds else "does not hold")


def report(lab, checks, stale):
    """Print the checks, a line each."""
    if stale:
        print("some results are of earlier code; run the lab without --draw=True to renew them")
    registered = register(lab)
    for check in checks:
        p = f" (p = {check.p:.2g})" if check.p is not None else ""
        paper = f" (paper: {check.paper})" if check.paper != "-" else ""
        print(f"{verdict(check, registered)} | {check.claim}: {check.ours}{p}{paper}")


def p_value(differences):
    """Return the p of a one-sided t test: how likely a mean so far above 0 is, if the true mean is
    0. It is NaN if the seeds do not differ, as with one seed.

    differences   (seeds,), or (seeds, comparisons): then the largest p of these
    """
    differences = np.array(differences, dtype=float)
    n, spread = len(differences), differences.std(0)
    if not spread.all():
        return math.nan
    t = differences.mean(0) / (spread / math.sqrt(n - 1))       # the mean in its standard errors
    return float(np.max(student_t.sf(t, n - 1)))


def mean_and_range(values, form=".1f"):
    """Return "MEAN (LOWEST to HIGHEST)" of the values of all seeds, or the mean if they agree."""
    mean, low, high = (format(of(values), form) for of in (np.mean, np.min, np.max))
    return mean if low == high else f"{mean} ({low} to {high})"


# ---- figures

# a projector's format, type that the last row can read
SLIDE = {"figure.figsize": (13.33, 7.5), "figure.dpi": 96, "font.size": 20, "lines.linewidth": 3,
         "lines.markersize": 10, "axes.grid": True, "grid.alpha": 0.3}


def plotting():
    """Return matplotlib.pyplot, loaded only now and without a window."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def figure(rows, columns, title, width=4.2, height=3.4):
    """Return (figure, axes (rows, columns)) to draw into; width and height of a panel in inches."""
    drawing, axes = plotting().subplots(rows, columns, figsize=(width * columns, height * rows),
                                        squeeze=False, layout="constrained", dpi=110)
    drawing.suptitle(title)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return drawing, axes


def curve(ax, x, seeds, style, **more):
    """Plot the mean over seeds of an array (seeds, points), and the seeds' range as a band."""
    ax.plot(x, seeds.mean(0), **{**style, **more})
    ax.fill_between(x, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.15)


def bars(ax, x, samples, style, center=np.mean, **more):
    """Plot the center of each list in samples, with a bar from its lowest to its highest value."""
    low, middle, high = (np.array(list(map(of, samples))) for of in (min, center, max))
    ax.errorbar(x, middle, [middle - low, high - middle], capsize=3, **{**style, **more})


def log_x(ax, values):
    """Make the x axis logarithmic, with ticks at these values only."""
    ax.set_xscale("log")
    ax.set_xticks([], minor=True)
    ax.set_xticks(list(values), [f"{value:,g}" for value in values])


COLORS = ("black", "tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown",
          "tab:gray")
STYLES = [{"color": color, "marker": marker, "linestyle": line}     # distinct without color too
          for color, marker, line in zip(COLORS, "os^vDPX*", ("-", "--", "-.", ":") * 2)]
