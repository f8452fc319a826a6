"""Four strategies for labs/budget.py, from which to begin your own.

A strategy is a function of the game (labs/budget.py: Game). It returns a prediction of the target's
loss, and an interval (low, high).
"""
import numpy as np

from labs.scaling_law import fit, loss_of


def trunk(game, width, share=1, **options):
    """Run five decays from one trunk; the longest has this share of the updates allowed."""
    *_, longest = game.size(width)
    game.run(width, [round(share * longest * part / 5) for part in (1, 2, 3, 4, 5)], **options)


def by_law(game):
    """Return the prediction of the law L(N, D) through all points. Its interval is the largest
    error that the law, fitted to the shorter runs, makes at those above 0.6 of the longest."""
    points = np.array(game.points)
    n, d, loss = points.T
    far = n * d > 0.61 * (n * d).max()
    error = abs(loss_of(fit(points[~far]), n[far], d[far]) / loss[far] - 1).max()
    prediction = loss_of(fit(points), *game.target)
    return prediction, (prediction * (1 - error), prediction * (1 + error))


def one_size(game):
    """The target's size alone: the law can see the tokens only."""
    for seed in range(4):
        trunk(game, game.width, seed=seed)
    return by_law(game)


def two_sizes(game):
    """Two small sizes at the target's tokens per parameter: a straight line through the logarithms
    of compute and loss. The interval is a guess, 2 % to each side."""
    n_target, d_target = game.target
    for seed in range(4):
        for width in (game.width // 4, game.width // 2):
            n, tokens, _ = game.size(width)
            game.run(width, [round(n * d_target / n_target / tokens)], seed=seed)
    n, d, loss = np.log(game.points).T
    prediction = np.exp(np.polyval(np.polyfit(n + d, loss, 1), np.log(n_target * d_target)))
    return prediction, (0.98 * prediction, 1.02 * prediction)


def full_law(game):
    """Trunks at three sizes, and the law of size and tokens."""
    for quarters, seed in ((4, 0), (4, 1), (3, 0), (2, 0)):
        trunk(game, game.width * quarters // 4, seed=seed)
    return by_law(game)


def rate_first(game):
    """Half of the budget for the best learning rate, the rest for the law."""
    rates, width = (0.0025, 0.005, 0.01, 0.02, 0.04), game.width * 3 // 4
    *_, longest = game.size(width)
    losses = [game.run(width, [longest // 2], learning_rate=rate)[0] for rate in rates]
    best, game.points = rates[np.nanargmin(losses)], []
    for quarters in (4, 3, 2):
        trunk(game, game.width * quarters // 4, share=1 / 2, learning_rate=best)
    return by_law(game)


STRATEGIES = {function.__name__: function
              for function in (one_size, two_sizes, full_law, rate_first)}
