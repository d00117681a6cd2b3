"""A sweep over many candidates is, bit for bit, a plain forward of each of them alone."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evaluators.engine.batches import Batches
from evaluators.engine.evaluator import GenomeEvaluator
from evaluators.engine.prefix_cache import PrefixCache
from evaluators.engine.sweep import Candidate, Sweep
from evaluators.engine.weights import ModelWeights
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank
from search.types import Fidelity, Genome
from tests.conftest import EMBEDDED, SmallBank
from tests.small_models import save_small_model

CPU = torch.device("cpu")


def sweep_of(small_bank: SmallBank, *, weights: int = 1 << 30, windows: int = 4, cache: int = 1 << 28) -> Sweep:
    model = BlockModel(ModelFolder(EMBEDDED), CPU)
    return Sweep(ModelWeights(model, Bank(small_bank.directory), weights), Batches(windows), PrefixCache(cache))


def family(small_bank: SmallBank) -> list[Genome]:
    """Two parents, and children that differ from them by one to three genes anywhere, one of them by the embedding."""
    rng = random.Random(5)
    genes = small_bank.space.genes
    parents = [tuple(rng.randrange(len(g.formats)) for g in genes) for _ in range(2)]
    children = []
    for changed in ([0], [41], [20, 41], [36, 39], [1, 7, 30]):
        child = list(parents[len(children) % 2])
        for gene in changed:
            child[gene] = (child[gene] + 1) % len(genes[gene].formats)
        children.append(tuple(child))
    return [*parents, *children]


def candidates_of(small_bank: SmallBank) -> list[Candidate]:
    return [{}, *(small_bank.space.formats_of(genome) for genome in family(small_bank))]


def ids_of(small_bank: SmallBank) -> Tensor:
    return torch.from_numpy(small_bank.windows.take("search", 1536))


@pytest.fixture(scope="module")
def plain(small_bank: SmallBank) -> list[Tensor]:
    """Final states of each candidate, all of the text through transformers' own model at once."""
    bank, found = Bank(small_bank.directory), []
    for candidate in candidates_of(small_bank):
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
        for name, fmt in candidate.items():
            parameter = model.get_parameter(name)
            parameter.data = bank.weights(name, fmt, parameter.shape[1], CPU)
        with torch.inference_mode():
            found.append(model.model(ids_of(small_bank)).last_hidden_state)
    return found


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(sweep_of, id="resident"),
        pytest.param(lambda bank: sweep_of(bank, weights=0), id="streamed"),
        pytest.param(lambda bank: sweep_of(bank, weights=4 << 20), id="partly resident"),
        pytest.param(lambda bank: sweep_of(bank, windows=1), id="a window at a time"),
        pytest.param(lambda bank: sweep_of(bank, windows=6), id="all windows at once"),
        pytest.param(lambda bank: sweep_of(bank, cache=0), id="nothing remembered"),
        pytest.param(lambda bank: sweep_of(bank, cache=5 << 20), id="little remembered"),
    ],
)
def test_a_sweep_equals_a_plain_forward_of_every_candidate(
    small_bank: SmallBank, plain: list[Tensor], make: Callable[[SmallBank], Sweep]
) -> None:
    candidates, ids, sweep = candidates_of(small_bank), ids_of(small_bank), make(small_bank)
    parents = candidates[1:3]
    for order in (list(range(len(candidates))), [6, 3, 0], [2, 5, 4, 1, 7]):  # later sweeps start from the cache
        found = sweep.final_states(ids, "text", [candidates[i] for i in order], keep=parents)
        assert [torch.equal(states, plain[i]) for states, i in zip(found, order, strict=True)] == [True] * len(order)


