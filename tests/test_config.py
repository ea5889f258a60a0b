"""Settings from YAML: what is read, and how what is wrong is refused."""

from pathlib import Path

import numpy as np
import pytest

from openmm_diffforce.config import (
    DemoSettings,
    SampleSettings,
    StatesSettings,
    WindowsSettings,
    check_settings,
    load_settings,
    window_arguments,
)
from openmm_diffforce.errors import InputError

GOOD = """
system: {alanine: F1}
n_frames: 20
states: {n: 3}
out_dir: run
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "windows.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> str:
    path = written(folder, text)
    with pytest.raises(InputError) as caught:
        load_settings(path, WindowsSettings)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_defaults_and_paths(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, GOOD), WindowsSettings)
    assert settings.states == StatesSettings(n=3)
    assert settings.temperature == 300.0
    assert settings.out_dir == tmp_path / "run"


def test_paths_of_a_tuple_and_of_a_part(tmp_path: Path) -> None:
    text = (
        "system: {end_states: [a.xml, sub/b.xml]}\ntopology: m.pdb\nn_frames: 1\nout_dir: /r\n"
        "force: {artefact: f.diffforce}"
    )
    settings = load_settings(written(tmp_path, text), WindowsSettings)
    assert settings.system.end_states == (tmp_path / "a.xml", tmp_path / "sub" / "b.xml")
    assert settings.force is not None
    assert settings.force.artefact == tmp_path / "f.diffforce"
    assert settings.out_dir == Path("/r")


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD + "timstep: 0.001\n")
    assert "timstep: unknown key (did you mean timestep?)" in message
    assert "friction" in message  # the allowed ones are listed


def test_unknown_key_inside_a_part(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD + "force: {artefact: a, modus: add}\n")
    assert "force.modus: unknown key (did you mean mode?); allowed: artefact, mode" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("temperature: -3", "temperature: expected greater than 0, found -3"),
        ("temperature: .nan", "temperature: expected a finite number"),
        ("trajectory: pdb", "trajectory: expected 'dcd' or 'xtc', found 'pdb'"),
        ("seed: one", "seed: expected a valid integer"),
        ("topology: a.pdb", "topology: alanine brings its own"),
        ("sampler: gibbs", "sampler: expected 'independent', 'exchange' or 'expanded', found 'gibbs'"),
        ("n_adapt: 0", "n_adapt: expected greater than or equal to 1, found 0"),
        ("sampler: exchange\nn_workers: 2", "n_workers: sampler exchange runs in one process"),
        ("sampler: expanded\nn_workers: 2", "n_workers: sampler expanded runs in one process"),
        ("states: 3", "states: expected {n: 11, power: 1.0} or a list of {parameter: value}, found 3."),
        ("states: {n: x}", "states.n: expected a valid integer"),
        ("states: {m: 3}", "states.m: unknown key; allowed: n, power"),
        ("states: [0, {lambda: 1}]", "states.0: expected a valid dictionary, found 0"),
        ("states: [{lambda: zero}]", "states.0.lambda: expected a valid number"),
    ],
)
def test_values_that_are_not_allowed(tmp_path: Path, change: str, expected: str) -> None:
    message = refused(tmp_path, GOOD + change + "\n")
    assert expected in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "key", "bound"),
    [
        *((DemoSettings, key, 20) for key in ("n_frames", "n_test", "window_frames", "base_frames")),
        (DemoSettings, "n_windows", 2),
        (StatesSettings, "n", 2),
        (SampleSettings, "n_frames", 20),
        (SampleSettings, "n_test", 20),
    ],
)
def test_lower_bounds_hold(kind: type, key: str, bound: int) -> None:
    assert getattr(check_settings(kind, {key: bound}, "here"), key) == bound
    with pytest.raises(InputError, match=f"here: {key}: expected greater than or equal to {bound}, found"):
        check_settings(kind, {key: bound - 1}, "here")


def test_exactly_one_system(tmp_path: Path) -> None:
    text = "n_frames: 1\nout_dir: r\nsystem: {alanine: F1, xml: a.xml}"
    assert "system: expected exactly one of alanine" in refused(tmp_path, text)


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "system: {alanine: F1}")
    assert "n_frames: expected a value" in message
    assert "out_dir: expected a value" in message


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "just text"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_settings(tmp_path / "none.yaml", DemoSettings)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DemoSettings().seed = 3  # type: ignore[misc]


def test_window_arguments_alanine(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, GOOD), WindowsSettings)
    arguments = window_arguments(settings)
    assert arguments["states"] == [{"lambda": 0.0}, {"lambda": 0.5}, {"lambda": 1.0}]
    assert arguments["system"].getNumParticles() == 22
    assert arguments["out_dir"] == tmp_path / "run"
    assert arguments["learned"] is None


def test_window_arguments_from_files(tmp_path: Path) -> None:
    """The same System from files as from the package: equal energies along lambda."""
    import openmm
    from openmm import app

    from openmm_diffforce.alanine import alanine_case
    from openmm_diffforce.systems import potential_energies

    case = alanine_case("F1")
    for name in ("system_0", "system_1"):
        xml = openmm.XmlSerializer.serialize(getattr(case, name))
        (tmp_path / f"{name}.xml").write_text(xml)
    with open(tmp_path / "m.pdb", "w") as handle:
        app.PDBFile.writeFile(case.topology, case.positions * 10, handle)
    text = (
        "system: {end_states: [system_0.xml, system_1.xml]}\ntopology: m.pdb\nn_frames: 1\n"
        "out_dir: r\nstates: [{lambda: 0}, {lambda: 1}]"
    )
    found = window_arguments(load_settings(written(tmp_path, text), WindowsSettings))
    expected = case.pair.linear_system()
    np.testing.assert_allclose(
        potential_energies(found["system"], case.positions[None]),
        potential_energies(expected, case.positions[None]),
    )


def test_window_arguments_missing_file(tmp_path: Path) -> None:
    text = "system: {xml: none.xml}\ntopology: m.pdb\nn_frames: 1\nout_dir: r\nstates: [{a: 0}]"
    settings = load_settings(written(tmp_path, text), WindowsSettings)
    with pytest.raises(InputError, match=r"m\.pdb"):
        window_arguments(settings)


def test_number_of_workers(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, GOOD + "n_workers: 2\n"), WindowsSettings)
    assert settings.n_workers == 2
    assert "n_workers" in refused(tmp_path, GOOD + "n_workers: 0\n")
