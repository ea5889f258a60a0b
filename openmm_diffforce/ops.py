r"""Torch operators of the compiled library, and the plain-torch reference of each.

Three operators live in the namespace ``diffforce`` once :func:`load` has been called
(units: nm and radians, values reduced, i.e. in kT):

- ``pair_operator``: noised pair functions between sites A and environment B,
- ``internal_action``: noised 1-D splines of distances, angles and torsions,
- ``internal_normal``: normal equations of score matching for the latter.

The first two also exist as ``*_hvp``, the product of the Hessian with a vector, from which
the doors of this module build second derivatives. In TorchScript call
``torch.ops.diffforce.*`` directly: they return their gradients explicitly.

Splines
    Uniform cubic B-splines given by coefficients. With n coefficients on the grid (lo, h) the
    domain is [lo, lo + (n-3) h] and basis function i is centred at lo + (i-1) h. Outside the
    domain the value and slope at the edge continue linearly (C1); the internal action adds
    wall/2 (q - edge)^2. Torsions are periodic: h = 2 pi/n, lo = -pi.
Noise
    Coefficients stand at noise knots, the first one 0. Between knots the weights are linear in
    sigma^2 in the first interval and linear in log sigma in the others. A sigma below zero or
    above the last knot is an error.
lambda
    Hat functions on knots that run from 0 to 1. With ``integrated=False`` they weight the
    operator O itself, with ``integrated=True`` their integrals from 0 to lambda weight the
    action increment S_lambda - S_0, whose lambda derivative is exactly O.
"""

import ctypes
import math
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, MissingDependencyError

Tensor = torch.Tensor

DISTANCE, ANGLE, TORSION = 2, 3, 4
"""Kinds of internal coordinates (the number of atoms of each)."""

_LIBRARY_NAME = "libdiffforce.so"
_LIBRARY: ctypes.CDLL | None = None


def library_path() -> Path:
    """Path at which the compiled library is expected: beside this module."""
    return Path(__file__).resolve().parent / _LIBRARY_NAME


def load() -> None:
    """Load the compiled library and register its torch operators; a second call does nothing.

    Raises
    ------
    MissingDependencyError
        If the library is absent, cannot be loaded, or does not find LibTorch.
    """
    global _LIBRARY
    if _LIBRARY is not None:
        return
    path = library_path()
    if not path.is_file():
        raise MissingDependencyError(
            f"ops: expected the compiled library at {path}, found none; "
            "build it with `pip install .` in a clone of openmm_diffforce."
        )
    try:
        library = ctypes.CDLL(str(path))
        library.diffforce_torch_register.restype = ctypes.c_int
        library.diffforce_last_error.restype = ctypes.c_char_p
        status = library.diffforce_torch_register()
    except (OSError, AttributeError) as err:
        raise MissingDependencyError(
            f"ops: {path} cannot be loaded ({err}); build it again with `pip install .`."
        ) from err
    if status != 0:
        reason = library.diffforce_last_error().decode()
        raise MissingDependencyError(
            f"ops: registering the operators with torch {torch.__version__} failed: {reason}; "
            "torch >= 2.9 is needed: `pip install 'torch>=2.9'`."
        )
    _register_fakes()
    _LIBRARY = library


# ------------------------------------------------------------------ plain torch, shared pieces


def noise_weights(sigma: Tensor, sigma_knots: Tensor) -> Tensor:
    r"""Interpolation weights of the noise knots.

    .. math:: w = 1 - \sigma^2/\sigma_1^2 \quad (\sigma < \sigma_1), \qquad
              w = 1 - \ln(\sigma/\sigma_m)/\ln(\sigma_{m+1}/\sigma_m) \quad \text{otherwise}

    for the lower knot of the interval; the upper one has 1 - w.

    Parameters
    ----------
    sigma : Tensor [F]
        Noise levels [nm].
    sigma_knots : Tensor [M]
        Ascending, the first one 0 [nm].

    Returns
    -------
    Tensor [F, M]
        Rows sum to one; differentiable in ``sigma`` (at a knot: from above).

    Raises
    ------
    InputError
        If a sigma is NaN, negative, or above the last knot, or the knots do not ascend from 0.

    Examples
    --------
    >>> noise_weights(torch.tensor([0.0, 0.02]), torch.tensor([0.0, 0.01, 0.04]))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    """
    _check_knots("sigma_knots", sigma_knots)
    last = float(sigma_knots[-1])
    slack = last * (1e-6 if sigma.dtype == torch.float32 else 1e-12)
    bad = ~((sigma >= 0) & (sigma <= last + slack))
    if bool(bad.any()):
        raise InputError(
            f"sigma: expected noise levels in [0, {last:g}] nm, found {sigma[bad][0].item():g}; "
            "refit the model with higher noise knots or ask for less noise."
        )
    n_knots = sigma_knots.shape[0]
    weights = sigma.new_zeros((sigma.shape[0], n_knots))
    if n_knots == 1:
        return weights + 1.0
    m = torch.searchsorted(sigma_knots, sigma.detach(), right=True).sub(1).clamp(0, n_knots - 2)
    low, high = sigma_knots[m], sigma_knots[m + 1]
    first = m == 0
    safe_sigma = torch.where(first, torch.ones_like(sigma), sigma)
    safe_low = torch.where(first, torch.ones_like(low), low)
    by_log = torch.log(safe_sigma / safe_low) / torch.log(torch.where(first, 2.0 * safe_low, high) / safe_low)
    upper = torch.where(first, (sigma / high) ** 2, by_log)
    weights = weights.scatter(1, m[:, None], (1.0 - upper)[:, None])
    return weights.scatter(1, m[:, None] + 1, upper[:, None])


