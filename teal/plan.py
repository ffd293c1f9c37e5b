"""Which activations to drop: histograms of |x|, thresholds from them, and the plan that lists one per projection.

TEAL (arXiv 2408.14690, section 4): the inputs of a projection are zero-mean and unimodal. So dropping entries with |x|
below the p-quantile of |x| over calibration tokens gives sparsity p.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.errors import ParameterError, UserError
from teal.files import FileKind, atomic_file, cache_folder
from teal.model import ModelConfig
from teal.user_text import is_number, parse_json

PLAN_FORMAT = "teal-plan"
PLAN_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)  # 2 does not say for which weights a plan was made; 3 and older name a criterion
ESTIMATE = 3  # raised when how plans are found changes: what an older way has found is then not taken from the cache
PLAN = FileKind("a sparsity plan", rb'"format": "teal-plan"')
MAX_MISS = 0.05  # of a target, on some text, that is passed over in silence
ENOUGH_TOKENS = 256  # to measure a projection on: in a short text single ones differ by 20 points, the average by 3

# Bins are the top bits of |x| as fp32: 128 to an octave, so neighbouring edges differ by under 0.8% at every scale. No
# first pass over the data is needed to find its range.
BITS_DROPPED = 16
LOWEST_BIN = (127 - 24) << 7  # 2^-24: smaller magnitudes share the first bin
NUM_BINS = 40 << 7  # up to 2^16: larger ones share the last


class Histogram:
    """Counts of |x| in logarithmic bins of fixed memory (40 KiB), filled as a stream."""

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count every entry of x (any shape, any float dtype, any device). Raises UserError on NaN."""
        magnitude = x.detach().float().abs().flatten()
        if magnitude.isnan().any():
            raise UserError("activations hold NaN during calibration; the checkpoint is damaged or its dtype overflows")
        bins = (magnitude.view(torch.int32) >> BITS_DROPPED) - LOWEST_BIN
        counts = torch.bincount(bins.clamp_(0, NUM_BINS - 1), minlength=NUM_BINS)
        self.counts += counts.cpu()

    def quantile(self, p: float) -> float:
        """The magnitude below which a share p of the entries lies, interpolated within its bin; 0 for p = 0."""
        check_share(p)
        total = int(self.counts.sum())
        if total == 0:
            raise UserError("calibration saw no activations; give it a longer text")
        wanted = p * total
        if wanted == 0:
            return 0.0
        cumulative = self.counts.cumsum(0)
        i = int(torch.searchsorted(cumulative, wanted))
        before = int(cumulative[i - 1]) if i else 0
        low, high = _bin_edge(i) if i else 0.0, _bin_edge(i + 1)
        return low + (high - low) * (wanted - before) / int(self.counts[i])


def bin_edges() -> Tensor:
    """Edges of a Histogram's bins: fp64 [NUM_BINS + 1], the first 0."""
    bits = (torch.arange(NUM_BINS + 1, dtype=torch.int32) + LOWEST_BIN) << BITS_DROPPED
    edges = bits.view(torch.float32).double()
    edges[0] = 0.0
    return edges


def _bin_edge(i: int) -> float:
    return float(torch.tensor((i + LOWEST_BIN) << BITS_DROPPED, dtype=torch.int32).view(torch.float32))


def check_share(value: Any, what: str = "sparsity") -> None:
    """Raise UserError, which calls it what, unless it is a share of activations that can be dropped."""
    if not (is_number(value) and 0 <= value < 1):
        raise UserError(f"{what} {value!r:.200} is out of range; expected 0 <= sparsity < 1")


@dataclass(frozen=True, slots=True)
class ProjectionPlan:
    """One projection: its target sparsity, the threshold on |x|, and the sparsity measured on held-out text."""

    sparsity: float
    threshold: float
    achieved: float | None = None

    def __post_init__(self) -> None:
        check_share(self.sparsity)
        if not (is_number(self.threshold) and 0 <= self.threshold < math.inf):
            raise UserError(f"threshold {self.threshold!r} is not usable; expected a finite number >= 0")
        if self.achieved is not None and not (is_number(self.achieved) and 0 <= self.achieved <= 1):
            raise UserError(f"achieved {self.achieved!r} is not usable; expected a share from 0 to 1, or null")


