"""The compiled operators against their plain-torch references, and everything they must refuse."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openmm_diffforce import ops
from openmm_diffforce.errors import InputError, MissingDependencyError

# torch 2.13 announces the end of TorchScript, which torch 2.9's TorchForce needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_HOME = Path(ops.__file__).resolve().parents[1]  # installed or in the tree
F64 = torch.float64
REL_F64 = 1e-10
REL_F32, ABS_F32 = 1e-4, 1e-6

SIGMA_KNOTS = [0.0, 0.005, 0.01, 0.03]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / scale


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in args.items()
    }


# ------------------------------------------------------------------ cases


def pair_case(n_lam: int = 4, n_noise: int = 4, n_types: int = 3) -> dict[str, Any]:
    g = generator(1)
    knots = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=F64)[:n_lam]
    pair_type = torch.randint(-1, n_types, (3, 9), generator=g)
    pair_type[0, :4] = torch.tensor([-1, 0, 1, 2])
    return {
        "sites": torch.tensor([0, 5, 2]),
        "env": torch.tensor([1, 3, 4, 6, 7, 8, 9, 10, 11]),
        "pair_type": pair_type,
        "table": torch.randn(n_types, n_lam, n_noise, 14, generator=g, dtype=F64),
        "r_grid": torch.tensor([[0.1, 0.04], [0.15, 0.05], [0.05, 0.03]], dtype=F64),
        "lam_knots": knots,
        "sigma_knots": torch.tensor(SIGMA_KNOTS[:n_noise], dtype=F64),
    }


def coordinates(n_frames: int = 5, n_atoms: int = 12, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(n_frames, n_atoms, 3, generator=generator(2), dtype=F64)


def states(n_frames: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    sigma = torch.tensor([0.0, 0.003, 0.005, 0.017, 0.03], dtype=F64)
    lam = torch.tensor([0.0, 0.1, 0.2, 0.55, 1.0], dtype=F64)
    reps = -(-n_frames // 5)
    return sigma.repeat(reps)[:n_frames], lam.repeat(reps)[:n_frames]


BOXES = {
    "orthorhombic": torch.diag(torch.tensor([1.5, 1.8, 1.6], dtype=F64)),
    "triclinic": torch.tensor([[1.6, 0.0, 0.0], [0.5, 1.5, 0.0], [-0.6, 0.7, 1.4]], dtype=F64),
}


def internal_case() -> dict[str, Any]:
    g = generator(3)
    sizes = [9, 12, 8, 10, 7]
    kind = [2, 2, 3, 4, 4]
    grids = []
    for m in range(len(SIGMA_KNOTS)):
        rows = [[0.15 + 0.01 * m, 0.05, 300.0], [0.1, 0.08, 100.0], [0.4, 0.3, 50.0]]
        rows += [[-math.pi, 2 * math.pi / n, 0.0] for n in sizes[3:]]
        grids.append(rows)
    atoms, cls = [], []
    for i in range(7):
        atoms.append([i, i + 1, -1, -1])
        cls.append(i % 2)
    for i in range(6):
        atoms.append([i, i + 1, i + 2, -1])
        cls.append(2)
    for i in range(5):
        atoms.append([i, i + 1, i + 2, i + 3])
        cls.append(3 + i % 2)
    atoms.append([0, 7, -1, -1])
    cls.append(1)
    offsets = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    return {
        "atoms": torch.tensor(atoms),
        "cls": torch.tensor(cls),
        "kind": torch.tensor(kind),
        "grid": torch.tensor(grids, dtype=F64),
        "offsets": torch.tensor(offsets),
        "coef": torch.randn(len(SIGMA_KNOTS), offsets[-1], generator=g, dtype=F64),
        "sigma_knots": torch.tensor(SIGMA_KNOTS, dtype=F64),
    }


def normal_args(case: dict[str, Any]) -> dict[str, Any]:
    keep = {k: case[k] for k in ("atoms", "cls", "kind", "offsets")}
    return keep | {"grid": case["grid"][0]}


# ------------------------------------------------------------------ C++ against the reference


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize(
    ("box", "cutoff"),
    [
        ("none", None),
        ("none", (0.3, 0.7)),
        ("orthorhombic", (0.3, 0.7)),
        ("triclinic", (0.3, 0.7)),
    ],
)
def test_pair_operator_is_its_reference(
    integrated: bool, box: str, cutoff: tuple[float, float] | None
) -> None:
    x, (sigma, lam) = coordinates(), states()
    args = pair_case() | {"integrated": integrated}
    if box != "none":
        args["box"] = BOXES[box].expand(5, 3, 3)
        x = x * 5.0
    if cutoff is not None:
        args["r_switch"], args["r_cutoff"] = cutoff
    expected = ops.reference_pair_operator(x, sigma, lam, **args)
    found = ops.pair_operator(x, sigma, lam, **args)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0.01
        assert relative(a, b) < REL_F64
    found = ops.pair_operator(x.float(), sigma.float(), lam.float(), **cast(args, torch.float32))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        # Derivatives jump at knots, where rounding may choose the other side: values only there.
        if b is expected[0] or b is expected[1]:
            assert relative(a.double(), b) < REL_F32 + ABS_F32


def test_pair_operator_blends_tables_alike_for_few_and_many_pairs() -> None:
    # 27 pairs of a long table are blended pair by pair, 27 of a short one ahead.
    x, (sigma, lam) = coordinates(), states()
    args = pair_case()
    long = args | {"table": torch.cat([args["table"], args["table"]], -1)}
    for case in (args, long):
        found = ops.pair_operator(x, sigma, lam, **case)
        for a, b in zip(found, ops.reference_pair_operator(x, sigma, lam, **case), strict=True):
            assert relative(a, b) < REL_F64


@pytest.mark.parametrize(("box", "reach"), [("cubic", 0.4), ("cubic", 1.0), ("triclinic", 1.2)])
def test_pair_operator_finds_the_pairs_in_reach_of_a_large_environment(box: str, reach: float) -> None:
    # More than 64 environment atoms and a cutoff: the far ones are sorted out first, except where
    # the cutoff and the extent of the sites reach beyond half the box.
    g = generator(7)
    n_atoms = 1500
    vectors = 2.5 * torch.eye(3, dtype=F64)
    if box == "triclinic":
        vectors[1, 0], vectors[2, 0], vectors[2, 1] = 1.25, -1.2, 1.25
    x = torch.rand(4, n_atoms, 3, generator=g, dtype=F64) @ vectors
    x[:, [0, 5, 2]] = x[:, :1] + 0.4 * torch.randn(4, 3, 3, generator=g, dtype=F64)
    args = pair_case() | {
        "env": torch.arange(12, n_atoms),
        "pair_type": torch.randint(-1, 3, (3, n_atoms - 12), generator=g),
        "box": vectors.expand(4, 3, 3),
        "r_switch": 0.2,
        "r_cutoff": reach,
    }
    sigma, lam = (v[:4] for v in states())
    found = ops.pair_operator(x, sigma, lam, **args)
    for a, b in zip(found, ops.reference_pair_operator(x, sigma, lam, **args), strict=True):
        assert relative(a, b) < REL_F64


@pytest.mark.parametrize("n_lam", [1, 4])
@pytest.mark.parametrize("n_noise", [1, 2])
def test_pair_operator_with_single_knots(n_lam: int, n_noise: int) -> None:
    x = coordinates()
    sigma = states()[0].clamp(max=0.0 if n_noise == 1 else 0.005)
    lam = states()[1]
    for integrated in (False, True):
        args = pair_case(n_lam, n_noise) | {"integrated": integrated}
        found = ops.pair_operator(x, sigma, lam, **args)
        expected = ops.reference_pair_operator(x, sigma, lam, **args)
        for a, b in zip(found, expected, strict=True):
            assert relative(a, b) < REL_F64
    # The table's lambda axis is the action increment's derivative.
    operator = ops.pair_operator(x, sigma, lam, **pair_case(n_lam, n_noise))[0]
    assert relative(found[3], operator) < REL_F64


def test_internal_action_is_its_reference() -> None:
    x, sigma = coordinates(n_atoms=8), states()[0]
    args = internal_case()
    expected = ops.reference_internal_action(x, sigma, **args)
    for a, b in zip(ops.internal_action(x, sigma, **args), expected, strict=True):
        assert relative(a, b) < REL_F64
    found = ops.internal_action(x.float(), sigma.float(), **cast(args, torch.float32))
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert a.dtype == torch.float32
        assert relative(a.double(), b) < REL_F32 + ABS_F32


@pytest.mark.parametrize("n_threads", [1, 3])
def test_internal_normal_is_its_reference(n_threads: int) -> None:
    x = coordinates(70, 8)
    target = torch.randn(x.shape, generator=generator(4), dtype=F64)
    args = normal_args(internal_case())
    found = ops.internal_normal(x, target, n_threads=n_threads, **args)
    expected = ops.reference_internal_normal(x, target, **args)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 1.0
        assert relative(a, b) < REL_F64


def test_internal_normal_gives_the_gradient_and_laplacian_of_the_action() -> None:
    # phi is linear in the coefficients: c.A.c = sum |grad S|^2, c.b = sum grad S.g, c.L = lap S.
    x = coordinates(3, 8)
    case = internal_case()
    case["grid"][..., 2] = 0.0
    target = torch.randn(x.shape, generator=generator(4), dtype=F64)
    a, b, lap = ops.internal_normal(x, target, **normal_args(case))
    coef = case["coef"][0]
    sigma = torch.zeros(3, dtype=F64)
    grad = ops.internal_action(x, sigma, **case)[1]
    assert float(coef @ a @ coef) == pytest.approx(float((grad * grad).sum()), rel=REL_F64)
    assert float(coef @ b) == pytest.approx(float((grad * target).sum()), rel=REL_F64)

    def action(frame: torch.Tensor) -> torch.Tensor:
        return ops.reference_internal_action(frame[None], sigma[:1], **case)[0][0]

    hessians = [torch.autograd.functional.hessian(action, f) for f in x]
    trace = sum(float(h.reshape(24, 24).diagonal().sum()) for h in hessians)
    assert float(coef @ lap) == pytest.approx(trace, rel=REL_F64)


def test_threads_give_the_same_frames() -> None:
    x = coordinates(9000, 12)
    sigma, lam = states(9000)
    args = pair_case()
    ops.load()
    assert ops._LIBRARY is not None
    single = ops.pair_operator(x, sigma, lam, **args)
    assert ops._LIBRARY.diffforce_set_num_threads(3) == 0
    try:
        several = ops.pair_operator(x, sigma, lam, **args)
    finally:
        ops._LIBRARY.diffforce_set_num_threads(0)
    for a, b in zip(single, several, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------ derivatives


def inner_states() -> tuple[torch.Tensor, torch.Tensor]:
    """Away from the knots, where the interpolation has a kink."""
    return (
        torch.tensor([0.001, 0.007, 0.02], dtype=F64, requires_grad=True),
        torch.tensor([0.1, 0.45, 0.9], dtype=F64, requires_grad=True),
    )


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("box", [None, "triclinic"])
def test_pair_operator_gradients(integrated: bool, box: str | None) -> None:
    x = coordinates(3).requires_grad_()
    sigma, lam = inner_states()
    args = pair_case() | {"integrated": integrated, "r_switch": 0.3, "r_cutoff": 0.7}
    if box is not None:
        args["box"] = BOXES[box].expand(3, 3, 3)

    def call(*a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.pair_operator(*a, **args)

    # All four outputs: the gradients of grad_x, d_sigma and d_lam are the Hessian.
    assert torch.autograd.gradcheck(call, (x, sigma, lam))
    assert torch.autograd.gradgradcheck(lambda *a: call(*a)[0], (x, sigma, lam))


def test_internal_action_gradients() -> None:
    x = coordinates(3, 8).requires_grad_()
    sigma = inner_states()[0]
    args = internal_case()
    assert torch.autograd.gradcheck(lambda *a: ops.internal_action(*a, **args), (x, sigma))
    assert torch.autograd.gradgradcheck(lambda *a: ops.internal_action(*a, **args)[0], (x, sigma))


@pytest.mark.parametrize("name", ["pair_operator", "internal_action"])
def test_second_sigma_derivative_at_no_noise(name: str) -> None:
    # There the upper knot has neither weight nor slope, only curvature.
    x = coordinates(2, 12)
    sigma = torch.zeros(2, dtype=F64, requires_grad=True)
    lam = torch.tensor([0.1, 0.5], dtype=F64)
    curvatures = []
    for prefix in ("", "reference_"):
        call = getattr(ops, prefix + name)
        if name == "pair_operator":
            value = call(x, sigma, lam, **pair_case())[0]
        else:
            value = call(x, sigma, **internal_case())[0]
        (slope,) = torch.autograd.grad(value.sum(), sigma, create_graph=True)
        curvatures.append(torch.autograd.grad(slope.sum(), sigma)[0])
    assert float(curvatures[1].abs().max()) > 1.0
    assert relative(*curvatures) < REL_F64


def test_explicit_gradients_are_autograd_of_the_value() -> None:
    x, (sigma, lam) = coordinates().requires_grad_(), states()
    value, grad_x, *_ = ops.pair_operator(x, sigma, lam, **pair_case())
    (from_autograd,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert torch.equal(from_autograd, grad_x)
    assert from_autograd.requires_grad


@pytest.mark.parametrize("name", ["pair_operator", "internal_action"])
def test_forces_are_finite_differences(name: str) -> None:
    x, (sigma, lam) = coordinates(5, 12), states()
    if name == "pair_operator":
        args = pair_case() | {"r_switch": 0.3, "r_cutoff": 0.7}

        def value(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return ops.pair_operator(y, sigma, lam, **args)
    else:
        case = internal_case()

        def value(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return ops.internal_action(y, sigma, **case)

    direction = torch.randn(x.shape, generator=generator(9), dtype=F64)
    h = 1e-5
    slope = (value(x + h * direction)[0] - value(x - h * direction)[0]) / (2 * h)
    expected = (value(x)[1] * direction).sum((1, 2))
    assert relative(slope, expected) < 1e-6


def test_third_derivatives_are_refused() -> None:
    x = coordinates(3, 8).requires_grad_()
    sigma = inner_states()[0].detach()
    grad = ops.internal_action(x, sigma, **internal_case())[1]
    (second,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
    with pytest.raises(InputError, match="third derivatives"):
        second.sum().backward()


# ------------------------------------------------------------------ invariance and limits


@pytest.mark.parametrize("box", ["orthorhombic", "triclinic"])
def test_periodic_images_are_alike(box: str) -> None:
    x, (sigma, lam) = coordinates(scale=1.0), states()
    vectors = BOXES[box]
    args = pair_case() | {"box": vectors.expand(5, 3, 3), "r_switch": 0.4, "r_cutoff": 0.7}
    first = ops.pair_operator(x, sigma, lam, **args)
    shift = torch.randint(-2, 3, (5, 12, 3), generator=generator(5)).to(F64) @ vectors
    second = ops.pair_operator(x + shift, sigma, lam, **args)
    for a, b in zip(second, first, strict=True):
        assert relative(a, b) < 1e-9
    # Brute force over images: no nearer one was missed.
    offsets = torch.cartesian_prod(*(torch.arange(-6.0, 7.0, dtype=F64),) * 3) @ vectors
    a, b = torch.nonzero(args["pair_type"] >= 0, as_tuple=True)
    d = (x[:, args["sites"][a]] - x[:, args["env"][b]])[:, :, None] + offsets
    nearest = d.norm(dim=-1).min(-1).values
    counting = args | {"table": torch.ones(3, 1, 1, 14, dtype=F64),
                       "lam_knots": torch.zeros(1, dtype=F64),
                       "sigma_knots": torch.zeros(1, dtype=F64)}  # fmt: skip
    y = ((nearest - 0.4) / 0.3).clamp(0, 1)
    expected = (1 - y**3 * (10 - 15 * y + 6 * y * y)).sum(1)
    found = ops.pair_operator(x, 0 * sigma, lam, **counting)[0]
    assert relative(found, expected) < 1e-9


def test_translation_and_rotation_leave_the_values() -> None:
    x, (sigma, lam) = coordinates(), states()
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator(6), dtype=F64))
    q = q * r.diagonal().sign()
    q = q * torch.det(q)
    moved = x @ q.T + torch.tensor([3.0, -2.0, 1.0], dtype=F64)
    for a, b in (
        (ops.pair_operator(x, sigma, lam, **pair_case()),
         ops.pair_operator(moved, sigma, lam, **pair_case())),
        (ops.internal_action(x, sigma, **internal_case()),
         ops.internal_action(moved, sigma, **internal_case())),
    ):  # fmt: skip
        assert relative(b[0], a[0]) < 1e-9
        assert relative(b[1], a[1] @ q.T) < 1e-9


def test_excluded_pairs_and_the_cutoff_leave_nothing() -> None:
    x, (sigma, lam) = coordinates(), states()
    args = pair_case()
    none = args | {"pair_type": torch.full_like(args["pair_type"], -1)}
    assert all(float(a.abs().max()) == 0.0 for a in ops.pair_operator(x, sigma, lam, **none))
    one = none | {"pair_type": none["pair_type"].clone()}
    one["pair_type"][1, 4] = 2
    grad = ops.pair_operator(x, sigma, lam, **one)[1]
    touched = [i for i in range(12) if float(grad[:, i].abs().max()) > 0]
    assert touched == [5, 7]
    far = args | {"r_switch": 1e-4, "r_cutoff": 2e-4}
    assert float(ops.pair_operator(x, sigma, lam, **far)[0].abs().max()) == 0.0


def test_switch_is_smooth_at_both_ends() -> None:
    args = pair_case() | {
        "sites": torch.tensor([0]),
        "env": torch.tensor([1]),
        "pair_type": torch.tensor([[0]]),
        "r_switch": 0.4,
        "r_cutoff": 0.6,
    }
    h = 1e-6

    def at(r: float) -> tuple[float, float, float]:
        x = torch.zeros(1, 2, 3, dtype=F64)
        x[0, 1, 0] = r
        x.requires_grad_()
        zero = torch.zeros(1, dtype=F64)
        value, grad, *_ = ops.pair_operator(x, zero, zero, **args)
        (second,) = torch.autograd.grad(grad[0, 1, 0], x)
        return value.item(), grad[0, 1, 0].item(), second[0, 1, 0].item()

    for r in (0.4, 0.6):
        for left, right in zip(at(r - h), at(r + h), strict=True):
            assert left == pytest.approx(right, abs=0.1)
    assert at(0.6 - h)[0] == pytest.approx(0.0, abs=1e-12)


def test_internal_action_beyond_the_data() -> None:
    # A line plus a wall: value by hand.
    args = {
        "atoms": torch.tensor([[0, 1, -1, -1]]), "cls": torch.tensor([0]),
        "kind": torch.tensor([2]), "offsets": torch.tensor([0, 6]),
        "grid": torch.tensor([[[0.2, 0.1, 80.0]]], dtype=F64),
        "coef": torch.linspace(0.1, 0.6, 6, dtype=F64)[None],
        "sigma_knots": torch.zeros(1, dtype=F64),
    }  # fmt: skip
    # Coefficient i at 0.2 + (i - 1) 0.1 is 0.1 (i + 1): the function r + 0.0, domain [0.2, 0.5].
    for r, beyond in ((0.1, 0.1), (0.3, 0.0), (0.7, 0.2)):
        x = torch.zeros(1, 2, 3, dtype=F64)
        x[0, 1, 2] = r
        value = ops.internal_action(x, torch.zeros(1, dtype=F64), **args)[0]
        assert float(value) == pytest.approx(r + 0.5 * 80.0 * beyond**2, rel=1e-12)


def test_torsions_are_periodic_with_the_iupac_sign() -> None:
    mdtraj = pytest.importorskip("mdtraj")
    x = coordinates(40, 4)
    atoms = torch.tensor([[0, 1, 2, 3]])
    phi = ops.internal_coordinates(x, atoms)[:, 0]
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for _ in range(4):
        topology.add_atom("C", mdtraj.element.carbon, residue)
    expected = mdtraj.compute_dihedrals(mdtraj.Trajectory(x.numpy(), topology), [[0, 1, 2, 3]])
    assert abs(phi.numpy() - expected[:, 0]).max() < 1e-4  # mdtraj keeps float32

    n = 9
    args = {
        "atoms": atoms, "cls": torch.tensor([0]), "kind": torch.tensor([4]),
        "offsets": torch.tensor([0, n]),
        "grid": torch.tensor([[[-math.pi, 2 * math.pi / n, 0.0]]], dtype=F64),
        "coef": torch.randn(1, n, generator=generator(8), dtype=F64),
        "sigma_knots": torch.zeros(1, dtype=F64),
    }  # fmt: skip

    def at(angle: float) -> tuple[float, float]:
        y = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0], [0, 0, 1.0]]], dtype=F64)
        # Looking along the middle bond, IUPAC counts clockwise: minus the mathematical sense of
        # the axis that points towards the viewer.
        y[0, 3, 0], y[0, 3, 1] = math.cos(angle), math.sin(angle)
        out = ops.internal_action(y, torch.zeros(1, dtype=F64), **args)
        return float(out[0]), float(out[1][0, 3].norm())

    for a, b in zip(at(math.pi - 1e-9), at(-math.pi + 1e-9), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_noise_weights_are_linear_in_variance_then_in_log() -> None:
    knots = torch.tensor([0.0, 0.01, 0.04], dtype=F64)
    w = ops.noise_weights(torch.tensor([0.0, 0.005, 0.01, 0.02, 0.04], dtype=F64), knots)
    expected = torch.tensor([[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]], dtype=F64)
    assert torch.allclose(w, expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ kernel oracle


def kernel_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("kernel", ROOT / "benchmarks" / "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel"] = module
    spec.loader.exec_module(module)
    return module


def test_noised_pair_function_is_its_convolution() -> None:
    oracle = kernel_benchmark().oracle()
    assert oracle.value < 1e-6
    assert oracle.gradient < 1e-5


def test_noised_kernel_is_the_mean_over_noised_frames() -> None:
    # On a flat base O_t(y) = E[O(y + noise)], the noise on both sites: an ensemble, not a formula.
    kernel = kernel_benchmark()
    args = kernel.oracle_problem()
    n_frames, sigma = 40000, 0.02
    y = torch.tensor([[[0.0, 0, 0], [0.12, 0.2, 0.05]]], dtype=F64)
    noised = ops.pair_operator(y, torch.full((1,), sigma, dtype=F64), torch.zeros(1, dtype=F64), **args)[0]
    x = y + sigma * torch.randn(n_frames, 2, 3, generator=generator(10), dtype=F64)
    zero = torch.zeros(n_frames, dtype=F64)
    clean = ops.pair_operator(x, zero, zero, **args)[0]
    z = float((clean.mean() - noised[0]) / (clean.std() / math.sqrt(n_frames)))
    assert abs(z) < 4.0
    # The clean function at y is far off, so the test can fail.
    at_y = ops.pair_operator(y, zero[:1], zero[:1], **args)[0]
    assert abs(float((clean.mean() - at_y[0]) / (clean.std() / math.sqrt(n_frames)))) > 8.0


# ------------------------------------------------------------------ errors


BAD_PAIR = [
    ("x", lambda v: v[..., :2], "shape"),
    ("x", lambda v: v[0], "shape"),
    ("x", lambda v: v.float(), "float"),
    ("x", lambda v: v.half(), "float16"),
    ("x", lambda v: v.tolist(), "torch.Tensor"),
    ("x", lambda v: v * math.nan, "finite"),
    ("x", lambda v: v / 0.0, "finite"),
    ("sigma", lambda v: v[:-1], "shape"),
    ("sigma", lambda v: v - 0.01, "noise level"),
    ("sigma", lambda v: v + 0.01, "noise level"),
    ("sigma", lambda v: v * math.nan, "noise level"),
    ("lam", lambda v: v + 0.1, "lam"),
    ("lam", lambda v: v - 0.1, "lam"),
    ("lam", lambda v: v * math.nan, "lam"),
    ("lam", lambda v: v[:, None], "shape"),
    ("sites", lambda v: v + 100, "sites"),
    ("sites", lambda v: v.int(), "int64"),
    ("env", lambda v: v - 2, "env"),
    ("env", lambda v: v * 0, "itself"),
    ("pair_type", lambda v: v + 5, "pair_type"),
    ("pair_type", lambda v: v - 5, "pair_type"),
    ("pair_type", lambda v: v[:2], "shape"),
    ("table", lambda v: v[..., :3], "n_coef"),
    ("table", lambda v: v[0], "shape"),
    ("table", lambda v: v * math.nan, "table"),
    ("table", lambda v: v.float(), "float64"),
    ("table", lambda v: v.clone().requires_grad_(), "requires_grad"),
    ("r_grid", lambda v: v * 0, "r_grid"),
    ("r_grid", lambda v: v[:, :1], "shape"),
    ("lam_knots", lambda v: v + 0.1, "lam_knots"),
    ("lam_knots", lambda v: v * 2, "lam_knots"),
    ("sigma_knots", lambda v: -v, "sigma_knots"),
    ("sigma_knots", lambda v: v[:2], "shape"),
    ("r_cutoff", lambda v: 0.2, "r_switch"),
    ("r_cutoff", lambda v: math.nan, "r_cutoff"),
    ("r_cutoff", lambda v: 0.9, "width"),
    ("r_cutoff", lambda v: -1.0, "periodic box"),
    ("box", lambda v: v.transpose(1, 2), "reduced"),
    ("box", lambda v: v[:2], "shape"),
    ("box", lambda v: v * math.nan, "finite"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "word"), BAD_PAIR)
def test_pair_operator_refuses(name: str, spoil: Any, word: str) -> None:
    sigma, lam = states()
    args = pair_case() | {
        "x": coordinates(), "sigma": sigma, "lam": lam, "r_switch": 0.3, "r_cutoff": 0.7,
        "box": BOXES["triclinic"].repeat(5, 1, 1),
    }  # fmt: skip
    ops.pair_operator(**args)
    args[name] = spoil(args[name])
    with pytest.raises(InputError, match=word):
        ops.pair_operator(**args)


BAD_INTERNAL = [
    ("x", lambda v: v[..., :2], "shape"),
    ("x", lambda v: v * math.nan, "finite"),
    ("x", lambda v: v * 0, "coincide"),
    ("x", lambda v: v.float(), "float"),
    ("sigma", lambda v: v + 0.01, "noise level"),
    ("sigma", lambda v: v[:2], "shape"),
    ("atoms", lambda v: v + 1, "atoms"),
    ("atoms", lambda v: v[:, :3], "shape"),
    ("atoms", lambda v: v.clamp(max=1), "twice"),
    ("cls", lambda v: v - 1, "cls"),
    ("cls", lambda v: v[:3], "shape"),
    ("cls", lambda v: v.double(), "int64"),
    ("kind", lambda v: v + 1, "kind|atoms"),
    ("offsets", lambda v: v[:-1], "shape"),
    ("offsets", lambda v: v + 1, "offsets|shape"),
    ("grid", lambda v: v * 0, "grid"),
    ("grid", lambda v: v[:2], "shape"),
    ("grid", lambda v: v * 1.01, "torsion"),
    ("grid", lambda v: v.clone().requires_grad_(), "requires_grad"),
    ("coef", lambda v: v[:, :-1], "shape"),
    ("coef", lambda v: v / 0.0, "coefficients"),
    ("sigma_knots", lambda v: v[1:], "shape|sigma_knots"),
]


@pytest.mark.parametrize(("name", "spoil", "word"), BAD_INTERNAL)
def test_internal_action_refuses(name: str, spoil: Any, word: str) -> None:
    args = internal_case() | {"x": coordinates(n_atoms=8), "sigma": states()[0]}
    ops.internal_action(**args)
    args[name] = spoil(args[name])
    with pytest.raises(InputError, match=word):
        ops.internal_action(**args)


BAD_NORMAL = [
    ("x", lambda v: v.float(), "float"),
    ("x", lambda v: v.clone().requires_grad_(), "requires_grad"),
    ("x", lambda v: v * 0, "coincident"),
    ("target", lambda v: v[:1], "shape"),
    ("target", lambda v: v * math.nan, "target"),
    ("offsets", lambda v: v * 10**7, "offsets"),
    ("n_threads", lambda v: -1, "n_threads"),
]


@pytest.mark.parametrize(("name", "spoil", "word"), BAD_NORMAL)
def test_internal_normal_refuses(name: str, spoil: Any, word: str) -> None:
    x = coordinates(n_atoms=8)
    args = normal_args(internal_case()) | {"x": x, "target": x.clone(), "n_threads": 1}
    ops.internal_normal(**args)
    args[name] = spoil(args[name])
    with pytest.raises(InputError, match=word):
        ops.internal_normal(**args)


def test_another_device_is_refused() -> None:
    sigma, lam = states()
    args = pair_case() | {"table": pair_case()["table"].to("meta")}
    with pytest.raises(InputError, match="device"):
        ops.pair_operator(coordinates(), sigma, lam, **args)


def test_strided_tensors_are_taken_as_they_are() -> None:
    x, (sigma, lam) = coordinates(), states()
    args = pair_case()
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    for a, b in zip(ops.pair_operator(strided, sigma, lam, **args),
                    ops.pair_operator(x, sigma, lam, **args), strict=True):  # fmt: skip
        assert torch.equal(a, b)
        assert a.is_contiguous()


def test_no_frames() -> None:
    empty = torch.zeros(0, dtype=F64)
    out = ops.pair_operator(torch.zeros(0, 12, 3, dtype=F64), empty, empty, **pair_case())
    assert [tuple(a.shape) for a in out] == [(0,), (0, 12, 3), (0,), (0,)]


def test_a_missing_library_names_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "_LIBRARY", None)
    monkeypatch.setattr(ops, "library_path", lambda: tmp_path / "libdiffforce.so")
    with pytest.raises(MissingDependencyError, match=r"pip install \."):
        ops.load()
    (tmp_path / "libdiffforce.so").write_bytes(b"not a library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        ops.load()


# ------------------------------------------------------------------ TorchScript and torch.compile


class Both(torch.nn.Module):
    """Operators with their explicit gradients, as an artefact uses them."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (pair_case() | internal_case()).items():
            self.register_buffer("pair_knots" if name == "sigma_knots" else name, value)
        self.register_buffer("no_box", torch.zeros(0, dtype=F64))

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        o, o_x, _, o_lam = torch.ops.diffforce.pair_operator(
            x, sigma, lam, self.no_box, self.sites, self.env, self.pair_type, self.table,
            self.r_grid, self.lam_knots, self.pair_knots, 0.3, 0.7, True)  # fmt: skip
        s, s_x, _ = torch.ops.diffforce.internal_action(
            x, sigma, self.atoms, self.cls, self.kind, self.grid, self.offsets, self.coef,
            self.pair_knots)  # fmt: skip
        return o + s, o_x + s_x, o_lam


