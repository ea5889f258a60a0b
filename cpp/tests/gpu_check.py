"""Build the library with its CUDA twin and hold the twin to the C++ operator, on a machine with a GPU.

``python cpp/tests/gpu_check.py [--build DIR] [--no-build] [--quick] [--out]`` needs torch with CUDA
and nvcc (cmake if there is one), nothing else. Prints one line for each check, then a table of times
(medians; CUDA events on the device, the wall clock on the CPU); the exit status counts failures.
``--out`` writes benchmarks/results/kernel_cuda.md if nothing failed. Run it with ``--no-build --quick``
under ``compute-sanitizer`` to have memory accesses checked too.
"""

import argparse
import functools
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
F64, F32 = torch.float64, torch.float32
# Relative to the largest entry; float32 sums of thousands of terms in another order.
LIMITS = {F64: 1e-10, F32: 2e-4}
NAMES = ("value", "grad_x", "d_sigma", "d_lam")
PAGE = ROOT / "benchmarks" / "results" / "kernel_cuda.md"
failures = checks = 0


def check(name: str, ok: bool, detail: str = "") -> None:
    """One line of the report."""
    global failures, checks
    failures += not ok
    checks += 1
    print(f"{'ok    ' if ok else 'FAILED'}  {name}  {detail}", flush=True)


def build(folder: Path, architecture: str) -> Path:
    """Compile, with cmake where there is one and with nvcc alone otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libdiffforce.so"
    if shutil.which("cmake"):
        configure = ["cmake", "-S", str(ROOT / "cpp"), "-B", str(folder), "-DDIFFFORCE_CUDA=ON"]
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architecture}")
        commands = [configure, ["cmake", "--build", str(folder), "--parallel", "4"]]
    else:
        sources = ["common.cpp", "internal.cpp", "pair.cpp", "torch_registration.cpp"]
        sources.append("pair_cuda.cu")
        paths = [str(ROOT / "cpp" / "src" / s) for s in sources]
        flags = ["-O3", "-std=c++17", "-shared", "-cudart=static", '-DDIFFFORCE_VERSION="0.1.0"']
        flags += [f"-I{ROOT / 'cpp' / 'include'}", f"-arch=sm_{architecture}"]
        flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-math-errno,-fno-trapping-math"]
        commands = [["nvcc", *flags, *paths, "-o", str(library), "-ldl", "-lpthread"]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"build failed: {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return library


def load_ops(library: Path) -> Any:
    """ops.py on its own: the rest of the package may need what this machine lacks."""
    package = types.ModuleType("openmm_diffforce")
    package.__path__ = [str(ROOT / "openmm_diffforce")]
    sys.modules["openmm_diffforce"] = package
    from openmm_diffforce import ops

    ops.library_path = lambda: library
    ops.load()
    return ops


def problem(
    n_sites: int, n_env: int, n_frames: int, *, box: str = "orthorhombic", n_lam: int = 3
) -> dict[str, Any]:
    """Float64 CPU arguments of pair_operator: sites in the middle of an environment, 4 types."""
    g = torch.Generator().manual_seed(11)
    n = n_sites + n_env
    edge = (n_env / 100.0) ** (1.0 / 3.0)
    cutoff = min(1.2, 0.49 * edge)
    x = torch.rand(n, 3, generator=g, dtype=F64) * edge
    x[:n_sites] = 0.5 * edge + 0.15 * torch.randn(n_sites, 3, generator=g, dtype=F64)
    x = x + 0.002 * torch.randn(n_frames, n, 3, generator=g, dtype=F64)
    sigma_knots = torch.tensor([0.0, 0.005, 0.01, 0.02, 0.05], dtype=F64)
    centres = 0.1 + 0.01 * (torch.arange(int((cutoff - 0.1) / 0.01) + 4, dtype=F64) - 1.0)
    kinds = torch.arange(1.0, 5.0, dtype=F64)[:, None, None, None]
    slopes = torch.linspace(1.0, -0.5, n_lam, dtype=F64)[None, :, None, None]
    widths = 0.08 + sigma_knots[None, None, :, None]
    args: dict[str, Any] = {
        "x": x,
        "sigma": torch.full((n_frames,), 0.007, dtype=F64),
        "lam": torch.full((n_frames,), 0.3, dtype=F64),
        "sites": torch.arange(n_sites),
        "env": torch.arange(n_sites, n),
        "pair_type": (torch.arange(n_sites)[:, None] + torch.arange(n_env)) % 5 - 1,
        "table": (kinds * slopes * (torch.exp(-0.5 * (centres / widths) ** 2) + 0.2)).contiguous(),
        "r_grid": torch.tensor([[0.1, 0.01]] * 4, dtype=F64),
        "lam_knots": torch.linspace(0.0, 1.0, n_lam, dtype=F64),
        "sigma_knots": sigma_knots,
        "r_switch": cutoff - 0.2,
        "r_cutoff": cutoff,
    }
    vectors = edge * torch.eye(3, dtype=F64)
    if box == "triclinic":
        vectors[1, 0], vectors[2, 0], vectors[2, 1] = 0.4 * edge, -0.3 * edge, 0.45 * edge
    if box == "none":
        args["r_switch"] = args["r_cutoff"] = -1.0
    else:
        args["box"] = vectors.expand(n_frames, 3, 3).contiguous()
    return args


def to(args: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments on a device, the real ones with a dtype."""
    return {
        k: v
        if not isinstance(v, torch.Tensor)
        else v.to(device, dtype)
        if v.is_floating_point()
        else v.to(device)
        for k, v in args.items()
    }


