"""Serve a model over HTTP, as OpenAI's API does: python serve.py --sparsity 0.5"""

import argparse
import gc
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from teal.cli import command_line as cli
from teal.cli.options import add_decode_arguments, add_draft_arguments, draft_options, model_options
from teal.cli.ranks import is_first, start_ranks
from teal.errors import UserError
from teal.options import DEFAULT_QUEUE, MAX_ROWS, DraftOptions, ModelOptions
from teal.serving.shutdown import Shutdown, hang_up

if TYPE_CHECKING:
    import uvicorn

    from teal.checkpoint.loading import Described
    from teal.decoding.engine import Engine
    from teal.decoding.scheduler import Scheduler
    from teal.plan import SparsityPlan
    from teal.serving.http_origin import Callers
    from teal.serving.openai_api import Service

DEFAULT_PORT = 8000


def build_parser() -> cli.Parser:
    """The command line of serve.py."""
    parser = cli.Parser("Serve a model over HTTP with OpenAI's API, and a page to chat with it.")
    add_decode_arguments(parser)
    add_draft_arguments(parser)
    add_server_arguments(parser)
    add_limit_arguments(parser)
    return parser


def add_server_arguments(parser: cli.Parser) -> None:
    """Options that say where it listens, to whom, and under what name."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", type=cli.host, default="127.0.0.1", help="address to listen on; 0.0.0.0 or :: is every network"
    )
    server.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one")
    server.add_argument(
        "--served-model-name", "--name", nargs="+", metavar="NAME",
        help="what the API calls the model, and aliases; without it the checkpoint's name",
    )  # fmt: skip
    server.add_argument("--api-key", help="required from clients; without it the environment's TEAL_API_KEY, or none")
    server.add_argument("--sparsities", type=cli.sparsities, default=(), help="further ones that requests may name")
    server.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name this server is reached by beside localhost and --host; may be repeated; with a key any will do",
    )  # fmt: skip
    server.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="a site whose pages may use this server, such as https://example.org, or *; may be repeated",
    )  # fmt: skip


def add_limit_arguments(parser: cli.Parser) -> None:
    """Options that bound what clients may ask for."""
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--rows", type=cli.positive_int, default=MAX_ROWS, help=f"generations decoded at once, at most {MAX_ROWS}"
    )
    limits.add_argument(
        "--queue", type=cli.positive_int, default=DEFAULT_QUEUE, help="generations that may wait; then 429"
    )
    limits.add_argument("--context", type=cli.positive_int, help="tokens of prompt and answer; without it the model's")
    limits.add_argument("--max-seconds", type=cli.positive_int, default=600, help="for one request")
    limits.add_argument("--max-body-mb", type=cli.positive_int, default=4, help="of one request; then 413")
    limits.add_argument("--max-held-mb", type=cli.positive_int, default=64, help="of all bodies together; then 503")
    limits.add_argument("--connections", type=cli.positive_int, default=256, help="open at once; then 503")
    limits.add_argument(
        "--client-seconds", type=cli.positive_int, default=30,
        help="for a client to send a request whole (then 408), and to take more of its answer",
    )  # fmt: skip
    limits.add_argument("--drain-seconds", type=cli.positive_int, default=30, help="for answers to end at shutdown")


def main() -> None:
    """Load the model, listen, serve until interrupted."""
    args = build_parser().parse_args()
    check_arguments(args)
    options, drafting = model_options(args), draft_options(args)
    key = api_key(args.api_key)
    if not is_first(args.tensor_parallel):
        start_ranks(args.tensor_parallel, args.device)
        load_engine(options, drafting, args.sparsities)[0].follow()
        return
    ending = Shutdown()
    callers = make_callers(args, key)
    listener = open_listener(args.host, args.port)
    start_ranks(args.tensor_parallel, args.device)
    from teal.decoding.scheduler import Scheduler
    from teal.serving.openai_api import Service

    engine, plans = load_engine(options, drafting, args.sparsities)
    scheduler = Scheduler(engine, args.rows, args.queue, args.context)
    warm(scheduler, args.rows)
    names = model_names(args, engine)
    service = Service(engine, scheduler, names, plans)
    service.grammars.prepare()
    web = make_web(args, key, service, callers)
    gc.freeze()  # what is loaded stays: looking through it took collections 100 ms, in which no thread ran
    listener.listen()  # from here on clients wait and are not refused
    print(f"{names[0]} at {url_of(listener)}/ (API under /v1)", file=sys.stderr, flush=True)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, name="web")

    def drain() -> None:
        web.should_exit = True
        scheduler.close(args.drain_seconds)

    ending.drain = drain
    thread.start()
    try:
        scheduler.run()  # in this thread: see there
    finally:
        hang_up(web)
        thread.join()


def warm(scheduler: "Scheduler", rows: int) -> None:
    """Compile steps of 1 to so many rows on CUDA, and say so: with nothing cached that takes about a minute."""
    if scheduler.engine.use_graph:
        print(f"compiling steps of up to {rows} rows", file=sys.stderr, flush=True)
    scheduler.warm()


def api_key(given: str | None) -> str | None:
    """The key that clients must send, if any. Raises UserError for one that no client can send."""
    name = "TEAL_API_KEY" if given is None else "--api-key"
    key = os.environ.get("TEAL_API_KEY") if given is None else given
    if key is None:
        return None
    if not key:
        raise UserError(f"{name} is empty; give a key, or leave it out to serve without one")
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{name} has a character that no header can carry; use printable ASCII without spaces")
    return key


def make_callers(args: argparse.Namespace, key: str | None) -> "Callers":
    """Who may call; warns if that is anyone. With a key the name in Host tells nothing more."""
    from teal.serving.http_origin import ANY, Callers, check_origin, is_local

    if key is None and not is_local(args.host):
        print(f"warning: --host {args.host} without --api-key: whoever reaches it may use it", file=sys.stderr)
    names = (ANY,) if key is not None else tuple(args.allow_host)
    return Callers(args.host, names, tuple(map(check_origin, args.allow_origin)))


def open_listener(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises UserError if that cannot be."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_web(args: argparse.Namespace, key: str | None, service: "Service", callers: "Callers") -> "uvicorn.Server":
    """The web server of a service, within the limits of the command line."""
    from teal.serving.app import build_app
    from teal.serving.http_limits import Limits
    from teal.serving.http_protocol import web_server

    limits = Limits(
        body_bytes=args.max_body_mb * 1_000_000, held_bytes=args.max_held_mb * 1_000_000,
        connections=args.connections, client_seconds=args.client_seconds, seconds=args.max_seconds,
        drain_seconds=args.drain_seconds, api_key=key,
    )  # fmt: skip
    return web_server(build_app(service, limits, callers), limits)


def model_names(args: argparse.Namespace, engine: "Engine") -> tuple[str, ...]:
    """What the API calls the model, and aliases: as told, or by its folder, file or hub id; the default model's own."""
    from teal.checkpoint.source import DEFAULT_FOLDER

    is_default = args.checkpoint is None and args.random_weights is None and args.adapter is None
    short = os.path.basename(os.path.normpath(engine.name))
    own = [DEFAULT_FOLDER if is_default else short, short]
    if not os.path.exists(engine.name):  # a hub id; a path is nobody else's concern
        own.append(engine.name)
    return tuple(dict.fromkeys(args.served_model_name or own))


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for what is wrong whatever the model."""
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port} is out of range; expected 0 to 65535")
    if args.rows > MAX_ROWS:
        raise UserError(f"--rows {args.rows} is out of range; expected 1 to {MAX_ROWS}")


def load_engine(
    options: ModelOptions, drafting: DraftOptions | None, sparsities: tuple[float, ...]
) -> "tuple[Engine, dict[float, SparsityPlan]]":
    """The engine, by the sparse kernels even at 0%, and the plans that requests may name, by sparsity."""
    from teal.calibration.choose import choose_plan
    from teal.checkpoint.loading import check_draft_fit, load_for_decoding
    from teal.decoding.speculation import SpeculativeEngine, make_draft

    def check(model: "Described") -> None:
        if drafting is not None:
            check_draft_fit(drafting, model, options.force_plan)

    loaded = load_for_decoding(options, check, sparse=True)
    draft = None
    if drafting is not None and not drafting.lookup:  # first: it may need the weights as they were loaded
        draft = make_draft(loaded, drafting, options.compile)
    plans = {target: choose_plan(loaded, target, None) for target in {0.0, *sparsities}}
    own = choose_plan(loaded, options.sparsity, options.plan)
    engine = SpeculativeEngine.from_loaded(loaded, own, options.compile, options.backend)
    if drafting is not None and draft is not None:
        engine.draft_with(draft, drafting.length)
    elif drafting is not None:
        engine.look_up(drafting.length)
    times = f"load {engine.load_s:.2f} s, calibrate {engine.calibrate_s:.1f} s, compile {engine.compile_s:.1f} s"
    print(times, file=sys.stderr)
    return engine, plans | {own.target: own}


if __name__ == "__main__":
    cli.run(main)
