"""A trace of a few updates by torch.profiler: a file that https://ui.perfetto.dev and
chrome://tracing open. On several ranks it also shows who waits: the communication of the slowest
rank is the shortest."""
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function


def parse_steps(text):
    """Return (A, B) of --profile_steps. Raises ValueError unless it is A:B with 0 <= A < B."""
    first, last = map(int, text.split(":"))
    if not 0 <= first < last:
        raise ValueError(text)
    return first, last


class Trace:
    """Traces the updates A+1 to B of a run, with what happens between them (evaluating, saving),
    to out_dir/trace-rank0.json, one file per rank.

    A run that ends earlier, or that resumes between A and B, traces those that it makes.
    """

    def __init__(self, config, state, world, say):
        """Without --profile_steps nothing is traced."""
        self.first, self.last, self.state, self.say = 0, 0, state, say
        if config.profile_steps:
            self.first, self.last = parse_steps(config.profile_steps)
        self.path = Path(config.out_dir) / f"trace-rank{world.rank}.json"
        self.activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self.profiler, self.update = None, None

    def start_step(self):
        if not self.first <= self.state.step < self.last:
            return
        if self.profiler is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)            # labs have no folder
            self.profiler = profile(activities=self.activities)
            self.profiler.start()
        self.update = record_function(f"update {self.state.step + 1}")
        self.update.__enter__()

    def end_step(self):
        """state.step: the updates done, this one included."""
        if self.update:
            self.update.__exit__(None, None, None)
            self.update = None
        if self.state.step == self.last:
            self.close()

    def close(self):
        """Write what was traced, if anything."""
        if self.update:                                    # stopped, or failed, within an update
            self.update.__exit__(None, None, None)
        if self.profiler:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path))
            self.say(f"trace: {self.path}, opens in https://ui.perfetto.dev")
        self.profiler, self.update = None, None