def lambda_weights(lam: Tensor, lam_knots: Tensor, *, integrated: bool) -> Tensor:
    """Hat functions of lambda, or their integrals from 0 to lambda.

    Parameters
    ----------
    lam : Tensor [F]
        Alchemical coordinate in [0, 1].
    lam_knots : Tensor [L]
        Ascending from 0 to 1; a single knot makes a function that is constant in lambda.
    integrated : bool
        ``False``: h_k(lam), ``True``: integral of h_k from 0 to lam.

    Returns
    -------
    Tensor [F, L]

    Raises
    ------
    InputError
        If a lambda is NaN or outside [0, 1], or the knots do not ascend from 0 to 1.

    Examples
    --------
    >>> lambda_weights(torch.tensor([0.25]), torch.tensor([0.0, 0.5, 1.0]), integrated=False)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    n_knots = lam_knots.shape[0]
    _check_knots("lam_knots", lam_knots)
    if n_knots > 1 and abs(float(lam_knots[-1]) - 1.0) > 1e-6:
        raise InputError(f"lam_knots: expected the last knot to be 1, found {float(lam_knots[-1])}.")
    slack = 1e-6 if lam.dtype == torch.float32 else 1e-12
    bad = ~((lam >= -slack) & (lam <= 1 + slack))
    if bool(bad.any()):
        raise InputError(f"lam: expected values in [0, 1], found {lam[bad][0].item():g}.")
    if n_knots == 1:
        return lam[:, None] if integrated else torch.ones_like(lam)[:, None]
    k = torch.searchsorted(lam_knots, lam.detach(), right=True).sub(1).clamp(0, n_knots - 2)
    gaps = lam_knots[1:] - lam_knots[:-1]
    u = (lam - lam_knots[k]) / gaps[k]
    if not integrated:
        weights = lam.new_zeros((lam.shape[0], n_knots)).scatter(1, k[:, None], (1 - u)[:, None])
        return weights.scatter(1, k[:, None] + 1, u[:, None])
    # Fraction of each interval that lies below lambda; half-hats integrate to u - u^2/2 and u^2/2.
    index = torch.arange(n_knots - 1, device=lam.device)[None]
    part = torch.where(index < k[:, None], torch.ones_like(u)[:, None], u[:, None])
    part = torch.where(index > k[:, None], torch.zeros_like(part), part)
    falling, rising = gaps * (part - 0.5 * part**2), gaps * 0.5 * part**2
    zero = lam.new_zeros((lam.shape[0], 1))
    return torch.cat([falling, zero], 1) + torch.cat([zero, rising], 1)


def _check_knots(name: str, knots: Tensor) -> None:
    ok = knots.ndim == 1 and knots.shape[0] >= 1 and float(knots[0]) == 0.0
    if not ok or bool((~(knots[1:] > knots[:-1])).any()) or not bool(torch.isfinite(knots).all()):
        raise InputError(f"{name}: expected a 1-D tensor that ascends from 0, found {knots}.")


def _cubic(u: Tensor) -> Tensor:
    """Uniform cubic B-spline weights [..., 4] at the fraction u of an interval."""
    v = 1.0 - u
    return (
        torch.stack(
            [v**3, 3 * u**3 - 6 * u**2 + 4, 3 * v**3 - 6 * v**2 + 4, u**3],
            -1,
        )
        / 6.0
    )


def _cubic_slope(u: Tensor) -> Tensor:
    v = 1.0 - u
    return torch.stack([-(v**2), 3 * u**2 - 4 * u, 4 * v - 3 * v**2, u**2], -1) / 2.0


def _cubic_curve(u: Tensor) -> Tensor:
    v = 1.0 - u
    return torch.stack([v, 3 * u - 2, 3 * v - 2, u], -1)


def _locate(s: Tensor, n: Tensor, periodic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Interval (int), fraction in it, and the overshoot beyond the domain, of reduced s."""
    top = torch.where(periodic, torch.full_like(s, math.inf), (n - 3).to(s.dtype))
    inside = torch.where(periodic, s, torch.minimum(s.clamp(min=0.0), top))
    interval = torch.floor(inside.detach())
    interval = torch.where(periodic, interval, torch.minimum(interval, (n - 4).to(s.dtype)))
    return interval.long(), inside - interval, s - inside


