"""Generate text with a dense or activation-sparse model: python generate.py --prompt "..." --sparsity 0.5"""

import argparse
import functools
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.cli import command_line as cli
from teal.cli.options import (
    add_decode_arguments,
    add_draft_arguments,
    add_sampling_arguments,
    draft_options,
    model_options,
    sampling_params,
)
from teal.cli.ranks import is_first, start_ranks
from teal.errors import UserError
from teal.options import (
    COUNTED_TOKENS,
    DEFAULT_MAX_NEW_TOKENS,
    DraftOptions,
    ModelOptions,
    SamplingParams,
    check_bias,
    check_prompt,
)
from teal.user_text import is_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from teal.checkpoint.loading import Check, Described
    from teal.decoding.engine import Engine


def build_parser() -> cli.Parser:
    """The command line of generate.py."""
    parser = cli.Parser("Generate text, dense or with activation sparsity. Text goes to stdout, statistics to stderr.")
    add_decode_arguments(parser)
    text = parser.add_argument_group("prompt (one of these; without any, stdin is read)")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue; with --chat, the first message")
    source.add_argument("--prompt-file", type=Path, help="file whose text is the prompt")
    text.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of control tokens in the prompt, such as <|im_end|>, are those tokens; otherwise they are text",
    )
    text.add_argument("--chat", action="store_true", help="converse: one message a line on stdin, until its end")
    text.add_argument("--system", help="system message for --chat")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--max-new-tokens", type=cli.positive_int, default=DEFAULT_MAX_NEW_TOKENS, help="tokens to generate"
    )
    out.add_argument("--stop", action="append", default=[], help="stop before this text; may be repeated")
    out.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-text token")
    out.add_argument(
        "--json", action="store_true", help="print one JSON object (text, statistics) instead of streaming"
    )
    out.add_argument("--stats", action="store_true", help="measure and print bandwidth and sparsity by layer")
    add_sampling_arguments(parser)
    add_draft_arguments(parser)
    return parser


def main() -> None:
    """Parse the command line, load the model, print text."""
    args = build_parser().parse_args()
    params, model, draft = sampling_params(args), model_options(args), draft_options(args)
    check_arguments(args, draft)
    if not is_first(args.tensor_parallel):
        start_ranks(args.tensor_parallel, args.device)
        load_engine(model, draft, None).follow()
        return
    given = args.prompt is not None or args.prompt_file is not None
    prompt = read_prompt(args) if given or not args.chat else ""
    start_ranks(args.tensor_parallel, args.device)
    engine = load_engine(model, draft, functools.partial(check_model, args, prompt, params))
    if args.chat:
        chat(engine, args, params, prompt or None)
        return
    ids = engine.tokenizer.encode(prompt, allow_special=args.special_tokens)
    text = "".join(answer(engine, ids, args, params, quiet=args.json))
    statistics = collect_statistics(engine) | (detailed_statistics(engine, ids, params) if args.stats else {})
    if args.json:
        print(json.dumps({"prompt": prompt, "text": text, **statistics}))
    else:
        print_statistics(statistics)


def check_arguments(args: argparse.Namespace, draft: DraftOptions | None) -> None:
    """Raise UserError for options that contradict each other, or lack one that gives them a meaning."""
    if args.chat and args.json:
        raise UserError("--json prints one answer and --chat holds a conversation; choose one")
    if args.chat and args.special_tokens:
        raise UserError("--special-tokens is for a raw prompt; with --chat the template writes the control tokens")
    if args.system is not None and not args.chat:
        raise UserError("--system goes with --chat; a prompt is continued as it is")
    if "" in args.stop:
        raise UserError("--stop is empty; give the text to stop before")
    if draft is not None and args.stats:
        raise UserError("--stats does not go with speculative decoding, which has no bytes a token")


def check_model(args: argparse.Namespace, prompt: str, params: SamplingParams, model: "Described") -> None:
    """Raise UserError if what is asked for cannot be done with this model. Its weights have not been read yet."""
    check_bias(params, model.config.vocab_size)
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        model.tokenizer.encode_chat([*system, {"role": "user", "content": prompt or "Hello"}])
    else:
        check_prompt(model.tokenizer.encode(prompt, allow_special=args.special_tokens), model.config.max_seq_len)


