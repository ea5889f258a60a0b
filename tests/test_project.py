"""What holds for the project as a whole: floors, names, documents, installation."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import openmm_diffforce

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "openmm_diffforce"
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
    for p in PACKAGE.rglob("*.py")
    if p.name != "__init__.py"
)
FOLDERS = sorted({name.split(".")[0] for name in MODULES if "." in name})

# A module imports only from lower floors. Decimals order the modules of one floor.
FLOORS: dict[str, float] = {
    "errors": 0,
    "constants": 0.1,
    "units": 0.1,
    "schedule": 1,
    "ops": 1,
    "record": 1,
    "page": 1,
    "models.action": 2.0,
    "models.graph": 2.0,
    "models.examine": 2.1,
    "models.physics": 2.1,
    "models.stiff": 2.1,
    "models.envelope": 2.2,
    "models.network": 2.3,
    "models": 2.9,
    "training": 3,
    "network_training": 3.1,
    "pair_features": 3.1,
    "artefact": 3,
    "systems": 3,
    "scores": 3.2,
    "force": 4,
    "energy": 4,
    "posterior": 5,
    "sampler": 5,
    "langevin": 5,
    "step_size": 5.1,
    "path_kl": 5.2,
    "alchemy": 5,
    "alanine": 5.1,
    "runs": 5.5,
    "workers": 5.6,
    "closure": 6,
    "windows": 6,
    "summary": 6,
    "density": 6.1,
    "conditional": 6.2,
    "labels": 6.1,
    "heads": 6.1,
    "binned_mbar": 6.25,
    "bridge": 6.3,
    "posterior_work": 6.3,
    "posterior_bridge": 6.4,
    "audit": 6.4,
    "legs": 6.5,
    "bridge_inputs": 6.5,
    "bridge_figures": 6.5,
    "bridge_run": 8.15,
    "swaps": 6.1,
    "exchange": 6.2,
    "reporters": 6,
    "estimate": 6,
    "analysis": 6,
    "docking.so3": 7.0,
    "docking.complex": 7.0,
    "docking.statistics": 7.1,
    "docking.contacts": 7.2,
    "docking.metrics": 7.3,
    "docking.potentials": 7.3,
    "docking.residue_model": 7.3,
    "docking.residual": 7.35,
    "docking.decoys": 7.4,
    "docking.model_file": 7.4,
    "docking.physics_score": 7.4,
    "docking.learning": 7.5,
    "docking.pages": 7.6,
    "docking.dock_run": 7.7,
    "docking.scoring": 7.5,
    "docking.poses": 7.05,
    "docking.rigid": 7.1,
    "docking.rigid_sampler": 7.15,
    "docking.mixture": 7.15,
    "docking.rigid_energy": 7.2,
    "docking.adapter": 7.2,
    "docking": 7.8,
    "testing": 7.9,
    "config": 8.0,
    "report": 8.0,
    "project": 8.1,
    "demo": 8.2,
    "cli": 8.3,
}


def parsed(module: str) -> ast.Module:
    path = PACKAGE / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Modules of this package that ``module`` imports anywhere, also inside functions."""
    package = module.split(".") if module in FOLDERS else module.split(".")[:-1]
    found = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "openmm_diffforce":
                base = []
            else:
                continue
            inner = (node.module or "").removeprefix("openmm_diffforce").strip(".")
            base = base + (inner.split(".") if inner else [])
            for name in node.names:
                whole = ".".join([*base, name.name])
                found.add(whole if whole in {*MODULES, *FOLDERS} else ".".join(base))
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("openmm_diffforce."):
                    found.add(name.name.removeprefix("openmm_diffforce."))
    return found - {""}  # the package itself: __version__


def test_every_module_has_a_floor() -> None:
    assert set(FLOORS) == {*MODULES, *FOLDERS}


@pytest.mark.parametrize("module", [*MODULES, *FOLDERS])
def test_imports_go_strictly_downward(module: str) -> None:
    for other in imports_of(module):
        assert FLOORS[other] < FLOORS[module], f"{module} imports {other}"


def test_the_import_test_sees_imports() -> None:
    assert {"config", "report", "estimate"} <= imports_of("cli")  # inside functions
    assert "models.graph" in imports_of("models.physics")
    assert "ops" in imports_of("models.physics")


