import math
import sys
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest

from openmm_diffforce import analysis as a
from openmm_diffforce.alanine import alanine_dipeptide, phi_atoms, psi_atoms
from openmm_diffforce.errors import ConvergenceError, InputError, MissingDependencyError
from openmm_diffforce.systems import forces, sample
from openmm_diffforce.units import MOLAR_GAS_CONSTANT

RNG = np.random.default_rng


@pytest.fixture(scope="module")
def run() -> tuple[object, np.ndarray, object]:
    topology, x, system = alanine_dipeptide()
    frames = sample(system, topology, x, temperature=300.0, n_frames=400, interval=100, seed=5)
    return topology, frames, system


def test_phi_psi_is_the_torsion_of_the_named_atoms(run: tuple) -> None:
    topology, x, _ = run
    trajectory = a.trajectory_of(x, topology)
    angles = a.phi_psi(trajectory)
    expected = md.compute_dihedrals(trajectory, [phi_atoms(topology), psi_atoms(topology)])
    assert np.allclose(angles, expected)
    with pytest.raises(InputError, match="residue"):
        a.phi_psi(trajectory, residue=1)


def test_trajectories_come_part_by_part(run: tuple, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    topology, x, _ = run
    path = tmp_path / "a.dcd"
    a.trajectory_of(x[:25], topology).save_dcd(str(path))
    top = md.Topology.from_openmm(topology)
    assert a.count_frames(path) == 25
    parts = list(a.iterate_trajectory(path, top, chunk=10))
    assert [p.n_frames for p in parts] == [10, 10, 5]
    np.testing.assert_allclose(np.concatenate([p.xyz for p in parts]), x[:25], atol=1e-6)
    for name in ("none.dcd", "a.txt"):
        assert a.count_frames(tmp_path / name) == 0
        with pytest.raises(InputError, match=f"{name}: expected a trajectory"):
            list(a.iterate_trajectory(tmp_path / name, top))
    (tmp_path / "a.h5").write_text("no")
    with pytest.raises((InputError, MissingDependencyError), match=r"a\.h5"):  # with or without PyTables
        list(a.iterate_trajectory(tmp_path / "a.h5", top))
    assert capfd.readouterr() == ("", "")  # the readers' remarks are no result


def test_rmsd_ignores_rigid_motion_and_leaves_the_input(run: tuple) -> None:
    topology, x, _ = run
    angle = 0.7
    rotation = np.array([[math.cos(angle), -math.sin(angle), 0],
                         [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])  # fmt: skip
    trajectory = a.trajectory_of(np.stack([x[0], x[0] @ rotation.T + 0.3, x[1]]), topology)
    before = trajectory.xyz.copy()
    found = a.rmsd(trajectory)
    assert found[:2] == pytest.approx([0.0, 0.0], abs=2e-4)
    assert found[2] > 0.005
    assert np.array_equal(trajectory.xyz, before)
    assert a.rmsd(trajectory, atoms="all")[2] != found[2]
    with pytest.raises(InputError, match="atoms"):
        a.rmsd(trajectory, atoms=[99])
    with pytest.raises(InputError, match="atoms"):
        a.rmsd(trajectory, atoms="light")


def test_distribution_integrates_to_one_and_has_honest_errors() -> None:
    rms = []
    for seed in range(20):
        x = RNG(seed).normal(size=20000)
        d = a.distribution(x, bins=20, limits=(-5.0, 5.0), n_blocks=40)
        assert (d.density * np.diff(d.edges)).sum() == pytest.approx(1.0, abs=1e-3)
        cdf = np.array([0.5 * math.erf(edge / math.sqrt(2)) for edge in d.edges])
        z = (d.density - np.diff(cdf) / 0.5)[5:15] / d.error[5:15]
        rms.append(math.sqrt((z**2).mean()))
    assert 0.8 < np.mean(rms) < 1.25
    assert a.distribution(np.zeros(10), bins=3).density.max() > 0
    for bad in ([], [np.nan] * 9, np.zeros((3, 3))):
        with pytest.raises(InputError, match="values"):
            a.distribution(bad)
    with pytest.raises(InputError, match="limits"):
        a.distribution(x, limits=(1.0, 0.0))


def test_jensen_shannon_by_hand_and_its_noise_floor() -> None:
    low, high = np.full((4, 2), -1.0), np.full((4, 2), 1.0)
    mixed = np.concatenate([low[:2], high[:2]])
    # p = (1, 0), q = (1/2, 1/2): 1/2 ln(4/3) + 1/4 ln(2/3) + 1/4 ln 2.
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert a.jensen_shannon(low, mixed) == pytest.approx(expected, rel=1e-12)
    assert a.jensen_shannon(mixed, low) == pytest.approx(expected, rel=1e-12)
    assert a.jensen_shannon(low, high) == pytest.approx(math.log(2))
    # Two samples of the uniform distribution: about (24^2 - 1)/8 (1/n + 1/n).
    x, y = (RNG(s).uniform(-np.pi, np.pi, size=(10000, 2)) for s in (1, 2))
    assert a.jensen_shannon(x, y) == pytest.approx(575 / 8 * 2e-4, rel=0.2)
    # Angles live on a circle.
    assert a.jensen_shannon(x, x + 0) == 0.0
    assert a.jensen_shannon(np.full((3, 2), np.pi), np.full((3, 2), -np.pi)) == 0.0


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.zeros((0, 2)), [[np.nan, 0.0]], [[170.0, -80.0]]])
def test_bad_angles(bad: object) -> None:
    with pytest.raises(InputError, match="angles"):
        a.jensen_shannon(bad, np.zeros((3, 2)))
    with pytest.raises(InputError, match="angles"):
        a.basin_fraction(bad)


