"""Settings of the workers, which say where a run computes and never change its result."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.section import Section
from workers.pool.scheduling import Elasticity, Patience

Seconds = Annotated[float, Field(gt=0)]


class WorkerSettings(Section):
    """Settings of the cluster and its workers.

    ``ray`` is auto, local, HOST:PORT, or off for one process. The cluster holds ``count`` workers, or from ``min`` to
    ``max`` of them, as many as there is work for.
    """

    ray: str = Field("auto", description="auto, local, HOST:PORT, or off for one process")
    count: int | None = Field(None, ge=1, description="a fixed number; none: elastic")
    min: int | None = Field(None, ge=0, description="1; 0 for a cluster that starts empty and scales up")
    max: int | None = Field(
        None, ge=1, description="none: what there is room for at the time: set it where an autoscaler is to add nodes"
    )
    cpus_per_worker: int = Field(1, ge=1, description="also the threads it computes with")
    gpus_per_worker: float | None = Field(None, ge=0, description="0.25: four share one; none: 1 where there are GPUs")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="custom ones of Ray, by name: where workers may run"
    )
    deadline: Seconds | None = Field(
        None, description="of a task: then another worker gets it too; after twice as long its worker counts as lost"
    )
    straggler_factor: float = Field(
        Patience.straggler_factor,
        gt=1,
        description="times the median of its stage, after which another worker gets a task too",
    )
    max_retries: int = Field(
        Patience.max_retries, ge=0, description="of a task whose worker was lost; none for one that fails by itself"
    )
    idle_release: Seconds = Field(
        Elasticity.idle_release_s, description="seconds without work until a worker beyond min is given back"
    )
    start_timeout: Seconds = Field(
        Elasticity.start_timeout_s, description="seconds for the first worker to come, and for any to load"
    )
    insecure: bool = Field(False, description="join another machine's cluster that asks for no token")

    @field_validator("ray", mode="before")
    @classmethod
    def yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Raise ValueError for settings that contradict each other."""
        if self.count is not None and (self.min is not None or self.max is not None):
            raise ValueError(f"expected count, or min and max, found count {self.count} with them")
        if self.max is not None and (self.min or 0) > self.max:
            raise ValueError(f"expected min at most max ({self.max}), found {self.min}")
        if self.gpus_per_worker is not None and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"expected gpus_per_worker up to 1 or a whole number, found {self.gpus_per_worker:g}")
        if reserved := {"CPU", "GPU", "memory", "object_store_memory"} & self.resources.keys():
            raise ValueError(f"expected resources beside cpus_per_worker and gpus_per_worker, found {min(reserved)}")
        return self

    @property
    def elasticity(self) -> Elasticity:
        """How many workers a pool may hold."""
        least = 1 if self.min is None else self.min
        return Elasticity(self.count or least, self.count or self.max, self.idle_release, self.start_timeout)

    @property
    def patience(self) -> Patience:
        """When tasks count as late and workers as lost."""
        return Patience(self.straggler_factor, self.deadline, self.start_timeout, self.max_retries)
