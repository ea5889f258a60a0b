"""Looking at trajectories: torsions, distributions, how alike two runs are, how warm one is.

Figures are plain :class:`matplotlib.figure.Figure` objects: no pyplot, no global state.
"""

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import mdtraj as md
import numpy as np
import numpy.typing as npt
from openmm import unit

from .errors import ConvergenceError, InputError, MissingDependencyError
from .units import MOLAR_GAS_CONSTANT, to_md

FloatArray = npt.NDArray[np.float64]


def load_trajectory(path: str | os.PathLike[str], topology: str | os.PathLike[str]) -> md.Trajectory:
    """Load a DCD or XTC trajectory with its PDB.

    Raises
    ------
    InputError
        If a file cannot be read, or they have different atoms.
    """
    try:
        with _quiet_stdout():
            return md.load(os.fspath(path), top=os.fspath(topology))
    except (OSError, ValueError, RuntimeError, TypeError) as err:
        raise InputError(f"{path}: expected a trajectory of the atoms in {topology}, found {err}.") from err


def iterate_trajectory(
    path: str | os.PathLike[str], topology: Any, *, chunk: int = 100
) -> Iterator[md.Trajectory]:
    """A trajectory of any format that mdtraj reads, part by part.

    Parameters
    ----------
    path : path-like
        DCD, XTC, PDB, HDF5, ...
    topology : path-like or mdtraj.Topology
    chunk : int
        Frames in a part.

    Yields
    ------
    mdtraj.Trajectory

    Raises
    ------
    InputError
        If a file cannot be read, or they have different atoms.
    MissingDependencyError
        For HDF5 without PyTables.
    """
    top = topology if isinstance(topology, md.Topology) else os.fspath(topology)
    try:
        # Opened at once: a missing file is an error here, not at the first part.
        with _quiet():
            parts = md.iterload(os.fspath(path), chunk=chunk, top=top)
        while True:
            with _quiet():
                part = next(parts, None)
            if part is None:
                return
            yield part
    except ImportError as err:
        raise MissingDependencyError(f"{path}: mdtraj needs PyTables for it: pip install tables") from err
    except (OSError, ValueError, RuntimeError, TypeError) as err:
        raise InputError(
            f"{path}: expected a trajectory of the atoms of its topology, found "
            f"{' '.join(str(err).split()):.200}."
        ) from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks of mdtraj's readers off the terminal, on how to install PyTables too."""
    with _quiet_stdout(), redirect_stderr(io.StringIO()):
        yield


def count_frames(path: str | os.PathLike[str]) -> int:
    """Frames in a trajectory, without reading them; 0 where the file does not say (for progress bars)."""
    try:
        with _quiet(), md.open(os.fspath(path)) as handle:
            return len(handle)
    except Exception:  # whatever is wrong with the file is said when it is read
        return 0


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keep the DCD plugin's remarks, printed by C code at every file, off the terminal."""
    sys.stdout.flush()
    kept, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def trajectory_of(x_nad: Any, topology: Any) -> md.Trajectory:
    """An mdtraj trajectory of frames [nm] and an OpenMM or mdtraj topology.

    Parameters
    ----------
    x_nad : array_like, shape (n_frames, n_atoms, 3)
        [nm].
    topology : openmm.app.Topology or mdtraj.Topology

    Raises
    ------
    InputError
        If they do not fit.
    """
    x = np.asarray(to_md(x_nad, unit.nanometer, name="positions"), dtype=np.float64)
    if not isinstance(topology, md.Topology):
        if not hasattr(topology, "getNumAtoms"):
            raise InputError(
                "topology: expected an openmm.app.Topology or mdtraj.Topology, found "
                f"{type(topology).__name__}."
            )
        topology = md.Topology.from_openmm(topology)
    if x.ndim != 3 or x.shape[1:] != (topology.n_atoms, 3) or not np.isfinite(x).all():
        raise InputError(
            f"positions: expected finite frames of shape (n_frames, {topology.n_atoms}, 3) [nm], "
            f"found {x.shape}."
        )
    return md.Trajectory(x, topology)