# ------------------------------------------------------------------ pair operator, plain torch


def _minimum_image(d: Tensor, box: Tensor) -> Tensor:
    """Nearest image of displacements d[F, ..., 3] in reduced boxes [F, 3, 3]."""
    shape = (box.shape[0],) + (1,) * (d.ndim - 2)
    for k in (2, 1, 0):
        n = torch.floor(d[..., k] / box[:, k, k].reshape(shape) + 0.5).detach()
        d = d - n[..., None] * box[:, k].reshape((*shape, 3))
    return d


def _pair_value(
    x: Tensor,
    sigma: Tensor,
    lam: Tensor,
    box: Tensor | None,
    sites: Tensor,
    env: Tensor,
    pair_type: Tensor,
    table: Tensor,
    r_grid: Tensor,
    lam_knots: Tensor,
    sigma_knots: Tensor,
    r_switch: float,
    r_cutoff: float,
    integrated: bool,
) -> Tensor:
    weights_l = lambda_weights(lam, lam_knots, integrated=integrated)
    weights_m = noise_weights(sigma, sigma_knots)
    a, b = torch.nonzero(pair_type >= 0, as_tuple=True)
    kind = pair_type[a, b]
    d = x[:, sites[a]] - x[:, env[b]]
    if box is not None and box.numel() > 0:
        d = _minimum_image(d, box)
    r = torch.sqrt((d * d).sum(-1))
    n = torch.tensor(table.shape[3], device=x.device)
    s = (r - r_grid[kind, 0]) / r_grid[kind, 1]
    interval, u, over = _locate(s, n, torch.zeros_like(s, dtype=torch.bool))
    rows = torch.einsum("fl,fm,tlmr->ftr", weights_l, weights_m, table)
    frame = torch.arange(x.shape[0], device=x.device)[:, None, None]
    coef = rows[frame, kind[None, :, None], interval[..., None] + torch.arange(4, device=x.device)]
    value = (_cubic(u) * coef).sum(-1) + over * (_cubic_slope(u) * coef).sum(-1)
    if 0.0 < r_cutoff < math.inf:
        y = ((r - r_switch) / (r_cutoff - r_switch)).clamp(0.0, 1.0)
        value = value * (1.0 - y**3 * (10.0 - 15.0 * y + 6.0 * y * y))
    return value.sum(-1)