def both_expected(x: torch.Tensor, sigma: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    pair = ops.reference_pair_operator(
        x, sigma, lam, integrated=True, r_switch=0.3, r_cutoff=0.7, **pair_case()
    )
    return pair[1] + ops.reference_internal_action(x, sigma, **internal_case())[1]


FRESH = """
import sys, torch
from openmm_diffforce import ops
ops.load()
ops.load()
x, sigma, lam, expected = torch.load(sys.argv[2])
module = torch.jit.load(sys.argv[1])
for m in (module, torch.jit.freeze(module.eval())):
    for k in range(3):
        found = m(x, sigma, lam)[1]
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
try:
    module(x, sigma * 9, lam)
except RuntimeError as err:
    assert "expected a noise level" in str(err), err
else:
    raise SystemExit("no error")
print("fine")
"""


def test_torchscript_survives_saving_and_a_fresh_process(tmp_path: Path) -> None:
    ops.load()
    x, (sigma, lam) = coordinates(), states()
    module = torch.jit.script(Both())
    expected = both_expected(x, sigma, lam)
    assert relative(module(x, sigma, lam)[1], expected) < REL_F64
    module.save(str(tmp_path / "both.pt"))
    torch.save((x, sigma, lam, expected), tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "both.pt"), str(tmp_path / "data.pt")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGE_HOME)}, check=False,
        cwd=tmp_path,  # not the clone, whose package has no compiled library
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout


