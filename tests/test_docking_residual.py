"""The network residual: invariance, derivatives, training, its file."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from openmm_diffforce.cli import app
from openmm_diffforce.docking import dock_run, learning
from openmm_diffforce.docking.complex import Complex, pdb_text
from openmm_diffforce.docking.decoys import reposed
from openmm_diffforce.docking.learning import (
    DockingData,
    DockingFit,
    cross_validate,
    fit_docking_model,
    prepare_docking_data,
    solve_level,
)
from openmm_diffforce.docking.model_file import load_docking_model, read_docking_file, save_docking_model
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.residual import (
    CUTOFF,
    N_RAW,
    HiddenLayer,
    PairTable,
    Residual,
    network_features,
    pair_table,
)
from openmm_diffforce.docking.residue_model import N_COEFS, ResidueModel, tables_from_coefs
from openmm_diffforce.docking.rigid import RigidSchedule, noise_poses
from openmm_diffforce.docking.rigid_energy import score_divergence
from openmm_diffforce.docking.scoring import energy_head, flow_energy, path_energy
from openmm_diffforce.errors import InputError, ModelError

from .tiny_complex import tiny_complex

SETTINGS = DockingFit(sigmas=(0.1, 0.4), n_noised=30, n_sets=1, n_decoys=40, network=8)
LENGTHS = np.full(20, 0.2)


@cache
def complexes() -> tuple[Complex, ...]:
    return tuple(tiny_complex(k) for k in range(3))


@cache
def data() -> DockingData:
    return prepare_docking_data(complexes(), SETTINGS, seed=1)


@cache
def fitted() -> ResidueModel:
    return fit_docking_model(settings=SETTINGS, data=data())


def closed() -> ResidueModel:
    return replace(fitted(), residual=None)


def random_residual() -> Residual:
    return Residual(HiddenLayer.drawn(8, 0), 0.1 * np.random.default_rng(0).standard_normal((2, 8)))


def with_random() -> ResidueModel:
    return replace(fitted(), residual=random_residual())


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


def test_laplacians_are_second_differences() -> None:
    one, poses, residual, h = tiny_complex(5), some_poses(6), random_residual(), 1e-4
    levels = np.random.default_rng(1).uniform(size=(6, 2))
    found = residual.laplacians(one, poses, levels, LENGTHS)
    want = np.zeros((6, 2))
    for k in range(3):
        step = np.zeros((6, 3))
        step[:, k] = h
        for part, move in enumerate(((0 * step, step), (step, 0 * step))):
            up, down = (
                residual.evaluate(
                    one, poses.perturbed(*(s * v for v in move)), levels, LENGTHS, gradient=True
                )[1]
                for s in (1, -1)
            )
            assert up is not None
            assert down is not None
            want[:, part] += (up - down)[:, k + 3 * part] / (2 * h)
    assert np.abs(want).min(axis=0).max() > 1
    assert found == pytest.approx(want, rel=1e-4, abs=1e-2)


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
    w = residual.hidden
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
            z = np.array([*bumps, raw[5]]) @ w.shape + w.bias + x @ w.first + y @ w.second
            want += (1 - (raw[0] / CUTOFF) ** 2) ** 3 * (residual.out @ (z / (1 + np.exp(-z))))
    for k, levels in enumerate(np.eye(2)):
        found = residual.evaluate(one, Poses.identity(), levels[None], LENGTHS, gradient=False)[0]
        assert found[0] == pytest.approx(want[k])


def test_energy_and_slopes_are_linear_in_the_features() -> None:
    one, poses, residual = tiny_complex(5), some_poses(40), random_residual()
    levels = np.random.default_rng(1).uniform(size=(40, 2))
    features, slopes = network_features(residual.hidden, one, poses, LENGTHS, gradient=True)
    assert slopes is not None
    energy, push = residual.evaluate(one, poses, levels, LENGTHS, gradient=True)
    out = levels @ residual.out
    assert energy == pytest.approx((features * out).sum(axis=1))
    assert push == pytest.approx(np.einsum("nqw,nw->nq", slopes, out))


def test_nothing_beyond_the_cutoff_and_no_jump_at_it() -> None:
    one = tiny_complex(5)
    far = Poses(np.eye(3)[None].repeat(2, axis=0), np.array([[50.0, 0, 0], [0, 80.0, 0]]))
    found = random_residual().evaluate(one, far, np.ones((2, 2)), LENGTHS, gradient=True)
    assert (found[0] == 0).all()
    assert (np.asarray(found[1]) == 0).all()
    raw, own, zero = np.full((2, N_RAW), 0.5), np.ones((1, 5)), np.zeros(2, dtype=np.int64)
    raw[:, 0] = CUTOFF - 1e-3, CUTOFF + 0.1
    table = PairTable(np.array([0, 2]), raw, zero, zero, own, own, None, None)
    units, slopes = random_residual().hidden.of_pairs(table, gradient=True)
    assert 0 < np.abs(units[0]).max() < 1e-6
    assert np.abs(slopes[0][0]).max() < 3e-3
    assert (units[1] == 0).all()
    assert all((s[1] == 0).all() for s in slopes)


def test_burial_counts_the_half_sphere() -> None:
    p = tiny_complex(1).receptor
    found = p.burial
    k = int(found.argmax())
    ray = p.sites[k, 3] - p.ca[k]
    want = sum(
        0 < np.linalg.norm(x - p.ca[k]) < 1.3 and (x - p.ca[k]) @ ray > 0 for x in p.ca
    )  # fmt: skip
    assert found[k] == want
    assert found.min() < found.max()
    bare = p.sites.copy()
    bare[:, 3] = bare[:, 1]  # no C-beta: no side
    assert (replace(p, sites=bare).burial == 0).all()


def test_energies_along_flow_and_path() -> None:
    one, poses = tiny_complex(5), some_poses(4)
    none = replace(closed(), residual=Residual(random_residual().hidden, np.zeros((2, 8))))
    for score in (energy_head, flow_energy, path_energy):
        want = score(closed())(one, poses)
        assert score(none)(one, poses) == pytest.approx(want, abs=1e-7)
        assert np.abs(score(with_random())(one, poses) - want).max() > 0.1


# ------------------------------------------------------------------------------------ fit and file


def loss_of(model: ResidueModel, level: int, coefs: np.ndarray, scale: np.ndarray) -> float:
    """The documented loss, from the model's own scores and energies."""
    sigma, total = SETTINGS.sigmas[level], 0.5 * SETTINGS.ridge * float(((coefs / scale) ** 2).sum())
    turn = sigma / SETTINGS.radius
    for k, one in enumerate(complexes()):
        found = noise_poses(
            Poses.identity(SETTINGS.n_noised), 1.0, schedule=RigidSchedule(sigma, turn),
            generator=np.random.default_rng((1, level, *one.name.encode())),
        )  # fmt: skip
        _, shift, spin = model.evaluate(one, found.poses, sigma)
        assert shift is not None
        assert spin is not None
        miss = sigma * (shift - found.tr_target), turn * (spin - found.rot_target)
        energy = model.evaluate(one, data().decoys[k][0].poses, sigma, gradient=False)[0]
        log_pi, q = -energy - np.logaddexp.reduce(-energy), data().levels[k][level].target
        kl = (q * (np.log(np.maximum(q, 1e-300)) - log_pi)).sum()
        total += (0.5 * np.mean(np.concatenate(miss, axis=1) ** 2) + SETTINGS.decoy_weight * kl) / 3
    return float(total)


