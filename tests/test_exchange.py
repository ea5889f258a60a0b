"""Replica exchange and expanded ensemble: ensembles, restart, bad input."""

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm as mm
import pandas as pd
import pytest

from openmm_diffforce.alchemy import lambda_states
from openmm_diffforce.errors import ConvergenceError, InputError, NotConservativeError, ResumeError
from openmm_diffforce.estimate import estimate_free_energy, read_replicas
from openmm_diffforce.exchange import run_expanded_ensemble, run_replica_exchange
from openmm_diffforce.testing import HarmonicEndStates
from openmm_diffforce.units import thermal_energy

from . import tiny
from .test_systems import topology_of
from .test_windows import Stop, stop_after
from .test_workers import learned_system

KT = thermal_energy(300.0)
ENDS = HarmonicEndStates((400.0, 1600.0), (0.0, 0.1), n_dim=3)


def wells() -> mm.System:
    """One particle; S_lambda = 1/2 K(lambda) |x - m(lambda)|^2 with K geometric, m linear."""
    system = mm.System()
    system.addParticle(10.0)
    force = mm.CustomCompoundBondForce(  # unlike CustomExternalForce it has derivatives
        1, f"{KT!r}*0.5*k*((x1-m)^2+(y1-m)^2+(z1-m)^2); k=400*exp(lambda*log(4)); m=0.1*lambda"
    )
    force.addGlobalParameter("lambda", 0.0)
    force.addEnergyParameterDerivative("lambda")
    force.addBond([0])
    system.addForce(force)
    return system


def run(folder: Path, method: Any = run_replica_exchange, **kwargs: Any) -> Any:
    args: dict[str, Any] = {
        "system": wells(), "topology": topology_of(1), "positions": np.zeros((1, 3)),
        "states": lambda_states(3), "temperature": 300.0, "out_dir": folder, "n_iterations": 12,
        "steps_per_iteration": 20, "n_equil": 50, "progress": False, **kwargs,
    }  # fmt: skip
    positional = [args.pop(k) for k in ("system", "topology", "positions", "states")]
    return method(*positional, **args)


# ------------------------------------------------------------------------------------- ensembles


def check_ensembles(result: Any) -> None:
    """Each state's radius against its Gaussian, in standard errors; Delta f against the exact."""
    estimate = estimate_free_energy(result.u_nk, result.dHdl, replica=result.replica)
    for name in ("MBAR", "BAR"):
        one = estimate.estimates[name]
        assert abs(one.delta_f - ENDS.delta_f) < 3 * one.d_delta_f
        assert one.d_delta_f < 0.15
    top = str(result.topology)
    for k, state in enumerate(result.states):
        x = md.load(str(result.trajectories[k]), top=top).xyz[:, 0].astype(float)
        lam = state["lambda"]
        stiffness = 400.0 * 4.0**lam
        g = estimate.inefficiency[k]
        n = len(x) / max(g, 1.0)
        z_mean = (x.mean(axis=0) - 0.1 * lam) * math.sqrt(n * stiffness)
        variance = ((x - 0.1 * lam) ** 2).sum(axis=1) * stiffness
        z_variance = (variance.mean() - 3.0) / math.sqrt(6.0 / n)
        assert abs(z_mean).max() < 4
        assert abs(z_variance) < 4
        u = 0.5 * stiffness * ((x - 0.1 * lam) ** 2).sum(axis=1)
        assert np.allclose(result.u_nk.xs(lam, level="lambdas")[lam], u, atol=1e-3)
        slope = math.log(4.0) * u - 0.1 * stiffness * (x - 0.1 * lam).sum(axis=1)
        assert np.allclose(result.dHdl.xs(lam, level="lambdas")["dHdl"], slope, atol=2e-3)


