"""Lists every method that a study may name, by its ``kind``."""

from evaluators.study.methods import BudgetMethod, Gptq, Method, Quantile, Rounding, Threshold
from evaluators.study.mutual_information import MutualInformation

METHODS: dict[str, type[Method]] = {
    "rtn": Rounding,
    "gptq": Gptq,
    "threshold": Threshold,
    "quantile": Quantile,
    "budget": BudgetMethod,
    "mutual_information": MutualInformation,
}