def _check_trajectory(trajectory: Any, name: str = "trajectory") -> md.Trajectory:
    if not isinstance(trajectory, md.Trajectory):
        raise InputError(
            f"{name}: expected an mdtraj.Trajectory, found {type(trajectory).__name__}; make one "
            "with load_trajectory or trajectory_of."
        )
    if trajectory.n_frames == 0 or not np.isfinite(trajectory.xyz).all():
        raise InputError(f"{name}: expected finite frames, found none or some that are not.")
    return trajectory


def phi_psi(trajectory: md.Trajectory, *, residue: int = 0) -> FloatArray:
    """phi and psi of one residue [rad], shape (n_frames, 2), IUPAC sign, in [-pi, pi].

    Parameters
    ----------
    trajectory : mdtraj.Trajectory
    residue : int
        Number among the residues that have both torsions, starting at 0.

    Raises
    ------
    InputError
        If there is no such residue.

    Examples
    --------
    >>> from openmm_diffforce.alanine import alanine_dipeptide
    >>> topology, x, _ = alanine_dipeptide()
    >>> np.degrees(phi_psi(trajectory_of(x[None], topology))).round().tolist()
    [[-75.0, 54.0]]
    """
    trajectory = _check_trajectory(trajectory)
    phi_idx, phi = md.compute_phi(trajectory)
    psi_idx, psi = md.compute_psi(trajectory)
    # phi is C-N-CA-C, psi N-CA-C-N: they belong together where they share N, CA, C.
    pairs = [
        (i, j) for i, a in enumerate(phi_idx) for j, b in enumerate(psi_idx) if tuple(a[1:]) == tuple(b[:3])
    ]
    if not 0 <= residue < len(pairs):
        raise InputError(
            f"residue: expected one of the {len(pairs)} residues that have phi and psi, found "
            f"{residue}; the topology needs bonds and standard atom names."
        )
    i, j = pairs[residue]
    return np.stack([phi[:, i], psi[:, j]], axis=1).astype(np.float64)


def rmsd(
    trajectory: md.Trajectory,
    reference: md.Trajectory | None = None,
    *,
    atoms: Sequence[int] | str = "heavy",
) -> FloatArray:
    """RMSD of every frame after superposition [nm], shape (n_frames,).

    Parameters
    ----------
    trajectory : mdtraj.Trajectory
    reference : mdtraj.Trajectory, optional
        Its first frame; that of the trajectory if omitted.
    atoms : "heavy", "all" or sequence of int

    Raises
    ------
    InputError
        For atoms or a reference that do not fit.
    """
    trajectory = _check_trajectory(trajectory)
    ref = trajectory if reference is None else _check_trajectory(reference, "reference")
    if ref.n_atoms != trajectory.n_atoms:
        raise InputError(f"reference: expected {trajectory.n_atoms} atoms, found {ref.n_atoms}.")
    if isinstance(atoms, str):
        if atoms not in ("heavy", "all"):
            raise InputError(f'atoms: expected "heavy", "all" or indices, found {atoms!r}.')
        chosen = [
            a.index
            for a in trajectory.topology.atoms
            if atoms == "all" or a.element is None or a.element.symbol != "H"
        ]
    else:
        chosen = [int(a) for a in atoms]
    if not chosen or min(chosen) < 0 or max(chosen) >= trajectory.n_atoms:
        raise InputError(f"atoms: expected indices in [0, {trajectory.n_atoms}), found {chosen}.")
    # mdtraj centres in place on a copy it makes itself only when atoms are given this way.
    return np.asarray(
        md.rmsd(trajectory[:], ref[:1], atom_indices=chosen, ref_atom_indices=chosen),
        dtype=np.float64,
    )


