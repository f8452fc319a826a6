"""The answers of labs/solutions, under the names of labs/assignments/adapters.py."""
from labs.solutions.dpo_loss import answer_logp, dpo_loss
from labs.solutions.fit_law import best_split, fit
from labs.solutions.lr_at import lr_at
from labs.solutions.mup_table import mup_table
from labs.solutions.ntk_base import dynamic_base, frequencies, ntk_base
from labs.solutions.parabola import best_rate, over_seeds
from labs.solutions.routing import balance_loss, top2

__all__ = ["answer_logp", "balance_loss", "best_rate", "best_split", "dpo_loss", "dynamic_base",
           "fit", "frequencies", "lr_at", "mup_table", "ntk_base", "over_seeds", "top2"]
