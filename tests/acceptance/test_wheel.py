"""The built wheel, in an environment that holds nothing else, has its scripts and migrations, and issues a voucher."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from tests.acceptance.test_up import ROOT, Running, environment

INSTALL_S = 300.0


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=INSTALL_S, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_alone_issues_a_voucher(tmp_path: Path) -> None:
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("voucherd-*.whl")
    venv.create(tmp_path / "empty")
    program = tmp_path / "empty" / "bin" / "python"
    install = ("--python", program, "install", "--no-compile", "--constraint", ROOT / "constraints.txt")
    run(sys.executable, *pip, *install, wheel, cwd=tmp_path)
    where = run(program, "-P", "-c", "import service; print(service.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path)), "the checkout was imported, not the wheel"
    started = Running(tmp_path / "data", program=[str(tmp_path / "empty" / "bin" / "voucherd")], checkout=False)
    try:
        answer = started.ready().voucher()
        assert answer.json()["status"] == "success"
    finally:
        started.stop()