def test_replica_exchange_keeps_every_ensemble(tmp_path: Path) -> None:
    result = run(
        tmp_path, n_iterations=1500, steps_per_iteration=100, timestep=0.004, friction=10.0,
        states=lambda_states(4), seed=7,
    )  # fmt: skip
    check_ensembles(result)
    swaps = result.swaps
    assert np.allclose(swaps.transition.sum(axis=1), 1.0)
    assert (swaps.occupancy == 0.25).all()
    assert (swaps.neighbour_acceptance > 0.1).all()
    assert swaps.round_trips.sum() > 50
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["what"] == "replica exchange"
    assert record["swaps"]["round_trips"] == swaps.round_trips.tolist()
    assert record["files_sha256"].keys() >= {"u_nk", "dHdl", "state_000", "exchange"}


def test_command_line_follows_replicas(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from openmm_diffforce.cli import app

    result = run(tmp_path, n_iterations=100, steps_per_iteration=100, timestep=0.004, friction=10.0)
    shown = CliRunner().invoke(app, ["estimate", str(tmp_path), "--json"])
    found = json.loads(shown.stdout)["estimates"]["MBAR"]["kT"]["error"]
    expected = estimate_free_energy(result.u_nk, result.dHdl, replica=result.replica).d_delta_f
    assert found == pytest.approx(expected)
    assert found != estimate_free_energy(result.u_nk, result.dHdl).d_delta_f


def test_expanded_ensemble_keeps_every_ensemble(tmp_path: Path) -> None:
    before = random.getstate()
    result = run(
        tmp_path, run_expanded_ensemble, n_iterations=6000, n_adapt=1500, steps_per_iteration=100,
        timestep=0.004, friction=10.0, seed=3,
    )  # fmt: skip
    assert random.getstate() == before  # OpenMM draws from it; a user's stream goes on
    check_ensembles(result)
    assert result.swaps.state_of_replica.shape == (6000, 1)
    assert (result.swaps.occupancy > 0.15).all()
    assert result.swaps.acceptance is None
    assert result.weights[-1] == pytest.approx(ENDS.delta_f, abs=0.7)
    assert set(result.replica) == {0}


def test_errors_follow_replicas() -> None:
    """Where replicas remember and exchange is fast, errors by state are too small, by replica not."""
    rng = np.random.default_rng(11)
    memory, n, k_states = 0.9, 400, 3
    mean = np.linspace(0.0, 1.5, k_states)
    values, by_state, by_replica = [], [], []
    for _ in range(60):
        z = rng.normal(size=k_states)
        assigned = list(range(k_states))
        x, state = np.empty((n, k_states)), np.empty((n, k_states), dtype=int)
        for t in range(n):
            z = memory * z + math.sqrt(1 - memory**2) * rng.normal(size=k_states)
            state[t] = assigned
            x[t] = z
            assigned = list(rng.permutation(k_states))  # a slow z that all states share
        iteration, replica = np.indices(state.shape).reshape(2, -1)
        order = np.lexsort((iteration, state.ravel()))
        u = 0.5 * x.ravel()[:, None] ** 2 + 0.8 * x.ravel()[:, None] * mean + mean
        # samples come from u_k = x^2/2 in all states: reweight to exp(-0.8 x mean)
        index = pd.MultiIndex.from_arrays(
            [iteration[order].astype(float), state.ravel()[order].astype(float)], names=["time", "lambdas"]
        )
        table = pd.DataFrame(u[order], index=index, columns=[0.0, 1.0, 2.0])
        table.attrs = {"temperature": 300.0, "energy_unit": "kT"}
        kwargs: dict[str, Any] = {"min_overlap": 0.0, "min_samples": 2}
        one = estimate_free_energy(table, **kwargs)
        two = estimate_free_energy(table, replica=replica[order], **kwargs)
        values.append(one.delta_f)
        by_state.append(one.d_delta_f)
        by_replica.append(two.d_delta_f)
    spread = float(np.std(values, ddof=1))
    assert np.mean(by_state) < 0.6 * spread
    assert 0.7 * spread < np.mean(by_replica) < 1.4 * spread


def test_replica_labels_of_a_run(tmp_path: Path) -> None:
    result = run(tmp_path, n_iterations=30)
    assert np.array_equal(read_replicas(tmp_path), result.replica)
    for k in range(3):  # rows of state k, in order of time
        where = np.argmax(result.swaps.state_of_replica == k, axis=1)
        assert np.array_equal(result.replica[30 * k : 30 * (k + 1)], where)
    assert read_replicas(tmp_path.parent) is None
    with pytest.raises(InputError, match="replica"):
        estimate_free_energy(result.u_nk, replica=result.replica[:-1])
    with pytest.raises(InputError, match="replica"):
        estimate_free_energy(result.u_nk, replica=result.replica.astype(float))
    (tmp_path / "exchange.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="walks"):
        read_replicas(tmp_path)


# --------------------------------------------------------------------------------------- restart


def same(a: Any, b: Any) -> None:
    pd.testing.assert_frame_equal(a.u_nk, b.u_nk, check_exact=True)
    pd.testing.assert_frame_equal(a.dHdl, b.dHdl, check_exact=True)
    assert np.array_equal(a.swaps.state_of_replica, b.swaps.state_of_replica)
    if a.swaps.accepted is not None:
        assert np.array_equal(a.swaps.accepted, b.swaps.accepted)
    for one, two in zip(a.trajectories, b.trajectories, strict=True):
        top = str(a.topology)
        assert np.array_equal(md.load(str(one), top=top).xyz, md.load(str(two), top=top).xyz)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_resumed_exchange_is_bit_by_bit_the_uninterrupted_one(tmp_path: Path, cut: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", checkpoint_seconds=1e-9, progress=stop_after(3 * cut))
    resumed = run(tmp_path / "cut")
    assert whole.n_steps == 3 * (50 + 12 * 20)
    assert resumed.n_steps == (whole.n_steps if cut == 0 else 3 * 20 * (12 - cut))
    same(whole, resumed)
    assert not (tmp_path / "cut" / "exchange.parts").exists()
    again = run(tmp_path / "cut")
    assert again.n_steps == 0
    same(whole, again)


def test_ctrl_c_saves_the_iteration_and_resumes(tmp_path: Path) -> None:
    def press(done: int, total: int) -> None:
        if done == 3 * 5:
            os.kill(os.getpid(), signal.SIGINT)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="same call resumes"):
        run(tmp_path / "cut", progress=press)
    resumed = run(tmp_path / "cut")
    assert resumed.n_steps == 3 * 20 * 6  # the iteration under way was finished and saved
    same(whole, resumed)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", [run_replica_exchange, run_expanded_ensemble])
@pytest.mark.parametrize("write", [2, 3, 4, 5, 6, 9])
def test_killed_between_any_two_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, write: int
) -> None:
    from openmm_diffforce import exchange

    extra = {"n_adapt": 10} if method is run_expanded_ensemble else {}
    whole = run(tmp_path / "whole", method, **extra)
    real, n_writes = exchange.write_npz, 0

    def dying(path: Path, **arrays: Any) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes == write:
            raise Killed
        real(path, **arrays)

    with monkeypatch.context() as patched:
        patched.setattr(exchange, "write_npz", dying)
        with pytest.raises(Killed):
            run(tmp_path / "cut", method, checkpoint_seconds=1e-9, **extra)
    same(whole, run(tmp_path / "cut", method, **extra))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_iterations": 13}, "n_iterations"),
        ({"steps_per_iteration": 21}, "steps_per_iteration"),
        ({"seed": 1}, "seed"),
        ({"states": lambda_states(4)}, "states"),
        ({"temperature": 301.0}, "temperature"),
        ({"method": run_expanded_ensemble}, "kind"),
    ],
)
def test_altered_settings_are_refused(tmp_path: Path, change: dict, word: str) -> None:
    run(tmp_path)
    with pytest.raises(ResumeError, match=word):
        run(tmp_path, **change)


