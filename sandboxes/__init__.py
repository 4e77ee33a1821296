"""Sandboxes: one untrusted program goes in, one verdict comes out, computed outside the program's process."""

from cispo.sandboxes.backends import open_sandbox
from cispo.sandboxes.types import Capabilities, ExecResult, ExecStatus, Limits, Sandbox, Verdict, VerdictStatus

__all__ = ["Capabilities", "ExecResult", "ExecStatus", "Limits", "Sandbox", "Verdict", "VerdictStatus", "open_sandbox"]