def test_basin_fraction_across_180() -> None:
    angles = np.radians([[170.0, 0.0], [-170.0, 0.0], [0.0, 0.0], [60.0, 0.0]])
    assert a.basin_fraction(angles, phi=(150.0, -150.0)) == 0.5
    assert a.basin_fraction(angles, phi=(30.0, 90.0), psi=(-10.0, 10.0)) == 0.25


@pytest.mark.parametrize("method", ["laplacian", "virial"])
def test_configurational_temperature_of_amber(run: tuple, method: str) -> None:
    _, x, system = run
    if method == "laplacian":
        x = x[::4]
    found = a.configurational_temperature(x, lambda y: forces(system, y), method=method)
    assert abs(found.temperature - 300.0) < 3.5 * found.error
    assert found.error < (15.0 if method == "laplacian" else 70.0)
    # Forces 20 % too weak for these frames read as another temperature.
    wrong = a.configurational_temperature(x, lambda y: 0.8 * forces(system, y), method=method)
    assert wrong.temperature == pytest.approx(0.8 * found.temperature, rel=1e-6)


def test_configurational_temperature_has_calibrated_errors() -> None:
    k, sd = 500.0, 0.07
    exact = k * sd**2 / MOLAR_GAS_CONSTANT
    z = []
    for seed in range(40):
        x = RNG(seed).normal(size=(200, 3, 3)) * sd
        found = a.configurational_temperature(x, lambda y: -k * y)
        z.append((found.temperature - exact) / found.error)
    assert abs(np.mean(z)) < 0.6
    assert 0.6 < np.std(z) < 1.4


def test_configurational_temperature_refuses() -> None:
    x = RNG(0).normal(size=(10, 2, 3))
    with pytest.raises(InputError, match="positions"):
        a.configurational_temperature(x[:2], lambda y: -y)
    with pytest.raises(InputError, match="method"):
        a.configurational_temperature(x, lambda y: -y, method="kinetic")
    with pytest.raises(InputError, match="forces"):
        a.configurational_temperature(x, lambda y: y[:, 0])
    with pytest.raises(InputError, match="step"):
        a.configurational_temperature(x, lambda y: -y, step=-1.0)
    with pytest.raises(ConvergenceError, match="Laplacian"):
        a.configurational_temperature(x, lambda y: y)


def test_trajectories_in_and_out(run: tuple, tmp_path: Path) -> None:
    topology, x, _ = run
    trajectory = a.trajectory_of(x[:3], topology)
    trajectory.save_dcd(str(tmp_path / "t.dcd"))
    trajectory[0].save_pdb(str(tmp_path / "t.pdb"))
    back = a.load_trajectory(tmp_path / "t.dcd", tmp_path / "t.pdb")
    assert np.allclose(back.xyz, x[:3], atol=1e-5)
    assert np.allclose(a.phi_psi(back), a.phi_psi(trajectory), atol=1e-3)
    with pytest.raises(InputError, match="expected a trajectory"):
        a.load_trajectory(tmp_path / "none.dcd", tmp_path / "t.pdb")
    with pytest.raises(InputError, match="positions"):
        a.trajectory_of(x[:, :5], topology)
    with pytest.raises(InputError, match="topology"):
        a.trajectory_of(x, "topology")
    with pytest.raises(InputError, match="mdtraj"):
        a.phi_psi(x)


