"""Tasks of the project; ``nox -l`` is their manual.

Each session makes an environment of its own. On a machine whose environment is ready (a GPU machine
with its own torch), run it there: ``nox --no-venv -s bench``. Arguments after ``--`` reach the command.
"""

import os

import nox

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.needs_version = ">=2025.5"

CONSTRAINTS = "constraints-cpu.txt"


def install(session: nox.Session, *requirements: str, constraints: str = CONSTRAINTS) -> None:
    """Install into the session's environment; with ``--no-venv`` the present one is used as it is."""
    if session.virtualenv.venv_backend != "none":
        session.install("--constraint", constraints, *requirements)


def run_tests(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests, the browser's too (they need Debian's or your own Chromium on the PATH)."""
    install(session, "-e", ".[test]")
    run_tests(session)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Make videos with every strategy, print the table, build the page (-- --help for options)."""
    install(session, "-e", ".")
    session.run("python", "-m", "harness.bench", *session.posargs)


@nox.session(default=False)
def microbench(session: nox.Session) -> None:
    """Time every strategy and operator alone with pytest-benchmark, correctness checked first."""
    install(session, "-e", ".[test]")
    os.makedirs("runs", exist_ok=True)
    report = "--benchmark-json=runs/microbenchmarks.json"
    session.run("python", "-m", "pytest", "-o", "addopts=", "tests/benchmark", report, *session.posargs)


@nox.session(default=False)
def doctor(session: nox.Session) -> None:
    """Check every attention kernel on this machine against attention by its definition (-- --quick)."""
    install(session, "-e", ".")
    session.run("python", "-m", "harness.doctor", *session.posargs)


@nox.session(default=False)
def bench_kernels(session: nox.Session) -> None:
    """Check and time every attention kernel at the shapes of video models (-- --help for options)."""
    install(session, "-e", ".")
    session.run("python", "-m", "harness.bench_kernels", *session.posargs)


@nox.session(default=False)
def gallery(session: nox.Session) -> None:
    """Regenerate gallery/ and the README's comparison from a run (-- --run DIR)."""
    install(session, "-e", ".")
    session.run("python", "-m", "harness.gallery", *session.posargs)


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Check style (ruff), types (mypy) and the direction of imports."""
    install(session, "-e", ".[test,lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("python", "-m", "pytest", "-q", "tests/test_architecture.py")


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the tests with the lowest versions of the dependencies that we allow."""
    install(session, "-e", ".[test]", constraints="constraints-minimums.txt")
    run_tests(session)
