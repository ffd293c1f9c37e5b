"""Thresholds from text, one block at a time (TEAL, sections 4 and 5).

All sequences pass through block i before block i + 1 sees any, so what is held is one block's worth of
activations. Within a block the thresholds are set in the order of its projections, each from what the sparse ones
before it give. So every threshold is the quantile of the inputs that the sparse model really has. With each target
comes its own stream of activations.

The greedy method first chooses the sparsity of each projection on the dense stream (greedy.py).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal.calibration.allocation import allocate_by_layer
from teal.calibration.curves import GRID, error_curves
from teal.calibration.greedy import block_error, check_targets, greedy_sparsities
from teal.calibration.stages import BlockStages, Positions, Stream, weight_counts
from teal.calibration.texts import split_sequences, text_hash
from teal.errors import UserError
from teal.files import atomic_file
from teal.model import Block, Projection, Transformer
from teal.options import Settings
from teal.plan import ESTIMATE, Histogram, ProjectionPlan, SparsityPlan, Weights, config_fields
from teal.progress import progress
from teal.teal_layers import SparseLinear, achieved_sparsity, set_counting, sparse_prefill, sparsify, sparsify_block
from teal.user_text import parse_json

# Quick calibration, on the default model: the worst projection misses its target by 1.7 points on held-out text of the
# same kind. With half of the sequences it is 2.1, with twice as many no less.
QUICK_SEQUENCES = 16
QUICK_LENGTH = 512
HELD_OUT_SEQUENCES = 16
QUICK_GRADIENTS = 2048  # tokens that a global plan takes gradients of, in half the time of the default
# Tokens on which the greedy method measures a block's error, from the start of each calibration sequence.
GREEDY_SEQUENCES = 4
GREEDY_LENGTH = 128

Layer = dict[str, ProjectionPlan]


@torch.inference_mode()
def calibrate(
    model: Transformer,
    sequences: Tensor,
    settings: Settings,
    facts: dict[str, Any],
    offload: bool = False,
    progress_file: Path | None = None,
    seen: list[list[dict[str, Histogram]]] | None = None,
    weights: Weights | None = None,
    save: Callable[[list[SparsityPlan]], None] | None = None,
    curves: Path | None = None,
) -> list[SparsityPlan]:
    """A plan for each of settings.targets, from sequences [N, L] of token ids; leaves model sparse with the last.

    facts are kept in the plans, and whose weights these are. Finished blocks are written to progress_file and not
    computed again if a call with the same model, sequences and settings finds them there. It is removed at the end,
    after save(plans), so that nothing can come between. curves: a file that keeps what the global method estimates, for
    calls with other targets. A list given as seen receives [block][target][projection], the histograms behind the
    thresholds. Raises UserError.
    """
    work = _work(model, sequences, settings, facts)
    key = work | {"settings": [list(settings.targets), settings.method, settings.step]}
    done = _read_progress(progress_file, key) if seen is None else []  # resumed blocks have no histograms
    notes = None if progress_file is None else progress_file.with_suffix(".safetensors")
    is_global = settings.method == "global" and len(done) < len(model.blocks)
    fixed = allocate_globally(model, sequences, settings, curves or notes, json.dumps(work)) if is_global else None
    positions, dense = Positions(model, sequences.shape[1]), Stream.embedded(model, sequences, offload)
    streams = [dense for _ in settings.targets]
    blocks: list[list[Layer]] = []
    for i in progress(range(len(model.blocks)), "calibrating", "block"):
        stages = BlockStages(positions, i)
        sparsify_block(stages.block, dict.fromkeys(stages.sizes, 0.0))
        if i < len(done):
            blocks.append(done[i])
            pass_on(stages, streams, done[i])
        else:
            layers, found = calibrate_block(stages, streams, dense, settings, fixed[i] if fixed else None)
            blocks.append(layers)
            if seen is not None:
                seen.append(found)
            _write_progress(progress_file, key, blocks)
        if settings.method == "greedy" and i + 1 < len(model.blocks):
            dense = dense.map(stages.forward)
    plans = _plans(model, settings, blocks, facts, weights)
    if save is not None:
        save(plans)
    for path in filter(None, (progress_file, notes)):
        path.unlink(missing_ok=True)
    return plans


def _plans(
    model: Transformer, settings: Settings, blocks: list[list[Layer]], facts: dict[str, Any], weights: Weights | None
) -> list[SparsityPlan]:
    """A plan for each target, of the layers [block][target]."""
    layers = zip(*blocks, strict=True)
    fields = config_fields(model.config), settings.method
    return [SparsityPlan(*fields, t, own, facts, weights) for t, own in zip(settings.targets, layers, strict=True)]


def use_layer(block: Block, layer: Layer) -> None:
    """Give a block the thresholds of a plan's layer."""
    sparsify_block(block, {n: p.threshold for n, p in layer.items()})


