"""The network residual: invariance, derivatives, training, its file."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from openmm_diffforce.cli import app
from openmm_diffforce.docking.complex import RESIDUES, Complex
from openmm_diffforce.docking.decoys import reposed
from openmm_diffforce.docking.learning import (
    DockingData,
    DockingFit,
    fit_docking_model,
    prepare_docking_data,
)
from openmm_diffforce.docking.model_file import load_docking_model, read_docking_file, save_docking_model
from openmm_diffforce.docking.residual import (
    CUTOFF,
    N_RAW,
    Residual,
    burial,
    pair_energies,
    pair_table,
    weight_shapes,
)
from openmm_diffforce.docking.residual_fit import ResidualFit, fit_residual, prepare_residual_data
from openmm_diffforce.docking.residue_model import ResidueModel
from openmm_diffforce.docking.rigid import Poses, RigidSchedule, noise_poses
from openmm_diffforce.docking.rigid_energy import score_divergence
from openmm_diffforce.docking.scoring import energy_head, flow_energy, path_energy
from openmm_diffforce.errors import ConvergenceError, InputError, ModelError

from .tiny_complex import tiny_complex

SETTINGS = DockingFit(sigmas=(0.1, 0.4), n_noised=30, n_sets=1, n_decoys=40)
NETWORK = ResidualFit(width=8, n_steps=60, batch=3, learning_rate=2e-2, weight_decay=0.0)
LENGTHS = np.full(20, 0.2)


@cache
def complexes() -> tuple[Complex, ...]:
    return tuple(tiny_complex(k) for k in range(3))


@cache
def data() -> DockingData:
    return prepare_docking_data(complexes(), SETTINGS, seed=1)


@cache
def closed() -> ResidueModel:
    return fit_docking_model(settings=SETTINGS, data=data())


@cache
def trained() -> ResidueModel:
    return fit_residual(closed(), complexes(), data(), SETTINGS, NETWORK, seed=1)


def random_residual(n_levels: int = 2, width: int = 8) -> Residual:
    g = np.random.default_rng(0)
    shapes = weight_shapes(width, n_levels)
    return Residual({k: g.standard_normal(s) / np.sqrt(s[0]) for k, s in shapes.items()})


def with_random() -> ResidueModel:
    """The closed form with a residual of its own size."""
    weights = random_residual().weights
    return replace(closed(), residual=Residual({**weights, "out": 5 * weights["out"]}))


def some_poses(n: int, sigma: float = 0.15) -> Poses:
    g = np.random.default_rng(3)
    return noise_poses(Poses.identity(n), 1.0, schedule=RigidSchedule(sigma, sigma), generator=g).poses


def exchanged(one: Complex, poses: Poses) -> tuple[Complex, Poses]:
    """Receptor and ligand in each other's place: the inverse motion of the other partner."""
    c, new = one.ligand.centre, one.receptor.centre
    inverse = np.swapaxes(poses.rotation, 1, 2)
    # x -> R^T (x - c - tau) + c, written about the other centre.
    shift = np.einsum("nij,nj->ni", inverse, new - c - poses.translation) + c - new
    return Complex(one.name, one.ligand, one.receptor), Poses(inverse, shift)


# ------------------------------------------------------------------------------------- the energy


def test_scores_are_the_gradient_of_the_energy() -> None:
    one, poses, model, h = tiny_complex(5), some_poses(6), with_random(), 1e-5
    for sigma in (0.1, 0.2):
        _, shift, turn = model.evaluate(one, poses, sigma)
        _, closed_shift, _ = closed().evaluate(one, poses, sigma)
        assert shift is not None
        assert turn is not None
        assert closed_shift is not None
        assert np.abs(shift - closed_shift).max() > 1.0
        for found, move in ((shift, lambda v: (0 * v, v)), (turn, lambda v: (v, 0 * v))):
            for k in range(3):
                step = np.zeros((6, 3))
                step[:, k] = h
                up, down = (
                    model.evaluate(one, poses.perturbed(*move(s * step)), sigma, gradient=False)[0]
                    for s in (1, -1)
                )
                assert found[:, k] == pytest.approx((down - up) / (2 * h), abs=1e-5)