@pytest.mark.parametrize("method", [run_replica_exchange, run_expanded_ensemble])
def test_a_run_that_never_began_may_be_begun_otherwise(tmp_path: Path, method: Any) -> None:
    with pytest.raises(InputError, match="parameter 'mu'"):
        run(tmp_path, method, states=lambda_states(3, parameter="mu"))
    extra = {"n_adapt": 10} if method is run_expanded_ensemble else {}
    assert run(tmp_path, method, **extra).n_steps > 0


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path, checkpoint_seconds=1e-9, progress=stop_after(9))
    parts = tmp_path / "exchange.parts"
    (checkpoint,) = parts.glob("checkpoint_*.npz")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResumeError, match="damaged"):
        run(tmp_path)
    checkpoint.unlink()
    with pytest.raises(ResumeError, match="checkpoint"):
        run(tmp_path)
    checkpoint.write_bytes(whole)
    (parts / "part_00000.npz").unlink()
    with pytest.raises(ResumeError, match="parts are missing"):
        run(tmp_path)


# ------------------------------------------------------------------------------------- the door


def test_learned_force_exchanges(tmp_path: Path) -> None:
    case = tiny.case()
    system, force = learned_system(tmp_path)
    states = lambda_states(2, parameter=force.parameter("lambda"))
    result = run(
        tmp_path / "run", system=system, topology=case.topology, positions=case.positions,
        states=states, learned=force, n_iterations=3, steps_per_iteration=5, n_equil=5,
    )  # fmt: skip
    assert result.u_nk.shape == (6, 2)
    assert np.isfinite(result.dHdl.to_numpy()).all()
    force.artefact.metadata["conservative"] = False
    for method in (run_replica_exchange, run_expanded_ensemble):
        with pytest.raises(NotConservativeError, match="conservative"):
            run(tmp_path / "no", method, system=system, topology=case.topology,
                positions=case.positions, states=states, learned=force)  # fmt: skip


