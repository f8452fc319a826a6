"""Lab: the wind tunnel as a game: small runs, and one prediction (paper sections 3 and 4.5)

Question    You have a budget of compute for runs of your choice. What is the loss of a run that
            costs five times the largest run that you may make? Which strategy predicts it best?
Claim       What the course taught is enough: with muP the learning rate of a small model holds for
            a large one (lr_transfer), one trunk gives many decays (wsd_vs_cosine), and the law
            L(N, D) joins sizes and lengths (scaling_law).
Write down  before you run it: how would you spend the budget? Which of the five strategies below is
            the best, which is the worst, and by how many percent are they off? Give an interval in
            which four of five target runs lie.
Command     python -m labs.budget                           30 minutes on one core
            python -m labs.budget --strategy=mine.py        scores your own: 6 minutes on one core

The rules. A run of N parameters and D tokens costs 6 N D FLOPs; evaluations are free. FLOPs are
counted, not minutes, so that the game is the same on every machine. 30 core minutes are 5.4e13
FLOPs at 30 GFLOP/s, which models of this size reach on one core. The committed leaderboard plays a
small edition: 4e12 FLOPs, about two minutes per play, and three plays with other seeds, because one
good prediction may be luck. (The full edition is --budget=5.4e13 --target_width=128.)

No run may cost more than a fifth of the budget. The target costs the whole budget, so five times
that. All but its loss is known: a model of four layers, trained as config/lab.py says. Strategies
get its loss by no call. It stands in labs/results/budget.jsonl, so not looking there is on your
honour.

A strategy is a function strategy(game) in a file of its own. It returns a prediction and an
interval (low, high) that should hold 80 % of target runs. The strategies below are examples.
"""
# %%
import hashlib
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import train
from configurator import BadInput, exits_cleanly
from engine.run import NonFinite
from labs import runs
from labs.runs import Check
from labs.scaling_law import fit, loss_of

HEAD = 16                               # size of a head
WARMUP = 50                             # updates
LARGEST = 1 / 5                         # of the budget: the most that one run may cost
TARGET_SEEDS = (1000, 1001, 1002)       # no strategy uses them
SEEDS_PER_PLAY = 100                    # play p has the seeds from 100 p on
COVERAGE = 0.8                          # of target runs, in the interval
CLOSE = 2                               # % of the loss, for the checks


@dataclass
class Settings:
    budget: float = 4e12                # FLOPs of a play, and of the target
    target_width: int = 64
    plays: int = 3                      # of each strategy, with different seeds
    eval_tokens: int = 131072           # held-out bytes per evaluation
    strategy: str | None = None         # file of your own strategy

    def problems(self):
        return ["--plays: must be 2 or more, to see the spread"] if self.plays < 2 else []

    def rules(self):
        return dict(budget=self.budget, width=self.target_width, eval_tokens=self.eval_tokens)


# %% The game: runs, and what they cost

def losses_of(width, starts, seed, eval_tokens, **options):
    """Return the held-out losses (nats per byte) at the ends of decays from one trunk; None if the
    run has diverged. starts: [[first update of a decay, its last], ...]"""
    steps, losses = max(start for start, _ in starts), [None] * len(starts)
    config, model, batches, validate = runs.build(
        "config/lab.py", **runs.shape(width, HEAD), seed=seed, eval_tokens=eval_tokens,
        max_steps=steps, decay_steps=0, warmup_steps=min(WARMUP, steps), **options)
    try:
        for update in train.train(config, batches, train.language_loss, model):
            for i, (start, end) in enumerate(starts):
                if start == update.step:
                    decayed = runs.decayed_model(config, batches, update, end)
                    losses[i] = validate(decayed.eval())["val_loss"]
    except NonFinite:
        pass
    return losses


class Game:
    """One play.

    left     FLOPs that are left of the budget
    points   [(parameters, tokens, loss), ...] of all decays so far
    width    of the target
    target   (its parameters, its tokens)
    """

    def __init__(self, budget, width, eval_tokens, config, first_seed=0, largest=LARGEST):
        self.left, self.largest, self.points = budget, largest * budget, []
        self.width, self.eval_tokens, self.config = width, eval_tokens, config
        self.first_seed = first_seed
        n, tokens = self.size(width)
        self.target = n, tokens * int(budget / (6 * n * tokens))

    def size(self, width, **options):
        """Return (parameters without the embedding, tokens per update) of a run."""
        knobs = runs.options(**runs.shape(width, HEAD), **options)
        config, model, _ = train.read_config(["config/lab.py", *knobs])
        return model.n_params_non_embedding, config.batch_size * config.block_size

    def longest(self, width, **options):
        """Return the most updates that a run may have."""
        n, tokens = self.size(width, **options)
        return int(self.largest / (6 * n * tokens))

    def run(self, width, ends, seed=0, decay_share=0.1, **options):
        """Train one trunk, from which a decay branches for each of `ends` (its last update).

        options  of train.py and model.py: learning_rate, batch_size, n_layer, ...
        returns  held-out losses at the ends (nats per byte), NaN if the run has diverged
        raises   BadInput if the budget does not allow it
        """
        n, tokens = self.size(width, **options)
        starts = [[end - max(1, round(decay_share * end)), end] for end in ends]
        updates = max(start for start, _ in starts) + sum(end - start for start, end in starts)
        longest, cost = 6 * n * tokens * max(ends), 6 * n * tokens * updates
        if longest > self.largest or cost > self.left:
            raise BadInput(f"width {width}, ends {ends}: the longest run costs {longest:.3g} FLOPs "
                           f"of {self.largest:.3g}, all of it {cost:.3g} of {self.left:.3g} left")
        self.left -= cost
        job = dict(width=width, starts=starts, seed=self.first_seed + seed,
                   eval_tokens=self.eval_tokens, **options)
        (losses,), _ = runs.collect("budget", losses_of, [job], self.config)
        losses = np.array(losses, dtype=float)
        self.points += [(n, tokens * end, loss) for end, loss in zip(ends, losses)]
        return losses


