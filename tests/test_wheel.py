"""The built wheel holds jdml alone, and works where nothing else of the repository is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = ("experiments", "tests", "benchmarks", "sharding", "models")


def run(*command: str | Path, cwd: Path) -> str:
    # Neither the repository nor the user's own settings may lend a module to what is tested.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built through the source archive, so that this is seen to hold all that it needs."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("jdml-*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel; nothing is downloaded.

    The dependencies come through a path file. Path files found along it are not read, so that an
    editable install of this checkout stays invisible.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    interpreter = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", interpreter, *install, cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return interpreter


def test_wheel_holds_jdml_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert tops == {"jdml", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"jdml/py.typed", "jdml/sharding/__init__.py", "jdml/models/__init__.py"} <= set(names)


def test_wheel_leaves_no_source_out(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("jdml/")}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "jdml").rglob("*.py")}
    assert {name for name in packed if name.endswith(".py")} == tracked


def test_wheel_names_the_licence_and_the_python(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_imports_from_another_folder(python, tmp_path):
    script = (
        "import sys, jdml, jdml.sharding, jdml.models, jdml.communicate, jdml.aggregate\n"
        "import jdml.train\n"
        "print(*{m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'jdml'},"
        " sep='\\n')\n"
    )
    files = run(python, "-c", script, cwd=tmp_path).splitlines()
    environment = python.parent.parent
    assert len(files) >= 5
    assert all(Path(file).is_relative_to(environment) for file in files)


def test_a_users_own_modules_are_not_shadowed(python, tmp_path):
    for name in ("models", "sharding"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    run(python, "-c", "import models, sharding; assert models.mine and sharding.mine", cwd=tmp_path)


def test_nothing_else_is_installed(python):
    (packages,) = (python.parent.parent).glob("lib/python*/site-packages")
    assert not [name for name in NOT_SHIPPED if (packages / name).exists()]
    assert (packages / "jdml" / "py.typed").exists()
