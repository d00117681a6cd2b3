"""Resumes a run from its directory.

A run that goes on is the same configuration run again (bitgenome/run/pipeline.py): stages whose artefacts are complete
are skipped, and the search goes on from its checkpoint (search/loop/checkpoint.py).
"""

from bitgenome.config.run import RunConfig
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.staged import with_stored_model


def config_to_resume(location: str) -> RunConfig:
    """Return the configuration that the run directory at ``location``, a path or URL, was begun with.

    Its model is the one stored for other nodes where this machine has no copy. Raises UserError if there is no run.
    """
    directory = RunDirectory.open(location)
    return with_stored_model(directory.config, directory.record.get("digests", {}).get("model"))
