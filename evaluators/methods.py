"""Every method that a study may name."""

from evaluators.grouped_method import MutualInformation
from evaluators.study_methods import BudgetMethod, Gptq, Method, Quantile, Rounding, Threshold

METHODS: dict[str, type[Method]] = {
    "rtn": Rounding,
    "gptq": Gptq,
    "threshold": Threshold,
    "quantile": Quantile,
    "budget": BudgetMethod,
    "mutual_information": MutualInformation,
}
