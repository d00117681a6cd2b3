"""Names of the files and folders that runs, batches and studies leave, and of what they share.

<storage_path>/<run>/                   a run, or a study
<storage_path>/batch-<name>/            a batch
<storage_path>/shared/<kind>/<digest>/  artefacts that several runs use, by a digest of all that they depend on
"""

# A run
RECORD = "run.json"  # configuration, digests, versions, seconds by stage
WINDOWS = "windows.safetensors"  # token windows of every split; also beside a calibration
SENSITIVITY = "sensitivity.parquet"
GENE_GROUPS = "gene-groups.json"
SCALING = "scaling.json"
IMATRIX = "imatrix.gguf"
EVALUATIONS = "evaluations.jsonl"
GENERATIONS = "generations.jsonl"
CHECKPOINT = "checkpoint.json"
TOLD = "checkpoint-told.jsonl"  # what the strategy was told; see search.loop.checkpoint
JOURNAL = "optuna-journal.log"
PARETO = "pareto.json"
HEALED = "healed.safetensors"
HEALING_CHECKPOINT = "healing-checkpoint.safetensors"
RECIPE = "recipe.txt"  # nothing but NAME=TYPE lines: llama-quantize takes no comments
RECIPE_COMMAND = "recipe-command.txt"
BEST = "best.json"
EVENTS = "events.log"
WORKER_LIMIT = "workers.json"
COMPARISON = "sensitivity-comparison.parquet"
COMPARISON_LOG = "sensitivity-comparison.jsonl"

# A study
STUDY = "study.json"
STUDY_RESULTS = "results.jsonl"

# A batch
BATCH = "batch.json"
LOGS, CONFIGS = "logs", "configs"  # folders
LEADERBOARD = "leaderboard.html"

# Tables of a batch, and of a study
RESULTS_PARQUET, RESULTS_CSV = "results.parquet", "results.csv"

# What runs share
SHARED = "shared"  # below it names are digests of content, so that a file of that name and size is the file
CALIBRATION_KIND, SAMPLES_KIND, SCALING_KIND, BANK_KIND, SENSITIVITY_KIND, MODEL_KIND = (
    "calibration", "samples", "scaling", "bank", "sensitivity", "model",
)  # fmt: skip
GROUPS = "groups.json"  # names of the input groups of a calibration, or of samples
MANIFEST = "manifest.json"  # sha256 of a bank's files
SCALED_MODEL = "model"  # folder of the scaled view within a scaling
SCALED_VIEW, SCALING_FACTORS = "scaled_view.json", "scaling.safetensors"  # of a scaled view
SENSITIVITY_PARTS, SENSITIVITY_SECONDS = "parts.jsonl", "seconds.json"

# Behind a URL, and for processes that meet
LEASE = ".lease"  # folder of numbered claims
LOCKS = ".locks"
STAGED = ".staged"  # below a storage root: files by name and content
SEGMENTS = ".parts"  # behind the name of a file that grows: the folder of its segments
PUSH_VERSION = "version.json"  # remote: says which push was the last
PUSH_STATE = ".pushed.json"  # local: what that push was, and what of the mirror is remote already

GROWING = (EVALUATIONS, TOLD, EVENTS, JOURNAL, STUDY_RESULTS, COMPARISON_LOG)  # files that only grow, line by line
POINTERS = (MANIFEST, GROUPS, SCALED_VIEW, SENSITIVITY, RECORD, CHECKPOINT)  # that say of others that they are there
