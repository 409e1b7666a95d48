"""Tries the package beside other versions of torch and `transformers` than the pinned ones.

    python tools/smoke.py newest     # the newest that pyproject.toml allows; then the newest there are
    python tools/smoke.py oldest     # its lower ends

Each time as a user would: an environment of its own (build/smoke), torch, `pip install .` in a
fresh clone of the last commit; then tests/test_smoke.py, about a minute, in that clone.

The newest that there are may lie outside the range. That they fail is only told as long as they are
younger than two weeks: whoever changes the project that day need not mend it. Needs git and a
package index, and the standard library alone.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_env import (
    ROOT, check_machine, fail, has_gpu, is_in, make_venv, pip_install, ranges, torch_options,
)  # fmt: skip

FOLDER = ROOT / "build" / "smoke"
PACKAGES = ("torch", "transformers")
OLDEST = {"torch": "2.10.0", "transformers": "5.10.4"}  # 5.10.0 was withdrawn
GRACE = datetime.timedelta(days=14)


def say(text):
    print(f"smoke: {text}", flush=True)


def named(versions):
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def environment(name):
    """The Python of build/smoke/``name``, with a pip that knows the dates of releases."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    python = make_venv(folder / "venv", over_own_packages=False)
    pip_install(python, "--upgrade", "pip>=26")
    return python


def resolve(python, requirements, index, before=None):
    """{package: version} that pip would install today, or would have ``before`` a time.

    None if pip finds nothing, for instance because the index does not know when its files came.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
                   "--report", str(report), *torch_options(index), *requirements]  # fmt: skip
        if before is not None:
            command += ["--uploaded-prior-to", before.isoformat(timespec="seconds")]
        if subprocess.run(command, stderr=subprocess.DEVNULL if before else None).returncode:
            return None
        installs = json.loads(report.read_text())["install"]
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in installs}
    return {name: found[name] for name in PACKAGES}


def clone(folder):
    """The last commit, in a folder."""
    command = ["git", "clone", "--quiet", "--no-local", str(ROOT), str(folder)]
    if subprocess.run(command).returncode:
        fail("a clone is wanted, and git cannot make it")
    status = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    if subprocess.run(status, capture_output=True, text=True).stdout:
        say("the clone is of the last commit: what is not committed is not in it")


def lift_upper_ends(project):
    """What raising the ranges would do, if they had no end."""
    text = project.read_text()
    for name in PACKAGES:
        text = re.sub(rf'"({name}>=[\d.]+),<[\d.]+"', r'"\1"', text)
    project.write_text(text)


def smoke(name, versions, index):
    """Install and try one combination; whether all of it works."""
    start = time.monotonic()
    say(f"{named(versions)}: installing")
    python = environment(name)
    variables = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "PYTHONPATH")}
    variables["SPECEXTEND_CUDA"] = "AUTO" if has_gpu() else "OFF"  # minutes that show nothing here
    variables["SPECEXTEND_BUILD_DIR"] = str(FOLDER / name / "build")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "specextend")
        clone(work)
        if name == "beyond":
            lift_upper_ends(work / "pyproject.toml")
        exactly = Path(folder, "versions.txt")
        exactly.write_text("".join(f"{n}=={version}\n" for n, version in versions.items()))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(exactly)]
        commands = [
            [*pip, *torch_options(index), f"torch=={versions['torch']}"],
            [*pip, "."],
            [*pip, "pytest>=8"],
        ]
        for command in commands:
            if subprocess.run(command, cwd=work, env=variables).returncode:
                say(f"{named(versions)}: FAILED: {' '.join(command[1:])}")
                return False
        installed = time.monotonic()
        # Only what was installed is there to be imported.
        subprocess.run(["rm", "-r", str(work / "specextend")], check=True)
        tests = [str(python.with_name("pytest")), "-m", "smoke", "tests/test_smoke.py"]
        passed = subprocess.run(tests, cwd=work, env=variables).returncode == 0
    took = f"{installed - start:.0f} s to install, {time.monotonic() - installed:.0f} s of tests"
    say(f"{named(versions)}: {'passed' if passed else 'FAILED'} ({took})")
    return passed


def newest(index):
    python, allowed = environment("newest"), ranges()
    inside = resolve(python, [name + allowed[name] for name in PACKAGES], index)
    if inside is None:
        fail("pip finds no torch and transformers within the ranges of pyproject.toml")
    passed = smoke("newest", inside, index)
    there = resolve(python, PACKAGES, index)
    if there == inside:
        say("the newest that there are: the same")
        return passed
    say(f"the newest that there are, outside the ranges: {named(there)}")
    if smoke("beyond", there, index):
        say(f"the newest that there are: passed; the ranges can be raised to {named(there)}")
        return passed
    settled = resolve(python, PACKAGES, index, datetime.datetime.now(datetime.timezone.utc) - GRACE)
    if settled in (None, there):
        say(f"the newest that there are: FAILED, and are not younger than {GRACE.days} days")
        return False
    say(f"the newest that there are: FAILED; {GRACE.days} days ago they were {named(settled)}")
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