# %% Four strategies

def trunk(game, width, share=1.0, **options):
    """Run five decays from one trunk; the longest has this share of the updates that are allowed.
    Returns their points, an array (5, 3)."""
    longest = share * game.longest(width)
    game.run(width, [round(longest * part) for part in (0.2, 0.4, 0.6, 0.8, 1)], **options)
    return np.array(game.points[-5:])


def of_seeds(predictions):
    return np.mean(predictions), (min(predictions), max(predictions))


def one_size(game):
    """The target's size with four seeds; a power law with a floor over tokens."""
    return of_seeds([loss_of(fit(trunk(game, game.width, seed=seed)), *game.target)
                     for seed in range(4)])


def two_sizes(game):
    """Two small sizes at the target's tokens per parameter, four seeds; the straight line through
    the logarithms of compute and loss."""
    predictions, (n_target, target_tokens) = [], game.target
    for seed in range(4):
        for width in (game.width // 4, game.width // 2):
            n, tokens = game.size(width)
            game.run(width, [round(n * target_tokens / n_target / tokens)], seed=seed)
        n, tokens, loss = np.array(game.points[-2:]).T
        line = np.polyfit(np.log(n * tokens), np.log(loss), 1)
        predictions.append(np.exp(np.polyval(line, np.log(n_target * target_tokens))))
    return of_seeds(predictions)


def full_law(game):
    """Trunks with decays at three sizes, and the law of size and data through all of them."""
    for part, seed in ((4, 0), (4, 1), (3, 0), (2, 0)):
        trunk(game, game.width * part // 4, seed=seed)
    return by_law(game)


def rate_first(game):
    """Half of the budget for the best learning rate, the rest for the law."""
    width, rates = game.width * 3 // 4, (0.0025, 0.005, 0.01, 0.02, 0.04)
    losses = [game.run(width, [game.longest(width) // 2], learning_rate=rate) for rate in rates]
    best, game.points = rates[np.nanargmin(losses)], []
    for part in (4, 3, 2):
        trunk(game, game.width * part // 4, share=0.5, learning_rate=best)
    return by_law(game)


def by_law(game):
    """Return the prediction of the law through all points. Its interval is the law's largest error
    at runs of more than 0.6 of the highest cost, if it is fitted to the others."""
    points = np.array(game.points)
    n, d, loss = points.T
    far = n * d > 0.61 * (n * d).max()
    error = abs(loss_of(fit(points[~far]), n[far], d[far]) / loss[far] - 1).max()
    prediction = loss_of(fit(points), *game.target)
    return prediction, (prediction * (1 - error), prediction * (1 + error))


STRATEGIES = {strategy.__name__: strategy
              for strategy in (one_size, two_sizes, full_law, rate_first)}


# %% The experiment: every strategy plays, and the target is run

def play(strategy, digest, number, quick, **rules):
    """Return [prediction, low, high, FLOPs spent] of a play.

    strategy  the name of one above, or a file with a function strategy(game)
    digest    of that file: a changed strategy plays again
    """
    function = STRATEGIES.get(strategy) or runpy.run_path(strategy)["strategy"]
    game = Game(**rules, config=runs.LabConfig(quick=quick, workers=1),
                first_seed=SEEDS_PER_PLAY * number)
    prediction, (low, high) = function(game)
    return [float(value) for value in (prediction, low, high, rules["budget"] - game.left)]


def plays_of(strategy, settings, config):
    """Return (array (plays, 4) of the results of play, stale). One play after the other: each may
    use runs of those before."""
    own = strategy not in STRATEGIES
    digest = hashlib.sha256(Path(strategy).read_bytes()).hexdigest()[:12] if own else None
    jobs = [dict(strategy=strategy, digest=digest, number=number, quick=config.quick,
                 **settings.rules()) for number in range(settings.plays)]
    found, stale = runs.collect("budget_leaderboard", play, jobs, replace(config, workers=1))
    return np.array(found), stale


def run_target(settings, config):
    """Return the target's losses, one per seed."""
    losses = []
    for seed in TARGET_SEEDS:
        game = Game(**settings.rules(), config=config, largest=1)
        losses += [*game.run(game.width, [game.longest(game.width)], seed=seed)]
    return np.array(losses)


def experiment(settings, config):
    """Return ((target, board), stale): the target's losses, one per seed, and {strategy: array
    (plays, 4) of prediction, low, high, FLOPs}, the best score first."""
    runs.prepare(config)
    torch.set_num_threads(1)                        # the same sums on every machine
    players, own = dict.fromkeys(STRATEGIES, config), settings.strategy
    if own:                                         # beside the recorded leaderboard
        players = {**dict.fromkeys(STRATEGIES, replace(config, draw=True)),
                   own: replace(config, quick=True)}
        config = replace(config, draw=True)
    target, board, old = run_target(settings, config), {}, []
    for strategy, of_player in players.items():
        plays, stale = plays_of(strategy, settings, of_player)
        board[Path(strategy).stem] = plays
        old.append(stale)
    ranked = sorted(board.items(), key=lambda item: scores(item[1], target).mean())
    return (target, dict(ranked)), any(old)


# %% The score, in % of the loss; lower is better. It is the weighted interval score of forecasters:
# whoever states the median and the 80 % interval that he believes in can expect the best.

def scores(plays, target):
    """Return the score of each play, the mean over target runs: the error of the prediction, a
    tenth of the interval's width, and how far the loss lies outside of it."""
    prediction, low, high, _ = plays.T[..., None]           # (plays, 1) each
    outside = np.maximum(0, np.maximum(low - target, target - high))
    weighted = (1 - COVERAGE) / 2 * (high - low)
    return 100 * ((abs(prediction - target) + weighted + outside) / target).mean(1)


def errors_of(plays, target):
    """Return how far each play's (prediction, low, high) is off, % of the target's mean loss."""
    return 100 * (plays[:, :3] / target.mean() - 1)


# %% The figure

def draw(results, settings):
    target, board = results
    figure, (axes,) = runs.figure(1, 2, "the target's loss: "
                                  f"{runs.mean_and_range(target, '.3f')} nats per byte", width=5.6)
    draw_predictions(axes[0], target, board)
    for row, plays in enumerate(board.values()):
        score = scores(plays, target)
        axes[1].barh(row, score.mean(), color="0.8", edgecolor="black")
        axes[1].plot(score, [row] * len(score), "ko", markersize=4)
        axes[1].text(0, row, f" {plays[:, 3].mean() / settings.budget:.0%} of the budget")
    axes[1].set(xlabel="score (% of the loss), lower is better", title="bars: means; dots: plays")
    axes[1].sharey(axes[0])
    return figure


def draw_predictions(ax, target, board):
    """Draw each play's prediction and interval; filled if the interval holds the mean loss."""
    spread = 100 * (target / target.mean() - 1)
    ax.axvspan(spread.min(), spread.max(), color="0.85", label="the target's runs")
    for row, plays in enumerate(board.values()):
        x, low, high = errors_of(plays, target).T
        rows = row + np.linspace(-0.25, 0.25, len(x))
        ax.hlines(rows, low, high, color="black")
        ax.scatter(x, rows, c=np.where((low <= 0) & (high >= 0), "black", "white"),
                   edgecolors="black", zorder=3)
    ax.set_yticks(range(len(board)), list(board))
    ax.set(xlabel="prediction - measured (% of the loss)", ylim=(len(board) - 0.5, -0.5))


def slide(ax, results, settings):
    target, board = results
    draw_predictions(ax, target, board)
    best = next(iter(board))
    worst = abs(errors_of(board[best], target)[:, 0]).max()
    return f"{best}: small runs predict 5 times the compute within {worst:.1f} %"


# %% The checks

def checks(results, settings):
    target, board = results
    score = {name: scores(board[name], target) for name in board}
    law, error = score["full_law"], errors_of(board["full_law"], target)[:, 0]
    _, low, high, _ = board["full_law"].T[..., None]
    inside = (low <= target) & (target <= high)
    out = [Check(f"full_law predicts the target's loss within {CLOSE} % in every play",
                 f"{runs.mean_and_range(error, '+.1f')} %", "-", abs(error).max() < CLOSE)]
    for name in ("one_size", "two_sizes", "rate_first"):
        ours = ", ".join(f"{each} {runs.mean_and_range(score[each], '.2f')} %"
                         for each in ("full_law", name))
        out.append(Check(f"full_law has a better score than {name}, on average over the plays",
                         f"{ours} (p = {runs.p_value(score[name] - law):.2g})", "-",
                         law.mean() < score[name].mean()))
    return [*out, Check("the interval of full_law holds the loss in at least two thirds of the "
                        "pairs of a play and a target run",
                        f"{inside.sum()} of {inside.size}, stated {COVERAGE:.0%}", "-",
                        inside.mean() >= 2 / 3)]


# %% What it means:
#
# Exercises
# 1. Write a strategy of your own: copy `full_law` to mine.py as `strategy`, with
#    `from labs.budget import by_law, trunk`, and change how it spends the budget.
# 2. `six decays`.
# 3. x

@exits_cleanly
def main(argv):
    quick = dict(budget=1e11, target_width=32, plays=2, eval_tokens=2048)
    runs.main("budget", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