def worst(found: Any, expected: Any) -> tuple[float, str]:
    """Largest error of the four results, relative to the largest entry of each."""
    errors = []
    for name, a, b in zip(NAMES, found, expected, strict=True):
        scale = float(b.abs().max()) or 1.0
        error = float((a.detach().cpu().to(F64) - b).abs().max()) / scale
        errors.append((math.inf if math.isnan(error) else error, name))
    return max(errors)


def compare(ops: Any) -> dict[str, float]:
    """Numbers: the twin against C++ in float64, over boxes, types of lambda, frames.

    Returns the largest error of the twin in each dtype, and of C++ in float32.
    """
    largest = {"float64": 0.0, "float32": 0.0, "C++ float32": 0.0}
    shapes = [(4, 2000, 1), (20, 20000, 1), (4, 2000, 7), (70, 333, 3), (1, 1, 2), (3, 100, 70000)]
    for shape, box, integrated in itertools.product(
        shapes, ("none", "orthorhombic", "triclinic"), (False, True)
    ):
        if shape[2] > 1000 and (box != "orthorhombic" or integrated):
            continue
        if shape == (1, 1, 2) and box != "none":
            continue
        args = problem(*shape, box=box) | {"integrated": integrated}
        n = shape[2]
        args["sigma"] = torch.tensor([0.0, 0.003, 0.007, 0.05], dtype=F64).repeat(n)[:n].clone()
        args["lam"] = torch.tensor([1.0, 0.2, 0.6, 0.0, 0.5], dtype=F64).repeat(n)[:n].clone()
        expected = ops.pair_operator(**args)
        for dtype in (F64, F32):
            on_cpu = ops.pair_operator(**to(args, dtype, "cpu"))
            found = ops.pair_operator(**to(args, dtype, "cuda"))
            # In float32 both round: neither is the judge of the other.
            error, where = worst(found, expected)
            cpu_error, _ = worst(on_cpu, expected)
            largest[str(dtype)[6:]] = max(largest[str(dtype)[6:]], error)
            if dtype == F32:
                largest["C++ float32"] = max(largest["C++ float32"], cpu_error)
            name = f"{shape} {box} {'integrated' if integrated else 'operator'} {str(dtype)[6:]}"
            check(name, error < LIMITS[dtype], f"{error:.1e} ({where}); C++ {cpu_error:.1e}")
    return largest