def load_engine(model: ModelOptions, draft: DraftOptions | None, check: "Check | None") -> "Engine":
    """The engine of these options, unless check refuses the model. Raises UserError."""
    # Importing torch takes a second: not for --help or a mistyped option.
    from teal.decoding.speculation import SpeculativeEngine

    if draft is None:
        return SpeculativeEngine.load(model, check=check)
    return SpeculativeEngine.load_with_draft(model, draft, check=check)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from --prompt, --prompt-file or stdin. Raises UserError if it is empty or unreadable."""
    if args.prompt is not None:
        name, prompt = "--prompt", args.prompt
    elif args.prompt_file is not None:
        name, prompt = f"--prompt-file {args.prompt_file}", _decode(args.prompt_file.read_bytes(), args.prompt_file)
    elif sys.stdin is not None and not sys.stdin.isatty():
        name, prompt = "stdin", _decode(sys.stdin.buffer.read(), "stdin")
    else:
        raise UserError("no prompt; give --prompt TEXT, --prompt-file FILE, text on stdin, or --chat")
    if not prompt:
        raise UserError(f"{name} is empty; give some text")
    return prompt


def _decode(content: bytes, name: str | Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it") from None


def answer(
    engine: "Engine", ids: list[int], args: argparse.Namespace, params: SamplingParams, quiet: bool = False
) -> "Iterator[str]":
    """Generate from ids: the pieces of the text, each printed before it is yielded unless quiet."""
    for piece in engine.stream(ids, params, args.max_new_tokens, tuple(args.stop), args.ignore_eos):
        if not quiet:
            print(piece, end="", flush=True)
        yield piece
    if not quiet:
        print(flush=True)


def chat(engine: "Engine", args: argparse.Namespace, params: SamplingParams, first: str | None) -> None:
    """Hold a conversation that begins with first, if given; a turn feeds the model only what its KV cache lacks."""
    from teal.cli.conversation import Conversation

    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer here, not the program
    conversation = Conversation(engine, args.system, args.max_new_tokens)
    for message in conversation.messages_of_user(first):
        pieces: list[str] = []
        try:
            if not is_text(message):
                raise UserError(f"{message[:80]!a} is not UTF-8 text; convert it")
            ids = conversation.prompt_ids(message)
        except UserError as error:  # of this message; the conversation goes on
            print(f"error: {cli.message_of(error)}", file=sys.stderr)
            continue
        try:
            for piece in answer(engine, ids, args, params):
                pieces.append(piece)
        except KeyboardInterrupt:  # of the answer, not of the conversation
            if not sys.stdin.isatty():
                raise
            engine.stats.finish_reason = "stopped"
            print("\n[stopped]", file=sys.stderr)
        conversation.add_answer("".join(pieces))
        conversation.figures = collect_statistics(engine)
        if args.stats:
            conversation.figures |= detailed_statistics(engine, ids, params)
            print_statistics(conversation.figures)


def collect_statistics(engine: "Engine") -> dict[str, Any]:
    """Figures of the last answer."""
    stats = engine.stats
    return {
        "model": engine.name,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "target_sparsity": engine.plan.target if engine.plan else 0.0,
        "finish_reason": stats.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "new_tokens": stats.new_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "load_s": engine.load_s,
        "calibrate_s": engine.calibrate_s,
        "compile_s": engine.compile_s,
        "first_token_s": stats.first_token_s,
        "tokens_per_s": stats.tokens_per_s,
        "latency_p50_s": stats.latency_percentile(0.5),
        "latency_p99_s": stats.latency_percentile(0.99),
    }


def detailed_statistics(engine: "Engine", ids: list[int], params: SamplingParams) -> dict[str, Any]:
    """Bandwidth of the answer to ids and what sparsity drops, by layer and projection, counted in its first tokens.

    They are generated once more for that: counting slows a GPU's decoding, and would change the speed it explains.
    """
    from teal.hardware import read_bandwidth
    from teal.teal_layers import achieved_sparsity, weight_bytes_per_token

    stats, cached = engine.stats, engine.cached_ids
    figures: dict[str, Any] = {"dtype_reason": engine.loaded.dtype_reason if engine.loaded else ""}
    figures |= {"backend": engine.backend.name, "backend_reason": engine.backend.reason}
    if stats.tokens_per_s is None:
        return figures
    with engine.counting():
        if engine.plan is not None:
            for _ in engine.generate(ids, params, min(stats.new_tokens, COUNTED_TOKENS), ignore_eos=True):
                pass
            achieved = figures["achieved_sparsity"] = achieved_sparsity(engine.model)
            if warning := engine.plan.warning(achieved, engine.stats.new_tokens, "this text"):
                print(warning, file=sys.stderr)
        rate = weight_bytes_per_token(engine.model) * stats.tokens_per_s
    if cached[: len(engine.cached_ids)] == engine.cached_ids:  # what the cache holds beyond is as it was
        engine.cached_ids = cached
    engine.stats = stats
    ceiling = read_bandwidth(engine.device)
    return figures | {"gb_per_s": rate / 1e9, "bandwidth_share": rate / ceiling, "read_gb_per_s": ceiling / 1e9}


def print_statistics(figures: dict[str, Any]) -> None:
    """The figures as a few lines on stderr."""

    def milliseconds(name: str) -> str:
        return "-" if figures[name] is None else f"{1e3 * figures[name]:.1f} ms"

    rate = figures["tokens_per_s"]
    calibrated = f"calibrate {figures['calibrate_s']:.1f} s, " if figures["calibrate_s"] else ""
    lines = [
        f"[{figures['model']}, {figures['device']} {figures['dtype']}, sparsity {figures['target_sparsity']:g}]",
        f"load {figures['load_s']:.2f} s, {calibrated}compile {figures['compile_s']:.1f} s, "
        f"prompt {figures['prompt_tokens']} tokens ({figures['reused_tokens']} cached), "
        f"first token {milliseconds('first_token_s')}",
        f"{figures['new_tokens']} tokens, {'-' if rate is None else f'{rate:.1f}'} tok/s, "
        f"p50 {milliseconds('latency_p50_s')}, p99 {milliseconds('latency_p99_s')}, end: {figures['finish_reason']}",
    ]
    if figures["drafted_tokens"]:
        share = figures["accepted_tokens"] / figures["drafted_tokens"]
        lines.append(f"{figures['drafted_tokens']} tokens drafted, {share:.0%} of them accepted")
    if "backend" in figures:
        lines.append(f"backend {figures['backend']}: {figures['backend_reason']}")
    if figures.get("dtype_reason"):
        lines.append(f"dtype {figures['dtype']}: {figures['dtype_reason']}")
    if "gb_per_s" in figures:
        share = f"{figures['bandwidth_share']:.0%} of {figures['read_gb_per_s']:.1f} GB/s measured"
        lines.append(f"weights read at {figures['gb_per_s']:.1f} GB/s, {share}")
    for i, layer in enumerate(figures.get("achieved_sparsity", [])):
        lines.append(f"layer {i:2d}  " + "  ".join(f"{name} {share:6.1%}" for name, share in layer.items()))
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
