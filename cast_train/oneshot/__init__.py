"""One-shot 2:4 pruning: the baselines CAST is compared with, and the warm start of short runs.

Each method is one function of a weight [N, K] and the Gram matrix of its inputs; `prune` walks the blocks.
"""

from cast_train.oneshot.prune import METHODS, prune

__all__ = ["METHODS", "prune"]
