"""The tests that need transformers, which is no dependency of the package: one session for each release that serves as oracle."""

import nox

nox.options.reuse_venv = "yes"


@nox.session
def transformers4(session: nox.Session) -> None:
    """transformers 4.57, the oracle for everything but head_dim."""
    _oracle(session, "constraints-shared.txt", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")


@nox.session
def transformers5(session: nox.Session) -> None:
    """transformers 5, the oracle for head_dim and for what newer writers store."""
    _oracle(session, "constraints.txt", "transformers==5.23.0")


def _oracle(session: nox.Session, constraints: str, *requirements: str) -> None:
    session.install("-c", constraints, "-e", ".[export,cpu]", "pytest", *requirements)
    # one thread: the models are so small that a second one costs more than it gives
    session.run("pytest", "tests/oracle", *session.posargs, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
