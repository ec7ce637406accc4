"""Kernels as functions of tensors: each with its formula in plain PyTorch, its gradient, and the op that holds it."""
