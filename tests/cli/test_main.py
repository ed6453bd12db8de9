from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points, requires

import pytest

import normwise
from normwise.cli import app as application
from normwise.cli.main import EXTRAS

GROUPS = {group.name: group.typer_instance for group in application.app.registered_groups}
COMMANDS = [command.name or command.callback.__name__ for command in application.app.registered_commands]
SUBCOMMANDS = [
    [name, command.name or command.callback.__name__]
    for name, group in GROUPS.items()
    for command in group.registered_commands
]


def test_version(normwise_command):
    assert normwise_command("--version") == (0, f"normwise {normwise.__version__}\n", "")


@pytest.mark.parametrize("command", [[], *([name] for name in (*COMMANDS, *GROUPS)), *SUBCOMMANDS])
def test_help_fits_80_columns_and_is_whole(normwise_command, command):
    status, out, err = normwise_command(*command, "--help")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.partition("Options:")[2]  # a summary too long for its line is cut with dots
    assert normwise_command(*command, "-h").out == out


def test_help_names_every_command(normwise_command):
    out = normwise_command("--help").out
    assert {"explain", "info"} <= set(COMMANDS)
    for name in (*COMMANDS, *GROUPS):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("arguments", [("bogus",), ("--bogus",), ("info", "--bogus"), ("info", "extra")])
def test_bad_arguments_exit_2_with_the_reason_on_stderr(normwise_command, arguments):
    status, out, err = normwise_command(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert arguments[-1] in err


def test_what_the_lab_refuses_is_one_line_and_status_2(normwise_command, tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,x\n")
    status, out, err = normwise_command("explain", "--csv", str(tmp_path / "t.csv"))
    assert (status, out) == (2, "")
    assert err.startswith("normwise: error: ")
    assert err.count("\n") == 1
    assert "line 2, column 2 (b): 'x'" in err


def test_a_bug_keeps_its_traceback_and_is_not_taken_for_a_finding(normwise_command, monkeypatch):
    monkeypatch.setattr("normwise.lab.explain.explain", lambda *args, **kwargs: 1 / 0)
    status, out, err = normwise_command("explain")
    assert (status, out) == (4, "")
    assert err.startswith("Traceback (most recent call last):")
    assert "ZeroDivisionError: division by zero\nnormwise: error: this is a fault of normwise" in err


def test_ctrl_c_exits_130(normwise_command, monkeypatch):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("normwise.lab.explain.explain", interrupted)
    assert normwise_command("explain").status == 130


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is a console event there, not a signal that a test can send")
@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.8])
def test_ctrl_c_while_torch_is_loading_is_silent_too(seconds):
    (script,) = (e for e in entry_points(group="console_scripts") if e.name == "normwise")
    program = f"from {script.module} import {script.attr}; print('up', flush=True); {script.attr}()"
    command = [sys.executable, "-c", program, "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 130 or (process.returncode == 0 and "Backends" in out)
    if seconds < 0.1:
        assert process.returncode == 130


def run_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.modules[{package!r}] = None; from normwise.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def test_without_the_extra_the_script_says_what_to_install():
    ran = run_without("typer", "--help")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "normwise: error: the package 'typer' is not installed; run: pip install 'normwise[lab]'\n"


def test_a_missing_package_that_the_extra_does_not_bring_is_a_bug():
    ran = run_without("json.encoder", "explain", "--json")
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr


@pytest.mark.parametrize("extra", ["lab", "cluster", "parquet"])
def test_the_packages_of_the_extras_are_those_in_pyproject(extra):
    # The metadata's quotes are the build backend's choice.
    declared = [
        line.split(">")[0].replace("vl-convert-python", "vl_convert")
        for line in requires("normwise") or []
        if re.search(f"extra == .{extra}.", line)
    ]
    named = [package for package, brought_by in EXTRAS.items() if brought_by == extra]
    assert sorted(named) == sorted(name for name in declared if not name.startswith("normwise[lab]"))


def test_the_installed_script_runs_without_loading_what_only_the_lab_needs():
    """`--help` costs the import of torch (through `normwise`) and typer, nothing else."""
    program = """
import sys
from normwise.cli.main import main
try:
    main(["--help"])
finally:
    print(sorted({"numpy", "jinja2", "altair", "vl_convert"} & set(sys.modules)), file=sys.stderr)
"""
    torch_alone = subprocess.run(
        [sys.executable, "-c", "import torch, sys; print('numpy' in sys.modules)"], capture_output=True, text=True
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == ("['numpy']" if torch_alone.stdout.strip() == "True" else "[]")
