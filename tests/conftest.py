"""Tests never touch the network, and share the two cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch

torch.set_num_threads(1)
