"""Free-energy differences from window tables: MBAR, BAR, TI, and the correction of learned ends.

Overlap is computed first. Below the gate the estimators are refused, because BAR and MBAR return
confident wrong numbers on ensembles that do not meet. Nothing here needs OpenMM's dynamics.
"""

import logging
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, log_expit, logsumexp

from .constants import EXCHANGE_FILE
from .errors import ConvergenceError, InputError, PoorOverlapError, UnitsError
from .units import KJ_PER_KCAL, thermal_energy

FloatArray = npt.NDArray[np.float64]

MIN_OVERLAP = 0.03
"""Gate on the overlap A = int 2 p0 p1 / (p0 + p1), at most 1, of neighbouring states and of end
corrections. Elements of MBAR's overlap matrix shrink as states are added: no gate for them."""

MIN_SAMPLES = 10
"""Independent frames per state below which error estimates mean nothing."""

ENERGY_UNITS = ("kT", "kJ/mol", "kcal/mol")


def convert_energy(value: Any, energy_unit: str, *, temperature: Any) -> Any:
    """Convert kT to ``"kT"``, ``"kJ/mol"`` or ``"kcal/mol"``.

    Raises
    ------
    UnitsError
        For another unit, or a temperature that is none.

    Examples
    --------
    >>> round(convert_energy(1.0, "kJ/mol", temperature=300.0), 4)
    2.4943
    """
    if energy_unit not in ENERGY_UNITS:
        raise UnitsError(f"energy_unit: expected one of {ENERGY_UNITS}, found {energy_unit!r}.")
    factor = {"kT": 1.0, "kJ/mol": 1.0, "kcal/mol": 1.0 / KJ_PER_KCAL}[energy_unit]
    return value * (factor if energy_unit == "kT" else factor * thermal_energy(temperature))


@dataclass(frozen=True)
class Estimate:
    """One number with its standard error.

    Attributes
    ----------
    method : str
    delta_f, d_delta_f : float
        f(last state) - f(first state) and its standard error [kT].
    temperature : float
        [K].
    """

    method: str
    delta_f: float
    d_delta_f: float
    temperature: float

    def to(self, energy_unit: str) -> tuple[float, float]:
        """Value and standard error in ``"kT"``, ``"kJ/mol"`` or ``"kcal/mol"``."""
        value, error = (
            convert_energy(v, energy_unit, temperature=self.temperature)
            for v in (self.delta_f, self.d_delta_f)
        )
        return float(value), float(error)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: method, and value and error in each unit."""
        return {
            "method": self.method,
            **{u: dict(zip(("value", "error"), self.to(u), strict=True)) for u in ENERGY_UNITS},
        }

    def __str__(self) -> str:
        return f"{self.method}: {self.delta_f:.3f} +- {self.d_delta_f:.3f} kT"


@dataclass(frozen=True)
class FreeEnergyEstimate:
    """What :func:`estimate_free_energy` returns.

    Attributes
    ----------
    temperature : float
        [K].
    states : tuple
        Lambda (or tuple of lambdas) of each sampled state, in the order of the columns.
    estimates : dict of str to Estimate
        ``"MBAR"``, ``"BAR"`` and, where dHdl was given, ``"TI"``.
    f_k, d_f_k : numpy.ndarray, shape (n_states,)
        MBAR's f of each state relative to the first, and its error [kT].
    overlap : numpy.ndarray, shape (n_states, n_states)
        MBAR overlap matrix; rows sum to 1, and elements depend on how many states there are.
    neighbour_overlap : numpy.ndarray, shape (n_states - 1,)
        A = int 2 p0 p1 / (p0 + p1) of neighbours, at most 1: what the gate looks at.
    n_frames, n_decorrelated : numpy.ndarray, shape (n_states,)
        Frames, and how many independent ones they are worth.
    inefficiency : numpy.ndarray, shape (n_states,)
        Statistical inefficiency g of MBAR's influences.
    n_effective : numpy.ndarray, shape (n_states,)
        MBAR's effective sample number of each state.
    dhdl, d_dhdl : numpy.ndarray or None, shape (n_states, n_parameters)
        Mean dH/dlambda and its error [kT].
    """

    temperature: float
    states: tuple[Any, ...]
    estimates: dict[str, Estimate]
    f_k: FloatArray
    d_f_k: FloatArray
    overlap: FloatArray
    neighbour_overlap: FloatArray
    n_frames: npt.NDArray[np.int64]
    n_decorrelated: npt.NDArray[np.int64]
    inefficiency: FloatArray
    n_effective: FloatArray
    dhdl: FloatArray | None = None
    d_dhdl: FloatArray | None = None

    @property
    def delta_f(self) -> float:
        """MBAR's Delta f [kT]."""
        return self.estimates["MBAR"].delta_f

    @property
    def d_delta_f(self) -> float:
        """Its standard error [kT]."""
        return self.estimates["MBAR"].d_delta_f

    @property
    def min_overlap(self) -> float:
        """Smallest overlap of neighbouring states."""
        return float(self.neighbour_overlap.min())

    def to(self, energy_unit: str) -> tuple[float, float]:
        """MBAR's value and error in ``"kT"``, ``"kJ/mol"`` or ``"kcal/mol"``."""
        return self.estimates["MBAR"].to(energy_unit)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        arrays = (
            "f_k", "d_f_k", "overlap", "neighbour_overlap", "n_frames", "n_decorrelated",
            "inefficiency", "n_effective", "dhdl", "d_dhdl",
        )  # fmt: skip
        return {
            "temperature": self.temperature,
            "states": [list(s) if isinstance(s, tuple) else s for s in self.states],
            "estimates": {k: v.to_dict() for k, v in self.estimates.items()},
            "min_overlap": self.min_overlap,
            **{
                name: None if getattr(self, name) is None else getattr(self, name).tolist() for name in arrays
            },
        }


