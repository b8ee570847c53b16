"""One thread: tiny models gain nothing from more, and lose a hundredfold where other processes keep the cores busy."""

import os

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