def pass_on(stages: BlockStages, streams: list[Stream], layers: list[Layer]) -> None:
    """Replace each stream, one a target, by what the block makes of it with the thresholds of that target."""
    for j, layer in enumerate(layers):
        use_layer(stages.block, layer)
        with sparse_prefill(stages.model):
            streams[j] = streams[j].map(stages.forward)


def calibrate_block(
    stages: BlockStages,
    streams: list[Stream],
    dense: Stream,
    settings: Settings,
    fixed: list[dict[str, float]] | None = None,
) -> tuple[list[Layer], list[dict[str, Histogram]]]:
    """Thresholds of the block for each target, with their histograms; streams are replaced as by pass_on.

    dense: what the greedy method measures errors on. fixed: the block's sparsities for each target, if known before.
    """
    wanted = fixed or [dict.fromkeys(stages.sizes, target) for target in settings.targets]
    if settings.method == "greedy":
        wanted = allocate_greedily(stages, dense, settings)
    layers, seen = [], []
    for j, sparsities in enumerate(wanted):
        layer, found, streams[j] = set_thresholds(stages, streams[j], sparsities)
        layers.append(layer)
        seen.append(found)
    return layers, seen


def set_thresholds(
    stages: BlockStages, x: Stream, wanted: dict[str, float]
) -> tuple[Layer, dict[str, Histogram], Stream]:
    """Thresholds that give the block's projections the wanted sparsities on stream x, set stage by stage.

    With them come the histograms they were read from, and the block's output.
    """
    seen: dict[str, Histogram] = {}
    layer = {name: ProjectionPlan(p, 0.0) for name, p in wanted.items()}
    use_layer(stages.block, layer)

    def fix(p: Projection, x: Stream) -> Stream:
        inputs = stages.inputs(p, x)
        found = histograms(stages.block.get_submodule(p.module), inputs)
        seen.update(found)
        for name, histogram in found.items():
            layer[name] = ProjectionPlan(wanted[name], histogram.quantile(wanted[name]))
        use_layer(stages.block, layer)
        return stages.after(p, x, inputs)

    with sparse_prefill(stages.model):
        for p in stages.projections:
            x = fix(p, x)
    return layer, seen, x


def histograms(module: nn.Module, inputs: Stream) -> dict[str, Histogram]:
    """For each projection stacked in module, the histogram of their common input."""
    assert isinstance(module, SparseLinear)
    shared = Histogram()
    for part in inputs.parts:
        shared.add(part)
    return dict.fromkeys(module.names, shared)


def allocate_greedily(stages: BlockStages, dense: Stream, settings: Settings) -> list[dict[str, float]]:
    """The sparsities the greedy method gives the block's projections, for each target."""
    block, model = stages.block, stages.model
    seen: dict[str, Histogram] = {}
    x = dense
    for p in stages.projections:
        inputs = stages.inputs(p, x)
        seen |= histograms(block.get_submodule(p.module), inputs)
        x = stages.after(p, x, inputs)
    length = min(GREEDY_LENGTH, dense.parts[0].shape[1])
    short_x = torch.cat([part[:, :length] for part in dense.parts[:GREEDY_SEQUENCES]]).to(stages.device)
    short = BlockStages(Positions(model, length, batch=len(short_x)), stages.index)
    expected = short.forward(short_x)

    def error(sparsities: dict[str, float]) -> float:
        layer = {n: ProjectionPlan(p, seen[n].quantile(p)) for n, p in sparsities.items()}
        use_layer(block, layer)
        with sparse_prefill(model):
            return block_error(short.forward(short_x), expected, short_x)

    found = greedy_sparsities(error, stages.sizes, list(settings.targets), settings.step)
    sparsify_block(block, dict.fromkeys(stages.sizes, 0.0))
    return [{name: round(p, 6) for name, p in sparsities.items()} for sparsities in found]