@dataclass(frozen=True)
class BarResult:
    """BAR between two ensembles, with the overlap that judges it.

    Attributes
    ----------
    delta_f, d_delta_f : float
        f_1 - f_0 and its standard error [kT].
    overlap, d_overlap : float
        A = int 2 p0 p1 / (p0 + p1), in [0, 1], and its standard error.
    n_forward, n_reverse : int
        Samples.
    """

    delta_f: float
    d_delta_f: float
    overlap: float
    d_overlap: float
    n_forward: int
    n_reverse: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: getattr(self, k) for k in self.__dataclass_fields__}


@dataclass(frozen=True)
class EndCorrection:
    """Delta f of the classical end states from windows between the learned ones.

    Attributes
    ----------
    learned : Estimate
        Delta f between the learned ends.
    correction_0, correction_1 : BarResult or None
        Learned -> classical at each end; None where the learned end IS the classical one.
    corrected : Estimate
        ``learned + correction_1 - correction_0``: the force field's own Delta f.
    """

    learned: Estimate
    correction_0: BarResult | None
    correction_1: BarResult | None
    corrected: Estimate

    @property
    def min_overlap(self) -> float:
        """Smaller overlap of the two ends (1 where no correction was needed)."""
        ends = (self.correction_0, self.correction_1)
        return min((c.overlap for c in ends if c is not None), default=1.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "learned": self.learned.to_dict(),
            "correction_0": self.correction_0.to_dict() if self.correction_0 else None,
            "correction_1": self.correction_1.to_dict() if self.correction_1 else None,
            "corrected": self.corrected.to_dict(),
            "min_overlap": self.min_overlap,
        }


@dataclass(frozen=True)
class _Table:
    """A checked u_nk: rows sorted by state, then time."""

    frame: pd.DataFrame
    state: npt.NDArray[np.int64] = field(repr=False)  # column of each row's state
    order: npt.NDArray[np.int64] = field(repr=False)  # rows of the original, sorted

    def rows(self, k: int) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.state == k)


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a ``u_nk`` or ``dHdl`` parquet file with its attrs.

    Raises
    ------
    InputError
        If it cannot be read.
    UnitsError
        If it does not say its temperature and energy unit.
    """
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError as err:
        raise InputError(
            f"{path}: expected the table of a finished run of windows, found no such file; give the "
            "run's folder, and call windows again if it was stopped."
        ) from err
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: expected a parquet table, found {err}.") from err
    columns = list(table.columns)
    if columns and all(isinstance(c, str) and c.startswith("(") for c in columns):
        try:
            tuples = [tuple(float(v.strip(" '\"")) for v in c.strip("()").split(",")) for c in columns]
        except ValueError as err:
            raise InputError(f"{path}: expected lambdas as columns, found {columns}.") from err
        table.columns = pd.Index(tuples, tupleize_cols=False)
    _check_attrs(table, str(path))
    return table


def read_replicas(folder: str | os.PathLike[str]) -> npt.NDArray[np.int64] | None:
    """Replica of each row of a run's ``u_nk``; None if the folder holds no run with exchange.

    Raises
    ------
    InputError
        If the file with the walks is damaged.
    """
    path = Path(folder) / EXCHANGE_FILE
    if not path.exists():
        return None
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as found:
            state = found["state"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as err:
        raise InputError(f"{path}: expected the walks of an exchange run, found {err}.") from err
    return table_order(state)[1]


def table_order(
    state_of_replica: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How walks, (n_iterations, n_replicas), become rows: by state, then by time.

    Returns
    -------
    order, replica, iteration : numpy.ndarray, shape (n_rows,)
        Index into the flattened walks, and replica and iteration of each row.

    Examples
    --------
    >>> [v.tolist() for v in table_order(np.array([[0, 1], [1, 0]]))]
    [[0, 3, 1, 2], [0, 1, 1, 0], [0, 1, 0, 1]]
    """
    iteration, replica = np.indices(state_of_replica.shape).reshape(2, -1)
    order = np.lexsort((iteration, state_of_replica.ravel()))
    return order, replica[order], iteration[order]


def _check_attrs(table: pd.DataFrame, name: str) -> float:
    missing = [key for key in ("temperature", "energy_unit") if key not in table.attrs]
    if missing:
        raise UnitsError(
            f"{name}: expected attrs temperature and energy_unit, found none of {missing}; set "
            "table.attrs as alchemlyb does."
        )
    if table.attrs["energy_unit"] != "kT":
        raise UnitsError(
            f"{name}: expected energy_unit 'kT', found {table.attrs['energy_unit']!r}; convert it "
            "with alchemlyb.postprocessors.units.to_kT."
        )
    thermal_energy(table.attrs["temperature"])
    return float(table.attrs["temperature"])