def behave(ops: Any) -> None:
    """Everything beside numbers."""
    args = to(problem(4, 200, 3), F64, "cuda")
    expected = ops.pair_operator(**to(args, F64, "cpu"))
    x = args["x"].clone().requires_grad_()
    value, grad, *_ = ops.pair_operator(**(args | {"x": x}))
    (by_autograd,) = torch.autograd.grad(value.sum(), x)
    check("autograd of the value is the explicit gradient", torch.equal(by_autograd, grad.detach()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        slow = torch.randn(4000, 4000, device="cuda")
        for _ in range(20):
            slow = slow @ slow * 1e-2
        late = args["x"] + 0.0 * slow[0, 0].nan_to_num(0.0, 0.0, 0.0)
        found = ops.pair_operator(**(args | {"x": late}))
    stream.synchronize()
    check("runs on the current stream", worst(found, expected)[0] < LIMITS[F64])

    for name, bad in (
        ("sigma", torch.tensor([0.0, 0.06, 0.01])),
        ("lam", torch.tensor([0.0, -0.1, 1.0])),
        ("x", args["x"].cpu().clone().index_put((torch.tensor(1),) * 3, torch.tensor(math.nan, dtype=F64))),
        ("x", args["x"].cpu().clone().index_put((torch.tensor(1),) * 3, torch.tensor(math.inf, dtype=F64))),
        ("box", args["box"].cpu() * torch.tensor([1.0, 0.5, 1.0])[:, None, None]),
    ):  # fmt: skip
        out = ops.pair_operator(**(args | {name: bad.to("cuda", F64)}))
        nan = [bool(a[1].isnan().any()) for a in out[:2]]
        good = all(bool(a[k].isfinite().all()) for a in out for k in (0, 2))
        check(f"{name} out of range: that frame is NaN, the others are not", all(nan) and good)

    for name, change in (
        ("table on the CPU", {"table": args["table"].cpu()}),
        ("float32 table", {"table": args["table"].float()}),
        ("wrong shape", {"sigma": args["sigma"][:2]}),
        ("box without cutoff", {"r_cutoff": -1.0}),
        ("x on the CPU", {"x": args["x"].cpu()}),
    ):
        try:
            ops.pair_operator(**(args | change))
            check(f"refuses: {name}", False)
        except ValueError as err:
            check(f"refuses: {name}", True, str(err)[:90])

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k, v in args.items():
                if isinstance(v, torch.Tensor) and k not in ("x", "sigma", "lam"):
                    self.register_buffer(k, v)
            self.switch: float = args["r_switch"]
            self.cutoff: float = args["r_cutoff"]

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
            out = torch.ops.diffforce.pair_operator(
                x, sigma, lam, self.box, self.sites, self.env, self.pair_type, self.table,
                self.r_grid, self.lam_knots, self.sigma_knots, self.switch, self.cutoff, False)  # fmt: skip
            return out[1]

    frozen = torch.jit.freeze(torch.jit.script(Module()).eval())
    for _ in range(3):
        found_grad = frozen(args["x"], args["sigma"], args["lam"])
    error = float((found_grad.cpu() - expected[1]).abs().max()) / float(expected[1].abs().max())
    check("from frozen TorchScript", error < LIMITS[F64], f"{error:.1e}")


def on_device(call: Callable[[], Any], repeats: int) -> float:
    """Median microseconds between CUDA events around a call."""
    for _ in range(5):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in pairs) * 1e3


def on_clock(call: Callable[[], Any], repeats: int) -> float:
    """Median microseconds of a call by the wall clock."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def times(ops: Any, quick: bool) -> list[str]:
    """Rows of the table of times; the raw operator, so that Python's checks are left out."""
    sizes = [(4, 2000, 1), (4, 2000, 100), (4, 2000, 10000), (20, 20000, 1), (20, 20000, 100)]
    if quick:
        sizes = [s for s in sizes if s[2] == 1]
    lines = [
        "| pairs | frames | dtype | CUDA twin [us] | plain torch on CUDA [us] | C++ on CPU [us] |",
        "|---|---|---|---|---|---|",
    ]
    for n_sites, n_env, n_frames in sizes:
        for dtype in (F32, F64):
            base = problem(n_sites, n_env, n_frames)
            cpu, cuda = to(base, dtype, "cpu"), to(base, dtype, "cuda")

            def raw(a: dict[str, Any]) -> Any:
                return torch.ops.diffforce.pair_operator(
                    a["x"], a["sigma"], a["lam"], a["box"], a["sites"], a["env"], a["pair_type"],
                    a["table"], a["r_grid"], a["lam_knots"], a["sigma_knots"], a["r_switch"],
                    a["r_cutoff"], False)  # fmt: skip

            many = n_frames * n_sites * n_env > 10_000_000
            kernel = on_device(functools.partial(raw, cuda), 20 if many else 200)
            host = on_clock(functools.partial(raw, cpu), 3 if many else 50)
            plain = None
            if n_frames * n_sites * n_env <= 50_000_000:
                reference = functools.partial(ops.reference_pair_operator, **cuda)
                try:
                    plain = on_device(reference, 5 if many else 20)
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
            lines.append(row(n_sites, n_env, n_frames, str(dtype)[6:], kernel, plain, host))
            print(lines[-1], flush=True)
    return lines


def row(
    n_sites: int, n_env: int, n_frames: int, dtype: str, kernel: float, plain: float | None, host: float
) -> str:
    """One line of the table [us], with ratios to the twin."""
    cells = [f"{v:,.0f} ({v / kernel:.1f}x)" if v else "not run" for v in (plain, host)]
    return f"| {n_sites} x {n_env:,} | {n_frames:,} | {dtype} | {kernel:,.1f} | {' | '.join(cells)} |"


def page(machine: str, n_checks: int, largest: dict[str, float], lines: list[str]) -> str:
    """The markdown of ``--out``."""
    return "\n".join([
        "# CUDA twin of the pair operator",
        "",
        "Made by `python cpp/tests/gpu_check.py --out`, which builds the library with its twin and holds the",
        f"twin to the C++ operator: {machine}.",
        "",
        "## Checks",
        "",
        f"{n_checks} checks, all passed: value, forces, sigma and lambda derivative against C++ in float64",
        "(no box, orthorhombic, triclinic; operator and integrated; 1 to 70,000 frames), autograd, the",
        "current stream, input out of range, arguments that must be refused, frozen TorchScript.",
        "",
        f"Largest error relative to the largest entry: {largest['float64']:.1e} in float64,",
        f"{largest['float32']:.1e} in float32 (C++ itself in float32: {largest['C++ float32']:.1e}).",
        "",
        "## Times",
        "",
        "Medians of one evaluation (value, forces, sigma and lambda derivative), orthorhombic box, by CUDA",
        "events on the device and by the wall clock on the CPU; in brackets the ratio to the twin. Plain",
        "torch is `reference_pair_operator` on the same GPU.",
        "",
        *lines,
        "",
    ])  # fmt: skip


def main() -> None:
    """Build, check, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--no-build", action="store_true", help="the library is in --build already")
    parser.add_argument("--quick", action="store_true", help="no times of batches")
    parser.add_argument("--out", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check: expected a CUDA device and a torch that uses it, found none")
    major, minor = torch.cuda.get_device_capability()
    library = options.build.resolve() / "libdiffforce.so"
    if not options.no_build:
        library = build(options.build.resolve(), f"{major}{minor}")
    threads = os.environ.get("DIFFFORCE_NUM_THREADS", "all")
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, C++ threads for batches: "
        f"{threads} of {os.cpu_count()}"
    )
    print(machine)
    ops = load_ops(library)
    check("the library has its CUDA twin", ops._LIBRARY.diffforce_has_cuda() == 1)
    largest = compare(ops)
    behave(ops)
    text = page(machine, checks, largest, times(ops, options.quick))
    print(f"\n{failures} failed" if failures else "\nall checks passed")
    if options.out and not failures:
        temporary = PAGE.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(PAGE)
    sys.exit(min(failures, 100))


if __name__ == "__main__":
    main()