def test_a_start_for_each_state_and_formats(tmp_path: Path) -> None:
    starts = np.zeros((3, 1, 3))
    result = run(tmp_path / "a", positions=starts, trajectory="xtc")
    assert [p.suffix for p in result.trajectories] == [".xtc"] * 3
    assert md.load(str(result.trajectories[2]), top=str(result.topology)).n_frames == 12
    assert run(tmp_path / "b", trajectory=None, dhdl=False).dHdl is None


def test_blow_up_is_said_and_keeps_what_was_computed(tmp_path: Path) -> None:
    system = wells()
    wild = mm.CustomExternalForce("step(lambda-0.9)*1e9*x^4")
    wild.addGlobalParameter("lambda", 0.0)
    wild.addParticle(0)
    system.addForce(wild)
    with pytest.raises(ConvergenceError, match="unstable") as info:
        run(tmp_path, system=system, timestep=0.05, minimize=False, steps_per_iteration=2000,
            positions=np.full((1, 3), 0.1), dhdl=False)  # fmt: skip
    assert any("kept" in n for n in info.value.__notes__)


@pytest.mark.parametrize(
    ("method", "bad", "word"),
    [
        (run_replica_exchange, {"states": [{"lambda": 0.0}]}, "at least two"),
        (run_replica_exchange, {"states": [{"temperature": 300.0}, {"temperature": 310.0}]}, "temperature"),
        (run_replica_exchange, {"states": [{"groups": 1.0}, {"groups": 2.0}]}, "groups"),
        (run_replica_exchange, {"states": lambda_states(2, parameter="mu")}, "mu"),
        (run_replica_exchange, {"n_iterations": 0}, "n_iterations"),
        (run_replica_exchange, {"steps_per_iteration": 0}, "steps_per_iteration"),
        (run_replica_exchange, {"n_equil": -1}, "n_equil"),
        (run_replica_exchange, {"checkpoint_seconds": 0.0}, "checkpoint"),
        (run_replica_exchange, {"platform": "Abacus"}, "platform"),
        (run_expanded_ensemble, {"weights": [0.0]}, "weights"),
        (run_expanded_ensemble, {"weights": [0.0, 1.0, math.nan]}, "weights"),
        (run_expanded_ensemble, {"n_adapt": 0}, "n_adapt"),
        (run_expanded_ensemble, {"positions": np.zeros((3, 1, 3))}, "one walker"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, method: Any, bad: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        run(tmp_path, method, **bad)


def test_given_weights_are_used(tmp_path: Path) -> None:
    result = run(tmp_path, run_expanded_ensemble, weights=[5.0, 5.0, -1000.0], n_iterations=20)
    assert result.swaps.occupancy[2] == 0.0
    assert len(result.trajectories) == 2
    assert result.weights.tolist() == [0.0, 0.0, -1005.0]
