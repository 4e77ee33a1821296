"""Triton kernels for CUDA: each serves what its plain-PyTorch twin in the folder above defines."""
