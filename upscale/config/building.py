"""Settings of the upscalers."""

from dataclasses import dataclass

from upscale.config.option import DTYPES, check_choices, check_least, option, parse_size
from upscale.errors import ConfigError


@dataclass(frozen=True)
class BuildConfig:
    """What every method needs to know to build."""

    rank: int = option(
        64, "Rank of each low-rank expert; clamped to what a matrix allows, so a large one is full rank.", metavar="R"
    )
    budget: str | None = option(
        None,
        "Size of the result against the base's, e.g. 1.5x, instead of one rank: ranks follow the spectra.",
        metavar="N.NNx",
    )
    energy: float | None = option(
        None,
        "Part of every module's and expert's squared delta to keep, e.g. 0.95, instead of one rank.",
        metavar="PART",
    )
    exact: bool = option(False, "Factor by full SVD instead of a random sketch: slow, the reference.", is_flag=True)
    dtype: str = option("auto", "Number format of the written tensors; 'auto' keeps each tensor's own.")
    device: str = option("cpu", "Where to factor: cpu, cuda, cuda:1 ...", metavar="DEVICE")
    max_memory: str | None = option(
        None, "Refuse to start if the build would take more memory, e.g. 4GiB.", metavar="SIZE"
    )
    seed: int = option(0, "Seed of what is random: same seed, same bytes.", metavar="N")

    CHOICES = {"dtype": DTYPES}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        check_least(self, rank=1)
        if self.max_memory is not None:
            parse_size(self.max_memory, "--max-memory")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be at least 0 and less than 2**63, not {self.seed}")
        if self.budget is not None and self.energy is not None:
            raise ConfigError("--budget and --energy exclude each other: each decides all ranks")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"--energy must be above 0 and at most 1, not {self.energy}")
        check_choices(self)

    @property
    def one_rank(self) -> bool:
        """Whether ``rank`` is everyone's."""
        return self.budget is None and self.energy is None


@dataclass(frozen=True)
class SmileConfig(BuildConfig):
    """How to build a SMILE model (arXiv 2408.10174)."""

    router_rank: int = option(8, "Leading directions of each expert that its router looks at.", metavar="K")
    top_k: int = option(1, "Experts that serve a token in each linear.", metavar="N")
    scope: str = option(
        "linear",
        "Whose evidence the projection router counts: this linear's, the block's before too, or all blocks' before.",
    )
    granularity: str = option("token", "Evidence of this token alone, or its mean over the prefix.")
    standardise: bool = option(
        False,
        "Divide the energies of each linear by their mean over experts (always so in wider scopes).",
        is_flag=True,
    )
    include: tuple[str, ...] = option(
        (), "Upscale only modules whose name matches this glob pattern, e.g. '*.mlp.*'.", multiple=True, metavar="GLOB"
    )
    exclude: tuple[str, ...] = option(
        (), "Leave out modules whose name matches this glob pattern.", multiple=True, metavar="GLOB"
    )
    rest: str = option(
        "experts",
        "What becomes of embeddings, output head and norms: experts too (a projection router leaves embeddings and "
        "norms idle), the base's, or the experts' average.",
    )
    lm_head: bool = option(False, "Upscale the output head also where --rest is not 'experts'.", is_flag=True)

    CHOICES = {  # noqa: RUF012 (a constant, not a field)
        "rest": ("experts", "base", "average"),
        "scope": ("linear", "block", "model"),
        "granularity": ("token", "prefix"),
        "dtype": DTYPES,
    }

    def __post_init__(self):
        super().__post_init__()
        check_least(self, router_rank=1, top_k=1)
        if self.one_rank and self.router_rank > self.rank:
            raise ConfigError(
                f"--router-rank {self.router_rank} is larger than --rank {self.rank}: "
                "the router looks at the experts' own directions; lower it or raise --rank"
            )


@dataclass(frozen=True)
class WemoeConfig(BuildConfig):
    """How to build a WEMoE model (arXiv 2402.00433, 2410.21804)."""

    vectors: str = option(
        "low-rank",
        "How the MLPs' task vectors are kept: low-rank, dense, sparse (their largest entries), or rank-one (low-rank "
        "with a weight for each direction; rank-one WEMoE).",
    )
    density: float = option(0.1, "With --vectors sparse, part of each task vector's entries that is kept.", metavar="P")
    merge: str = option("task-arithmetic", "How everything outside the MLPs is merged.")
    scaling: float | None = option(
        None,
        "Weight of the task vectors in the merge, and of each in the MLPs before adaptation; by default 0.3, or of an "
        "average one part for each expert.",
        metavar="LAMBDA",
    )
    router_depth: int = option(2, "Layers of the router: 0 (a constant), 1 or 2.", metavar="0|1|2")
    shared_router: bool = option(False, "One router for all blocks (E-WEMoE) instead of one each.", is_flag=True)
    mlp_pattern: tuple[str, ...] = option(
        (),
        "Glob pattern of the MLPs' linears, e.g. '*.mlp.*', where they are not found by themselves.",
        multiple=True,
        metavar="GLOB",
    )

    CHOICES = {  # noqa: RUF012 (a constant, not a field)
        "vectors": ("low-rank", "dense", "sparse", "rank-one"),
        "merge": ("task-arithmetic", "average", "ties"),
        "dtype": DTYPES,
    }

    def __post_init__(self):
        super().__post_init__()
        if self.router_depth not in (0, 1, 2):
            raise ConfigError(f"--router-depth must be 0, 1 or 2, not {self.router_depth}")
        if self.shared_router and self.router_depth == 0:
            raise ConfigError("--shared-router needs --router-depth 1 or 2: a constant has nothing to share")
        if not 0 < self.density <= 1:
            raise ConfigError(f"--density must be above 0 and at most 1, not {self.density}")
        if self.merge == "average" and self.scaling is not None:
            raise ConfigError("--scaling does not go with --merge average, whose weights are one part for each expert")
        if self.vectors != "low-rank" and not self.one_rank:
            raise ConfigError("--budget and --energy choose ranks: they need --vectors low-rank")