def test_the_fit_is_the_least_of_the_loss() -> None:
    scale = learning._scales(data(), SETTINGS)
    g, hidden = np.random.default_rng(0), data().hidden
    assert hidden is not None

    def model_of(coefs: np.ndarray) -> ResidueModel:
        both = np.stack([coefs, coefs])
        tables = tables_from_coefs(both[:, :N_COEFS], data().contact)
        return replace(fitted(), tables=tables, residual=Residual(hidden, both[:, N_COEFS:]))

    for level in range(2):
        c = solve_level(data(), SETTINGS, level, range(3))
        assert len(c) == N_COEFS + 8
        assert isinstance(fitted().residual, Residual)
        assert (c[N_COEFS:] == fitted().residual.out[level]).all()  # type: ignore[union-attr]
        best = loss_of(model_of(c), level, c, scale)
        for only in (slice(None), slice(N_COEFS, None)):
            for sign in (1, -1):
                other = c.copy()
                other[only] += sign * 3e-2 * (scale * g.standard_normal(len(c)))[only]
                assert loss_of(model_of(other), level, other, scale) > best
        without = c * (np.arange(len(c)) < N_COEFS)
        assert loss_of(model_of(without), level, without, scale) > best + 1e-4


def test_fits_are_reproducible_and_cross_validated() -> None:
    again = fit_docking_model(complexes(), SETTINGS, seed=1)
    assert isinstance(again.residual, Residual)
    assert (again.residual.out == fitted().residual.out).all()  # type: ignore[union-attr]
    assert (again.residual.hidden.shape == fitted().residual.hidden.shape).all()  # type: ignore[union-attr]
    assert not np.allclose(HiddenLayer.drawn(8, 2).shape, HiddenLayer.drawn(8, 1).shape)
    assert again.metadata["settings"]["network"] == 8
    strong = cross_validate(data(), SETTINGS)
    weak = cross_validate(data(), replace(SETTINGS, network_weight=1e-4))
    alone = prepare_docking_data(complexes(), replace(SETTINGS, network=0), seed=1)
    none = cross_validate(alone, replace(SETTINGS, network=0))
    for a, b, c in zip(strong, weak, none, strict=True):
        assert b.score_r2 == pytest.approx(c.score_r2, abs=1e-5)
        assert a.score_r2 != pytest.approx(c.score_r2, abs=1e-5)
    with pytest.raises(InputError, match="the 0 network units of the settings, found 8"):
        fit_docking_model(settings=replace(SETTINGS, network=0), data=data())
    with pytest.raises(InputError, match="network: expected a whole number >= 0, found -1"):
        DockingFit(network=-1)
    with pytest.raises(InputError, match="network_weight: expected a finite number >= 1e-06, found nan"):
        DockingFit(network_weight=float("nan"))


