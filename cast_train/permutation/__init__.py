"""Channels in a better order before pruning: the same function, of which 2:4 takes less away.

`channels` says which axes of which weights share channels, `search` orders them, `permute` does so for a model.
"""

from cast_train.permutation.permute import permute

__all__ = ["permute"]
