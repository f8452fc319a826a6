"""What the labs share: a run is made once, and read from labs/results/NAME.jsonl from then on.

A result is valid for its settings, the source of the lab's own experiment function, the version of torch, and the numerics of
the project, which tests/golden.json records (code_key). Moving or rewording other code repeats no run; a changed number does.
An interrupted lab continues with the run that it was in.
"""
import ast
import dataclasses
import glob
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from configurator import ROOT, BadInput, configure
from data.corpus import prepare_missing
from data.dataset import open_data
from data.tokenizer import load_tokenizer
from engine import checkpoint, metrics
from engine.run import RunState, is_finished
from model import MiniCPM, MiniCPMConfig, init_weights


@dataclass
class LabConfig:
    quick: bool = False         # True: seconds, to try the machinery; files go to out/labs, nothing that is committed changes
    draw: bool = False          # True: run nothing, draw what is there, that of earlier code marked as such
    rekey: bool = False         # True: run nothing, take the recorded results as those of the present code. For a change of code
                                # that leaves the numbers alone, after one run of the lab has shown that it does
    workers: int = 0            # runs at a time, a thread each; 0: one a core

    def problems(self):
        return [f"--workers={self.workers}: must not be negative"] if self.workers < 0 else []


def settings(argv, Settings, quick, usage):
    """(settings, config) of a lab's command line; `quick` are its settings under --quick=True, where none are given."""
    if "ipykernel" in sys.modules and argv == sys.argv[1:]:
        argv = []                                                        # in a notebook these are the kernel's own words
    (own, config), given = configure(argv, Settings, LabConfig, usage=usage)
    config = dataclasses.replace(config, draw=config.draw or config.rekey)
    if config.quick:
        own = dataclasses.replace(Settings(**quick), **{name: given[name] for name in given if hasattr(own, name)})
    empty = [name for name, value in vars(own).items() if value == ()]
    if empty:
        raise BadInput(*(f"--{name}: needs a value" for name in empty))
    return own, config


def path(lab, kind, config):
    """Of a lab's results ("results") or figure ("figures")."""
    folder = ROOT / "out" / "labs" if config.quick else ROOT / "labs" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}"


def folder(lab, job):
    """Where a run that writes checkpoints does so: the same for the same job, code and configs, so that it goes on after an interruption."""
    configs = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "config").glob("*.py")))
    return str(ROOT / "out" / "labs" / lab / hashlib.sha256((key_of(job) + numerics_digest() + configs).encode()).hexdigest()[:12])


# ---- from the cache, or run

def collect(lab, work, jobs, config):
    """([work(**job), ...] in the order of jobs, stale).

    work    a function at the top of a lab's file: keyword arguments -> a dict for JSON
    jobs    dicts of keyword arguments, for JSON
    stale   whether one of the results is of earlier code; only with --draw=True
    """
    file, code = path(lab, "results", config), code_key(work)
    if config.rekey:
        relabel(file, work, code)
    known, missing = there(lab, work, config), lacking(lab, work, jobs, config)
    if config.draw and any(key not in known for key in missing):
        raise BadInput(f"{file}: lacks {sum(key not in known for key in missing)} of {len(jobs)} runs; without --draw=True the lab makes them")
    if not config.draw:
        held = file.with_name(f".{file.stem}")                           # one process a file at a time
        held.mkdir(parents=True, exist_ok=True)
        with checkpoint.lock(held):
            with open(tidy(file), "a", encoding="utf-8") as f:
                for key, result, seconds in run(work, missing, config.workers or os.cpu_count()):
                    line = {"work": work.__name__, "job": missing[key], "code": code, "seconds": round(seconds, 1), "result": result}
                    f.write(json.dumps(line) + "\n")
                    f.flush()
            tidy(file)
        known = there(lab, work, config)
    lines = [known[key_of(job)] for job in jobs]
    return [line["result"] for line in lines], any(line["code"] != code for line in lines)


def lacking(lab, work, jobs, config):
    """{key: job} of the jobs that the code as it is has not run."""
    code, known = code_key(work), there(lab, work, config)
    return {key: job for job in jobs if (key := key_of(job)) not in known or known[key]["code"] != code}


def relabel(file, work, code):
    """Write `code` into the recorded results of an experiment function."""
    lines = [{**line, "code": code} if line["work"] == work.__name__ else line for line in metrics.read_jsonl(file)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def there(lab, work, config):
    """{key: line} of the results of a work."""
    return {key_of(line["job"]): line for line in metrics.read_jsonl(path(lab, "results", config)) if line["work"] == work.__name__}


def key_of(job):
    return json.dumps(job, sort_keys=True)


def tidy(file):
    """Leave the last line of each job, and no half one, which a new one would continue; returns the file."""
    lines = {(line["work"], key_of(line["job"])): line for line in metrics.read_jsonl(file)}
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines.values()), encoding="utf-8")
    os.replace(temporary, file)
    return file


def run(work, jobs, workers):
    """Yield (key, work(**job), seconds) of jobs {key: job} as they finish, with a line each."""
    workers = min(workers, len(jobs))
    if workers > 1 and not getattr(sys.modules["__main__"], "__file__", None):
        print("one run at a time: processes need a lab that was started as a file (python -m labs.NAME)")
        workers = 1
    if workers > 1:
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"                              # of the processes to come: a thread each
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), alone)
        results = (future.result() for future in as_completed([pool.submit(timed_alone, key, work, job) for key, job in jobs.items()]))
    else:
        results = (timed(key, work, job) for key, job in jobs.items())
    try:
        for n, (key, result, seconds) in enumerate(results, 1):
            print(f"[{n}/{len(jobs)}] {' '.join(f'{name}={value}' for name, value in jobs[key].items())[:160]}: {seconds:.0f} s", flush=True)
            yield key, result, seconds
    except BrokenProcessPool:
        raise BadInput("the process of a run was killed (by you, or for want of memory: --workers=1); the same command goes on") from None
    except BaseException:                                                # Ctrl-C among them
        for process in multiprocessing.active_children():
            process.terminate()                                          # train.py saves and ends
        raise
    finally:
        if workers > 1:
            pool.shutdown(cancel_futures=True)
            os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


