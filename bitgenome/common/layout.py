"""Names the files and directories of runs, batches and studies, and of the artefacts that they share.

<storage_path>/<run>/                   a run, or a study
<storage_path>/batch-<name>/            a batch
<storage_path>/shared/<kind>/<digest>/  artefacts that several runs use, by a digest of all that they depend on
<cache>/<digest>/                       this machine's copy of what is behind a URL
<cache>/found/                          what was found in large files, so that each is read once
"""

import os
from pathlib import Path

# A run
SETTINGS = "run.yaml"  # of a run that `bitgenome quantize` began, with comments
RECORD = "run.json"  # configuration, digests, versions, seconds by stage
WINDOWS = "windows.safetensors"  # token windows of every split; also of a shared text, and beside a calibration
SENSITIVITY = "sensitivity.parquet"
USED = "shared.txt"  # what it uses of the shared artefacts, as kind/digest, a line each
GENE_GROUPS = "gene-groups.json"
SCALING = "scaling.json"
IMATRIX = "imatrix.gguf"
EVALUATIONS = "evaluations.jsonl"
GENERATIONS = "generations.jsonl"
CHECKPOINT = "checkpoint.json"
TOLD = "checkpoint-told.jsonl"  # results told to the strategy (ask and tell); see search.loop.checkpoint
JOURNAL = "optuna-journal.log"
PARETO = "pareto.json"
HEALED = "healed.safetensors"
HEALING_CHECKPOINT = "healing-checkpoint.safetensors"
RECIPE = "recipe.txt"  # nothing but NAME=TYPE lines: llama-quantize takes no comments
RECIPE_COMMAND = "recipe-command.txt"
BEST = "best.json"
REPORT = "report.html"
EVENTS = "events.log"
WORKER_LIMIT = "workers.json"
COMPARISON = "sensitivity-comparison.parquet"
COMPARISON_CSV = "sensitivity-comparison.csv"
COMPARISON_LOG = "sensitivity-comparison.jsonl"

# A study
STUDY = "study.json"
STUDY_RESULTS = "results.jsonl"

# A batch
BATCH = "batch.json"
LOGS, CONFIGS = "logs", "configs"  # directories
LEADERBOARD = "leaderboard.html"

# Tables of a batch, and of a study
RESULTS_PARQUET, RESULTS_CSV = "results.parquet", "results.csv"

# What runs share
SHARED = "shared"  # names below it are digests of content: a file of the same name and size is the same file
TEXT_KIND, WRITTEN_KIND, CALIBRATION_KIND, STATISTICS_KIND, SAMPLES_KIND, SCALING_KIND = (
    "text", "written", "calibration", "statistics", "samples", "scaling",
)  # fmt: skip
BANK_KIND, SENSITIVITY_KIND, MODEL_KIND, OPENED_KIND = "bank", "sensitivity", "model", "opened"
TEMPLATE_KIND, OUTPUTS_KIND = "template", "outputs"
EXPLANATION = "explanation.safetensors"  # what of a model stands behind the tensors of a template
GROUPS = "groups.json"  # names of the input groups of a calibration, or of samples
PASSING = "passing"  # directory below a bank, while it is built, of what is removed when it is
MANIFEST = "manifest.json"  # sha256 of a bank's files
OPENED = "opened.json"  # in the folder of a GGUF model: written last, what it was made of
SCALED_MODEL = "model"  # directory of the scaled view within a scaling
SCALED_VIEW, SCALING_FACTORS = "scaled_view.json", "scaling.safetensors"  # of a scaled view
SENSITIVITY_PARTS, SENSITIVITY_SECONDS = "parts.jsonl", "seconds.json"

# Remote storage, and coordination of processes
LEASE = ".lease"  # directory of numbered claims, see bitgenome.storage.lease
LOCKS = ".locks"
STAGED = ".staged"  # below a storage root: files by a digest of name and content
SEGMENTS = ".parts"  # suffix of a growing file's name: the directory of its segments
PUSH_VERSION = "version.json"  # remote: identifies the last push
PUSH_STATE = ".pushed.json"  # local: the last push from this mirror, and which of its files are remote

GROWING = (EVALUATIONS, TOLD, EVENTS, JOURNAL, STUDY_RESULTS, COMPARISON_LOG)  # append-only files of lines
POINTERS = (MANIFEST, GROUPS, SCALED_VIEW, SENSITIVITY, RECORD, CHECKPOINT)  # sent last: each says that others exist

# A user's cache folder
FOUND = "found"


def cache_root() -> Path:
    """Return this user's cache folder on this machine: $BITGENOME_CACHE, else ~/.cache/bitgenome."""
    return Path(os.environ.get("BITGENOME_CACHE") or Path.home() / ".cache" / "bitgenome").resolve()