def test_divergences_are_those_of_the_scores() -> None:
    one, poses, model = tiny_complex(5), some_poses(5), with_random()
    t = np.linspace(0.2, 0.8, 5)
    bound = model.bound_to(one)
    found = bound.divergence(poses, t)
    want = score_divergence(bound, poses, t, steps=(1e-4, 1e-4))
    for a, b, c in zip(found, want, closed().bound_to(one).divergence(poses, t), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-1)
        assert np.abs(a - c).max() > 10


def test_frames_and_the_exchange_of_partners_do_not_matter() -> None:
    one, poses, residual = tiny_complex(5), some_poses(8), random_residual()
    levels = np.random.default_rng(1).uniform(size=(8, 2))
    energy, _ = residual.evaluate(one, poses, levels, LENGTHS, gradient=True)
    assert energy.std() > 1e-2
    hidden, same = reposed(one, poses, np.random.default_rng(2))
    assert residual.evaluate(hidden, same, levels, LENGTHS, gradient=False)[0] == pytest.approx(energy)
    other, inverse = exchanged(one, poses)
    assert residual.evaluate(other, inverse, levels, LENGTHS, gradient=False)[0] == pytest.approx(energy)


def test_energy_is_the_sum_over_pairs_by_hand() -> None:
    one, residual = tiny_complex(2), random_residual()
    table = pair_table(one, Poses.identity(), LENGTHS, gradient=False)
    d = np.linalg.norm(one.receptor.sites[:, None, 3] - one.ligand.sites[None, :, 3], axis=-1)
    assert {*zip(table.receptor.tolist(), table.ligand.tolist(), strict=True)} == {
        (int(i), int(j)) for i, j in zip(*np.nonzero(d < CUTOFF), strict=True)
    }
    w = residual.weights

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    want = np.zeros(2)
    for raw, i, j in zip(table.raw, table.receptor, table.ligand, strict=True):
        bumps = [
            np.exp(-0.5 * ((raw[k] - low - step * m) / step) ** 2)
            for k, (low, step) in enumerate(((0.35, 0.16), (0.40, 0.18), (0.30, 0.18)))
            for m in range(6)
        ]
        a = np.array([raw[3], *table.receptor_own[i]])
        b = np.array([raw[4], *table.ligand_own[j]])
        for x, y in ((a, b), (b, a)):
            h = silu(np.array([*bumps, raw[5]]) @ w["shape"] + w["bias"] + x @ w["first"] + y @ w["second"])
            h = silu(h @ w["hidden"] + w["hidden_bias"])
            want += 0.1 * (1 - (raw[0] / CUTOFF) ** 2) ** 3 * (h @ w["out"])
    for k, levels in enumerate(np.eye(2)):
        found = residual.evaluate(one, Poses.identity(), levels[None], LENGTHS, gradient=False)[0]
        assert found[0] == pytest.approx(want[k])


def test_nothing_beyond_the_cutoff_and_no_jump_at_it() -> None:
    import torch

    one = tiny_complex(5)
    far = Poses(np.eye(3)[None].repeat(2, axis=0), np.array([[50.0, 0, 0], [0, 80.0, 0]]))
    found = random_residual().evaluate(one, far, np.ones((2, 2)), LENGTHS, gradient=True)
    assert (found[0] == 0).all()
    assert (np.asarray(found[1]) == 0).all()
    weights = {k: torch.as_tensor(v) for k, v in random_residual().weights.items()}
    raw = torch.full((2, N_RAW), 0.5, dtype=torch.float64)
    raw[:, 0] = torch.tensor([CUTOFF - 1e-3, CUTOFF + 0.1])
    own = torch.ones(2, 5, dtype=torch.float64)
    value = pair_energies(weights, raw, own, own)
    assert float(value[0].abs().max()) < 1e-7
    assert float(value[1].abs().max()) == 0


