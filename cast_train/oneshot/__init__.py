"""One-shot 2:4 pruning of a model or a directory: the warm start of short runs, and baselines.

The methods themselves are in `cast_train.methods`; `prune` walks the blocks.
"""

from cast_train.oneshot.prune import prune

__all__ = ["prune"]
