"""Look into a wheel of normwise, install it where there is no compiler, and try it there.

    python scripts/check_wheel.py dist/normwise-*.whl [--sdist FILE] [--torch-of .venv] [-c constraints.txt]

The wheel must be for a platform, hold one compiled library and no OpenMP runtime (torch brings its own, and with two in
a process each one's threads wait for the other's), and everything that the commands read. Then it goes, with [lab] and
nothing else, into an empty virtual environment whose PATH leads to no compiler; there the self-test, README's
example and `normwise compare mlp --quick` must run. `--torch-of` borrows torch and what [lab] needs from another
virtual environment instead of installing them: quick, and less of a proof. A source distribution is looked into: it has
what a build needs and the tests, and nothing compiled.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = re.compile(r"\.(so|dylib|dll|pyd)(\.[\d.]+)?$")
OPENMP = re.compile(r"lib(g|i|)omp|vcomp", re.IGNORECASE)
# Read at run time: the report's page, the lab's data, the mark of a typed package.
READ_AT_RUN_TIME = ("normwise/py.typed", "normwise/lab/templates/", "normwise/lab/data/", "normwise/diagnosis/page/")


IN_A_SDIST = (
    "CMakeLists.txt",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "csrc/include/normwise.h",
    "csrc/src/norm/rows.cpp",
    "docs/index.md",
    "pyproject.toml",
    "scripts/check_wheel.py",
    "src/normwise/lab/data/README.md",
    "tests/conftest.py",
)


def sdist_faults(sdist: Path) -> list[str]:
    """What is wrong with a source distribution by its contents."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    found = [f"it lacks {wanted}" for wanted in IN_A_SDIST if wanted not in names]
    return found + [f"it holds {name}, which was compiled" for name in names if LIBRARY.search(name)]


def faults(wheel: Path, kernels: bool = True) -> list[str]:
    """What is wrong with the wheel by its name and contents. Without `kernels` it is to have none, as on Windows."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tag = wheel.stem.split("-", 2)[2]
        libraries = [name for name in names if LIBRARY.search(name)]
        if not tag.startswith("py3-none-"):
            found.append(f"its tag is {tag}: py3-none-PLATFORM was expected, since one wheel serves every Python")
        if "linux" in tag and "manylinux" not in tag:
            found.append(f"its tag is {tag}: no index takes it; auditwheel gives it a manylinux tag")
        if runtimes := [name for name in libraries if OPENMP.search(Path(name).name)]:
            found.append(f"it brings {', '.join(runtimes)}, an OpenMP runtime beside torch's")
        libraries = [name for name in libraries if name not in runtimes]
        if kernels and [str(Path(name).parent) for name in libraries] != ["normwise/backends/cpu"]:
            found.append(f"compiled libraries are {libraries}: one in normwise/backends/cpu was expected")
        lacking = [wanted for wanted in READ_AT_RUN_TIME if not any(name.startswith(wanted) for name in names)]
        found += [f"it lacks {wanted}" for wanted in lacking]
        too_much = [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]
        found += [f"it holds {name}" for name in too_much[:1]]
    return found


def readme_example() -> str:
    """The first Python block of README.md."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block.group(1)


def without_compilers(folder: Path) -> dict[str, str]:
    """This process's environment with nothing on PATH but the virtual environment, and nothing of Python's set."""
    dropped = ("PYTHON", "NORMWISE", "CC", "CXX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PATH": str(scripts_of(folder)), "VIRTUAL_ENV": str(folder)}


def scripts_of(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin")


def try_it(wheel: Path, torch_of: Path | None, constraints: list[str], kernels: bool) -> None:
    """Raises CalledProcessError at the first command that fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "venv"
        venv.create(folder, with_pip=True)
        environment = without_compilers(folder)
        python = str(scripts_of(folder) / "python")

        def run(*command: str) -> None:
            print("$", " ".join(Path(part).name if part == python else part for part in command), flush=True)
            subprocess.run(command, cwd=name, env=environment, check=True)

        if torch_of is None:
            run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *constraints, f"{wheel}[lab]")
        else:
            told = "import sysconfig; print(sysconfig.get_path('purelib'))"
            here, there = (
                subprocess.check_output([str(scripts_of(one) / "python"), "-c", told], text=True).strip()
                for one in (folder, torch_of)
            )
            run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
            (Path(here) / "borrowed.pth").write_text(f"{there}\n", encoding="utf-8")
        run(python, "-c", "import normwise, sys; sys.exit(not normwise.__path__[0].startswith(sys.prefix))")
        run(python, "-m", "normwise.selftest", *(["--need-kernels"] if kernels else []))
        example = Path(name) / "example.py"
        example.write_text(readme_example(), encoding="utf-8")
        run(python, str(example))
        command = str(scripts_of(folder) / "normwise")
        run(command, "info")
        run(command, "compare", "mlp", "--quick", "--out", str(Path(name) / "out"))
        assert (Path(name) / "out" / "report.html").stat().st_size > 10_000


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sdist", type=Path, help="the source distribution beside it")
    parser.add_argument("--torch-of", type=Path, help="a virtual environment that has torch and [lab]'s packages")
    parser.add_argument("-c", "--constraint", help="pip's")
    parser.add_argument("--without-kernels", action="store_true", help="for a platform whose wheel has none")
    given = parser.parse_args()
    wrong = [f"{given.wheel.name}: {fault}" for fault in faults(given.wheel, not given.without_kernels)]
    if given.sdist:
        wrong += [f"{given.sdist.name}: {fault}" for fault in sdist_faults(given.sdist)]
    for fault in wrong:
        print(fault)
    if wrong:
        sys.exit(1)
    constraints = ["-c", str(Path(given.constraint).resolve())] if given.constraint else []
    try_it(given.wheel.resolve(), given.torch_of, constraints, not given.without_kernels)
    print(f"{given.wheel.name} works")
