"""Sandboxes: one untrusted program goes in, one verdict comes out, computed outside the program's process."""
