"""Serve a model over HTTP, as OpenAI's API does: python serve.py --sparsity 0.5"""

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING

import cli
from errors import UserError
from generate import add_decode_arguments, add_draft_arguments, check_decode_arguments, check_draft_arguments
from params import LOOKUP_LENGTH

if TYPE_CHECKING:
    from engine import Engine
    from plan import SparsityPlan

DEFAULT_PORT = 8000


def build_parser() -> cli.Parser:
    """The command line of serve.py."""
    parser = cli.Parser("Serve a model over HTTP with OpenAI's API, and a page to chat with it.")
    add_decode_arguments(parser)
    add_draft_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", type=cli.host, default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    server.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one")
    server.add_argument("--name", help="model name in the API; without it that of the checkpoint")
    server.add_argument("--api-key", help="required from clients; without it the environment's TEAL_API_KEY, or none")
    server.add_argument("--sparsities", type=cli.sparsities, default=(), help="further ones that requests may name")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--rows", type=cli.positive_int, default=8, help="generations decoded at once, at most 8")
    limits.add_argument("--queue", type=cli.positive_int, default=128, help="generations that may wait; then 429")
    limits.add_argument("--context", type=cli.positive_int, help="tokens of prompt and answer; without it the model's")
    limits.add_argument("--max-seconds", type=cli.positive_int, default=600, help="for one request")
    limits.add_argument("--max-body-mb", type=cli.positive_int, default=4, help="of one request")
    limits.add_argument("--drain-seconds", type=cli.positive_int, default=30, help="for requests to end at shutdown")
    return parser


def main() -> None:
    """Load the model, listen, serve until interrupted."""
    args = build_parser().parse_args()
    check_arguments(args)
    import signal
    import socket
    import threading

    import uvicorn

    from http_limits import Limits
    from openai_api import Service
    from scheduler import Scheduler
    from server import build_app

    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except OSError as error:
        raise UserError(f"--host {args.host} --port {args.port}: {error.strerror}; choose another") from None
    engine, plans = load_engine(args)
    scheduler = Scheduler(engine, args.rows, args.queue, args.context)
    name = args.name or os.path.basename(os.path.normpath(engine.name))
    key = args.api_key or os.environ.get("TEAL_API_KEY") or None
    limits = Limits(args.max_body_mb * 1_000_000, args.max_seconds, key, args.drain_seconds)
    app = build_app(Service(engine, scheduler, name, plans), limits)
    listener.listen()  # from here on clients wait and are not refused
    host, port = listener.getsockname()[:2]
    print(f"{name} at http://{host}:{port}/ (API under /v1)", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=args.drain_seconds)
    web = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(web, "should_exit", True))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, name="web")
    thread.start()
    scheduler.run()  # in this thread: see there
    thread.join()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for what is wrong whatever the model."""
    from scheduler import MAX_ROWS

    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port} is out of range; expected 0 to 65535")
    if args.rows > MAX_ROWS:
        raise UserError(f"--rows {args.rows} is out of range; expected 1 to {MAX_ROWS}")


def load_engine(args: argparse.Namespace) -> "tuple[Engine, dict[float, SparsityPlan]]":
    """The engine, by the sparse kernels even at 0%, and the plans that requests may name, by sparsity."""
    speculative = check_draft_arguments(args)
    from engine import choose_plan
    from loading import load_for_decoding
    from speculation import SpeculativeEngine, make_draft

    length = args.speculate or LOOKUP_LENGTH
    loaded = load_for_decoding(
        args.checkpoint, args.random_weights, args.device, args.dtype, True, args.quant, args.lm_head == "int8",
        args.kv_cache, functools.partial(check_decode_arguments, args),
    )  # fmt: skip
    draft = None
    if speculative and not args.speculate_lookup:  # first: it may need the weights as they were loaded
        draft = make_draft(loaded, args.draft_sparsity, args.draft_plan, args.draft_quant, args.compile)
    plans = {target: choose_plan(loaded, target, None) for target in {0.0, *args.sparsities}}
    own = choose_plan(loaded, args.sparsity, args.plan)
    engine = SpeculativeEngine.from_loaded(loaded, own, args.compile)
    if draft is not None:
        engine.draft_with(draft, length)
    elif speculative:
        engine.look_up(length)
    times = f"load {engine.load_s:.2f} s, calibrate {engine.calibrate_s:.1f} s, compile {engine.compile_s:.1f} s"
    print(times, file=sys.stderr)
    return engine, plans | {own.target: own}


if __name__ == "__main__":
    cli.run(main)
