"""Tries the package beside other versions of torch and `transformers` than the pinned ones.

    python tools/smoke.py newest    # the newest that pip may choose, then the newest there are
    python tools/smoke.py oldest    # the oldest that pip may choose

Each is installed as a user would: an environment of its own (build/smoke), torch, `pip install .`
in a fresh clone of the last commit; then tests/test_smoke.py runs in that clone, about a minute.

The newest that there are may lie outside the range. That they fail is only told as long as they are
younger than two weeks: whoever changes the project that day need not mend it. The script needs git
and a package index, and the standard library alone.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

from make_env import (
    ROOT,
    check_machine,
    fail,
    has_gpu,
    is_in,
    make_venv,
    ranges,
    torch_options,
)

FOLDER = ROOT / "build" / "smoke"
PACKAGES = ("torch", "transformers")
OLDEST = {"torch": "2.10.0", "transformers": "5.10.4"}  # there is no 5.10.0
DAYS = 14


def say(text):
    print(f"smoke: {text}", flush=True)


def named(versions):
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def runs(command, **options):
    """Say whether a command succeeds; show what it prints where it does not."""
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if ran.returncode:
        say(f"FAILED: {' '.join(command)}\n{ran.stdout.strip()}")
    return ran.returncode == 0


def environment(name):
    """Make build/smoke/``name`` with a pip that knows dates of releases; return its Python."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    python = make_venv(folder / "venv", over_own_packages=False)
    if not runs([str(python), "-m", "pip", "install", "--upgrade", "pip>=26"]):
        sys.exit(1)
    return python


def resolve(python, requirements, index, before=None):
    """Return {package: version}, as pip would install today, or would have ``before`` a time.

    It is None if pip finds none, perhaps because the index does not say when its files came. What
    the two packages depend on is left out: to ask about that would download all of CUDA.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [str(python), "-m", "pip", "install", "--dry-run", "--no-deps",
                   "--ignore-installed", "--report", str(report), *torch_options(index),
                   *requirements]  # fmt: skip
        if before is not None:
            command += ["--uploaded-prior-to", before.isoformat(timespec="seconds")]
        if not runs(command):
            return None
        installs = json.loads(report.read_text())["install"]
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in installs}
    return {name: found[name] for name in PACKAGES}


def clone(folder):
    """Clone the last commit into a folder."""
    command = ["git", "clone", "--quiet", "--no-local", str(ROOT), str(folder)]
    if not runs(command):
        sys.exit(1)
    status = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    if subprocess.run(status, capture_output=True, text=True).stdout:
        say("the clone is of the last commit: what is not committed is not in it")


def lift_upper_ends(project):
    """Leave out where the ranges end, which is what raising them would do."""
    text = project.read_text()
    for name in PACKAGES:
        text = re.sub(rf'"({name}>=[\d.]+),<[\d.]+"', r'"\1"', text)
    project.write_text(text)


def smoke(name, versions, index):
    """Install and try one combination, and say whether all of it works."""
    start = time.monotonic()
    say(f"{named(versions)}: installing")
    python = environment(name)
    ours = ("CMAKE_ARGS", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "SPECEXTEND_BUILD_DIR")
    variables = {k: v for k, v in os.environ.items() if k not in ours}
    variables["SPECEXTEND_CUDA"] = "AUTO" if has_gpu() else "OFF"  # minutes that show nothing here
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "specextend")
        clone(work)
        if name == "beyond":
            lift_upper_ends(work / "pyproject.toml")
        exactly = Path(folder, "versions.txt")
        exactly.write_text("".join(f"{n}=={version}\n" for n, version in versions.items()))
        pip = [str(python), "-m", "pip", "install", "--no-compile", "-c", str(exactly)]
        commands = [
            [*pip, *torch_options(index), f"torch=={versions['torch']}"],
            [*pip, "."],
            [*pip, "pytest>=8"],
        ]
        if not all(runs(command, cwd=work, env=variables) for command in commands):
            say(f"{named(versions)}: FAILED, could not be installed")
            return False
        installed = time.monotonic()
        # Only what was installed is there to be imported.
        shutil.rmtree(work / "specextend")
        tests = [str(python.with_name("pytest")), "-m", "smoke", "tests/test_smoke.py"]
        passed = subprocess.run(tests, cwd=work, env=variables).returncode == 0
    took = f"{installed - start:.0f} s to install, {time.monotonic() - installed:.0f} s of tests"
    say(f"{named(versions)}: {'passed' if passed else 'FAILED'} ({took})")
    return passed


def newest(index):
    python, allowed = environment("newest"), ranges()
    inside = resolve(python, [name + allowed[name] for name in PACKAGES], index)
    there = resolve(python, PACKAGES, index)
    if inside is None or there is None:
        fail("pip finds no torch and transformers, or none within the ranges of pyproject.toml")
    passed = smoke("newest", inside, index)
    if there == inside:
        say("the newest that there are: the same")
        return passed
    say(f"the newest that there are, outside the ranges: {named(there)}")
    if smoke("beyond", there, index):
        say(f"the newest that there are: passed; the ranges can be raised to {named(there)}")
        return passed
    settled = resolve(python, PACKAGES, index, datetime.now(timezone.utc) - timedelta(days=DAYS))
    if settled in (None, there):
        say(f"the newest that there are: FAILED, and are not known to be younger than {DAYS} days")
        return False
    say(f"the newest that there are: FAILED; {DAYS} days ago they were {named(settled)}")
    outside = not all(is_in(settled[name], allowed[name]) for name in PACKAGES)
    return passed and (not outside or smoke("beyond", settled, index))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("newest", "oldest"))
    parser.add_argument("--torch-index", default="auto", help="index to take torch from")
    options = parser.parse_args()
    check_machine()
    if options.which == "newest":
        passed = newest(options.torch_index)
    else:
        passed = smoke("oldest", OLDEST, options.torch_index)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
