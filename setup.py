"""Builds specextend._C with CMake. Everything else is in pyproject.toml.

Environment: SPECEXTEND_CUDA=AUTO|ON|OFF, SPECEXTEND_BUILD_DIR (kept between builds), MAX_JOBS, and
CMAKE_ARGS for the options at the top of CMakeLists.txt.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parents[1]
        build = Path(os.environ.get("SPECEXTEND_BUILD_DIR", self.build_temp)).resolve()
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSPECEXTEND_VERSION={self.distribution.get_version()}",
            f"-DSPECEXTEND_CUDA={os.environ.get('SPECEXTEND_CUDA', 'AUTO')}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        env = dict(os.environ)  # a venv's cmake and ninja need not be on PATH
        env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env.get("PATH", "")
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call(configure, env=env)
        subprocess.check_call(
            ["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])], env=env
        )
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(prefix)], env=env)
        # CMake keeps the time of the build, and setuptools copies what is newer than what is there:
        # a build of another flavour that was made earlier would be left out.
        os.utime(self.get_ext_fullpath(ext.name))


setup(
    packages=find_packages(include=["specextend", "specextend.*"]),
    ext_modules=[Extension("specextend._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