def reference_pair_operator(
    x: Tensor,
    sigma: Tensor,
    lam: Tensor,
    *,
    sites: Tensor,
    env: Tensor,
    pair_type: Tensor,
    table: Tensor,
    r_grid: Tensor,
    lam_knots: Tensor,
    sigma_knots: Tensor,
    box: Tensor | None = None,
    r_switch: float = -1.0,
    r_cutoff: float = -1.0,
    integrated: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`pair_operator` in plain torch: the same arguments and results.

    Slow and plain, on any device; differentiable as often as a cubic spline is.
    """
    with torch.enable_grad():
        graph = any(a.requires_grad for a in (x, sigma, lam))
        x, sigma, lam = (a if a.requires_grad else a.detach().clone().requires_grad_()
                         for a in (x, sigma, lam))  # fmt: skip
        value = _pair_value(x, sigma, lam, box, sites, env, pair_type, table, r_grid, lam_knots,
                            sigma_knots, r_switch, r_cutoff, integrated)  # fmt: skip
        if not value.requires_grad:
            return value, torch.zeros_like(x), torch.zeros_like(sigma), torch.zeros_like(lam)
        grads = torch.autograd.grad(value.sum(), (x, sigma, lam), create_graph=graph, materialize_grads=True)
    out = (value, *grads)
    return out if graph else tuple(a.detach() for a in out)  # type: ignore[return-value]


# ------------------------------------------------------------------ internal action, plain torch


def internal_coordinates(x: Tensor, atoms: Tensor) -> Tensor:
    """Distances [nm], angles in [0, pi] and torsions in (-pi, pi], by the number of atoms.

    Parameters
    ----------
    x : Tensor [F, N, 3]
        Coordinates [nm].
    atoms : Tensor [I, 4]
        Atom indices, padded with -1: two atoms are a distance, three an angle, four a torsion
        (IUPAC sign, as mdtraj has it).

    Returns
    -------
    Tensor [F, I]

    Examples
    --------
    >>> x = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 1, 0]]])
    >>> internal_coordinates(x, torch.tensor([[0, 1, -1, -1], [0, 1, 2, -1]]))
    tensor([[1.0000, 1.5708]])
    """
    q = x.new_zeros((x.shape[0], atoms.shape[0]))
    n_atoms = (atoms >= 0).sum(1)
    for count in (DISTANCE, ANGLE, TORSION):
        which = torch.nonzero(n_atoms == count)[:, 0]
        if which.numel() == 0:
            continue
        p = [x[:, atoms[which, k]] for k in range(count)]
        if count == DISTANCE:
            value = torch.linalg.vector_norm(p[1] - p[0], dim=-1)
        elif count == ANGLE:
            a, b = p[0] - p[1], p[2] - p[1]
            value = torch.atan2(torch.linalg.vector_norm(torch.linalg.cross(a, b), dim=-1), (a * b).sum(-1))
        else:
            b1, b2, b3 = p[1] - p[0], p[2] - p[1], p[3] - p[2]
            m, n = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
            sine = (b1 * n).sum(-1) * torch.linalg.vector_norm(b2, dim=-1)
            value = torch.atan2(sine, (m * n).sum(-1))
        q = q.index_copy(1, which, value)
    return q


def _internal_value(
    x: Tensor,
    sigma: Tensor,
    atoms: Tensor,
    cls: Tensor,
    kind: Tensor,
    grid: Tensor,
    offsets: Tensor,
    coef: Tensor,
    sigma_knots: Tensor,
) -> Tensor:
    q = internal_coordinates(x, atoms)
    weights = noise_weights(sigma, sigma_knots)
    n = (offsets[1:] - offsets[:-1])[cls]
    first = offsets[:-1][cls]
    periodic = (kind == TORSION)[cls].expand_as(q)
    value = torch.zeros_like(sigma)
    for m in range(sigma_knots.shape[0]):
        lo, h, wall = grid[m, cls].unbind(-1)
        interval, u, over = _locate((q - lo) / h, n, periodic)
        index = interval[..., None] + torch.arange(4, device=x.device)
        index = torch.where(periodic[..., None], index % n[:, None], index)
        c = coef[m][first[:, None] + index]
        terms = (_cubic(u) * c).sum(-1) + over * (_cubic_slope(u) * c).sum(-1)
        terms = terms + 0.5 * wall * (h * over) ** 2
        value = value + weights[:, m] * terms.sum(-1)
    return value


def reference_internal_action(
    x: Tensor,
    sigma: Tensor,
    *,
    atoms: Tensor,
    cls: Tensor,
    kind: Tensor,
    grid: Tensor,
    offsets: Tensor,
    coef: Tensor,
    sigma_knots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`internal_action` in plain torch: the same arguments and results.

    Slow and plain, on any device; differentiable as often as a cubic spline is.
    """
    with torch.enable_grad():
        graph = x.requires_grad or sigma.requires_grad
        x, sigma = (a if a.requires_grad else a.detach().clone().requires_grad_()
                    for a in (x, sigma))  # fmt: skip
        value = _internal_value(x, sigma, atoms, cls, kind, grid, offsets, coef, sigma_knots)
        grads = torch.autograd.grad(value.sum(), (x, sigma), create_graph=graph, materialize_grads=True)
    out = (value, *grads)
    return out if graph else tuple(a.detach() for a in out)  # type: ignore[return-value]


