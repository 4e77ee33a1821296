"""Every kernel beside its peers and its floor, in one table, on one GPU.

    python benchmarks/kernels.py [--only NAME ...]

Random data, medians of CUDA-event times, sizes that fill the card. Each case first checks its results against float64.
The floors are bytes moved and operations over what a large copy and a large product reach in this very run. Peers that
are not installed are said so in the table; a peer is never left out in silence.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_cases
import torch
import triton
from kernel_cases import Case, Machine

WARM_UP_MS, REPEAT_MS = 25, 100


def median_ms(work: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(work, warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="median"))


def measure_machine() -> Machine:
    """A copy of 1 GiB, read and written, and a bfloat16 product of 8192 cubed."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy_s = median_ms(lambda: target.copy_(source)) / 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = median_ms(lambda: a @ b) / 1e3
    return Machine(2 * source.nbytes / copy_s, 2 * 8192**3 / product_s)


def cases() -> Iterator[Case]:
    for info in sorted(pkgutil.iter_modules(kernel_cases.__path__), key=lambda info: info.name):
        yield from importlib.import_module(f"kernel_cases.{info.name}").CASES


def run(case: Case, machine: Machine) -> str:
    error = case.error()
    if not error <= case.error_limit:
        raise SystemExit(f"{case.name}: relative error {error:.2e} to float64 is over {case.error_limit:.1e}")
    torch.cuda.empty_cache()
    times = {name: median_ms(work) for name, work in case.prepare().items()}
    ours, floor = times.pop("cispo"), case.floor_s(machine) * 1e3
    reach = "-" if case.reach_ms is None else f"{case.reach_ms:.3f} {'yes' if ours <= case.reach_ms else 'NO'}"
    peers = ", ".join(f"{name} {ms:.3f} ({ms / ours:.2f}x)" for name, ms in times.items())
    notes = "".join(f"; {name}: {text}" for name, text in case.extra.items())
    return f"| {case.name} | {floor:.3f} | {ours:.3f} | {ours / floor:.2f} | {reach} | {error:.1e} | {peers}{notes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="run the cases whose name holds one of these")
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a CUDA device; none is visible here")
    machine = measure_machine()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: copy", end=" ")
    print(f"{machine.copy_bytes_per_s / 1e12:.2f} TB/s, products {machine.products_flops_per_s / 1e12:.0f} TFLOP/s")
    print("| work | floor ms | cispo ms | x floor | to reach ms | error | peers ms (peer / cispo) |")
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        if not only or any(part in case.name for part in only):
            print(run(case, machine), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