def test_nothing_imports_testing() -> None:
    assert not [m for m in MODULES if "testing" in imports_of(m)]


def foreign_imports(module: str) -> set[str]:
    out = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            out.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            out |= {n.name.split(".")[0] for n in node.names}
    return out


@pytest.mark.parametrize(
    "module",
    [
        "audit",
        "bridge",
        "closure",
        "conditional",
        "density",
        "estimate",
        "labels",
        "posterior_work",
        "summary",
        "swaps",
        *(m for m in MODULES if m.startswith("models.")),
        "docking.adapter",
        "docking.mixture",
        "docking.poses",
        "docking.rigid",
        "docking.rigid_sampler",
        "docking.rigid_energy",
        "docking.so3",
    ],
)
def test_modules_that_never_import_openmm(module: str) -> None:
    assert "openmm" not in foreign_imports(module)


def test_no_public_function_bears_the_name_of_a_module() -> None:
    names = {part for module in MODULES for part in module.split(".")}
    for module in MODULES:
        if module == "cli":  # its functions are commands
            continue
        for node in parsed(module).body:
            if isinstance(node, ast.FunctionDef):
                assert node.name not in names, f"{module}.{node.name}"


def loaded_by(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["openmm_diffforce", "openmm_diffforce.cli"])
def test_light_imports(module: str) -> None:
    heavy = {"torch", "openmm", "matplotlib", "pandas", "scipy", "mdtraj", "pymbar"}
    assert not heavy & loaded_by(f"import {module}")


def test_public_names() -> None:
    for name in openmm_diffforce.__all__:
        assert getattr(openmm_diffforce, name) is not None
    assert set(openmm_diffforce.__all__) <= set(dir(openmm_diffforce))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = openmm_diffforce.nonsense


def test_public_names_are_the_ones_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == openmm_diffforce._HOME


def test_packages_inits_do_nothing() -> None:
    """An __init__ holds imports, constants and the lazy lookup; it calls nothing."""
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            assert isinstance(
                node, ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef | ast.If | ast.Expr
            ), path
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), path


# ------------------------------------------------------------------------------- documents


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version() -> None:
    version = openmm_diffforce.__version__
    assert project()["project"]["version"] == version
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"VERSION {version} " in (ROOT / "cpp" / "CMakeLists.txt").read_text()


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


@pytest.mark.parametrize("file", ["README.md", "examples/README.md", "CHANGELOG.md"])
def test_commands_in_documents_exist(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    from openmm_diffforce.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) <= make_targets()
    assert set(re.findall(r"^(?:\$ )?diffforce ([a-z-]+)", text, re.MULTILINE)) <= commands
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / file).parent.joinpath(path).exists(), path
    for path in re.findall(r"\bpython ((?:examples|benchmarks)/[\w./]+\.py)", text):
        assert (ROOT / path).exists(), path


def test_readme_begins_with_the_two_commands() -> None:
    above = (ROOT / "README.md").read_text().split("\n## ")[0]
    assert "make demo" in above
    assert "make test" in above


def tracked() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name]


def test_no_machine_paths_in_tracked_files() -> None:
    # Written in pieces, so that this file does not find itself.
    pattern = re.compile(rb"/(?:home|root|work|Users)" + rb"/[\w.]|/tmp" + rb"/\w")
    for path in tracked():
        if path.is_file() and path != Path(__file__).resolve():
            found = pattern.search(path.read_bytes())
            assert found is None, f"{path}: {found.group()!r}"


def test_nothing_built_is_tracked() -> None:
    names = [p.name for p in tracked()]
    assert not [n for n in names if n.endswith((".so", ".o", ".whl", ".dcd", ".xtc", ".parquet"))]


def test_top_level_is_what_the_design_says() -> None:
    allowed = {
        "pyproject.toml", "README.md", "openmm_diffforce", "cpp", "tests", "examples", "Makefile",
        "LICENSE", "CHANGELOG.md", "CITATION.cff", ".gitignore", ".ci", "benchmarks",
        ".clang-format",
    }  # fmt: skip
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_docstring_and_imports(module: str) -> None:
    assert ast.get_docstring(parsed(module))
    importlib.import_module(f"openmm_diffforce.{module}")