def combine_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables of one kind, refusing those that do not belong together.

    Raises
    ------
    InputError
        If there are none, or their columns or index levels differ.
    UnitsError
        If their attrs differ or are missing.
    """
    if len(tables) == 0:
        raise InputError("tables: expected at least one, found none.")
    first = tables[0]
    for i, table in enumerate(tables):
        _check_attrs(table, f"table {i}")
        if table.attrs != first.attrs:
            raise UnitsError(
                f"tables: expected equal attrs, found {first.attrs} and {table.attrs} (table {i}); "
                "samples of different temperature or unit cannot be mixed."
            )
        if list(table.columns) != list(first.columns) or table.index.names != first.index.names:
            raise InputError(
                f"tables: expected the states {list(first.columns)} everywhere, found "
                f"{list(table.columns)} in table {i}; evaluate all frames in all states."
            )
    out = pd.concat(list(tables))
    out.attrs = dict(first.attrs)
    return out


def _check_u_nk(u_nk: Any, name: str = "u_nk") -> _Table:
    if not isinstance(u_nk, pd.DataFrame):
        raise InputError(f"{name}: expected a pandas.DataFrame, found {type(u_nk).__name__}.")
    _check_attrs(u_nk, name)
    if u_nk.index.nlevels < 2 or u_nk.index.names[0] != "time":
        raise InputError(f"{name}: expected alchemlyb's index (time, lambda, ...), found {u_nk.index.names}.")
    if len(u_nk) == 0 or len(u_nk.columns) < 2:
        raise InputError(f"{name}: expected frames in at least two states, found {u_nk.shape}.")
    values = u_nk.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        n, k = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"{name}: expected finite reduced potentials, found {values[n, k]} in row {n}, state "
            f"{u_nk.columns[k]}."
        )
    column = {c: i for i, c in enumerate(u_nk.columns)}
    if len(column) != len(u_nk.columns):
        raise InputError(f"{name}: expected different states as columns, found a repeated one.")
    keys = [i[1:] if len(i) > 2 else i[1] for i in u_nk.index]
    try:
        state = np.array([column[k] for k in keys], dtype=np.int64)
    except KeyError as err:
        raise InputError(f"{name}: expected a column for every sampled state, found none for {err}.") from err
    times = u_nk.index.get_level_values(0).to_numpy(dtype=np.float64)
    order = np.lexsort((times, state))
    table = u_nk.iloc[order]
    table.attrs = dict(u_nk.attrs)
    return _Table(frame=table, state=state[order], order=order)


@dataclass(frozen=True)
class StateOperators:
    """What :func:`state_operators` returns.

    Attributes
    ----------
    lams : numpy.ndarray, shape (n_states,)
        Lambda of every sampled state, increasing; 0 and 1 are the table's first and last column.
    operators : list of numpy.ndarray, each of shape (n_frames,)
        O = u_1 - u_0 on its frames [kT], in time order.
    temperature : float
        [K]
    """

    lams: FloatArray
    operators: list[FloatArray]
    temperature: float


def state_operators(u_nk: pd.DataFrame) -> StateOperators:
    """O on the frames of every state, from a table of windows with linear mixing.

    Parameters
    ----------
    u_nk : pandas.DataFrame
        Reduced potentials [kT], alchemlyb standard form with attrs.

    Returns
    -------
    StateOperators

    Raises
    ------
    InputError
        For a table of another form, or one whose columns are not ``u_0 + lambda O``: then O of
        first and last column says nothing of the states between them.

    Examples
    --------
    >>> index = pd.MultiIndex.from_tuples([(0.0, 0.0), (0.0, 1.0)], names=["time", "lambda"])
    >>> table = pd.DataFrame([[1.0, 3.0], [1.0, 2.0]], index=index, columns=[0.0, 1.0])
    >>> table.attrs = {"temperature": 300.0, "energy_unit": "kT"}
    >>> [o.tolist() for o in state_operators(table).operators]
    [[2.0], [1.0]]
    """
    table = _check_u_nk(u_nk)
    u = table.frame.to_numpy(dtype=np.float64)
    shifts = u - u[:, :1]
    o = shifts[:, -1]
    square = float(o @ o)
    lams = (o @ shifts) / square if square > 0 else np.linspace(0.0, 1.0, u.shape[1])
    miss = np.abs(shifts - np.outer(o, lams)).max(axis=0)
    worst = int(miss.argmax())
    if miss[worst] > 1e-6 * max(1.0, float(np.abs(u).max())):
        raise InputError(
            "u_nk: expected states that mix linearly, u_k = u_0 + lambda_k (u_last - u_0), found a "
            f"deviation of {miss[worst]:.3g} kT in column {table.frame.columns[worst]}; use MBAR."
        )
    sampled = sorted(set(table.state.tolist()), key=lambda k: lams[k])
    return StateOperators(
        lams=np.clip(lams[sampled].round(12), 0.0, 1.0),  # rounding of the fit
        operators=[o[table.rows(k)] for k in sampled],
        temperature=_check_attrs(u_nk, "u_nk"),
    )


def _pymbar() -> Any:
    """pymbar, without the advertisements that it logs as warnings when it is imported."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import pymbar
        import pymbar.timeseries
    finally:
        logger.setLevel(level)
    return pymbar