def test_figures_draw_what_they_are_given_without_pyplot() -> None:
    angles = {"amber14": RNG(0).uniform(-1, 1, (500, 2)), "learned": RNG(1).normal(size=(500, 2))}
    weak = np.array([[0.98, 0.02, 0.0], [0.02, 0.5, 0.48], [0.0, 0.48, 0.52]])
    figures = {
        "overlap": a.overlap_figure(weak, [0.0, 0.5, 1.0]),
        "phi": a.phi_psi_figure(angles, divergences={"learned": 0.012}),
        "dhdl": a.dhdl_figure({"classical": ([0, 1], [1, 2], [0.1, 0.1])}),
        "delta": a.delta_f_figure({"a": (1.0, 0.1), "b": (1.2, 0.2)}, reference="a"),
    }
    for figure in figures.values():
        assert a.figure_bytes(figure).startswith(b"<?xml")
        assert a.figure_bytes(figure, file_format="png").startswith(b"\x89PNG")
    # The two cells below the gate are outlined.
    assert len(figures["overlap"].axes[0].patches) == 2
    assert len(figures["phi"].axes) == 3
    assert [t.get_text() for t in figures["delta"].axes[0].get_yticklabels()] == ["a", "b"]
    lines = figures["dhdl"].axes[0].lines
    assert list(lines[0].get_ydata()) == [1, 2]
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_figures_refuse() -> None:
    with pytest.raises(InputError, match="square"):
        a.overlap_figure(np.zeros((2, 3)))
    with pytest.raises(InputError, match="labels"):
        a.overlap_figure(np.eye(2), [0.0])
    with pytest.raises(InputError, match="at least one"):
        a.phi_psi_figure({})
    with pytest.raises(InputError, match="one length"):
        a.dhdl_figure({"x": ([0], [1, 2], [0.1])})
    with pytest.raises(InputError, match="reference"):
        a.delta_f_figure({"a": (1.0, 0.1)}, reference="b")
    with pytest.raises(InputError, match="finite value"):
        a.delta_f_figure({"a": (math.nan, 0.1)})
    with pytest.raises(InputError, match="file_format"):
        a.figure_bytes(a.delta_f_figure({"a": (1.0, 0.1)}), file_format="gif")


def test_replica_figure() -> None:
    states = np.random.default_rng(0).permuted(np.tile(np.arange(9), (50, 1)), axis=1)
    figure = a.replica_figure(states, n_shown=4)
    assert [x.get_ylabel() for x in figure.axes] == ["replica 0", "replica 3", "replica 5", "replica 8"]
    assert len(a.replica_figure(states[:, :1]).axes) == 1
    for bad in ([], [0, 1], [[0.5]]):
        with pytest.raises(InputError, match="state_of_replica"):
            a.replica_figure(bad)


def test_autocorrelation_of_a_known_process() -> None:
    """AR(1): C(l) = rho^l, its sum up to a lag; and a vector series counts all components."""
    random, rho = np.random.default_rng(11), 0.9
    x = np.empty((8, 4000, 2))
    x[:, 0] = random.standard_normal((8, 2))
    for t in range(1, 4000):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * random.standard_normal((8, 2))
    for series in (x[..., 0], x):
        found = a.autocorrelation(series, 60, interval=0.5)
        exact = rho ** np.arange(61)
        assert found.n_runs == 8
        assert abs((found.correlation - exact)[1:] / found.error[1:]).max() < 4.5
        assert abs(found.time - np.trapezoid(exact, dx=0.5)) < 4 * found.time_error
        assert 0 < found.time_error < 0.6
    assert found.lag[-1] == 30.0


@pytest.mark.parametrize(
    ("series", "n_lags", "message"),
    [
        (np.zeros((1, 10)), 2, "series"),
        (np.zeros(10), 2, "series"),
        (np.full((2, 10), np.nan), 2, "series"),
        (np.zeros((2, 10)), 2, "constant"),
        (np.ones((2, 10)), 10, "n_lags"),
        (np.ones((2, 10)), 1.5, "n_lags"),
    ],
)
def test_autocorrelation_refuses(series: np.ndarray, n_lags: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        a.autocorrelation(series, n_lags)
