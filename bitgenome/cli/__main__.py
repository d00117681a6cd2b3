"""Runs the command line as ``python -m bitgenome.cli``, for whoever starts it as a module (jobs, tests)."""

from bitgenome.cli.main import main

main()