def statistical_inefficiency(series: FloatArray) -> float:
    """g >= 1 of a time series by pymbar; 1 where nothing varies.

    Examples
    --------
    >>> statistical_inefficiency(np.zeros(10))
    1.0
    """
    timeseries = _pymbar().timeseries

    a = np.asarray(series, dtype=np.float64)
    if len(a) < 4 or np.ptp(a) <= 1e-10 * max(1.0, abs(a).max()):
        return 1.0
    return float(timeseries.statistical_inefficiency(a))


def _correlated_error(
    influence: FloatArray, n_k: npt.NDArray[np.int64], decorrelate: bool
) -> tuple[float, FloatArray]:
    """Standard error of a sum of per-frame influences, and g of each state.

    Frames are grouped by state, in time order. A state's g is the larger of its own and of the one
    pooled over all states: a short window that never saw a slow change finds no correlation.
    """
    timeseries = _pymbar().timeseries

    parts = np.split(influence, np.cumsum(n_k)[:-1])
    parts = [p - p.mean() for p in parts]
    g_k = np.ones(len(parts))
    if decorrelate:
        g_k = np.array([statistical_inefficiency(p) for p in parts])
        varied = [p for p in parts if len(p) >= 4 and np.ptp(p) > 0]
        if len(varied) > 1:
            scaled = [p / p.std() for p in varied]
            g_k = np.maximum(g_k, timeseries.statistical_inefficiency_multiple(scaled))
    variance = sum(g * len(p) * p.var(ddof=1) for g, p in zip(g_k, parts, strict=True) if len(p) > 1)
    return math.sqrt(variance), g_k