def test_burial_counts_the_half_sphere() -> None:
    p = tiny_complex(1).receptor
    found = burial(p)
    k = int(found.argmax())
    ray = p.sites[k, 3] - p.ca[k]
    want = sum(
        0 < np.linalg.norm(x - p.ca[k]) < 1.3 and (x - p.ca[k]) @ ray > 0 for x in p.ca
    )  # fmt: skip
    assert found[k] == want
    assert found.min() < found.max()
    bare = p.sites.copy()
    bare[:, 3] = bare[:, 1]  # no C-beta: no side
    assert (burial(replace(p, sites=bare)) == 0).all()


def test_energies_along_flow_and_path() -> None:
    """A residual that undoes the closed form's tables is not there; one that is there is seen by all."""
    one, poses = tiny_complex(5), some_poses(4)
    small = {**random_residual().weights, "out": np.zeros((8, 2))}
    none = replace(closed(), residual=Residual(small))
    for score in (energy_head, flow_energy, path_energy):
        want = score(closed())(one, poses)
        assert score(none)(one, poses) == pytest.approx(want, abs=1e-7)
        assert np.abs(score(with_random())(one, poses) - want).max() > 0.1


# --------------------------------------------------------------------------------------- training


def loss_of(model: ResidueModel) -> float:
    """The documented loss, from the model's own scores and energies."""
    total = []
    pairs = prepare_residual_data(complexes(), data(), SETTINGS, seed=1)
    for k, one in enumerate(complexes()):
        decoys = data().decoys[k][0].poses
        n = len(pairs[k].noised_poses)
        sigma = np.tile(SETTINGS.sigmas, n // 2)
        _, shift, turn = model.evaluate(one, pairs[k].noised_poses, sigma)
        assert shift is not None
        assert turn is not None
        scores = np.concatenate([shift * sigma[:, None], turn * sigma[:, None] / SETTINGS.radius], axis=1)
        loss = 0.5 * np.mean((scores - pairs[k].score) ** 2)
        for m, s in enumerate(SETTINGS.sigmas):
            energy = model.evaluate(one, decoys, s, gradient=False)[0]
            log_pi = -energy - np.logaddexp.reduce(-energy)
            loss -= SETTINGS.decoy_weight * (data().levels[k][m].target @ log_pi) / 2
        total.append(loss)
    return float(np.mean(total))


def test_training_lowers_the_loss_and_is_reproducible() -> None:
    before, after = loss_of(closed()), loss_of(trained())
    assert after < before - 0.01
    first, last = trained().metadata["residual"]["loss"]
    # The mean over the first steps is that of the closed form, but for the noised poses of a step.
    assert first == pytest.approx(before, abs=0.1)
    assert last < first
    again = fit_residual(closed(), complexes(), data(), SETTINGS, NETWORK, seed=1)
    assert isinstance(again.residual, Residual)
    assert isinstance(trained().residual, Residual)
    for k, v in again.residual.weights.items():
        assert (v == trained().residual.weights[k]).all()  # type: ignore[union-attr]
    other = fit_residual(closed(), complexes(), data(), SETTINGS, NETWORK, seed=2)
    assert not np.allclose(other.residual.weights["out"], again.residual.weights["out"])  # type: ignore[union-attr]
    for name in again.tables:
        assert again.tables[name] is closed().tables[name]


def test_without_decoys_there_is_score_matching_alone() -> None:
    seen: list[tuple[str, int, int]] = []
    settings = replace(SETTINGS, decoy_weight=0.0)
    found = fit_residual(
        closed(), complexes(), data(), settings, replace(NETWORK, n_steps=3), seed=1,
        progress=lambda *a: seen.append(a),
    )  # fmt: skip
    assert found.metadata["residual"]["loss"][0] < 1
    assert seen[-1] == ("network", 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width: expected a whole number >= 1, found 0"),
        ({"n_steps": 2.5}, "n_steps: expected a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0, found -1.0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ResidualFit(**change)


def test_bad_fits_are_refused() -> None:
    with pytest.raises(
        InputError, match="expected the complexes of the data, tiny0, tiny1, tiny2, found tiny0"
    ):
        fit_residual(closed(), complexes()[:1], data(), SETTINGS, NETWORK, seed=1)
    other = replace(closed(), sigmas=np.array([0.1, 0.5]))
    with pytest.raises(InputError, match="expected a model of the noise levels"):
        fit_residual(other, complexes(), data(), SETTINGS, NETWORK, seed=1)
    wild = replace(NETWORK, learning_rate=1e30)
    with pytest.raises(ConvergenceError, match="lower the learning rate"):
        fit_residual(closed(), complexes(), data(), SETTINGS, wild, seed=1)


# --------------------------------------------------------------------------------------- its file


def test_a_file_holds_the_residual(tmp_path: Path) -> None:
    path = tmp_path / "m.docking"
    save_docking_model(trained(), path)
    found = load_docking_model(path)
    one, poses = tiny_complex(5), some_poses(4)
    for a, b in zip(found.evaluate(one, poses, 0.2), trained().evaluate(one, poses, 0.2), strict=True):
        assert (a == b).all()
    assert found.metadata["residual"] == trained().metadata["residual"]
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert "network residual" in shown.output
    assert "width 8, n_steps 60" in shown.output
    save_docking_model(closed(), path)
    assert load_docking_model(path).residual is None
    assert "none" in CliRunner().invoke(app, ["inspect", str(path)]).output


def test_broken_residuals_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.docking"
    weights = random_residual().weights
    for change, message in (
        ({"out": np.zeros((8, 3))}, "other shapes of residual_out"),
        ({"bias": np.zeros(9)}, "other shapes of residual_shape"),
    ):
        save_docking_model(replace(closed(), residual=Residual({**weights, **change})), path)
        with pytest.raises(ModelError, match=message):
            load_docking_model(path)
    save_docking_model(replace(closed(), residual=Residual({"bias": weights["bias"]})), path)
    with pytest.raises(ModelError, match="do not belong together"):
        load_docking_model(path)
    broken = Residual({**weights, "hidden": np.full((8, 8), np.nan)})
    with pytest.raises(ModelError, match="found others in residual_hidden"):
        save_docking_model(replace(closed(), residual=broken), path)

    class Other:
        def evaluate(self, *_: Any, **__: Any) -> Any:
            return 0.0, None

    with pytest.raises(ModelError, match="expected a Residual or none, found Other"):
        save_docking_model(replace(closed(), residual=Other()), path)


def test_dock_fit_trains_one_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openmm_diffforce.docking import dock_run, residual_fit
    from openmm_diffforce.docking.complex import pdb_text

    for one in complexes():
        text = pdb_text(one.receptor) + pdb_text(one.ligand)
        (tmp_path / f"{one.name}.pdb").write_text(text + "END\n")
    monkeypatch.setattr(dock_run, "DockingFit", lambda: SETTINGS)
    monkeypatch.setattr(residual_fit, "ResidualFit", lambda: replace(NETWORK, n_steps=2))
    out = tmp_path / "m.docking"
    done = CliRunner().invoke(app, ["dock-fit", str(tmp_path), "--out", str(out), "--network", "--quiet"])
    assert done.exit_code == 0, done.output
    metadata, arrays, _ = read_docking_file(out)
    assert metadata["training"]["residual"]["settings"]["n_steps"] == 2
    assert arrays["residual_out"].shape == (8, 2)
    assert len(RESIDUES) == 20
