"""Options that several commands have, each declared once, and what they mean to the library.

Defaults and choices are those of teal.options. Imports nothing heavy: --help and a mistyped option answer at once.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from teal.architectures import ARCHITECTURES
from teal.cli import command_line as cli
from teal.errors import UserError
from teal.options import (
    BACKENDS,
    DTYPE_NAMES,
    KV_CACHES,
    LOOKUP_LENGTH,
    QUANTS,
    DraftOptions,
    ModelOptions,
    SamplingParams,
    check_speculation,
)

MODEL, DRAFT = ModelOptions(), DraftOptions()
Group = argparse._ArgumentGroup


def add_model_arguments(parser: argparse.ArgumentParser) -> Group:
    """Options that choose the model, its device and dtype; the group of them."""
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group()
    add_checkpoint_argument(source)
    source.add_argument(
        "--random-weights", metavar="NAME", type=cli.architecture,
        help=f"a known architecture with random weights, for speed only: {', '.join(ARCHITECTURES)}",
    )  # fmt: skip
    add_adapter_argument(model)
    add_device_argument(model)
    model.add_argument(
        "--dtype", choices=DTYPE_NAMES, default=MODEL.dtype,
        help="auto: bf16 where the device multiplies it, else the faster one",
    )  # fmt: skip
    return model


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose the model and how it decodes."""
    add_tensor_parallel_argument(add_model_arguments(parser))
    how = parser.add_argument_group("sparsity and compilation")
    sparse = how.add_mutually_exclusive_group()
    sparse.add_argument(
        "--sparsity", type=cli.sparsity, default=MODEL.sparsity, help="share of activations to drop; 0 is dense"
    )
    sparse.add_argument("--plan", help="sparsity plan (JSON) to use instead of --sparsity")
    add_force_plan_argument(how)
    how.add_argument("--quant", choices=QUANTS, help="round the weights at load; quantize.py does it once")
    add_head_argument(how, "with --quant: round the head too, to the same or other bits")
    add_kv_cache_argument(how)
    add_compile_argument(how)
    how.add_argument(
        "--backend", choices=BACKENDS, default=MODEL.backend,
        help="what runs a decode step; auto: what suits device, dtype and formats",
    )  # fmt: skip
    how.add_argument(
        "--threads", type=cli.positive_int, default=MODEL.threads, metavar="N",
        help="threads on a CPU; otherwise as many as there are cores that the process may use",
    )  # fmt: skip
    how.add_argument(
        "--dequantize", action="store_true",
        help="make floats of a GGUF file's integers, which a CPU else multiplies as they are",
    )  # fmt: skip


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of speculative decoding."""
    draft = parser.add_argument_group("speculative decoding (the dense model's text, several tokens a pass)")
    draft.add_argument("--speculate", type=cli.positive_int, metavar="K", help="draft up to K tokens by sparse steps")
    draft.add_argument(
        "--draft-sparsity", type=cli.sparsity, default=DRAFT.sparsity, help="share of activations that they drop"
    )
    draft.add_argument("--draft-plan", help="sparsity plan (JSON) to use instead of --draft-sparsity")
    weights = draft.add_mutually_exclusive_group()
    weights.add_argument("--draft-quant", choices=QUANTS, help="round the weights of those steps, and of no other")
    weights.add_argument(
        "--draft-checkpoint", metavar="FOLDER", help="weights of those steps: what quantize.py made of this model"
    )
    draft.add_argument(
        "--speculate-lookup", action="store_true",
        help=f"draft what followed the last words before; up to {LOOKUP_LENGTH} tokens without --speculate",
    )  # fmt: skip


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose how a token is picked: a field of SamplingParams each."""
    group = parser.add_argument_group("sampling")
    for field in fields(SamplingParams):
        if meaning := field.metadata.get("help"):
            option = f"--{field.name.replace('_', '-')}"
            group.add_argument(option, type=type(field.default), default=field.default, help=meaning)
    group.add_argument(
        "--logit-bias", type=cli.token_bias, action="append", default=[], metavar="TOKEN_ID:BIAS",
        help="added to a token's logit; -100 bans it, 100 leaves no other; may be repeated",
    )  # fmt: skip