def timed(key, work, job):
    began = time.perf_counter()
    return key, work(**job), time.perf_counter() - began


def timed_alone(key, work, job):
    try:
        return timed(key, work, job)
    except KeyboardInterrupt:
        os._exit(130)                                                    # its state is saved; this process takes no other run


def alone():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                         # Ctrl-C is the lab's, which ends its processes


# ---- what a result depends on

def code_key(work):
    """Return a hash of what the results of an experiment function depend on besides its arguments: see the top of this file."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(work)))
    if ast.get_docstring(tree.body[0]) is not None:
        del tree.body[0].body[0]                                         # comments and line breaks do not count either
    parts = [ast.unparse(tree), torch.__version__.partition("+")[0], numerics_digest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def numerics_digest():
    """Return the sha256 of the golden numbers of every path that the labs use."""
    return hashlib.sha256((ROOT / "tests" / "golden.json").read_bytes().replace(b"\r\n", b"\n")).hexdigest()


# ---- a run

def prepare(config, **knobs):
    """Make the corpora of these knobs (data, tokenizer) where they are not there yet, before runs side by side want them."""
    if not config.draw:
        of = train.TrainConfig(**{"data": "pytorch", "tokenizer": "bytes", **knobs})
        prepare_missing(of, load_tokenizer(of.tokenizer))


def begin(config_file, **knobs):
    """(model, updates, validate) of `python train.py CONFIG_FILE --name=value ...` in memory alone: updates is train.py's loop, to
    be drained and looked into; validate() -> {"val_loss", "val_bpb"} once it is."""
    config, shape, given = train.read_config([str(ROOT / config_file), "--quiet=True", *options(**knobs)])
    tokenizer = load_tokenizer(config.tokenizer)
    if "vocab_size" not in given:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.n_vocab)
    batches, validate = open_data(config, tokenizer)
    model = MiniCPM(shape)
    init_weights(model, config.seed)
    return model, train.train(config, batches, train.language_loss, model), lambda: validate(model.eval())


def finish(script, *words, out_dir, **knobs):
    """Bring the run in out_dir to its end by script (train.main, dpo.main): True, or False where the loss was no number.
    What is there is not run again. raises KeyboardInterrupt: stopped by a signal, and saved, to go on the next time"""
    def at_its_end():
        return bool(checkpoint.checkpoints(out_dir)) and is_finished(out_dir, RunState(**checkpoint.read_meta(checkpoint.resolve(out_dir))["run"]))

    if at_its_end():
        return True
    try:
        script([*words, "--quiet=True", *options(out_dir=out_dir, **knobs)])
    except SystemExit as end:
        if end.code != 3:
            raise
        return False
    if not at_its_end():
        raise KeyboardInterrupt
    return True


def options(**knobs):
    """["--name=value", ...]"""
    return [f"--{name}={value}" for name, value in knobs.items()]


def of_pattern(pattern):
    """[(folder, training knobs {name: value}, MiniCPMConfig, lines of metrics.jsonl), ...] of the reader's own runs: folders of
    train.py or the metrics.jsonl in them; * and ** match. raises BadInput: none, or one that lacks its config.json"""
    folders = sorted({path if path.is_dir() else path.parent for path in map(Path, glob.glob(pattern, recursive=True))
                      if path.is_dir() and (path / "metrics.jsonl").is_file() or path.name == "metrics.jsonl"})
    if not folders:
        raise BadInput(f"--runs={pattern}: no folder with a metrics.jsonl; give run folders of train.py, quoted: --runs='out/sweep/*'")
    found = []
    for folder in folders:
        about = checkpoint.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if not {"train", "model"} <= about.keys():
            raise BadInput(f"{folder}: metrics.jsonl without the config.json that train.py writes beside it, so without batch and model size")
        found.append((folder, about["train"], checkpoint.model_config_of(MiniCPMConfig, about, folder), metrics.read_jsonl(folder / "metrics.jsonl")))
    return found


# ---- what a lab says

@dataclass
class Check:
    """A statement of a lab about its results: a row of labs/README.md."""
    claim: str
    ours: str                   # what was measured
    paper: str                  # the paper's number, or "-"
    holds: bool


def report(checks, stale):
    """Print what was found."""
    if stale:
        print("some results are of earlier code: without --draw=True the lab makes them again")
    for check in checks:
        print(f"{'holds   ' if check.holds else 'DOES NOT'} | {check.claim}: {check.ours}" + (f" (paper: {check.paper})" if check.paper != "-" else ""))


def figure(rows, columns, title, stale, width=4.2, height=3.4):
    """(figure, axes (rows, columns)) to draw into, with a line where results are of earlier code."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    made, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")
    made.suptitle(title + (" [results of earlier code]" if stale else ""))
    for each in axes.flat:
        each.grid(alpha=0.3)
    return made, axes


def curve(ax, x, seeds, style, **more):
    """Mean over seeds (seeds, points), and a band from the lowest to the highest."""
    ax.plot(x, seeds.mean(0), **{**style, **more})
    ax.fill_between(x, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.15)


STYLES = [{"color": color, "marker": marker, "linestyle": line} for color, marker, line in zip(
    ("black", "tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:gray"), "os^vDPX*",
    ("-", "--", "-.", ":", "-", "--", "-.", ":"))]                       # told apart without colour too