def allocate_globally(
    model: Transformer, sequences: Tensor, settings: Settings, notes: Path | None, key: str
) -> list[list[dict[str, float]]]:
    """The sparsities [block][target][projection] at which the estimated divergences of all add up to the least.

    notes, key: as for error_curves.
    """
    check_targets(settings.targets)
    errors = error_curves(model, sequences, settings.gradient_tokens, notes, key)
    curves = [{name: list(zip(GRID, values, strict=True)) for name, values in layer.items()} for layer in errors]
    sizes = [weight_counts(block.projections()) for block in model.blocks]
    plans = [allocate_by_layer(curves, sizes, target) for target in settings.targets]
    return [
        [{name: round(sparsity, 6) for name, sparsity in layer.items()} for layer in of_targets]
        for of_targets in zip(*plans, strict=True)
    ]


def _work(model: Transformer, sequences: Tensor, settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """What the global method's estimates depend on: the key of what is kept of them."""
    tokens = text_hash(",".join(map(str, sequences.flatten().tolist())))
    weights = sum(float(p.detach().double().abs().sum()) for p in model.blocks[0].parameters())
    return {
        "model": config_fields(model.config),
        "weights": f"{weights:.9g}",  # a sparse model's weights are transposed, and their sum rounded otherwise
        "tokens": tokens,
        "estimate": ESTIMATE,
        "gradient_tokens": settings.gradient_tokens,
    } | facts


def _read_progress(path: Path | None, key: dict[str, Any]) -> list[list[Layer]]:
    try:
        content = parse_json(path.read_text(encoding="utf-8")) if path else {}
        if content.get("key") != key:
            return []
        return [[{n: ProjectionPlan(**p) for n, p in layer.items()} for layer in block] for block in content["blocks"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return []


def _write_progress(path: Path | None, key: dict[str, Any], blocks: list[list[Layer]]) -> None:
    if path is None:
        return
    plain = [
        [{n: {"sparsity": p.sparsity, "threshold": p.threshold} for n, p in layer.items()} for layer in block]
        for block in blocks
    ]
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps({"key": key, "blocks": plain}), encoding="utf-8")


def calibrate_quickly(
    model: Transformer,
    encode: Callable[[str], list[int]],
    settings: Settings,
    text: str,
    weights: Weights | None = None,
    save: Callable[[list[SparsityPlan]], None] | None = None,
    rotated: bool = False,
    curves: Path | None = None,
) -> SparsityPlan:
    """Sparsify model, in place, for the first of settings.targets, on few tokens; the plan has measured sparsities.

    encode turns text into token ids; weights is kept in the plan. save gets the plan before sparsities are measured.
    rotated: as for split_text; curves: as for calibrate. Raises UserError if the text is too short or sparsity is out
    of range.
    """
    length = min(QUICK_LENGTH, model.config.max_seq_len)
    sizes = (QUICK_SEQUENCES, length), (HELD_OUT_SEQUENCES, length)
    sequences, held_out = split_sequences(encode, text, *sizes, rotated)
    facts = {"text": text_hash(text), "sequences": QUICK_SEQUENCES, "length": length}
    plan = calibrate(model, sequences, settings, facts, weights=weights, save=save, curves=curves)[0]
    return with_achieved(model, plan, held_out)


def with_achieved(model: Transformer, plan: SparsityPlan, sequences: Tensor) -> SparsityPlan:
    """The plan with the sparsities measured on sequences [N, L]; leaves model sparse with it."""
    sparsify(model, plan)
    achieved = measure_sparsity(model, sequences)
    layers = tuple(
        {name: replace(p, achieved=round(shares[name], 4)) for name, p in layer.items()}
        for layer, shares in zip(plan.layers, achieved, strict=True)
    )
    return replace(plan, layers=layers)


@torch.inference_mode()
def measure_sparsity(model: Transformer, sequences: Tensor) -> list[dict[str, float]]:
    """Achieved sparsity [layer][projection] of a sparsified model over sequences [N, L], sparse on every token."""
    length = sequences.shape[1]
    cache = model.new_cache(1, length)
    positions = torch.arange(length, device=model.device)[None]
    set_counting(model, True)
    try:
        with sparse_prefill(model):
            for row in progress(list(sequences), "measuring", "sequence"):
                model.hidden_states(row[None].to(model.device), positions, cache)
        return achieved_sparsity(model)
    finally:
        set_counting(model, False)