def blocks_run(sweep: Sweep, run: Callable[[], object]) -> int:
    """Windows of text that went through attention and MLP of a block while ``run`` ran."""
    count = 0

    def add(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal count
        count += len(inputs[0])

    handles = [block.mlp.register_forward_hook(add) for block in sweep.model.blocks]
    run()
    for handle in handles:
        handle.remove()
    return count


def test_what_candidates_share_is_computed_once(small_bank: SmallBank) -> None:
    sweep, ids = sweep_of(small_bank), ids_of(small_bank)
    parent = small_bank.space.formats_of(family(small_bank)[0])
    name = "model.layers.4.mlp.up_proj.weight"
    children = [{**parent, name: fmt} for fmt in small_bank.space.genes[0].formats]  # the parent is one of them
    windows, blocks = len(ids), len(sweep.model.blocks)
    sweep.final_states(ids[:1], "first", [{}])  # the first pass through a block looks at how it is made
    together = blocks_run(sweep, lambda: sweep.final_states(ids, "a", children, keep=[parent]))
    assert together == windows * (4 + 2 * len(children))
    remembered = blocks_run(sweep, lambda: sweep.final_states(ids, "a", children))
    assert remembered == windows * 2 * (len(children) - 1)
    elsewhere = blocks_run(sweep, lambda: sweep.final_states(ids, "b", [parent]))
    assert elsewhere == windows * blocks


def test_products_that_depend_on_nothing_changed_are_not_made_again(
    small_bank: SmallBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, ids = sweep_of(small_bank), ids_of(small_bank)[:1]
    sweep.final_states(ids, "first", [{}])
    made: list[tuple[int, ...]] = []
    linear = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", counted)
    prefix, fmt = "model.layers.5.", small_bank.space.genes[-1].formats[0]
    names = [f"{prefix}self_attn.o_proj.weight", f"{prefix}mlp.up_proj.weight", f"{prefix}mlp.down_proj.weight"]
    sweep.final_states(ids, "text", [{}, *({name: fmt} for name in names)])
    once = [(256, 256), (128, 256), (128, 256), (256, 256), (768, 256), (768, 256), (256, 768)]
    again = [(256, 256), (768, 256), (768, 256), (256, 768), (768, 256), (256, 768), (256, 768)]
    assert sorted(made) == sorted(once * 6 + again)


def test_tensors_are_kept_up_to_the_bound_and_no_block_stays_loaded(small_bank: SmallBank) -> None:
    bound = 3 << 20
    sweep = sweep_of(small_bank, weights=bound)
    sweep.final_states(ids_of(small_bank), "text", candidates_of(small_bank))
    assert bound / 2 < sweep.weights._stays.used + sweep.weights._passes.used <= bound
    parameters = [p for block in sweep.model.blocks for p in block.parameters()]
    assert all(parameter.is_meta for parameter in parameters)


def test_the_cache_never_holds_more_than_its_bound() -> None:
    cache = PrefixCache(1000)
    for key in range(8):
        cache.put(key, [torch.zeros(100), torch.zeros(25)])
        assert cache.used <= 1000
    assert cache.get(5) is None and cache.get(6) is not None and cache.get(7) is not None
    cache.put("large", [torch.zeros(300)])
    assert cache.get("large") is None and cache.get(7) is not None


def test_out_of_memory_halves_the_batch_and_says_so(
    small_bank: SmallBank, plain: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    sweep, candidates = sweep_of(small_bank, windows=6), candidates_of(small_bank)
    run_block = sweep.model.run_block

    def crowded(block: int, hidden: Tensor) -> Tensor:
        if block == 3 and len(hidden) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has: torch's own error
        return run_block(block, hidden)

    sweep.model.run_block = crowded  # type: ignore[method-assign]
    found = sweep.final_states(ids_of(small_bank), "text", candidates)
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))
    assert sweep.batches.windows == 1
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: from now on 3 windows of text at once, not 6",
        "out of memory: from now on 1 windows of text at once, not 3",
    ]


def test_a_window_that_does_not_fit_is_an_error_and_other_errors_pass() -> None:
    def impossible(rows: Tensor) -> Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)

    def broken(rows: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    batches = Batches(4)
    with pytest.raises(RuntimeError, match="not enough memory|can't allocate memory"):
        batches.run(impossible, torch.zeros(4, 2))
    assert batches.windows == 1
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Batches(4).run(broken, torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.mlp.down_proj.weight", "block 1"),
        ("lm_head.weight", "head"),
    ],
)
def test_outputs_that_are_not_finite_name_genome_and_block(
    tmp_path: Path, small_bank: SmallBank, tensor: str, place: str
) -> None:
    folder = save_small_model(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights[tensor][5] = torch.inf if place == "embedding" else 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sweep = Sweep(ModelWeights(BlockModel(ModelFolder(folder), CPU), Bank(tmp_path), 0), Batches(2), PrefixCache(0))
    assert sweep.first_overflow(torch.arange(64).reshape(2, 32), {}) == place


def test_the_error_of_an_evaluation_names_its_genome_and_block(small_bank: SmallBank, tmp_path: Path) -> None:
    genomes = family(small_bank)[:3]
    formats = small_bank.space.formats_of(genomes[1])
    evaluator = GenomeEvaluator(small_bank.setup())
    name = "model.layers.2.mlp.down_proj.weight"
    weights = evaluator.sweep.weights
    weights.get(name, formats[name]).fill_(torch.nan)  # a decoded tensor that is kept
    bad = [g for g in genomes if small_bank.space.formats_of(g)[name] == formats[name]]
    with pytest.raises(FloatingPointError, match="block 2") as error:
        evaluator.evaluate(genomes, Fidelity("search", 512))
    assert str(list(bad[0])) in str(error.value)
