"""Two GPUs of one host: weights from one to the other, a learner over both, and a run that loses a sampler.

    python benchmarks/two_gpus.py                      all parts, under 9 minutes
    python benchmarks/two_gpus.py --only broadcast speed
    python benchmarks/two_gpus.py --device cpu         the same code on two gloo ranks with small sizes

Every part is a process of its own with a time limit, so one that hangs costs no other its figures; rows are printed as
they come and, last, as one table. Seeds are fixed. Weights are random; what is compared is one GPU with two.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# NVLink's multicast is not allowed on every shared machine.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
sys.path.insert(0, str(Path(__file__).parent))

PARTS = {"broadcast": 50, "equal": 190, "speed": 120, "ahead": 240, "killed": 110}
"""Modules of two_gpu_parts in their order, and the seconds that each may take."""


def run_part(name: str, device: str, rows: Path) -> None:
    """In a process of its own."""
    from two_gpu_parts.common import Setting

    importlib.import_module(f"two_gpu_parts.{name}").run(Setting(device, rows))


def start_part(name: str, device: str, rows: Path, limit_s: float) -> str:
    """Run a part and all that it starts; empty, or why it has no end."""
    command = [sys.executable, __file__, "--part", name, "--device", device, "--rows", str(rows)]
    limit_s, process = limit_s * (3 if device == "cpu" else 1), subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit_s)
        return "" if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        return f"did not end within {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit-s", type=float, default=537.0, help="seconds for all parts together")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.device, options.rows)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rows = options.rows or Path(scratch) / "rows.jsonl"
        rows.touch()
        failed = []
        for name in options.only:
            started = time.monotonic()
            left = options.limit_s - (started - began)
            print(f"== {name}", flush=True)
            failure = start_part(name, options.device, rows, min(PARTS[name], left)) if left > 5 else "no time was left"
            if failure:
                failed.append(f"{name} {failure}")
            print(f"== {name}: {time.monotonic() - started:.0f} s {failure}", flush=True)
        table = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    print(f"\n{_machine(options.device)}, {time.monotonic() - began:.0f} s in all")
    print("| item | what | value | limit | holds |\n|---|---|---|---|---|")
    for row in table:
        verdict = {None: "", True: "yes", False: "NO"}[row["holds"]]
        print(f"| {row['item']} | {row['what']} | {row['value']} | {row['limit']} | {verdict} |")
    for line in failed:
        print(f"FAILED: {line}")
    sys.exit(bool(failed) or any(row["holds"] is False for row in table))


def _machine(device: str) -> str:
    import torch

    if device == "cpu":
        return f"two gloo ranks, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{' and '.join(names)}, torch {torch.__version__}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


if __name__ == "__main__":
    main()
