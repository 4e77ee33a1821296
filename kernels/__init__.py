"""Kernels of the policy, each beside its plain-PyTorch twin; import them by full module name."""