def test_a_file_holds_the_residual(tmp_path: Path) -> None:
    path = tmp_path / "m.docking"
    save_docking_model(fitted(), path)
    found = load_docking_model(path)
    one, poses = tiny_complex(5), some_poses(4)
    for a, b in zip(found.evaluate(one, poses, 0.2), fitted().evaluate(one, poses, 0.2), strict=True):
        assert (a == b).all()
    assert "8 units" in CliRunner().invoke(app, ["inspect", str(path)]).output
    save_docking_model(closed(), path)
    assert load_docking_model(path).residual is None
    assert "8 units" not in CliRunner().invoke(app, ["inspect", str(path)]).output


def test_broken_residuals_are_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "m.docking", random_residual()
    for change, message in (
        ({"out": np.zeros((3, 8))}, "other shapes of residual_out"),
        ({"hidden": replace(good.hidden, bias=np.zeros(9))}, "other shapes of residual_shape"),
        ({"hidden": replace(good.hidden, first=np.zeros((3, 8)))}, "other shapes of residual_first"),
    ):
        save_docking_model(replace(closed(), residual=replace(good, **change)), path)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=message):
            load_docking_model(path)
    broken = replace(good, out=np.full((2, 8), np.nan))
    with pytest.raises(ModelError, match="found others in residual_out"):
        save_docking_model(replace(closed(), residual=broken), path)

    class Other:
        def evaluate(self, *_: Any, **__: Any) -> Any:
            return 0.0, None

    with pytest.raises(ModelError, match="expected a Residual or none, found Other"):
        save_docking_model(replace(closed(), residual=Other()), path)


def test_dock_fit_fits_one_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in complexes():
        text = pdb_text(one.receptor) + pdb_text(one.ligand)
        (tmp_path / f"{one.name}.pdb").write_text(text + "END\n")
    assert dock_run.DockingFit is DockingFit  # imported before the name is changed
    monkeypatch.setattr(learning, "DockingFit", lambda network: replace(SETTINGS, network=network))
    out = tmp_path / "m.docking"
    call = ["dock-fit", str(tmp_path), "--out", str(out), "--quiet", "--network"]
    done = CliRunner().invoke(app, [*call, "4"])
    assert done.exit_code == 0, done.output
    metadata, arrays, _ = read_docking_file(out)
    assert metadata["training"]["settings"]["network"] == 4
    assert arrays["residual_out"].shape == (2, 4)
    assert CliRunner().invoke(app, [*call, "-1"]).exit_code == 2
