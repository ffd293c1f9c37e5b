"""Models as benchmarks want them: a checkpoint or random weights, also rounded in ways that generate.py knows not."""

import argparse
from dataclasses import replace

from teal.bench.gemv import add_input_groups, check_input_groups, check_refined
from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import LoadedModel, load_for_decoding, round_weights
from teal.cli import command_line as cli
from teal.cli.options import model_options
from teal.errors import UserError
from teal.layers.quantized_embedding import use_quantized_modules
from teal.layers.quantized_linear import BITS, QuantConfig, pick_group_size
from teal.model import ModelConfig
from teal.plan import ProjectionPlan, SparsityPlan, even_plan


def add_rounding_arguments(group: argparse._ArgumentGroup) -> None:
    """Where groups lie, and refined channels."""
    add_input_groups(group)
    group.add_argument(
        "--refined", type=cli.positive_int, metavar="N",
        help="with --random-weights and int4: every N-th channel in 8 bits, as of mixed bits",
    )  # fmt: skip


def check_rounding(args: argparse.Namespace) -> None:
    """Raise UserError for options of add_rounding_arguments that do not go with the others."""
    check_input_groups(args)
    check_refined(args)
    if args.tensor_parallel > 1 and (args.input_groups or args.refined):
        name = "--input-groups" if args.input_groups else "--refined"
        raise UserError(f"{name} rounds a whole model, and --tensor-parallel {args.tensor_parallel} loads parts of one")
    if args.refined and args.random_weights is None:
        raise UserError("--refined is for random weights; quantize.py --mode mixed refines those of a checkpoint")


def load_rounded(args: argparse.Namespace) -> LoadedModel:
    """The model that the options name, in the layout of the sparse kernels' weights."""
    options = asked = model_options(args)
    if args.input_groups or args.refined:  # rounded below
        options = replace(asked, quant=None, quant_lm_head=None)
    loaded = load_for_decoding(options, sparse=True)
    if args.input_groups:
        round_weights(loaded, args.quant, asked.quant_lm_head, grouping="input")
    if args.refined:
        scheme = mixed_scheme(loaded.model.config, args.refined, asked.quant_lm_head)
        use_quantized_modules(loaded.model, scheme, fill=True)
    return loaded


def mixed_scheme(config: ModelConfig, every: int, head: str | None) -> QuantConfig:
    """That of a model every so many channels of whose projections are refined."""
    counts = tuple(p.in_features // every for p in config.projections())
    return QuantConfig(
        "mixed", pick_group_size(config, None, head is not None), head is not None, average_bits=8.0,
        head_bits=BITS[head or "int8"], refined=(counts,) * config.num_layers,
    )  # fmt: skip


def starting_plan(loaded: LoadedModel, target: float, args: argparse.Namespace) -> SparsityPlan:
    """A checkpoint's plan, or for random weights, which no text fits, one whose thresholds fitted_plan has to find."""
    if not is_fitted(args):
        return choose_plan(loaded, target, args.plan)
    return even_plan(loaded.model.config, ProjectionPlan(target, 0.0))


def is_fitted(args: argparse.Namespace) -> bool:
    """Whether fitted_plan has to find the thresholds: of random weights, unless there is a plan to use."""
    return args.random_weights is not None and args.plan is None


def timed_prompt(length: int) -> list[int]:
    """Token ids of any vocabulary beyond 2,000."""
    return [1000 + i % 1000 for i in range(length)]