def add_text_arguments(group: Group) -> None:
    """Options that choose a text to calibrate or evaluate on."""
    group.add_argument(
        "--text", type=Path, action="append", default=[],
        help=".txt or .jsonl file; may be repeated; without it Python's help topics, English prose in every CPython, "
        "good for a smoke test only",
    )  # fmt: skip
    group.add_argument("--field", default="text", help="field of each .jsonl line that holds the text")


def add_checkpoint_argument(group: Group) -> None:
    """The option that names a checkpoint."""
    group.add_argument(
        "--checkpoint", metavar="NAME",
        help="model folder, .gguf file or hub id (org/name); without it SmolLM2-135M-Instruct",
    )  # fmt: skip


def add_adapter_argument(group: Group) -> None:
    """The option that names a LoRA adapter."""
    group.add_argument("--adapter", metavar="NAME", help="LoRA adapter folder or hub id, merged into the checkpoint")


def add_device_argument(group: Group) -> None:
    """The option that chooses the device."""
    group.add_argument("--device", default=MODEL.device, help="cpu, cuda, cuda:N or auto")


def add_head_argument(group: Group, help: str, *more: str) -> None:
    """The option that rounds the output head; more: what it may be rounded to beside what --quant can."""
    group.add_argument("--lm-head", choices=("none", *QUANTS, *more), default="none", help=help)


def add_kv_cache_argument(group: Group) -> None:
    """The option that chooses how keys and values are kept."""
    group.add_argument("--kv-cache", choices=KV_CACHES, default=MODEL.kv_cache, help="int8: keys and values in 8 bits")


def add_compile_argument(group: Group) -> None:
    """The option that compiles, or does not."""
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=MODEL.compile,
        help="compile with torch.compile, or do not; otherwise on CUDA only, where it pays at once (see BENCHMARKS.md)",
    )  # fmt: skip


def add_force_plan_argument(group: Group) -> None:
    """The option that takes a plan made for other weights."""
    group.add_argument(
        "--force-plan", action="store_true", help="use a plan that was made for another model with as many layers"
    )


def add_tensor_parallel_argument(group: Group) -> None:
    """The option that shares a model among devices."""
    group.add_argument(
        "--tensor-parallel", type=cli.positive_int, default=MODEL.tensor_parallel, metavar="N",
        help="share the model among N cards of this machine, a process each; a plan must exist already",
    )  # fmt: skip


def model_options(args: argparse.Namespace, **other: Any) -> ModelOptions:
    """What args say of the model, save for other fields. What a command has no option for is as by default.

    Raises UserError for what no model could satisfy, and at once for a checkpoint of an unknown family.
    """
    from teal.checkpoint.source import check_family

    given = {f.name: getattr(args, f.name) for f in fields(ModelOptions) if hasattr(args, f.name)}
    if hasattr(args, "lm_head"):
        given["quant_lm_head"] = None if args.lm_head == "none" else args.lm_head
    options = ModelOptions(**given | other)
    check_family(options.checkpoint)
    return options


def draft_options(args: argparse.Namespace) -> DraftOptions | None:
    """How to draft, None if args do not ask for it. Raises UserError if they do in part, or for a sparse text."""
    if args.speculate is None and not args.speculate_lookup:
        for name in ("draft_plan", "draft_quant", "draft_checkpoint"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --speculate K")
        if args.draft_sparsity != DRAFT.sparsity:
            raise UserError("--draft-sparsity goes with --speculate K")
        return None
    check_speculation(model_options(args))
    return DraftOptions(
        length=DRAFT.length if args.speculate is None else args.speculate,
        sparsity=args.draft_sparsity,
        plan=args.draft_plan,
        quant=args.draft_quant,
        checkpoint=args.draft_checkpoint,
        lookup=args.speculate_lookup,
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """How to pick a token. Raises UserError."""
    given = {f.name: getattr(args, f.name) for f in fields(SamplingParams)}
    return SamplingParams(**given | {"logit_bias": dict(args.logit_bias)})
