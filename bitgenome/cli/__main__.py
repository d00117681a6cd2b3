"""``python -m bitgenome.cli``: the command line, for whoever starts it as a module (jobs, tests)."""

from bitgenome.cli.main import main

main()