@dataclass(frozen=True)
class Distribution:
    """A histogram as a density.

    Attributes
    ----------
    edges : numpy.ndarray, shape (n_bins + 1,)
    density, error : numpy.ndarray, shape (n_bins,)
        Density, and its standard error over blocks of the series.
    """

    edges: FloatArray
    density: FloatArray
    error: FloatArray

    @property
    def centres(self) -> FloatArray:
        """Bin centres."""
        return 0.5 * (self.edges[1:] + self.edges[:-1])


def distribution(
    values: Any,
    *,
    bins: int = 50,
    limits: tuple[float, float] | None = None,
    n_blocks: int = 5,
) -> Distribution:
    """Density of a time series, with errors from consecutive blocks.

    Parameters
    ----------
    values : array_like, shape (n_frames,)
        In time order.
    bins : int
    limits : (low, high), optional
        Range; that of the values if omitted. Values outside are left out of the density.
    n_blocks : int

    Raises
    ------
    InputError
        For values that are not finite, or too few of them.

    Examples
    --------
    >>> d = distribution(np.linspace(0, 1, 100), bins=4, limits=(0.0, 1.0))
    >>> d.density.round(6).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    x = np.asarray(values, dtype=np.float64)
    if n_blocks < 2 or bins < 1:
        raise InputError(f"n_blocks, bins: expected >= 2 and >= 1, found {n_blocks}, {bins}.")
    if x.ndim != 1 or len(x) < n_blocks or not np.isfinite(x).all():
        raise InputError(
            f"values: expected at least {n_blocks} finite numbers in one dimension, found shape {x.shape}."
        )
    low, high = limits if limits is not None else (float(x.min()), float(x.max()))
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        if limits is not None:
            raise InputError(f"limits: expected low < high, found {limits}.")
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    width = edges[1] - edges[0]

    def density(part: FloatArray) -> FloatArray:
        return np.histogram(part, edges)[0] / (len(part) * width)

    blocks = np.array([density(b) for b in np.array_split(x, n_blocks)])
    return Distribution(
        edges=edges,
        density=density(x),
        error=blocks.std(axis=0, ddof=1) / math.sqrt(n_blocks),
    )


def _check_angles(name: str, angles: Any) -> FloatArray:
    a = np.asarray(angles, dtype=np.float64)
    if a.ndim != 2 or a.shape[1] != 2 or len(a) == 0 or not np.isfinite(a).all():
        raise InputError(f"{name}: expected finite angles [rad] of shape (n_frames, 2), found {a.shape}.")
    if abs(a).max() > 2 * math.pi + 1e-6:
        raise InputError(
            f"{name}: expected radians, found a magnitude of {abs(a).max():.1f}; convert degrees "
            "with numpy.radians."
        )
    return (a + math.pi) % (2 * math.pi) - math.pi


def torsion_histogram(angles: Any, *, bins: int = 24) -> FloatArray:
    """Fraction of frames per cell of the (phi, psi) torus, shape (bins, bins).

    Cells run from -pi to pi; axis 0 is phi.
    """
    if not isinstance(bins, int) or bins < 1:
        raise InputError(f"bins: expected an integer > 0, found {bins!r}.")
    a = _check_angles("angles", angles)
    edges = np.linspace(-math.pi, math.pi, bins + 1)
    counts = np.histogram2d(a[:, 0], a[:, 1], bins=(edges, edges))[0]
    return counts / len(a)


def jensen_shannon(phi_psi_a: Any, phi_psi_b: Any, *, bins: int = 24) -> float:
    r"""Jensen-Shannon divergence of two sets of (phi, psi) [nats], in [0, ln 2].

    .. math:: JS = \tfrac12 \sum_i p_i \ln\frac{2 p_i}{p_i + q_i}
                 + \tfrac12 \sum_i q_i \ln\frac{2 q_i}{p_i + q_i}

    Parameters
    ----------
    phi_psi_a, phi_psi_b : array_like, shape (n_frames, 2)
        [rad].
    bins : int
        Cells along each angle.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For angles of another shape, or in degrees.

    Notes
    -----
    Finite samples of one distribution give about (occupied cells - 1) (1/n_a + 1/n_b) / 8, not 0:
    compare with two independent runs of the reference.

    References
    ----------
    J. Lin, Divergence measures based on the Shannon entropy, 1991, doi:10.1109/18.61115.

    Examples
    --------
    >>> a = np.zeros((10, 2))
    >>> jensen_shannon(a, a)
    0.0
    >>> round(jensen_shannon(a, a + 1.0), 6) == round(math.log(2), 6)
    True
    """
    p = torsion_histogram(phi_psi_a, bins=bins)
    q = torsion_histogram(phi_psi_b, bins=bins)
    middle = 0.5 * (p + q)
    total = 0.0
    for one in (p, q):
        seen = one > 0
        total += 0.5 * float((one[seen] * np.log(one[seen] / middle[seen])).sum())
    return max(total, 0.0)


def basin_fraction(
    angles: Any, *, phi: tuple[float, float] = (0.0, 120.0), psi: tuple[float, float] | None = None
) -> float:
    """Fraction of frames in a basin; by default C7ax (phi between 0 and 120 degrees).

    Parameters
    ----------
    angles : array_like, shape (n_frames, 2)
        (phi, psi) [rad].
    phi, psi : (low, high)
        [degrees]; a range with low > high goes through 180.

    Examples
    --------
    >>> basin_fraction([[1.0, -1.0], [-1.0, 1.0]])
    0.5
    """
    a = np.degrees(_check_angles("angles", angles))
    inside = np.ones(len(a), dtype=bool)
    for column, limits in ((0, phi), (1, psi)):
        if limits is not None:
            low, high = limits
            v = a[:, column]
            inside &= (v >= low) & (v < high) if low <= high else (v >= low) | (v < high)
    return float(inside.mean())


@dataclass(frozen=True)
class ConfigurationalTemperature:
    """What :func:`configurational_temperature` returns.

    Attributes
    ----------
    temperature, error : float
        [K], and one standard error.
    inefficiency : float
        Statistical inefficiency of the frames that the error accounts for.
    n_frames : int
    method : str
    """

    temperature: float
    error: float
    inefficiency: float
    n_frames: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: getattr(self, k) for k in self.__dataclass_fields__}


def configurational_temperature(
    x_nad: Any,
    forces: Callable[[FloatArray], Any],
    *,
    method: str = "laplacian",
    step: float = 1e-5,
) -> ConfigurationalTemperature:
    r"""Temperature that the positions of a run speak of, given its forces.

    For any vector field v that the boundary does not see,
    :math:`kT = \langle \nabla U\cdot v\rangle / \langle \nabla\cdot v\rangle`.

    - ``"laplacian"``: v = grad U, :math:`kT = \langle|\nabla U|^2\rangle/\langle\nabla^2 U\rangle`,
      sensitive to the stiff bonds. The Laplacian is a central difference of the forces, which costs
      6 n_atoms force evaluations per frame.
    - ``"virial"``: v = x less its centroid, whose divergence is 3 n_atoms - 3, so no second
      derivative is needed: :math:`kT = -\langle\sum_i F_i\cdot(x_i - \bar x)\rangle/(3n-3)`.
      Bound molecules in vacuum only, and noisier: a fluctuation of kT per coordinate and more.

    ============  ==========================  ============
    symbol        code                        unit
    ============  ==========================  ============
    -grad U       ``forces(x)``               kJ/mol/nm
    x             ``x_nad``                   nm
    difference    ``step``                    nm
    ============  ==========================  ============

    Parameters
    ----------
    x_nad : array_like, shape (n_frames, n_atoms, 3)
        Frames in time order [nm].
    forces : callable
        ``forces(x[n_frames, n_atoms, 3]) -> F`` [kJ/mol/nm], float64, e.g.
        ``lambda x: systems.forces(system, x)``.
    method : {"laplacian", "virial"}
    step : float
        Displacement of the finite difference [nm].

    Returns
    -------
    ConfigurationalTemperature

    Raises
    ------
    InputError
        For malformed frames or forces.
    ConvergenceError
        If the mean Laplacian is not above zero: too few frames, or wrong forces.

    References
    ----------
    H. H. Rugh, Dynamical approach to temperature, 1997, doi:10.1103/PhysRevLett.78.772.
    B. D. Butler et al., Configurational temperature: verification of Monte Carlo simulations,
    1998, doi:10.1063/1.477301.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(2000, 4, 3)) * 0.05
    >>> found = configurational_temperature(x, lambda x: -1000.0 * x)
    >>> abs(found.temperature - 1000.0 * 0.05**2 / MOLAR_GAS_CONSTANT) < 4 * found.error
    True
    """
    x = np.asarray(to_md(x_nad, unit.nanometer, name="positions"), dtype=np.float64)
    if x.ndim != 3 or x.shape[2] != 3 or len(x) < 4 or not np.isfinite(x).all():
        raise InputError(
            "positions: expected at least 4 finite frames of shape (n_frames, n_atoms, 3) [nm], "
            f"found {x.shape}."
        )
    if method not in ("laplacian", "virial"):
        raise InputError(f'method: expected "laplacian" or "virial", found {method!r}.')
    if not (isinstance(step, float) and math.isfinite(step) and step > 0):
        raise InputError(f"step: expected a finite number > 0 [nm], found {step!r}.")

    def force_at(points: FloatArray) -> FloatArray:
        f = np.asarray(forces(points), dtype=np.float64)
        if f.shape != points.shape or not np.isfinite(f).all():
            raise InputError(f"forces: expected finite forces of shape {points.shape}, found {f.shape}.")
        return f

    f_nad = force_at(x)
    n_atoms = x.shape[1]
    if method == "virial":
        top = -(f_nad * (x - x.mean(axis=1, keepdims=True))).sum(axis=(1, 2))
        bottom = np.full(len(x), 3.0 * n_atoms - 3.0)
    else:
        top = (f_nad**2).sum(axis=(1, 2))
        bottom = _laplacians(x, force_at, step)
    if not bottom.mean() > 0:
        raise ConvergenceError(
            f"configurational temperature: expected a mean Laplacian > 0, found {bottom.mean():.3g}"
            "; use more frames, and check the forces against finite differences of the energy."
        )
    ratio = top.mean() / bottom.mean()
    residual = (top - ratio * bottom) / bottom.mean()
    g = _inefficiency(residual)
    error = residual.std(ddof=1) * math.sqrt(g / len(x))
    return ConfigurationalTemperature(
        temperature=float(ratio / MOLAR_GAS_CONSTANT),
        error=float(error / MOLAR_GAS_CONSTANT),
        inefficiency=g,
        n_frames=len(x),
        method=method,
    )


def _laplacians(x: FloatArray, force_at: Callable[[FloatArray], FloatArray], step: float) -> FloatArray:
    """Laplacian of U at every frame [kJ/mol/nm^2]: minus the divergence of the forces."""
    n_atoms = x.shape[1]
    n_dof = 3 * n_atoms
    shift = step * np.eye(n_dof).reshape(n_dof, n_atoms, 3)
    # Many frames in one call, because a call may have to set up a simulation; 32 MB at most.
    block = max(1, int(4e6 / (2 * n_dof * n_dof)))
    out = []
    for start in range(0, len(x), block):
        part = x[start : start + block, None]
        moved = np.stack([part + shift, part - shift])
        f = force_at(moved.reshape(-1, n_atoms, 3)).reshape(2, -1, n_dof, n_dof)
        diagonal = np.diagonal(f[0] - f[1], axis1=1, axis2=2)
        out.append(-diagonal.sum(axis=1) / (2 * step))
    return np.concatenate(out)


def _inefficiency(series: FloatArray) -> float:
    from pymbar import timeseries

    if np.ptp(series) == 0:
        return 1.0
    return float(timeseries.statistical_inefficiency(series))


@dataclass(frozen=True)
class Autocorrelation:
    """Normalised autocorrelation of a quantity, from independent runs.

    Attributes
    ----------
    lag : [n_lags + 1]
        In units of the frame interval given.
    correlation, error : [n_lags + 1]
        C(lag), and its standard error by the jackknife over runs.
    time, time_error : float
        Integral of C from 0 to the last lag, in the same units: the relaxation time if C has decayed
        there.
    n_runs : int
    """

    lag: FloatArray
    correlation: FloatArray
    error: FloatArray
    time: float
    time_error: float
    n_runs: int


def autocorrelation(series: Any, n_lags: int, *, interval: float = 1.0) -> Autocorrelation:
    r"""How long a quantity remembers, with errors over independent runs.

    .. math:: C(l) = \frac{\langle (v_t - \bar v) \cdot (v_{t+l} - \bar v)\rangle}
              {\langle |v - \bar v|^2 \rangle}

    Mean and variance are those of all runs together, so that a run that is short beside the
    relaxation time does not hide it.

    Parameters
    ----------
    series : array_like [n_runs, n_frames] or [n_runs, n_frames, k]
        In time order; at least two runs. An angle goes in as its vector (cos, sin), k = 2.
    n_lags : int
        Largest lag, in frames.
    interval : float
        Time between frames.

    Returns
    -------
    Autocorrelation

    Raises
    ------
    InputError
        For shapes or lags that do not fit, numbers that are not finite, or a constant series.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((4, 1000))
    >>> found = autocorrelation(x, 3)
    >>> bool(abs(found.correlation[1:]).max() < 0.1)
    True
    """
    v = np.asarray(series, dtype=np.float64)
    v = v[..., None] if v.ndim == 2 else v
    if v.ndim != 3 or v.shape[0] < 2 or not np.isfinite(v).all():
        raise InputError(
            f"series: expected finite numbers [n_runs >= 2, n_frames] or [n_runs, n_frames, k], found shape "
            f"{np.shape(series)}."
        )
    if not isinstance(n_lags, int | np.integer) or not 1 <= n_lags < v.shape[1]:
        raise InputError(f"n_lags: expected an integer in [1, {v.shape[1] - 1}], found {n_lags!r}.")
    if not (math.isfinite(interval) and interval > 0):
        raise InputError(f"interval: expected a finite number > 0, found {interval!r}.")
    n_runs, n_frames, _ = v.shape

    def curve(runs: FloatArray) -> FloatArray:
        away = runs - runs.mean(axis=(0, 1))
        padded = np.fft.rfft(away, 2 * n_frames, axis=1)
        sums = np.fft.irfft((padded * padded.conj()).sum(axis=(0, 2)), 2 * n_frames)[: n_lags + 1]
        found = sums / (len(runs) * (n_frames - np.arange(n_lags + 1)))
        if not found[0] > 0:
            raise InputError("series: expected numbers that change, found a constant.")
        return np.asarray(found / found[0])

    lag: FloatArray = np.arange(n_lags + 1, dtype=np.float64) * interval
    whole = curve(v)
    left_out = np.array([curve(np.delete(v, r, axis=0)) for r in range(n_runs)])
    times = np.trapezoid(left_out, lag, axis=1)
    spread = np.sqrt((n_runs - 1) * np.array(left_out.var(axis=0)))
    return Autocorrelation(
        lag,
        whole,
        spread,
        float(np.trapezoid(whole, lag)),
        float(np.sqrt((n_runs - 1) * times.var())),
        n_runs,
    )


def new_figure(n_columns: int = 1, *, width: float = 4.5, height: float = 3.6) -> tuple[Any, Any]:
    """A Figure and its row of axes; ``width`` is that of one."""
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError("figures need matplotlib: pip install matplotlib") from err
    figure = Figure(figsize=(width * n_columns, height), layout="constrained")
    return figure, figure.subplots(1, n_columns, squeeze=False)[0]


def figure_bytes(figure: Any, *, file_format: str = "svg", dpi: int = 120) -> bytes:
    """A figure as the bytes of a file, to be written or embedded.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    file_format : {"svg", "png", "pdf"}
    dpi : int
        For png.
    """
    if file_format not in ("svg", "png", "pdf"):
        raise InputError(f'file_format: expected "svg", "png" or "pdf", found {file_format!r}.')
    buffer = io.BytesIO()
    # Without the date two equal figures are equal bytes.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[file_format]
    figure.savefig(buffer, format=file_format, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def overlap_figure(overlap: Any, states: Sequence[Any] | None = None, *, gate: float = 0.03) -> Any:
    """Heat map of an overlap matrix; cells next to the diagonal below the gate are outlined.

    Parameters
    ----------
    overlap : array_like, shape (n_states, n_states)
    states : sequence, optional
        Labels.
    gate : float

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If it is not a square matrix.
    """
    matrix = np.asarray(overlap, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise InputError(f"overlap: expected a finite square matrix, found {matrix.shape}.")
    n = len(matrix)
    size = max(3.6, 0.38 * n + 1.6)
    figure, (axes,) = new_figure(width=size + 0.6, height=size)
    image = axes.imshow(matrix, cmap="viridis", vmin=0.0, vmax=max(0.5, float(matrix.max())))
    figure.colorbar(image, ax=axes, label="overlap", shrink=0.8)
    for i in range(n):
        for j in range(n):
            if matrix[i, j] >= 0.005:
                shade = "black" if matrix[i, j] > 0.3 else "white"
                axes.text(j, i, f"{matrix[i, j]:.2f}".lstrip("0"), ha="center", va="center",
                          fontsize=7, color=shade)  # fmt: skip
            if abs(i - j) == 1 and matrix[i, j] < gate:
                from matplotlib.patches import Rectangle

                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red"))
    labels = [_label(s) for s in states] if states is not None else [str(i) for i in range(n)]
    if len(labels) != n:
        raise InputError(f"states: expected {n} labels, found {len(labels)}.")
    axes.set_xticks(range(n), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(n), labels, fontsize=7)
    axes.set_xlabel("state")
    axes.set_ylabel("state")
    return figure


def _label(state: Any) -> str:
    if isinstance(state, tuple | list):
        return ", ".join(f"{v:.3g}" for v in state)
    return f"{state:.3g}" if isinstance(state, int | float | np.floating) else str(state)


def phi_psi_figure(
    angles: Mapping[str, Any], *, bins: int = 48, divergences: Mapping[str, float] | None = None
) -> Any:
    """Free-energy surfaces -ln p(phi, psi) [kT] beside each other, on one colour scale.

    Parameters
    ----------
    angles : mapping
        Title -> (phi, psi) [rad], shape (n_frames, 2).
    bins : int
    divergences : mapping, optional
        Title -> Jensen-Shannon divergence [nats] to print above that panel.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If there are no panels, or the angles are malformed.
    """
    if len(angles) == 0:
        raise InputError("angles: expected at least one panel, found none.")
    surfaces = {}
    for name, a in angles.items():
        p = torsion_histogram(_check_angles(name, a), bins=bins)
        with np.errstate(divide="ignore"):
            f = -np.log(p)
        surfaces[name] = f - f[p > 0].min()
    top = max(float(f[np.isfinite(f)].max()) for f in surfaces.values())
    figure, all_axes = new_figure(len(surfaces), width=3.6)
    image = None
    for axes, (name, f) in zip(all_axes, surfaces.items(), strict=True):
        image = axes.imshow(
            np.ma.masked_invalid(f.T), origin="lower", extent=(-180, 180, -180, 180),
            cmap="viridis_r", vmin=0.0, vmax=max(top, 1.0), aspect="equal",
        )  # fmt: skip
        known = divergences is not None and name in divergences
        extra = f" (JS {divergences[name]:.3f} nats)" if known and divergences else ""
        axes.set_title(name + extra, fontsize=10)
        axes.set_xlabel("phi [degrees]")
        axes.set_ylabel("psi [degrees]")
        axes.set_xticks([-180, -90, 0, 90, 180])
        axes.set_yticks([-180, -90, 0, 90, 180])
    figure.colorbar(image, ax=list(all_axes), label="-ln p [kT]", shrink=0.8)
    return figure


def dhdl_figure(curves: Mapping[str, tuple[Any, Any, Any]]) -> Any:
    """Mean dH/dlambda against lambda, with error bars.

    Parameters
    ----------
    curves : mapping
        Name -> (lambda, mean, standard error) [kT].

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If there are no curves, or their lengths differ.
    """
    if len(curves) == 0:
        raise InputError("curves: expected at least one, found none.")
    figure, (axes,) = new_figure(width=5.0)
    for name, columns in curves.items():
        if len(columns) != 3:
            raise InputError(f"{name}: expected (lambda, mean, error), found {len(columns)} items.")
        lam, mean, error = (np.asarray(c, dtype=np.float64).ravel() for c in columns)
        if not len(lam) == len(mean) == len(error) or len(lam) == 0:
            raise InputError(
                f"{name}: expected lambda, mean and error of one length, found {len(lam)}, "
                f"{len(mean)}, {len(error)}."
            )
        axes.errorbar(lam, mean, error, marker="o", markersize=3, capsize=2, label=name)
    axes.set_xlabel("lambda")
    axes.set_ylabel("<dH/dlambda> [kT]")
    axes.legend(frameon=False, fontsize=8)
    return figure


def delta_f_figure(values: Mapping[str, tuple[float, float]], *, reference: str | None = None) -> Any:
    """Free-energy differences with their errors, one row each.

    Parameters
    ----------
    values : mapping
        Name -> (Delta f, standard error) [kT].
    reference : str, optional
        Name whose value and error are drawn through all rows.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        If there are no values, or the reference is none of them.
    """
    if len(values) == 0:
        raise InputError("values: expected at least one, found none.")
    if reference is not None and reference not in values:
        raise InputError(f"reference: expected one of {sorted(values)}, found {reference!r}.")
    figure, (axes,) = new_figure(width=5.5, height=1.2 + 0.4 * len(values))
    if reference is not None:
        middle, error = values[reference]
        axes.axvspan(middle - error, middle + error, color="0.85", zorder=0)
        axes.axvline(middle, color="0.5", linewidth=0.8, zorder=1)
    for row, (name, (value, error)) in enumerate(values.items()):
        if not (math.isfinite(value) and math.isfinite(error) and error >= 0):
            raise InputError(f"{name}: expected a finite value and error, found {value}, {error}.")
        axes.errorbar([value], [row], xerr=[error], marker="o", capsize=3)
        axes.annotate(f"{value:.2f} ± {error:.2f}", (value, row), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.7)
    axes.set_xlabel("Delta f [kT]")
    return figure


def replica_figure(state_of_replica: Any, *, n_shown: int = 6) -> Any:
    """Replicas on their way through the states, against the iteration, one band each.

    Parameters
    ----------
    state_of_replica : array_like of int, shape (n_iterations, n_replicas)
    n_shown : int
        Replicas drawn, spread evenly over all.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        For an array of another shape.
    """
    states = np.asarray(state_of_replica)
    if states.ndim != 2 or states.size == 0 or not np.issubdtype(states.dtype, np.integer) or n_shown < 1:
        raise InputError(
            "state_of_replica: expected integers of shape (n_iterations, n_replicas), found "
            f"{states.dtype} {states.shape}."
        )
    shown = sorted({int(i) for i in np.linspace(0, states.shape[1] - 1, n_shown).round()})
    figure, _ = new_figure(width=8.0, height=0.6 + 0.75 * len(shown))
    figure.clear()
    top = int(states.max())
    for axes, i in zip(figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0], shown, strict=True):
        axes.plot(states[:, i], linewidth=0.7, drawstyle="steps-post")
        axes.set_ylim(-0.5, top + 0.5)
        axes.set_yticks([0, top])
        axes.set_ylabel(f"replica {i}", fontsize=8)
    axes.set_xlabel("iteration")
    return figure