@dataclass(frozen=True, slots=True)
class Weights:
    """Which weights a plan is for: a name for people, and what their content hashes to (checkpoint.identity).

    Rounded weights count as those they were rounded from: rounding hardly moves activations, nor so thresholds.
    """

    name: str
    identity: str

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and isinstance(self.identity, str)):
            raise UserError(f"weights {self.name!r} {self.identity!r} are not usable; expected a name and an identity")

    def __str__(self) -> str:
        return f"{self.name} (weights {self.identity})"


@dataclass(frozen=True, slots=True)
class SparsityPlan:
    """Thresholds for every projection of a model: layers[i][projection], the same projections in each layer.

    model holds fields of the ModelConfig the plan is for (all of them, or those known). An entry x_i
    is dropped if |x_i| is below the threshold. weights: those it was made for, None if nothing is known.
    """

    model: dict[str, Any]
    method: str
    target: float
    layers: tuple[dict[str, ProjectionPlan], ...]
    calibration: dict[str, Any] = field(default_factory=dict)
    weights: Weights | None = None

    def __post_init__(self) -> None:
        check_share(self.target)
        for name, kind in (("model", dict), ("method", str), ("calibration", dict)):
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(
                    f"{name} {value!r} is not usable; expected {'an object' if kind is dict else 'a string'}"
                )
        if not self.layers:
            raise UserError("the plan lists no layers; expected one for each of the model's")
        for i, layer in enumerate(self.layers):
            if not layer or set(layer) != set(self.layers[0]):
                raise UserError(f"plan layer {i} lists {sorted(layer)}; expected the same projections in each layer")

    def check_fits(self, config: ModelConfig) -> None:
        """Raise UserError, naming what differs, unless the plan is for a model with this config and its projections."""
        own = config_fields(config)
        differing = [
            f"{name} {value!r} (this model: {own.get(name)!r})"
            for name, value in self.model.items()
            if own.get(name) != value
        ]
        if len(self.layers) != config.num_layers:
            differing.append(f"{len(self.layers)} layers (this model: {config.num_layers})")
        names = projection_names(config)
        if set(self.layers[0]) != set(names):
            differing.append(f"layer 0 lists {sorted(self.layers[0])} (this model: {sorted(names)})")
        if differing:
            raise UserError(f"plan is for another model: {', '.join(differing)}; calibrate for this model")

    def check_weights(self, weights: Weights | None) -> None:
        """Raise UserError, naming both, if plan and model are known to have other weights."""
        if self.weights is not None and weights is not None and self.weights.identity != weights.identity:
            raise ParameterError(
                "plan was made for {}, not for {}: its thresholds would drop another share; calibrate for this model, "
                "or use it all the same with {force_plan}", self.weights, weights,
            )  # fmt: skip

    def for_any_model(self) -> "SparsityPlan":
        """The same thresholds with nothing said of whose they are: any model with as many layers takes them."""
        return replace(self, model={}, weights=None)

    @property
    def achieved(self) -> list[dict[str, float]]:
        """The sparsities measured on held-out text [layer][projection], where they were."""
        return [{n: p.achieved for n, p in layer.items() if p.achieved is not None} for layer in self.layers]

    def warning(self, achieved: list[dict[str, float]], tokens: int, text: str) -> str | None:
        """A line for the user if achieved sparsities [layer][projection] on a text of so many tokens miss the plan's.

        The average may miss by MAX_MISS, and so may each projection, where the tokens are enough to tell.
        """
        gaps = {
            f"layer {i} {name}": seen - layer[name].sparsity
            for i, (layer, shares) in enumerate(zip(self.layers, achieved, strict=True))
            for name, seen in shares.items()
        }
        if not gaps:
            return None
        mean = sum(gaps.values()) / len(gaps)
        worst = max(gaps, key=lambda name: abs(gaps[name]))
        if abs(mean) <= MAX_MISS and (abs(gaps[worst]) <= MAX_MISS or tokens < ENOUGH_TOKENS):
            return None
        return (
            f"warning: on {text} the plan for sparsity {self.target:g} misses its target, by {100 * mean:+.1f} points "
            f"on average and {100 * gaps[worst]:+.1f} in {worst}; "
            "calibrate on more text of this kind (calibrate.py --text)"
        )

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        content = {"format": PLAN_FORMAT, "version": PLAN_VERSION, **asdict(self)}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SparsityPlan":
        """Read a plan. Raises UserError if the file is missing, not a plan, or holds impossible values."""
        try:
            content = parse_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"plan {path}: not readable ({error}); expected a JSON plan") from error
        if not isinstance(content, dict) or content.get("format") != PLAN_FORMAT:
            raise UserError(f"plan {path}: not a sparsity plan; expected a JSON object with format {PLAN_FORMAT!r}")
        if content.get("version") not in READABLE_VERSIONS:
            raise UserError(
                f"plan {path}: version {content.get('version')!r}; this code reads "
                f"{', '.join(map(str, READABLE_VERSIONS))}: calibrate again, or use the release that wrote it"
            )
        if (criterion := content.get("criterion", "magnitude")) != "magnitude":
            raise UserError(f"plan {path}: criterion {criterion!r} is not supported, only 'magnitude': calibrate again")
        try:
            layers = tuple({n: ProjectionPlan(**p) for n, p in layer.items()} for layer in content["layers"])
            fields = ("model", "method", "target", "calibration")
            weights = content.get("weights")
            return cls(
                layers=layers,
                weights=None if weights is None else Weights(**weights),
                **{name: content[name] for name in fields},
            )
        except UserError as error:
            raise UserError(f"plan {path}: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"plan {path}: missing or malformed field ({error}); calibrate again") from error


def load_fitting_plan(path: Path, config: ModelConfig, force: bool = False) -> SparsityPlan:
    """The plan in a file, for a model with this config; with force for any with as many layers.

    Raises UserError naming the file.
    """
    plan = SparsityPlan.load(path)
    plan = plan.for_any_model() if force else plan
    try:
        plan.check_fits(config)
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from None
    return plan


def plan_file(folder: Path | None, sparsity: float, plan: str | None) -> Path | None:
    """The file named plan, else the one for this sparsity beside a checkpoint in folder, None if there is none."""
    if plan is not None:
        return Path(plan)
    beside = folder / plan_name(sparsity) if folder is not None and sparsity > 0 else None
    return beside if beside is not None and beside.exists() else None


def keep_all_plan(config: ModelConfig) -> SparsityPlan:
    """The plan that drops nothing: dense decoding by the sparse kernels."""
    return even_plan(config, ProjectionPlan(0.0, 0.0), "none")


def even_plan(config: ModelConfig, projection: ProjectionPlan, method: str = "uniform") -> SparsityPlan:
    """The plan that is the same for every projection of every layer."""
    layer = dict.fromkeys(projection_names(config), projection)
    return SparsityPlan(config_fields(config), method, projection.sparsity, (layer,) * config.num_layers)


def projection_names(config: ModelConfig) -> list[str]:
    """What a plan for a model with this config lists for each layer."""
    return [name for p in config.projections() for name in p.names]


def plan_name(target: float) -> str:
    """File name under which a plan for a target is found beside a checkpoint."""
    return f"teal-{target:g}.json"


def cached_plan(identity: str, how: str, dtype: torch.dtype, device: torch.device, target: float) -> Path:
    """Where a plan is kept between commands. identity names the model, how the text and the method.

    A plan that 16 bits or another device have calibrated differs in the last digits of its thresholds, and so in text.
    """
    return cache_folder("plans") / f"{_cached_name(identity, how, dtype, device)}-{target:g}-v{PLAN_VERSION}.json"


def cached_curves(identity: str, how: str, dtype: torch.dtype, device: torch.device) -> Path:
    """Where the errors are kept from which global plans of all sparsities are made. Parameters as for cached_plan."""
    return cache_folder("calibration") / f"{_cached_name(identity, how, dtype, device)}-v{PLAN_VERSION}.safetensors"


def _cached_name(identity: str, how: str, dtype: torch.dtype, device: torch.device) -> str:
    return f"{identity}-{how}-{ESTIMATE}-{str(dtype).removeprefix('torch.')}-{device.type}"


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config as JSON would hold them."""
    return json.loads(json.dumps(asdict(config)))