def reference_internal_normal(
    x: Tensor,
    target: Tensor,
    *,
    atoms: Tensor,
    cls: Tensor,
    kind: Tensor,
    grid: Tensor,
    offsets: Tensor,
    n_threads: int = 0,
    chunk: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`internal_normal` in plain torch, with dense features and autograd's derivatives.

    ``chunk`` frames are held at a time; ``n_threads`` is ignored.
    """
    x, target = x.to(torch.float64), target.to(torch.float64)
    grid = grid.to(torch.float64)
    n_coef = int(offsets[-1])
    n = (offsets[1:] - offsets[:-1])[cls]
    first = offsets[:-1][cls]
    lo, h, _ = grid[cls].unbind(-1)
    matrix = x.new_zeros((n_coef, n_coef))
    vector, laplacian = x.new_zeros(n_coef), x.new_zeros(n_coef)

    def coordinates(frame: Tensor) -> Tensor:
        return internal_coordinates(frame[None], atoms)[0]

    for start in range(0, x.shape[0], chunk):
        part, aim = x[start : start + chunk], target[start : start + chunk]
        n_frames, n_dof = part.shape[0], part.shape[1] * 3
        q = internal_coordinates(part, atoms)
        jac = torch.func.vmap(torch.func.jacrev(coordinates))(part).reshape(n_frames, -1, n_dof)
        hess = torch.func.vmap(torch.func.jacfwd(torch.func.jacrev(coordinates)))(part)
        trace = hess.reshape(n_frames, -1, n_dof, n_dof).diagonal(dim1=-2, dim2=-1).sum(-1)
        periodic = (kind == TORSION)[cls].expand_as(q)
        interval, u, over = _locate((q - lo) / h, n, periodic)
        index = interval[..., None] + torch.arange(4, device=x.device)
        index = first[:, None] + torch.where(periodic[..., None], index % n[:, None], index)
        slope = _cubic_slope(u) / h[:, None]
        curve = _cubic_curve(u) / (h * h)[:, None]
        curve = torch.where((over == 0)[..., None], curve, torch.zeros_like(curve))
        features = x.new_zeros((n_frames, n_coef, n_dof))
        for k in range(4):
            where = index[..., k, None].expand(-1, -1, n_dof)
            features.scatter_add_(1, where, slope[..., k, None] * jac)
            lap = curve[..., k] * (jac * jac).sum(-1) + slope[..., k] * trace
            laplacian.index_add_(0, index[..., k].reshape(-1), lap.reshape(-1))
        matrix += torch.einsum("fkd,fld->kl", features, features)
        vector += torch.einsum("fkd,fd->k", features, aim.reshape(n_frames, n_dof))
    return matrix, vector, laplacian


# ------------------------------------------------------------ autograd of the compiled operators

# The operators themselves have no autograd entry: one registered from Python would cost every MD
# step 10-20 us and the interpreter's lock. The doors below wrap them instead.


def _call(op: str, *args: Any) -> Any:
    """Run a compiled operator; what it finds wrong becomes an InputError."""
    load()
    try:
        return getattr(torch.ops.diffforce, op)(*args)
    except NotImplementedError as err:
        raise InputError(
            f"{op}: has no kernel for {args[0].device}: of all operators only pair_operator runs "
            "on a GPU, without second derivatives; move the tensors to the CPU."
        ) from err
    except RuntimeError as err:
        text = str(err).split("\nException raised from")[0]
        if f"diffforce::{op}:" not in text:
            raise
        raise InputError(text[text.index(f"diffforce::{op}:") :]) from err


def _no_third(ctx: Any, n_inputs: int) -> None:
    if any(ctx.needs_input_grad[:n_inputs]):
        raise InputError(
            "ops: third derivatives of the compiled operators do not exist (the splines are "
            "cubic); use the reference_ function of the same name."
        )


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


class _PairOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _call("pair_operator", *inputs)
        ctx.set_materialize_grads(False)
        ctx.scalars = inputs[11:]
        ctx.save_for_backward(*inputs[:11], *output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, g_value: Any, *g_rest: Any) -> Any:
        *inputs, grad_x, d_sigma, d_lam = ctx.saved_tensors
        out: list[Any] = [None, None, None]
        if g_value is not None:
            out = [g_value[:, None, None] * grad_x, g_value * d_sigma, g_value * d_lam]
        if any(g is not None for g in g_rest):
            v = [_or_zero(g, like) for g, like in zip(g_rest, inputs[:3], strict=True)]
            h = _PairOperatorHvp.apply(*inputs[:3], *v, *inputs[3:], *ctx.scalars)
            out = [b if a is None else a + b for a, b in zip(out, h, strict=True)]
        return (*out, *(None,) * 11)


class _PairOperatorHvp(torch.autograd.Function):
    """Arguments x, sigma, lam, v_x, v_sigma, v_lam, then the rest."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _call("pair_operator_hvp", *inputs[:3], *inputs[6:], *inputs[3:6])
        ctx.set_materialize_grads(False)
        ctx.scalars = inputs[14:]
        ctx.save_for_backward(*inputs[:14])
        return output

    @staticmethod
    def backward(ctx: Any, *g_out: Any) -> Any:
        _no_third(ctx, 3)
        inputs = ctx.saved_tensors
        v = [_or_zero(g, like) for g, like in zip(g_out, inputs[:3], strict=True)]
        h = _PairOperatorHvp.apply(*inputs[:3], *v, *inputs[6:], *ctx.scalars)
        return (None, None, None, *h, *(None,) * 11)


class _InternalAction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _call("internal_action", *inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, g_value: Any, *g_rest: Any) -> Any:
        *inputs, grad_x, d_sigma = ctx.saved_tensors
        out: list[Any] = [None, None]
        if g_value is not None:
            out = [g_value[:, None, None] * grad_x, g_value * d_sigma]
        if any(g is not None for g in g_rest):
            v = [_or_zero(g, like) for g, like in zip(g_rest, inputs[:2], strict=True)]
            h = _InternalActionHvp.apply(*inputs[:2], *v, *inputs[2:])
            out = [b if a is None else a + b for a, b in zip(out, h, strict=True)]
        return (*out, *(None,) * 7)


class _InternalActionHvp(torch.autograd.Function):
    """Arguments x, sigma, v_x, v_sigma, then the rest."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _call("internal_action_hvp", *inputs[:2], *inputs[4:], *inputs[2:4])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *g_out: Any) -> Any:
        _no_third(ctx, 2)
        inputs = ctx.saved_tensors
        v = [_or_zero(g, like) for g, like in zip(g_out, inputs[:2], strict=True)]
        h = _InternalActionHvp.apply(*inputs[:2], *v, *inputs[4:])
        return (None, None, *h, *(None,) * 7)


def _register_fakes() -> None:
    """Shapes of the results, so that torch.compile and make_fx see through the operators."""

    def dense(like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    @torch.library.register_fake("diffforce::pair_operator")
    def _pair(x: Tensor, sigma: Tensor, lam: Tensor, *args: Any) -> Any:
        return tuple(dense(a) for a in (sigma, x, sigma, lam))

    @torch.library.register_fake("diffforce::pair_operator_hvp")
    def _pair_hvp(x: Tensor, sigma: Tensor, lam: Tensor, *args: Any) -> Any:
        return tuple(dense(a) for a in (x, sigma, lam))

    @torch.library.register_fake("diffforce::internal_action")
    def _internal(x: Tensor, sigma: Tensor, *args: Any) -> Any:
        return tuple(dense(a) for a in (sigma, x, sigma))

    @torch.library.register_fake("diffforce::internal_action_hvp")
    def _internal_hvp(x: Tensor, sigma: Tensor, *args: Any) -> Any:
        return dense(x), dense(sigma)

    @torch.library.register_fake("diffforce::internal_normal")
    def _normal(x: Tensor, *args: Any, n_threads: int = 0) -> Any:
        n = torch.library.get_ctx().new_dynamic_size()
        return x.new_empty((n, n)), x.new_empty(n), x.new_empty(n)


# ------------------------------------------------------------------ doors of the compiled operators


def _check_tensors(
    op: str, variables: dict[str, Any], reals: dict[str, Any], indices: dict[str, Any]
) -> None:
    """Types, dtypes and devices; shapes and contents are checked by the operator itself."""
    x = variables["x"]
    for name, value in (variables | reals | indices).items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{op}: {name}: expected a torch.Tensor, found {type(value).__name__}.")
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{op}: x: expected float32 or float64, found {x.dtype}.")
    for name, value in (variables | reals | indices).items():
        dtype = torch.int64 if name in indices else x.dtype
        if value.dtype != dtype:
            raise InputError(
                f"{op}: {name}: expected {dtype}{'' if name in indices else ' as x has'}, found "
                f"{value.dtype}; convert it with .to({dtype})."
            )
        if value.device != x.device:
            raise InputError(
                f"{op}: {name}: expected device {x.device} as x has, found {value.device}; "
                f"move it with .to({str(x.device)!r})."
            )
        if name not in variables and value.requires_grad:
            raise InputError(
                f"{op}: {name}: has requires_grad, but only {', '.join(variables)} are "
                f"differentiated; use reference_{op}, or pass {name}.detach()."
            )
    if x.device.type == "cuda" and op == "pair_operator":
        load()
        if _LIBRARY is None or not _LIBRARY.diffforce_has_cuda():
            raise MissingDependencyError(
                f"{op}: x is on {x.device}, but the library was built without CUDA; build it with "
                "`pip install . -C cmake.define.DIFFFORCE_CUDA=ON`, or move x to the CPU."
            )
    elif x.device.type not in ("cpu", "meta"):
        raise InputError(f"{op}: x: expected a tensor on the CPU, found {x.device}.")


def pair_operator(
    x: Tensor,
    sigma: Tensor,
    lam: Tensor,
    *,
    sites: Tensor,
    env: Tensor,
    pair_type: Tensor,
    table: Tensor,
    r_grid: Tensor,
    lam_knots: Tensor,
    sigma_knots: Tensor,
    box: Tensor | None = None,
    r_switch: float = -1.0,
    r_cutoff: float = -1.0,
    integrated: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Noised pair functions between sites A and environment B, with all first derivatives.

    .. math:: O(x, \sigma, \lambda) = \sum_{a \in A, b \in B} s(r_{ab})
              \sum_{l,m} h_l(\lambda)\, w_m(\sigma)\, f_{T(a,b),l,m}(r_{ab})

    ====================== ==========================================================
    :math:`r_{ab}`         distance, of nearest images where there is a box [nm]
    :math:`f_{T,l,m}`      ``table[T, l, m]``, spline on ``r_grid[T]``
    :math:`T(a,b)`         ``pair_type``
    :math:`h_l, w_m`       lambda and noise weights, see the module
    :math:`s`              quintic switch (C2) from ``r_switch`` to ``r_cutoff``
    ====================== ==========================================================

    Parameters
    ----------
    x : Tensor [F, N, 3]
        Coordinates [nm], float32 or float64; all real tensors have its dtype and device.
    sigma, lam : Tensor [F]
        Noise level [nm] and alchemical coordinate of each frame.
    sites, env : int64 Tensor [nA], [nB]
        Atom indices.
    pair_type : int64 Tensor [nA, nB]
        Row of ``table``; -1 excludes the pair.
    table : Tensor [T, L, M, R]
        Spline coefficients, reduced (kT).
    r_grid : Tensor [T, 2]
        First knot and spacing [nm] of each type.
    lam_knots, sigma_knots : Tensor [L], [M]
        Knots; sigma in nm.
    box : Tensor [F, 3, 3], optional
        Box vectors [nm] in OpenMM's reduced form; asks for a cutoff of at most half the width.
    r_switch, r_cutoff : float
        [nm]; a cutoff that is not positive, or infinite, means none.
    integrated : bool
        Give the action increment S_lam - S_0 instead of the operator.

    Returns
    -------
    value : Tensor [F]
    grad_x : Tensor [F, N, 3]
        [1/nm]
    d_sigma : Tensor [F]
        [1/nm]
    d_lam : Tensor [F]

    Raises
    ------
    InputError
        Wrong type, shape, dtype or device; NaN or infinity; sigma or lambda outside their knots;
        an index out of range; a box that is not reduced or too small; a real argument other than
        x, sigma and lam that requires a gradient.
    MissingDependencyError
        The library is absent, or was built without CUDA and x is on a GPU.

    Notes
    -----
    Differentiable twice in x, sigma and lam. Deterministic on the CPU; on a GPU the order of
    summation varies, indices are not checked, and a frame out of range comes out as NaN.
    Frames are shared out to threads (``DIFFFORCE_NUM_THREADS``, else ``OMP_NUM_THREADS``).
    Lambda and noise interpolation is C0 at the knots: there, derivatives are those from above.

    Examples
    --------
    >>> table = torch.ones(1, 1, 1, 8)                    # a constant function, 1 kT per pair
    >>> args = dict(sites=torch.tensor([0]), env=torch.tensor([1, 2]),
    ...             pair_type=torch.tensor([[0, 0]]), table=table,
    ...             r_grid=torch.tensor([[0.2, 0.1]]), lam_knots=torch.zeros(1),
    ...             sigma_knots=torch.zeros(1))
    >>> x = torch.tensor([[[0.0, 0, 0], [0.3, 0, 0], [0, 0.4, 0]]])
    >>> reference_pair_operator(x, torch.zeros(1), torch.zeros(1), **args)[0]
    tensor([2.])
    """
    box = x.new_empty(0) if box is None else box
    variables = {"x": x, "sigma": sigma, "lam": lam}
    reals = {"box": box, "table": table, "r_grid": r_grid, "lam_knots": lam_knots,
             "sigma_knots": sigma_knots}  # fmt: skip
    indices = {"sites": sites, "env": env, "pair_type": pair_type}
    _check_tensors("pair_operator", variables, reals, indices)
    args = [x, sigma, lam, box, sites, env, pair_type, table, r_grid, lam_knots, sigma_knots]
    if x.device.type == "cuda":
        args = [a.contiguous() for a in args]
    return _PairOperator.apply(*args, float(r_switch), float(r_cutoff), bool(integrated))


def internal_action(
    x: Tensor,
    sigma: Tensor,
    *,
    atoms: Tensor,
    cls: Tensor,
    kind: Tensor,
    grid: Tensor,
    offsets: Tensor,
    coef: Tensor,
    sigma_knots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Noised action of bond lengths, angles, torsions and pair distances.

    .. math:: S(x, \sigma) = \sum_m w_m(\sigma) \sum_i \Big[ f_{m,c(i)}(q_i(x))
              + \tfrac{1}{2} k_{m,c(i)} (q_i - q_\mathrm{edge})^2 \Big]

    ====================== ==========================================================
    :math:`q_i`            internal coordinate of ``atoms[i]`` [nm or rad]
    :math:`c(i)`           ``cls[i]``: instances of one class share a spline
    :math:`f_{m,c}`        ``coef[m, offsets[c]:offsets[c+1]]`` on ``grid[m, c]``
    :math:`k_{m,c}`        ``grid[m, c, 2]``, wall outside the domain only
    :math:`w_m`            noise weights, see the module; knots of weight 0 are not read
    ====================== ==========================================================

    Parameters
    ----------
    x : Tensor [F, N, 3]
        Coordinates [nm], float32 or float64; all real tensors have its dtype. No box.
    sigma : Tensor [F]
        Noise level of each frame [nm].
    atoms : int64 Tensor [I, 4]
        Atom indices, padded with -1.
    cls : int64 Tensor [I]
    kind : int64 Tensor [C]
        2 distance, 3 angle, 4 torsion (periodic, IUPAC sign).
    grid : Tensor [M, C, 3]
        First knot, spacing, wall constant [kT/nm^2 or kT/rad^2] for each noise knot.
    offsets : int64 Tensor [C+1]
        Class c has the coefficients ``offsets[c]:offsets[c+1]``, at least 4.
    coef : Tensor [M, K]
        Spline coefficients [kT].
    sigma_knots : Tensor [M]
        [nm]

    Returns
    -------
    value : Tensor [F]
    grad_x : Tensor [F, N, 3]
        [1/nm]
    d_sigma : Tensor [F]
        [1/nm]

    Raises
    ------
    InputError
        Wrong type, shape, dtype or device; NaN or infinity; sigma outside its knots; an index
        out of range; coincident or collinear atoms; a real argument other than x and sigma that
        requires a gradient.
    MissingDependencyError
        The library is absent.

    Notes
    -----
    Differentiable twice in x and sigma; deterministic. Arithmetic is float64 inside.

    Examples
    --------
    >>> args = dict(atoms=torch.tensor([[0, 1, -1, -1]]), cls=torch.tensor([0]),
    ...             kind=torch.tensor([2]), grid=torch.tensor([[[0.1, 0.1, 0.0]]]),
    ...             offsets=torch.tensor([0, 6]), coef=torch.arange(6.0)[None],
    ...             sigma_knots=torch.zeros(1))
    >>> x = torch.tensor([[[0.0, 0, 0], [0.25, 0, 0]]])
    >>> reference_internal_action(x, torch.zeros(1), **args)[0]
    tensor([2.5000])
    """
    variables = {"x": x, "sigma": sigma}
    reals = {"grid": grid, "coef": coef, "sigma_knots": sigma_knots}
    indices = {"atoms": atoms, "cls": cls, "kind": kind, "offsets": offsets}
    _check_tensors("internal_action", variables, reals, indices)
    return _InternalAction.apply(x, sigma, atoms, cls, kind, grid, offsets, coef, sigma_knots)


def internal_normal(
    x: Tensor,
    target: Tensor,
    *,
    atoms: Tensor,
    cls: Tensor,
    kind: Tensor,
    grid: Tensor,
    offsets: Tensor,
    n_threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normal equations of score matching in the basis of :func:`internal_action`.

    .. math:: A_{kl} = \sum_f \nabla\phi_k \cdot \nabla\phi_l, \quad
              b_k = \sum_f \nabla\phi_k \cdot g_f, \quad
              L_k = \sum_f \nabla^2 \phi_k

    with :math:`\phi_k` the sum over the instances of its class of basis function k, continued
    linearly outside the domain, and without wall. Denoising or force matching solves A c = b,
    implicit score matching A c = L.

    Parameters
    ----------
    x, target : float64 Tensor [F, N, 3]
        Coordinates [nm] and the field to fit, g_f [1/nm].
    atoms, cls, kind, offsets
        As for :func:`internal_action`.
    grid : float64 Tensor [C, 3]
        Grid of one noise knot; the wall is not used.
    n_threads : int
        Threads over frames; 0 means ``DIFFFORCE_NUM_THREADS``, else ``OMP_NUM_THREADS``, else all
        cores. Each holds a K x K matrix; the last bits of the sums depend on their number.

    Returns
    -------
    A : float64 Tensor [K, K]
    b : float64 Tensor [K]
    L : float64 Tensor [K]

    Raises
    ------
    InputError
        As for :func:`internal_action`; float32 input; any argument that requires a gradient.
    MissingDependencyError
        The library is absent.

    References
    ----------
    A. Hyvarinen, Estimation of non-normalized statistical models by score matching, 2005,
    Journal of Machine Learning Research 6, 695-709.

    Examples
    --------
    >>> args = dict(atoms=torch.tensor([[0, 1, -1, -1]]), cls=torch.tensor([0]),
    ...             kind=torch.tensor([2]), offsets=torch.tensor([0, 4]),
    ...             grid=torch.tensor([[0.1, 0.1, 0.0]], dtype=torch.float64))
    >>> x = torch.tensor([[[0.0, 0, 0], [0.15, 0, 0]]], dtype=torch.float64)
    >>> a, b, lap = reference_internal_normal(x, torch.zeros_like(x), **args)
    >>> [round(float(v), 1) for v in a.diagonal()]
    [3.1, 78.1, 78.1, 3.1]
    """
    reals = {"x": x, "target": target, "grid": grid}
    indices = {"atoms": atoms, "cls": cls, "kind": kind, "offsets": offsets}
    _check_tensors("internal_normal", {"x": x}, reals, indices)
    if x.dtype != torch.float64 or x.requires_grad:
        raise InputError(
            f"internal_normal: x: expected float64 without requires_grad, found {x.dtype} with "
            f"requires_grad={x.requires_grad}; pass x.detach().double()."
        )
    return _call("internal_normal", x, target, atoms, cls, kind, grid, offsets, int(n_threads))
