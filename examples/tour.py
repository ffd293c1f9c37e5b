"""What sparsity does to one model, step by step: python -m examples.tour -o tour

Run it whole, or cell by cell in an editor that knows the # %% marks. Draws the distributions of the inputs with their
thresholds, and the trade of quality for sparsity. Prints a text at each sparsity with its speed.
"""

# %%
import argparse
from pathlib import Path

from teal.calibration.texts import first_tokens, read_texts, split_text, token_sequences
from teal.calibration.thresholds import calibrate
from teal.checkpoint.loading import load_for_decoding
from teal.decoding.engine import Engine
from teal.evaluation.plots import FIGURE, plot_inputs, plot_quality
from teal.evaluation.quality import Case, evaluate
from teal.files import check_replaceable
from teal.options import ModelOptions, Settings
from teal.plan import Histogram

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--checkpoint", help="model folder, .gguf file or hub id; default SmolLM2-135M-Instruct")
parser.add_argument("--text", type=Path, action="append", default=[], help="to calibrate and evaluate on")
parser.add_argument("--sequences", type=int, default=2, help="of 512 tokens, to calibrate on")
parser.add_argument("--tokens", type=int, default=1024, help="to evaluate on")
parser.add_argument("-o", "--output", type=Path, default=Path("tour"), help="folder for the figures")
args = parser.parse_args()
args.output.mkdir(parents=True, exist_ok=True)
for name in ("inputs.png", "quality.png"):
    check_replaceable("-o", args.output / name, FIGURE)

# %% A dense model, and a text of which one part calibrates and the other evaluates
loaded = load_for_decoding(ModelOptions(args.checkpoint), sparse=True)
encode = loaded.tokenizer.encode
calibrating, evaluating = split_text(read_texts(args.text, "text"))

# %% Thresholds: quantiles of each projection's input. The histograms say how much a threshold drops.
seen: list[list[dict[str, Histogram]]] = []
targets = (0.25, 0.4, 0.5)
plans = calibrate(
    loaded.model, token_sequences(encode, calibrating, args.sequences, 512), Settings(targets), {}, seen=seen
)
projections = loaded.model.config.projections()
plot_inputs([block[-1] for block in seen], plans[-1], projections, args.output / "inputs.png")

# %% What it costs: perplexity, and how far the predictions move from the dense model's
cases = [Case("dense", 0.0, None)] + [Case(plan.method, plan.target, plan) for plan in plans]
rows = [
    result.as_row() for result in evaluate(loaded.model, first_tokens(encode, evaluating, args.tokens), cases, 512, 256)
]
plot_quality(rows, args.output / "quality.png")
for row in rows:
    print(f"{row['sparsity']:4.0%} sparse: perplexity {row['perplexity']:6.2f}, KL {row['kl']:.3f}")

# %% What it gives: a text at each sparsity
engine = Engine.from_loaded(loaded, plans[0])
ids = encode("The best thing about a cold winter morning is")
for plan in plans:
    engine.use_plan(plan)
    text = "".join(engine.stream(ids, max_new_tokens=24))
    print(f"{plan.target:4.0%} sparse, {engine.stats.tokens_per_s or 0:.1f} tokens/s:{text!r}")
