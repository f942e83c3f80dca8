"""Tests against what is not installed: transformers and optimum-onnx, the oldest ONNX Runtime, and other languages.

Run nox from an environment with `.[export,cpu,dev]`: the sessions' environments see its packages, and install only what
differs.
"""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"


@nox.session
def transformers4(session: nox.Session) -> None:
    """transformers 4.57, the oracle for everything but head_dim; peft, the oracle for merged adapters; and
    optimum-onnx, which wants transformers 4: this package is installed as a wheel, for optimum-cli to find its plug-in.
    """
    packages = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
    _install(session, "-c", "constraints.txt", *packages, "peft==0.21.2", "optimum-onnx==0.1.0")
    session.install("--no-deps", ".")
    _pytest(session, "tests/oracle", "tests/test_optimum.py")


@nox.session
def transformers5(session: nox.Session) -> None:
    """transformers 5, the oracle for head_dim and for what newer writers store."""
    _install(session, "-c", "constraints.txt", "transformers==5.23.0")
    _pytest(session, "tests/oracle")


@nox.session
def onnxruntime_1_29(session: nox.Session) -> None:
    """The oldest ONNX Runtime that pyproject.toml allows."""
    _install(session, "--no-deps", "onnxruntime==1.29.0")
    _pytest(
        session,
        *sorted(map(str, Path("tests").glob("test_runtime_*.py"))),
        "tests/test_oldest_onnxruntime.py",
        "tests/test_conformance.py",
        "tests/test_portable_blocks.py",
        # what ONNX Runtime has no part in
        "--deselect=tests/test_conformance.py::test_the_bundle_is_what_the_exporter_writes",
        "--deselect=tests/test_portable_blocks.py::test_only_standard_operators",
        "--deselect=tests/test_portable_blocks.py::test_the_numbers_are_the_cpu_targets",
        "--deselect=tests/test_portable_blocks.py::test_it_runs_in_onnx_itself",
        "--deselect=tests/test_portable_blocks.py::test_exports_do_not_touch_each_other",
    )


@nox.session
def lm_eval(session: nox.Session) -> None:
    """lm-evaluation-harness, with this package as its model."""
    _install(session, "-c", "constraints.txt", "lm-eval==0.4.13")
    _pytest(session, "tests/test_lm_eval.py")


@nox.session
def openvino(session: nox.Session) -> None:
    """OpenVINO as a reader of portable bundles."""
    _install(session, "--no-deps", "openvino==2026.4.1", "openvino-telemetry==2025.2.0")
    _pytest(session, "tests/test_openvino.py")


@nox.session
def onnxruntime_gpu(session: nox.Session) -> None:
    """What is said where the CUDA provider cannot start, with the real package; on a machine with a card there is
    nothing to test.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        session.skip("onnxruntime-gpu has no wheel for this machine")
    _install(session, "--no-deps", "onnxruntime-gpu==1.31.1")
    _pytest(session, "tests/test_cuda_errors.py")


@nox.session(venv_backend="none")
def rust(session: nox.Session) -> None:
    """embed/rust, over the ONNX Runtime library of the installed Python package."""
    if not shutil.which("cargo"):
        session.skip("there is no cargo here")
    session.run("cargo", "build", "--release", "--manifest-path", "embed/rust/Cargo.toml", external=True)
    _pytest(session, "tests/test_rust.py", python=sys.executable, distribution="load")  # one file, of small programs


@nox.session(venv_backend="none")
def native(session: nox.Session) -> None:
    """The crates under native: formatting, lint and their own tests. tests/test_native_*.py run the operators in ONNX
    Runtime, with all other tests.
    """
    if not shutil.which("cargo"):
        session.skip("there is no cargo here")
    for command in (("fmt", "--all", "--check"), ("clippy", "--release", "--all-targets", "--", "-D", "warnings")):
        session.run("cargo", command[0], "--manifest-path", "native/Cargo.toml", *command[1:], external=True)
    session.run("cargo", "test", "--release", "--manifest-path", "native/Cargo.toml", external=True)
    if sys.platform == "linux" and platform.machine() == "x86_64":
        # with AddressSanitizer, an option of the compiler that only this variable opens in a stable release
        target = ("--target", "x86_64-unknown-linux-gnu", "--target-dir", "native/target/sanitized")
        arguments = ("test", "--release", "--manifest-path", "native/Cargo.toml", "--lib", "--tests", *target)
        environment = {"RUSTC_BOOTSTRAP": "1", "RUSTFLAGS": "-Zsanitizer=address"}
        session.run("cargo", *arguments, external=True, env=environment)


@nox.session(venv_backend="none")
def java(session: nox.Session) -> None:
    """embed/java, over Maven Central's ONNX Runtime, and its documentation."""
    if not shutil.which("mvn"):
        session.skip("there is no Maven here")
    _cargo_build_operators(session)
    session.run("mvn", "-q", "-B", "-f", "embed/java/pom.xml", "test", "javadoc:jar", external=True)


@nox.session(venv_backend="none")
def csharp(session: nox.Session) -> None:
    """embed/csharp, over NuGet's ONNX Runtime."""
    if not shutil.which("dotnet"):
        session.skip("there is no .NET SDK here")
    _cargo_build_operators(session)
    session.run("dotnet", "test", "embed/csharp", external=True)


@nox.session(venv_backend="none")
def node(session: nox.Session) -> None:
    """embed/node, over npm's ONNX Runtime."""
    _npm_test(session, "embed/node")


@nox.session(venv_backend="none")
def web(session: nox.Session) -> None:
    """embed/web in a headless Chromium; CHROMIUM names another program than `chromium`."""
    if not shutil.which(os.environ.get("CHROMIUM", "chromium")):
        session.skip("there is no Chromium here")
    _npm_test(session, "embed/web")


def _cargo_build_operators(session: nox.Session) -> None:
    """The native operators, where there is cargo: the languages' builds take them from native/target."""
    if shutil.which("cargo"):
        session.run("cargo", "build", "--release", "--manifest-path", "native/Cargo.toml", external=True)


def _npm_test(session: nox.Session, folder: str) -> None:
    if not shutil.which("npm"):
        session.skip("there is no npm here")
    # onnxruntime-node would fetch CUDA's libraries
    session.run(
        "npm",
        "--prefix",
        folder,
        "ci",
        "--no-audit",
        "--no-fund",
        external=True,
        env={"ONNXRUNTIME_NODE_INSTALL": "skip"},
    )
    session.run("npm", "--prefix", folder, "test", external=True)


def _install(session: nox.Session, *arguments: str) -> None:
    """pip install, on top of the packages of the environment that runs nox: torch alone takes gigabytes."""
    prefix = session.virtualenv.location
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": prefix, "platbase": prefix}))
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    session.install(*arguments)


def _pytest(session: nox.Session, *arguments: str, python: str = "python", distribution: str = "loadfile") -> None:
    # a process a core, and so one thread each; the tests of a file share what they exported
    pytest = (python, "-m", "pytest", "--numprocesses", "auto", "--dist", distribution)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    session.run(*pytest, *arguments, *session.posargs, env=environment, external=python != "python")