def _posteriors(
    u_kn: FloatArray, f_k: FloatArray, n_k: npt.NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Probability of each state given the frame, (n_states, n_frames), and ln of the mixture."""
    log_terms = f_k[:, None] - u_kn + np.log(n_k)[:, None]
    log_mixture = logsumexp(log_terms, axis=0)
    return np.exp(log_terms - log_mixture), log_mixture


def _mbar_influence(p_kn: FloatArray, n_k: npt.NDArray[np.int64]) -> FloatArray:
    """First-order effect of every frame on MBAR's f_k - f_0, shape (n_states, n_frames).

    MBAR solves sum_n p_k(n) = N_k; its Jacobian is sum_n (diag p - p p^T), singular along a
    common shift of f, which f_0 = 0 removes.
    """
    jacobian = np.diag(p_kn.sum(axis=1)) - p_kn @ p_kn.T
    centred = np.concatenate(
        [p - p.mean(axis=1, keepdims=True) for p in np.split(p_kn, np.cumsum(n_k)[:-1], axis=1)],
        axis=1,
    )
    influence = np.zeros_like(p_kn)
    influence[1:] = -np.linalg.solve(jacobian[1:, 1:], centred[1:])
    return influence


def estimate_free_energy(
    u_nk: pd.DataFrame,
    dHdl: pd.DataFrame | None = None,
    *,
    replica: Any = None,
    decorrelate: bool = True,
    min_overlap: float = MIN_OVERLAP,
    min_samples: int = MIN_SAMPLES,
) -> FreeEnergyEstimate:
    r"""Delta f between the first and the last state by MBAR, BAR and TI.

    The overlap :math:`A = \int 2 p_k p_{k+1}/(p_k + p_{k+1})` of neighbouring states is looked at
    before MBAR is even solved.

    Parameters
    ----------
    u_nk : pandas.DataFrame
        Reduced potentials [kT], alchemlyb standard form with attrs.
    dHdl : pandas.DataFrame, optional
        Reduced dH/dlambda [kT] of the same frames; gives TI (trapezoid rule: its error does not
        hold the error of the rule).
    replica : array_like of int, shape (n_rows,), optional
        Replica that each row comes from (``ExchangeRun.replica``). With exchange a slow change
        travels from state to state with its replica: errors then follow each replica in time,
        and ``inefficiency`` is the replicas' mean.
    decorrelate : bool
        Let errors account for correlation in time. Without it they are too small.
    min_overlap : float
        Gate on neighbouring states; 0 insists on numbers without it.
    min_samples : int
        Frames that every state must have, and independent frames that states must have on
        average.

    Returns
    -------
    FreeEnergyEstimate

    Raises
    ------
    PoorOverlapError
        If two neighbouring states overlap less than ``min_overlap``.
    ConvergenceError
        If there are too few independent frames, or MBAR does not converge.
    InputError, UnitsError
        If the tables are malformed, or do not belong together.

    Notes
    -----
    All frames are used. An error is that of a sum of first-order influences, one per frame, with
    the statistical inefficiency g of that very series in each window: subsampling by each window's
    own g would give most weight to the windows that happened not to see a slow change. BAR's error
    includes the covariance of neighbouring pairs, which share a window. All errors are one
    standard error and see only what the windows visited.

    References
    ----------
    M. R. Shirts, J. D. Chodera, Statistically optimal analysis of samples from multiple
    equilibrium states, 2008, doi:10.1063/1.2978177.
    P. V. Klimovich, M. R. Shirts, D. L. Mobley, Guidelines for the analysis of free energy
    calculations, 2015, doi:10.1007/s10822-015-9840-9 (the overlap matrix and its 0.03).
    """
    table = _check_u_nk(u_nk)
    temperature = _check_attrs(u_nk, "u_nk")
    sampled = sorted({int(k) for k in table.state})
    if len(sampled) < 2:
        raise InputError("u_nk: expected samples of at least two states, found one.")
    slopes = _check_dhdl(dHdl, u_nk, table)
    walkers = _check_replica(replica, table)
    columns = [table.frame.columns[k] for k in sampled]
    u = table.frame.to_numpy(dtype=np.float64)[:, sampled]
    n_k = np.array([len(table.rows(k)) for k in sampled])
    if n_k.min() < max(min_samples, 2):
        raise ConvergenceError(
            f"state {columns[int(n_k.argmin())]}: expected at least {max(min_samples, 2)} frames, "
            f"found {n_k.min()}; run longer windows."
        )

    def correlated(influence: FloatArray) -> tuple[float, FloatArray]:
        if walkers is None:
            return _correlated_error(influence, n_k, decorrelate)
        order, n_walker = walkers
        error, g = _correlated_error(influence[order], n_walker, decorrelate)
        return error, np.full(len(n_k), np.average(g, weights=n_walker))

    bar_value = 0.0
    bounds = np.concatenate([[0], np.cumsum(n_k)])
    # Neighbouring pairs share a window: their errors are added sample by sample.
    influence = np.zeros(len(u))
    neighbour = np.empty(len(columns) - 1)
    for k in range(len(columns) - 1):
        here, there = slice(*bounds[k : k + 2]), slice(*bounds[k + 1 : k + 3])
        w_f, w_r = u[here, k + 1] - u[here, k], u[there, k] - u[there, k + 1]
        one = _bar(w_f, w_r)
        bar_value += one.delta_f
        neighbour[k] = one.overlap
        forward, reverse = _bar_influence(w_f, w_r, one.delta_f)
        influence[here] += forward
        influence[there] += reverse
    if not neighbour.min() >= min_overlap:
        k = int(neighbour.argmin())
        raise PoorOverlapError(
            f"states {columns[k]} and {columns[k + 1]}: expected an overlap of at least "
            f"{min_overlap:g}, found {neighbour[k]:.2e}; add states between them, or run longer. "
            "(min_overlap=0 returns the numbers all the same; do not trust them.)"
        )
    mbar = _fit_mbar(u.T, n_k)
    f_k = np.asarray(mbar.f_k, dtype=np.float64)
    p_kn, _ = _posteriors(u.T, f_k, n_k)
    psi = _mbar_influence(p_kn, n_k)
    pairs = [correlated(psi[k]) for k in range(1, len(columns))]
    d_f_k = np.array([0.0, *(error for error, _ in pairs)])
    inefficiency = pairs[-1][1]
    n_decorrelated = np.floor(n_k / inefficiency).astype(np.int64)
    # Overlapping windows stand in for each other: their mean counts, not the poorest one.
    if n_decorrelated.mean() < min_samples:
        k = int(n_decorrelated.argmin())
        raise ConvergenceError(
            f"expected at least {min_samples} independent frames per state, found "
            f"{n_decorrelated.mean():.1f} on average ({n_decorrelated[k]} of {n_k[k]} in state "
            f"{columns[k]}, statistical inefficiency {inefficiency[k]:.1f}); run longer windows."
        )
    estimates = {
        "MBAR": Estimate("MBAR", float(f_k[-1] - f_k[0]), float(d_f_k[-1]), temperature),
        "BAR": Estimate("BAR", bar_value, correlated(influence)[0], temperature),
    }
    means = errors = None
    if slopes is not None:
        parts = np.split(slopes, np.cumsum(n_k)[:-1])
        means = np.array([p.mean(axis=0) for p in parts])
        # Along the order of the columns: alchemlyb's TI sorts by lambda, which need not be the
        # path when there are several.
        lam = np.array([c if isinstance(c, tuple) else (c,) for c in columns], dtype=np.float64)
        step = np.diff(lam, axis=0)
        weight = 0.5 * (np.pad(step, ((1, 0), (0, 0))) + np.pad(step, ((0, 1), (0, 0))))
        errors = np.array(
            [
                [
                    _correlated_error(p[:, i] / len(p), np.array([len(p)]), decorrelate)[0]
                    for i in range(slopes.shape[1])
                ]
                for p in parts
            ]
        )
        ti_influence = (slopes * np.repeat(weight / n_k[:, None], n_k, axis=0)).sum(axis=1)
        # Of each state's mean, so that a replica's series does not jump with its states.
        centre = [part.mean() for part in np.split(ti_influence, np.cumsum(n_k)[:-1])]
        estimates["TI"] = Estimate(
            "TI",
            float((weight * means).sum()),
            correlated(ti_influence - np.repeat(centre, n_k))[0],
            temperature,
        )
    return FreeEnergyEstimate(
        temperature=temperature,
        states=tuple(columns),
        estimates=estimates,
        f_k=f_k - f_k[0],
        d_f_k=d_f_k,
        overlap=(p_kn / n_k[:, None]) @ p_kn.T,
        neighbour_overlap=neighbour,
        n_frames=n_k,
        n_decorrelated=n_decorrelated,
        inefficiency=inefficiency,
        n_effective=np.asarray(mbar.compute_effective_sample_number()),
        dhdl=means,
        d_dhdl=errors,
    )


def _check_replica(replica: Any, table: _Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """Rows of the sorted table ordered by replica, then time; and the number of rows of each."""
    if replica is None:
        return None
    labels = np.asarray(replica)
    if labels.shape != (len(table.order),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"replica: expected one integer per row of u_nk ({len(table.order)}), found "
            f"{labels.dtype} {labels.shape}; take it from the run that u_nk is from."
        )
    labels = labels[table.order]
    times = table.frame.index.get_level_values(0).to_numpy(dtype=np.float64)
    counts = np.unique(labels, return_counts=True)[1]
    if counts.min() < 2:
        raise InputError("replica: expected at least two frames of every replica, found one.")
    return np.lexsort((times, labels)), counts


def _check_dhdl(dhdl: pd.DataFrame | None, u_nk: pd.DataFrame, table: _Table) -> FloatArray | None:
    """Rows of dHdl in the order of the sorted table."""
    if dhdl is None:
        return None
    if not isinstance(dhdl, pd.DataFrame):
        raise InputError(f"dHdl: expected a pandas.DataFrame, found {type(dhdl).__name__}.")
    _check_attrs(dhdl, "dHdl")
    if dhdl.attrs != u_nk.attrs:
        raise UnitsError(
            f"dHdl: expected the attrs of u_nk, {u_nk.attrs}, found {dhdl.attrs}; they are of different runs."
        )
    if len(dhdl) != len(u_nk) or not dhdl.index.equals(u_nk.index):
        raise InputError(
            f"dHdl: expected the frames of u_nk ({len(u_nk)}), found {len(dhdl)} with another "
            "index; take both tables from one run."
        )
    values = dhdl.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("dHdl: expected finite numbers, found NaN or infinity.")
    if dhdl.shape[1] != u_nk.index.nlevels - 1:
        raise InputError(
            f"dHdl: expected {u_nk.index.nlevels - 1} columns, one per lambda, found {dhdl.shape[1]}."
        )
    return values[table.order]


def _fit_mbar(u_kn: FloatArray, n_k: npt.NDArray[np.int64]) -> Any:
    MBAR = _pymbar().MBAR
    from pymbar.utils import ConvergenceError as NotConverged
    from pymbar.utils import ParameterError

    # BAR along the chain is a start from which MBAR's solver does not get lost.
    start = np.zeros(len(n_k))
    bounds = np.concatenate([[0], np.cumsum(n_k)])
    for k in range(len(n_k) - 1):
        here, there = slice(*bounds[k : k + 2]), slice(*bounds[k + 1 : k + 3])
        w_f = u_kn[k + 1, here] - u_kn[k, here]
        w_r = u_kn[k, there] - u_kn[k + 1, there]
        start[k + 1] = start[k] + _bar(w_f, w_r).delta_f
    try:
        return MBAR(u_kn, n_k, initial_f_k=start, solver_protocol="robust")
    except (NotConverged, ParameterError, np.linalg.LinAlgError, FloatingPointError) as err:
        raise ConvergenceError(
            f"MBAR: expected a solution, found {err}; the states may not overlap at all: add "
            "windows or run longer."
        ) from err


def _check_work(name: str, work: Any) -> FloatArray:
    try:
        w = np.asarray(work, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected numbers [kT], found {err}.") from err
    if w.ndim != 1 or len(w) < 2 or not np.isfinite(w).all():
        raise InputError(
            f"{name}: expected at least two finite reduced works [kT] in one dimension, found "
            f"shape {w.shape}" + ("." if np.isfinite(w).all() else " with NaN or infinity.")
        )
    return w


def _bar(w_forward: FloatArray, w_reverse: FloatArray) -> BarResult:
    n_f, n_r = len(w_forward), len(w_reverse)
    m = math.log(n_f / n_r)

    def balance(delta_f: float) -> float:
        # Logarithms of the two sums: no overflow however far the ensembles are apart.
        left = logsumexp(log_expit(-(m + w_forward - delta_f)))
        right = logsumexp(log_expit(-(-m + w_reverse + delta_f)))
        return float(left - right)

    # The balance rises strictly from -inf to inf; outside the works it has its sign.
    low = min(w_forward.min(), (-w_reverse).min()) - abs(m) - 1.0
    high = max(w_forward.max(), (-w_reverse).max()) + abs(m) + 1.0
    while balance(low) > 0:
        low -= 2.0 * (high - low)
    while balance(high) < 0:
        high += 2.0 * (high - low)
    delta_f = float(brentq(balance, low, high, xtol=1e-12, rtol=1e-14))
    forward, reverse = _bar_influence(w_forward, w_reverse, delta_f)
    halves = 2 * expit(-(w_forward - delta_f)), 2 * expit(-(w_reverse + delta_f))
    # p0 and p1 each give A; weights by size keep the better sampled end in charge.
    overlap = (n_f * halves[0].mean() + n_r * halves[1].mean()) / (n_f + n_r)
    d_overlap = math.sqrt(n_f * halves[0].var() + n_r * halves[1].var()) / (n_f + n_r)
    return BarResult(
        delta_f=delta_f,
        d_delta_f=math.sqrt(float((forward**2).sum() + (reverse**2).sum())),
        overlap=float(overlap),
        d_overlap=float(d_overlap),
        n_forward=n_f,
        n_reverse=n_r,
    )


def _bar_influence(
    w_forward: FloatArray, w_reverse: FloatArray, delta_f: float
) -> tuple[FloatArray, FloatArray]:
    """First-order effect of every sample on BAR's Delta f; their squares sum to its variance.

    Delta f = ln <f>_1 - ln <f>_0 + const with Fermi functions f at fixed argument.
    """
    m = math.log(len(w_forward) / len(w_reverse))
    found = []
    for sign, log_f in (
        (-1.0, log_expit(-(m + w_forward - delta_f))),
        (1.0, log_expit(-(-m + w_reverse + delta_f))),
    ):
        n = len(log_f)
        found.append(sign * (np.exp(log_f - logsumexp(log_f)) - 1.0 / n))
    return found[0], found[1]


def bar_between(
    work_forward: Any,
    work_reverse: Any,
    *,
    decorrelate: bool = True,
    min_overlap: float = MIN_OVERLAP,
) -> BarResult:
    r"""BAR between two ensembles from reduced works, refused where they do not overlap.

    .. math:: A = \int \frac{2 p_0 p_1}{p_0 + p_1} dx
              = \Big\langle \frac{2}{1 + e^{w_f - \Delta f}} \Big\rangle_0
              = \Big\langle \frac{2}{1 + e^{w_r + \Delta f}} \Big\rangle_1

    Parameters
    ----------
    work_forward : array_like, shape (n_0,)
        u_1 - u_0 of samples of ensemble 0 [kT], in time order if ``decorrelate``.
    work_reverse : array_like, shape (n_1,)
        u_0 - u_1 of samples of ensemble 1 [kT].
    decorrelate : bool
    min_overlap : float
        Gate on A; 0 insists.

    Returns
    -------
    BarResult

    Raises
    ------
    PoorOverlapError
        If A is below ``min_overlap``.
    InputError
        For works that are not finite one-dimensional arrays.

    References
    ----------
    C. H. Bennett, Efficient estimation of free energy differences from Monte Carlo data, 1976,
    doi:10.1016/0021-9991(76)90078-4.

    Examples
    --------
    >>> round(bar_between([1.0, 1.0], [-1.0, -1.0]).delta_f, 6)
    1.0
    """
    w_f, w_r = _check_work("work_forward", work_forward), _check_work("work_reverse", work_reverse)
    result = _bar(w_f, w_r)
    if decorrelate:
        n_k = np.array([len(w_f), len(w_r)])
        series = np.concatenate(_bar_influence(w_f, w_r, result.delta_f))
        error, g_k = _correlated_error(series, n_k, True)
        result = replace(
            result,
            d_delta_f=error,
            d_overlap=result.d_overlap * math.sqrt(g_k.max()),
        )
    if not result.overlap >= min_overlap:
        raise PoorOverlapError(
            f"BAR: expected an overlap A of at least {min_overlap:g}, found {result.overlap:.2e}; "
            "put states between the two ensembles, or bring the learned end closer to the "
            "classical one. (min_overlap=0 returns the number all the same; do not trust it.)"
        )
    return result


def end_correction(
    learned: Estimate | FreeEnergyEstimate,
    *,
    work_0: tuple[Any, Any] | None = None,
    work_1: tuple[Any, Any] | None = None,
    decorrelate: bool = True,
    min_overlap: float = MIN_OVERLAP,
) -> EndCorrection:
    r"""From Delta f between learned end states to Delta f between the classical ones.

    .. math:: \Delta f_{classical} = \Delta f_{learned} + c_1 - c_0, \qquad
              c_k = f^{classical}_k - f^{learned}_k \text{ by BAR}

    Parameters
    ----------
    learned : Estimate or FreeEnergyEstimate
        Of the learned windows (MBAR's is taken).
    work_0, work_1 : (forward, reverse), optional
        Reduced works [kT] at each end: ``u_classical - u_learned`` on learned frames, and
        ``u_learned - u_classical`` on classical frames. None where the learned end is exactly the
        classical one (mode "operator" at lambda = 0).
    decorrelate : bool
    min_overlap : float
        Gate on each end's overlap.

    Returns
    -------
    EndCorrection

    Raises
    ------
    PoorOverlapError
        If an end's overlap is below the gate; the message says which.
    InputError
        For malformed works.
    """
    base = learned.estimates["MBAR"] if isinstance(learned, FreeEnergyEstimate) else learned
    if not isinstance(base, Estimate):
        raise InputError(
            f"learned: expected an Estimate or FreeEnergyEstimate, found {type(learned).__name__}."
        )
    found: list[BarResult | None] = []
    for k, work in enumerate((work_0, work_1)):
        if work is None:
            found.append(None)
            continue
        if not isinstance(work, tuple | list) or len(work) != 2:
            raise InputError(f"work_{k}: expected (forward, reverse), found {type(work).__name__}.")
        try:
            found.append(bar_between(work[0], work[1], decorrelate=decorrelate, min_overlap=min_overlap))
        except PoorOverlapError as err:
            raise PoorOverlapError(f"end state {k}, learned -> classical: {err}") from err
        except InputError as err:
            raise InputError(f"work_{k}: {err}") from err
    value, variance = base.delta_f, base.d_delta_f**2
    for sign, result in zip((-1.0, 1.0), found, strict=True):
        if result is not None:
            value += sign * result.delta_f
            variance += result.d_delta_f**2
    return EndCorrection(
        learned=base,
        correction_0=found[0],
        correction_1=found[1],
        corrected=Estimate(f"{base.method} + end correction", value, math.sqrt(variance), base.temperature),
    )


@dataclass(frozen=True)
class Reweighted:
    """What :func:`reweight` returns.

    Attributes
    ----------
    f : numpy.ndarray, shape (n_targets,)
        f of each target relative to the first [kT].
    n_effective : numpy.ndarray, shape (n_targets,)
        Kish's effective number of frames behind each target.
    n_frames : int
    """

    f: FloatArray
    n_effective: FloatArray
    n_frames: int
    _influence: FloatArray = field(repr=False)
    _n_k: npt.NDArray[np.int64] = field(repr=False)
    _decorrelate: bool = field(repr=False)

    def contrast(self, coefficients: Sequence[float]) -> tuple[float, float]:
        """Value and standard error of ``sum_i c_i f_i`` [kT], with all covariances.

        ``[-1, 1]`` is the difference of two targets; ``[1, -1, -1, 1]`` is the paired difference
        of two differences, (f_3 - f_2) - (f_1 - f_0).

        Raises
        ------
        InputError
            If the coefficients do not match the targets or do not sum to 0.
        """
        c = np.asarray(coefficients, dtype=np.float64)
        if c.shape != self.f.shape or abs(c.sum()) > 1e-9:
            raise InputError(
                f"coefficients: expected {len(self.f)} numbers that sum to 0, found {c.tolist()}."
            )
        error, _ = _correlated_error(c @ self._influence, self._n_k, self._decorrelate)
        return float(c @ self.f), error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "f": self.f.tolist(),
            "n_effective": self.n_effective.tolist(),
            "n_frames": self.n_frames,
        }


def reweight(
    u_nk: pd.DataFrame, u_target: Any, *, decorrelate: bool = True, min_effective: float = 20.0
) -> Reweighted:
    """Free energies of other potentials from the frames of one run (MBAR perturbation).

    The same frames carry a classical and a learned Hamiltonian, so their difference is paired:
    pass both ends of both as four targets and take a contrast.

    Parameters
    ----------
    u_nk : pandas.DataFrame
        Of the run that was sampled [kT].
    u_target : array_like, shape (n_rows, n_targets)
        Reduced potential of every row of ``u_nk`` in each target [kT].
    decorrelate : bool
        Let errors account for correlation in time.
    min_effective : float
        Gate on the effective number of frames behind each target; 0 insists.

    Returns
    -------
    Reweighted

    Raises
    ------
    PoorOverlapError
        If a target rests on too few frames.
    InputError, UnitsError
        For malformed tables.
    """
    table = _check_u_nk(u_nk)
    target = np.asarray(u_target, dtype=np.float64)
    if target.ndim != 2 or len(target) != len(u_nk) or not np.isfinite(target).all():
        raise InputError(
            f"u_target: expected finite numbers of shape ({len(u_nk)}, n_targets), found {target.shape}."
        )
    u_ln = target[table.order].T
    sampled = sorted({int(k) for k in table.state})
    n_k = np.array([len(table.rows(k)) for k in sampled])
    u_kn = table.frame.to_numpy(dtype=np.float64)[:, sampled].T
    f_k = np.asarray(_fit_mbar(u_kn, n_k).f_k) if len(sampled) > 1 else np.zeros(1)
    p_kn, log_mixture = _posteriors(u_kn, f_k, n_k)
    log_w = -u_ln - log_mixture
    f = -logsumexp(log_w, axis=1)
    w_ln = np.exp(log_w + f[:, None])
    n_effective = 1.0 / (w_ln**2).sum(axis=1)
    if not n_effective.min() >= min_effective:
        k = int(n_effective.argmin())
        raise PoorOverlapError(
            f"target {k}: expected at least {min_effective:g} effective frames, found "
            f"{n_effective[k]:.1f}; sample closer to it."
        )
    influence = (w_ln @ p_kn.T) @ _mbar_influence(p_kn, n_k) - w_ln
    return Reweighted(
        f=f - f[0],
        n_effective=n_effective,
        n_frames=len(u_nk),
        _influence=influence,
        _n_k=n_k,
        _decorrelate=decorrelate,
    )


def standard_score(a: Estimate, b: Estimate) -> float:
    """(a - b) in combined standard errors, of two independent estimates.

    Raises
    ------
    UnitsError
        If their temperatures differ.

    Examples
    --------
    >>> standard_score(Estimate("MBAR", 1.0, 0.3, 300.0), Estimate("BAR", 0.0, 0.4, 300.0))
    2.0
    """
    if a.temperature != b.temperature:
        raise UnitsError(f"estimates: expected one temperature, found {a.temperature} and {b.temperature} K.")
    error = math.hypot(a.d_delta_f, b.d_delta_f)
    if error == 0:
        return 0.0 if a.delta_f == b.delta_f else math.copysign(math.inf, a.delta_f - b.delta_f)
    return (a.delta_f - b.delta_f) / error
