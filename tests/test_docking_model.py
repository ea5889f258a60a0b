"""The residue model: features, derivatives, fit, its file; potentials, statistics, scores side by side."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr, wilcoxon

from openmm_diffforce.docking import learning
from openmm_diffforce.docking.complex import RESIDUES, Complex
from openmm_diffforce.docking.contacts import CB
from openmm_diffforce.docking.decoys import Decoys, make_decoys, reposed
from openmm_diffforce.docking.learning import (
    DockingData,
    DockingFit,
    cross_validate,
    fit_docking_model,
    prepare_docking_data,
    solve_level,
)
from openmm_diffforce.docking.model_file import (
    is_docking_model,
    load_docking_model,
    read_docking_file,
    save_docking_model,
)
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.potentials import (
    contact_count_score,
    contact_energy_score,
    miyazawa_jernigan,
    statistical_contacts,
)
from openmm_diffforce.docking.residue_model import (
    CHARGES,
    N_COEFS,
    SITES,
    ResidueModel,
    Spline,
    pair_potential_features,
    side_chain_lengths,
    site_points,
    tables_from_coefs,
)
from openmm_diffforce.docking.rigid import RigidSchedule, evaluate_scores, noise_poses
from openmm_diffforce.docking.rigid_energy import score_divergence
from openmm_diffforce.docking.scoring import (
    ScoredDecoys,
    chance,
    energy_head,
    flow_energy,
    path_energy,
    score_decoys,
    score_poses,
    summarise,
)
from openmm_diffforce.docking.so3 import exp
from openmm_diffforce.docking.statistics import (
    any_near,
    area_under_curve,
    compare_paired,
    enrichment,
    rank_correlation,
)
from openmm_diffforce.errors import InputError, ModelError

from .tiny_complex import tiny_complex

SETTINGS = DockingFit(sigmas=(0.1, 0.4), n_noised=40, n_sets=1, n_decoys=40)


@cache
def data() -> DockingData:
    return prepare_docking_data([tiny_complex(k) for k in range(4)], SETTINGS, seed=1)


@cache
def model() -> ResidueModel:
    return fit_docking_model(settings=SETTINGS, data=data())


@cache
def decoys() -> tuple[Complex, Decoys]:
    one = tiny_complex(9)
    return one, make_decoys(one, 40, seed=3)


# -------------------------------------------------------------------------------------- splines


def test_splines_sum_to_one_and_end_smoothly() -> None:
    s = Spline(0.1, 0.1, 8)
    d = np.linspace(0.1, 0.5999, 50)  # all four functions are there
    first, value, _ = s.weights(d)
    assert value.sum(axis=1) == pytest.approx(1.0)
    assert (first == np.floor((d - 0.1) / 0.1 + 1e-9)).all()
    c = np.concatenate([np.random.default_rng(0).standard_normal(8), np.zeros(4)])

    def curve(d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, value, slope = s.weights(d)
        return tuple(sum(c[first + k] * w[:, k] for k in range(4)) for w in (value, slope, s.bends(d)))  # type: ignore[return-value]

    end = np.array([s.cutoff - 1e-7, s.cutoff + 0.1])
    for v in curve(end):
        assert np.abs(v).max() < 1e-4
    h, d = 1e-5, np.linspace(0.105, 0.88, 40)
    up, mid, down = curve(d + h), curve(d), curve(d - h)
    assert mid[1] == pytest.approx((up[0] - down[0]) / (2 * h), abs=1e-6)
    assert mid[2] == pytest.approx((up[1] - down[1]) / (2 * h), abs=1e-4)


def test_energy_is_the_sum_over_pairs_by_hand() -> None:
    one = tiny_complex(2)
    g = np.random.default_rng(1)
    contact = g.standard_normal((20, 20))
    contact = contact + contact.T
    lengths = np.full(20, 0.2)
    coefs = g.standard_normal(N_COEFS)
    tables = tables_from_coefs(coefs[None], contact)
    found = ResidueModel(np.array([0.1]), tables, lengths, SETTINGS.schedule(), {})
    want = 0.0
    for site, s in SITES.items():
        a, b = (site_points(p, site, lengths) for p in (one.receptor, one.ligand))
        d = np.linalg.norm(a[:, None] - b, axis=-1)
        for i, j in zip(*np.nonzero(d < s.cutoff), strict=True):
            first, value, _ = s.weights(d[i, j : j + 1])
            row = np.append(tables[site][0, one.receptor.types[i], one.ligand.types[j]], np.zeros(4))
            want += row[first[0] : first[0] + 4] @ value[0]
    assert found.evaluate(one, Poses.identity(), 0.1)[0][0] == pytest.approx(want, rel=1e-10)
    assert np.abs(tables["sc"] - tables["sc"].swapaxes(1, 2)).max() < 1e-12  # u_ab = u_ba


def test_features_are_linear_in_what_the_tables_say() -> None:
    one, d = decoys()
    g = np.random.default_rng(1)
    contact = g.standard_normal((20, 20))
    contact, lengths = contact + contact.T, np.full(20, 0.2)
    coefs = g.standard_normal((2, N_COEFS))
    found = ResidueModel(
        np.array([0.1, 0.4]), tables_from_coefs(coefs, contact), lengths, SETTINGS.schedule(), {}
    )
    f, slopes = pair_potential_features(one, d.poses, lengths=lengths, contact=contact, gradient=True)
    assert slopes is not None
    energy, shift, turn = found.evaluate(one, d.poses, 0.1)
    assert energy == pytest.approx(f @ coefs[0], abs=1e-8)
    assert np.abs(shift + slopes[:, :3] @ coefs[0]).max() < 1e-8
    assert np.abs(turn + slopes[:, 3:] @ coefs[0]).max() < 1e-8
    # Between levels: linear in ln sigma, also if every pose has its own.
    half = found.evaluate(one, d.poses, 0.2, gradient=False)[0]
    assert half == pytest.approx(f @ (0.5 * coefs.sum(axis=0)), abs=1e-8)
    own = np.where(np.arange(len(d.poses)) % 2, 0.1, 0.2)
    mixed = found.evaluate(one, d.poses, own, gradient=False)[0]
    assert mixed == pytest.approx(np.where(np.arange(len(d.poses)) % 2, energy, half), abs=1e-8)


def test_scores_are_the_derivatives_of_the_energy() -> None:
    one, d = decoys()
    poses, h = d.poses[:6], 1e-5
    _, shift, turn = model().evaluate(one, poses, 0.15)
    assert shift is not None
    assert turn is not None
    for k in range(3):
        e = h * np.eye(3)[k]
        for score, moves in ((shift, ((0 * e, e), (0 * e, -e))), (turn, ((e, 0 * e), (-e, 0 * e)))):
            up, down = (model().evaluate(one, poses.perturbed(*m), 0.15, gradient=False)[0] for m in moves)
            assert score[:, k] == pytest.approx(-(up - down) / (2 * h), abs=1e-4)


def test_divergences_are_exact() -> None:
    one, d = decoys()
    bound = model().bound_to(one)
    exact = bound.divergence(d.poses[:6], np.full(6, 0.5))
    byhand = score_divergence(bound, d.poses[:6], 0.5, steps=(1e-5, 1e-5))
    for a, b in zip(exact, byhand, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-2)


def test_frames_do_not_matter() -> None:
    one, d = decoys()
    hidden, poses = reposed(one, d.poses, np.random.default_rng(0))
    turn = poses.rotation[0] @ reposed(one, d.poses, np.random.default_rng(0))[1].rotation[0].T
    assert turn == pytest.approx(np.eye(3))  # the same generator, the same frames
    for score in (
        energy_head(model(), (0.1, 0.4)),
        contact_count_score,
        path_energy(model(), n_steps=2),
        lambda c, p: contact_energy_score(c, p, miyazawa_jernigan([tiny_complex(0)])),
    ):
        assert score(hidden, poses) == pytest.approx(score(one, d.poses), abs=1e-8)
    # Scores turn with the receptor.
    a, b = (model().evaluate(c, p, 0.1)[1] for c, p in ((one, d.poses), (hidden, poses)))
    assert a is not None
    assert b is not None
    q = (b[:3].T @ np.linalg.inv(a[:3].T)).round(6)
    assert q @ q.T == pytest.approx(np.eye(3), abs=1e-5)
    assert b == pytest.approx(a @ q.T, abs=1e-3)


def test_far_apart_nothing_acts_and_the_contract_holds() -> None:
    one, _ = decoys()
    away = Poses.identity().perturbed(np.zeros(3), np.array([30.0, 0, 0]))
    energy, shift, turn = model().evaluate(one, away, 0.1)
    assert energy[0] == 0
    assert not np.any([shift, turn])
    shift, turn, energy = evaluate_scores(model().bound_to(one), Poses.identity(3), 0.3)
    assert shift.shape == turn.shape == (3, 3)
    with pytest.raises(InputError, match="expected at least one pose, found none"):
        model().evaluate(one, Poses.identity(0), 0.1)
    for bad in (-0.1, float("nan"), [0.1, 0.2]):
        with pytest.raises(InputError, match="sigma: expected"):
            model().evaluate(one, Poses.identity(3), bad)


# ------------------------------------------------------------------------------------------ fit


def test_the_closed_form_is_the_minimum_of_its_loss() -> None:
    settings = replace(SETTINGS, decoy_weight=0.0)
    c = solve_level(data(), settings, 0, range(4))
    scale = learning._scales(data(), SETTINGS)

    def loss(c: np.ndarray) -> float:
        fit = np.mean([c @ d[0].normal @ c / 2 - d[0].right @ c for d in data().levels])
        return float(fit + settings.ridge / 2 * ((c / scale) ** 2).sum())

    g = np.random.default_rng(0)
    for _ in range(20):
        other = c + 1e-3 * scale * g.standard_normal(N_COEFS)
        assert loss(other) > loss(c)


def test_with_decoys_the_slope_vanishes_at_the_solution() -> None:
    c = solve_level(data(), SETTINGS, 1, range(4))
    scale = learning._scales(data(), SETTINGS)

    def loss(c: np.ndarray) -> float:
        total = SETTINGS.ridge / 2 * ((c / scale) ** 2).sum()
        for f, levels in zip(data().features, data().levels, strict=True):
            one = levels[1]
            s = -f @ c
            log_pi = s - np.log(np.exp(s - s.max()).sum()) - s.max()
            total += (
                c @ one.normal @ c / 2 - one.right @ c - SETTINGS.decoy_weight * (one.target @ log_pi)
            ) / 4
        return float(total)

    g = np.random.default_rng(0)
    for _ in range(10):
        v = scale * g.standard_normal(N_COEFS)
        assert abs(loss(c + 1e-4 * v) - loss(c - 1e-4 * v)) < 1e-7
        assert loss(c + 0.03 * v) > loss(c)


def test_integration_by_parts_joins_target_and_divergence() -> None:
    """<s . target> = -<div s> over the noise, for shifts and for turns: signs, frames and kernels fit."""
    one, width = tiny_complex(0), 0.15
    noise = noise_poses(
        Poses.identity(800), 1.0, schedule=RigidSchedule(width, width), generator=np.random.default_rng(2)
    )
    _, shift, turn = model().evaluate(one, noise.poses, 0.4)
    div_tr, div_rot = model().divergences(one, noise.poses, 0.4)
    for score, target, div in ((shift, noise.tr_target, div_tr), (turn, noise.rot_target, div_rot)):
        assert score is not None
        each = (score * target).sum(axis=1) + div
        assert abs(each.mean()) < 4 * each.std() / np.sqrt(len(each))
        assert abs(div.mean()) > 10 * each.std() / np.sqrt(len(each))  # the test can fail


def test_what_was_learned_holds_on_another_complex() -> None:
    one, d = decoys()
    energy = energy_head(model(), (0.1, 0.4))(one, d.poses)
    assert area_under_curve(energy, d.near) > 0.9
    assert rank_correlation(energy, d.rmsd) > 0.4
    held_out = cross_validate(data(), SETTINGS)
    assert [h.sigmas for h in held_out] == [(0.1,), (0.4,), (0.1, 0.4)]
    assert held_out[2].score_r2 == pytest.approx((held_out[0].score_r2 + held_out[1].score_r2) / 2)
    assert held_out[0].score_r2 > 0.1
    assert held_out[0].auc > 0.9


def test_cross_validation_leaves_clusters_out_together() -> None:
    used = []

    def spy(data: DockingData, settings: DockingFit, level: int, use: list[int]) -> np.ndarray:
        used.append(tuple(use))
        return np.zeros(N_COEFS)

    original, learning.solve_level = learning.solve_level, spy  # type: ignore[assignment]
    try:
        cross_validate(data(), SETTINGS, [7, 0, 7, 1])
    finally:
        learning.solve_level = original
    assert len(used) == 6
    assert set(used) == {(0, 2, 3), (0, 1, 2), (1, 3)}
    with pytest.raises(InputError, match="clusters: expected a number for each of 4"):
        cross_validate(data(), SETTINGS, [1, 1, 1, 1])


def test_bad_fits_are_refused() -> None:
    one = tiny_complex(0)
    with pytest.raises(InputError, match="at least two native complexes, found 1"):
        fit_docking_model([one], SETTINGS)
    with pytest.raises(InputError, match="names that repeat"):
        fit_docking_model([one, one], SETTINGS)
    with pytest.raises(InputError, match="found none known for loose"):
        fit_docking_model([one, Complex("loose", one.receptor, one.ligand, native=False)], SETTINGS)
    with pytest.raises(InputError, match="found neither"):
        fit_docking_model()
    for name, bad in (("sigmas", (0.2, 0.1)), ("ridge", -1.0), ("n_noised", 0), ("radius", float("nan"))):
        with pytest.raises(InputError, match=f"{name}: expected"):
            DockingFit(**{name: bad})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- file


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    one, d = decoys()
    path = tmp_path / "m.docking"
    digest = save_docking_model(model(), path)
    found = load_docking_model(path)
    assert found.metadata["sha256"] == digest
    assert found.metadata["trained_on"] == ["tiny0", "tiny1", "tiny2", "tiny3"]
    for a, b in zip(found.evaluate(one, d.poses, 0.2), model().evaluate(one, d.poses, 0.2), strict=True):
        assert (a == b).all()
    assert found.schedule == model().schedule
    assert is_docking_model(path)
    assert save_docking_model(found, tmp_path / "again.docking") != ""


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.docking"
    save_docking_model(model(), path)
    content = path.read_bytes()
    for at in np.linspace(2, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ModelError):
            load_docking_model(path)
    path.write_bytes(content[:-10])
    with pytest.raises(ModelError, match="does not match its SHA-256"):
        load_docking_model(path)


def test_other_files_and_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.docking"
    with pytest.raises(ModelError, match="cannot be read"):
        load_docking_model(path)
    path.write_text("no model")
    assert not is_docking_model(path)
    with pytest.raises(ModelError, match="found another kind of file"):
        read_docking_file(path)
    with monkeypatch.context() as m:
        m.setattr("openmm_diffforce.docking.model_file.FORMAT_VERSION", 99)
        save_docking_model(model(), path)
    with pytest.raises(ModelError, match="expected format version 2, found 99"):
        load_docking_model(path)
    broken = replace(model(), lengths=np.full(20, np.nan))
    with pytest.raises(ModelError, match="expected finite numbers, found others in lengths"):
        save_docking_model(broken, path)


# ------------------------------------------------------------------------------ nulls, statistics


def test_contact_energies_by_hand() -> None:
    one, d = decoys()
    x = one.ligand.sites[:, CB]
    near = np.linalg.norm(one.receptor.sites[:, None, CB] - x, axis=-1) < 1.0
    assert contact_count_score(one, Poses.identity())[0] == -near.sum()
    e = np.random.default_rng(0).standard_normal((20, 20))
    want = e[one.receptor.types[:, None], one.ligand.types][near].sum()
    assert contact_energy_score(one, Poses.identity(), e)[0] == pytest.approx(want)
    table = miyazawa_jernigan([tiny_complex(k) for k in range(3)])
    assert table == pytest.approx(table.T)
    # Leucines were put where the helices face each other: they like each other more than most.
    leucine = RESIDUES.index("LEU")
    points = [tuple(p.sites[:, CB] for p in (c.receptor, c.ligand)) for c in map(tiny_complex, range(3))]
    energies = statistical_contacts(points, [tiny_complex(k) for k in range(3)], 0.65)  # type: ignore[arg-type]
    assert energies[leucine, leucine] < np.median(energies)
    assert contact_count_score(one, d.poses).max() <= 0


def test_side_chain_lengths_are_measured() -> None:
    lengths = side_chain_lengths([tiny_complex(0).receptor])
    assert lengths[RESIDUES.index("GLY")] == 0
    assert lengths[RESIDUES.index("ALA")] == pytest.approx(0.153, abs=2e-3)
    assert CHARGES.sum() == 0


def test_side_chain_centres_are_means_of_whole_side_chains() -> None:
    p, lengths = tiny_complex(0).receptor, np.full(20, 0.2)  # atoms up to C-beta
    found = site_points(p, "sc", lengths)
    alanine = np.array([RESIDUES[t] == "ALA" for t in p.types])
    assert found[alanine] == pytest.approx(p.sites[alanine, CB])
    # A leucine without its other atoms: along the ray, at the given length.
    leucine = int(np.flatnonzero([RESIDUES[t] == "LEU" for t in p.types])[0])
    ray = found[leucine] - p.ca[leucine]
    assert np.linalg.norm(ray) == pytest.approx(0.2)
    assert np.cross(ray, p.sites[leucine, CB] - p.ca[leucine]) == pytest.approx(0.0, abs=1e-9)
    extra = p.sites[leucine, CB] + np.array([[0.1, 0.0, 0.1], [0.2, 0.1, 0.0], [0.0, 0.2, 0.1]])
    whole = replace(
        p, atoms=np.concatenate([p.atoms, extra]), atom_names=(*p.atom_names, "CG", "CD1", "CD2"),
        atom_residues=np.append(p.atom_residues, [leucine] * 3),
    )  # fmt: skip
    want = np.vstack([p.sites[leucine, CB], extra]).mean(axis=0)
    assert site_points(whole, "sc", lengths)[leucine] == pytest.approx(want)


def test_statistics_against_scipy() -> None:
    g = np.random.default_rng(0)
    score, rmsd = g.standard_normal(50), g.uniform(size=50)
    near = rmsd < 0.3
    by_pairs = np.mean(score[near][:, None] < score[~near])
    assert area_under_curve(score, near) == pytest.approx(by_pairs)
    assert area_under_curve(np.zeros(50), near) == 0.5
    assert rank_correlation(score, rmsd) == pytest.approx(spearmanr(score, rmsd).statistic)
    assert rank_correlation(np.zeros(50), rmsd) == 0
    assert enrichment(rmsd, near) == pytest.approx(1 / near.mean())
    # Ties are shared: a constant score is chance, whatever the order of the poses.
    first = np.arange(40) < 2
    assert enrichment(np.zeros(40), first) == pytest.approx(1.0)
    assert any_near(np.zeros(40), first, 1) == pytest.approx(0.05)
    draws = [g.choice(40, 10, replace=False).min() < 2 for _ in range(4000)]
    assert any_near(np.zeros(40), first, 10) == pytest.approx(np.mean(draws), abs=0.03)
    assert any_near(score, near, 1) == float(near[score.argmin()])
    v = {"a": g.standard_normal(10) + 1, "b": np.zeros(10)}
    c = compare_paired(v, "a", "b", measure="auc")
    assert c.p_value == pytest.approx(wilcoxon(v["a"], alternative="greater").pvalue)
    assert c.wins == (v["a"] > 0).sum()
    assert compare_paired(v, "b", "b", measure="auc").p_value == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: area_under_curve([1.0, 2.0], [True, True]), "expected poses of both kinds"),
        (lambda: area_under_curve([1.0, np.nan], [True, False]), "1 scores that are not finite"),
        (lambda: rank_correlation([1.0], [1.0, 2.0]), "as many values beside them"),
        (lambda: enrichment([1.0], [False]), "expected near-native poses"),
        (lambda: compare_paired({"a": np.ones(3)}, "a", "b", measure="auc"), "expected one of a, found 'b'"),
        (lambda: compare_paired({"a": np.ones(1)}, "a", "a", measure="auc"), "at least two complexes"),
        (lambda: summarise([]), "expected scored decoys, found none"),
        (lambda: energy_head(model(), ()), "at least one noise level"),
    ],
)
def test_bad_statistics_are_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


# --------------------------------------------------------------------------------- side by side


def test_scores_side_by_side() -> None:
    one, d = decoys()
    scores = {"learned": energy_head(model(), (0.1,)), "count": contact_count_score, "chance": chance(1)}
    found = score_decoys(one, d, scores, seed=5)
    assert found.scores["learned"] == pytest.approx(scores["learned"](one, d.poses), abs=1e-8)
    assert np.corrcoef(found.dockq, d.rmsd)[0, 1] < -0.7
    other = Decoys(d.poses, d.rmsd, d.near_rmsd, (1,))
    second = score_decoys(replace(one, name="second"), other, scores, seed=5)
    summary = summarise([found, second])
    assert summary.complexes == (one.name, "second")
    assert summary.values["auc"]["learned"][0] == area_under_curve(found.scores["learned"], d.near)
    assert summary.mean("learned", "auc")[0] > summary.mean("chance", "auc")[0]
    assert summary.compare("learned", "chance", "spearman").n == 2
    assert summary.seed_errors["auc"]["learned"] == 0  # one set each
    with pytest.raises(InputError, match="as many decoy sets for every complex"):
        summarise([found, found, second])
    with pytest.raises(InputError, match="measure: expected one of auc"):
        summary.compare("learned", "chance", "luck")
    sets = summarise(
        [found, ScoredDecoys(one.name, d, found.dockq, {k: -v for k, v in found.scores.items()})]
    )
    assert sets.n_sets == 2
    assert sets.values["auc"]["learned"][0] == pytest.approx(0.5)
    assert sets.seed_errors["auc"]["learned"] > 0


def test_bad_scores_are_refused() -> None:
    one, d = decoys()
    for bad in (lambda c, p: np.zeros(3), lambda c, p: np.full(len(p), np.inf)):
        with pytest.raises(ModelError, match="score bad: expected 40 finite numbers"):
            score_poses(one, d.poses, {"bad": bad}, seed=1)
    with pytest.raises(InputError, match="expected scores and poses, found 0 and 40"):
        score_poses(one, d.poses, {}, seed=1)


def test_no_score_sees_the_native_frame() -> None:
    one, d = decoys()
    seen = []

    def nosy(c: Complex, p: Poses) -> np.ndarray:
        seen.append((c.native, np.linalg.norm(p.translation, axis=1), c.ligand.centre - c.receptor.centre))
        return np.linalg.norm(p.translation, axis=1)  # in the native frame: the distance from it

    found = score_poses(one, d.poses, {"nosy": nosy}, seed=1)["nosy"]
    assert not seen[0][0]
    assert rank_correlation(np.linalg.norm(d.poses.translation, axis=1), d.rmsd) > 0.5
    assert abs(area_under_curve(found, d.near) - 0.5) < 0.5


def test_minus_ln_p_of_a_weak_energy_is_its_first_order() -> None:
    """-ln p_0 = S_1 + (1/2) sum of variance times divergence, where |score|^2 may be left out."""
    one, d = decoys()
    weak = replace(
        model(), sigmas=np.array([0.1, 0.101]), tables={s: 1e-6 * t for s, t in model().tables.items()},
        schedule=RigidSchedule(0.101, 0.0674, 0.1, 0.0667, "geometric", "geometric"),
    )  # fmt: skip
    poses = d.poses[::4]
    div_tr, div_rot = weak.divergences(one, poses, 0.1005)
    want = weak.evaluate(one, poses, 0.101, gradient=False)[0]
    more = 0.5 * (0.101**2 - 0.1**2) * div_tr + 0.5 * (0.0674**2 - 0.0667**2) * div_rot
    assert np.abs(more).max() > 1e-8
    for score in (flow_energy(weak, n_steps=2), path_energy(weak, n_steps=2)):
        assert score(one, poses) == pytest.approx(want + more, abs=5e-10)


def test_perturbing_the_native_pose_costs_energy() -> None:
    """The funnel: energy of the learned model rises along random small moves, on average."""
    one, _ = decoys()
    g = np.random.default_rng(0)
    turn, shift = g.standard_normal((2, 60, 3))
    energy = [
        model().evaluate(one, Poses(exp(s / 1.5 * turn), s * shift), 0.1, gradient=False)[0].mean()
        for s in (0.02, 0.1, 0.2)
    ]
    assert energy[0] < energy[1] < energy[2]