def test_a_gradient_through_the_bare_operator_is_not_silently_zero() -> None:
    ops.load()
    x, (sigma, lam) = coordinates().requires_grad_(), states()
    value = Both()(x, sigma, lam)[0]
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        value.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_sees_through_the_doors() -> None:
    x, sigma = coordinates(n_atoms=8).requires_grad_(), states()[0]
    args = internal_case()

    def force(y: torch.Tensor) -> torch.Tensor:
        return ops.internal_action(y, sigma, **args)[0].sum()

    compiled = torch.compile(force, backend="aot_eager", fullgraph=True)
    compiled(x).backward()
    assert torch.equal(x.grad, ops.internal_action(x.detach(), sigma, **args)[1])


def test_fake_results_have_the_real_shapes() -> None:
    ops.load()
    x, (sigma, lam) = coordinates(), states()
    meta = {k: v.to("meta") for k, v in pair_case().items()}
    fake = ops.pair_operator(x.to("meta"), sigma.to("meta"), lam.to("meta"), **meta)
    for a, b in zip(fake, ops.pair_operator(x, sigma, lam, **pair_case()), strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()


# ------------------------------------------------------------------ the C interface


@pytest.mark.slow
def test_c_interface_under_sanitizers(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    options = ["-DDIFFFORCE_SANITIZE=ON", "-DDIFFFORCE_TESTS=ON", "-DDIFFFORCE_WERROR=ON"]
    build = str(tmp_path / "build")
    for command in (
        ["cmake", "-S", str(ROOT / "cpp"), "-B", build, *options],
        ["cmake", "--build", build, "--parallel", "2"],
        [str(Path(build) / "test_c_api")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks of the C interface passed" in done.stdout
