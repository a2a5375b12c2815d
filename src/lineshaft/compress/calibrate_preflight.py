"""What the calibrated steps need in memory, told before any weight is loaded.

Counted is what belongs to the process. Weights of other parts, the source that the proof looks at, and what is finished are mapped from
files: the system can take their pages back, so a model may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from lineshaft.base.machine import resident_memory_bytes
from lineshaft.compress import awq, gptq, proof
from lineshaft.compress.calibrate.observe import SAMPLE
from lineshaft.compress.calibrate.rows import rows_at_once
from lineshaft.compress.config import AwqConfig, GptqConfig, SmoothConfig, StaticConfig
from lineshaft.compress.methods import Awq, Gptq, Smooth, Static
from lineshaft.compress.preflight import CODE_BYTES
from lineshaft.compress.ranges import BINS
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import Product, layer_part, prediction_part
from lineshaft.model.fit import Step, Verdict, halved, judge
from lineshaft.model.memory import ITEM, Memory, Stored, Terms, integer_of
from lineshaft.model.packed_memory import PackedPass, readings
from lineshaft.ops.cpu import compiles_bfloat16
from lineshaft.ops.formats import DENSE
from lineshaft.train.preflight import COMPILED, COMPILED_BYTES

Config = GptqConfig | AwqConfig | SmoothConfig | StaticConfig
METHODS: Mapping[str, type[Gptq] | type[Awq] | type[Smooth] | type[Static]] = {
    "gptq": Gptq,
    "awq": Awq,
    "smooth": Smooth,
    "static": Static,
}
HOLES = 0.8
"""Share of a batch's pass that lies unused in the heap, as passes and statistics of parts differ in size (docs/preflight.md)."""
LEAST_SEQUENCES = 16
LEAST_TOKENS = 64
"""No fewer and no shorter rows are proposed."""
_A_TOKEN = 40
"""Bytes of a token of the text: its id, the next one's, position, document and place in it."""
_SCALED = {"float32": 11, "bfloat16": 8, "float16": 8}
"""Bytes a weight, beside itself, while it is scaled and found finite (model.junction.scale)."""
_ROUNDED = 6
"""Bytes a weight while GPTQ rounds it: a float32 copy, and its codes as they are found and in their own order."""
_ENCODED = 9
"""Bytes a weight while it is rounded to nearest: float32 twice in bfloat16, and codes."""
_TILES = 8
"""Float32 copies of a tile, at most, while AWQ tries scales and clips on it."""
_PROVED = 40
"""Bytes a weight of proof.ROWS_AT_ONCE rows: codes as int64 twice, what they decode to, and errors."""


@dataclass(frozen=True)
class Calibrating:
    """What is to be done to which model, on how much text."""

    model: ModelConfig
    stored: Stored
    step: str
    """One of METHODS."""
    sequences: int
    sequence_tokens: int
    formats: tuple[str, ...] = ()
    """What may be made of linear layers; of several the largest is reckoned for all. None where they stay dense."""
    head: bool = False
    """The output projection is changed, too."""
    clips: bool = False
    """AWQ looks for where to clip as well."""

    @classmethod
    def of(cls, model: ModelConfig, stored: Stored, config: Config) -> Calibrating:
        """As the step is told."""
        if isinstance(config, SmoothConfig):
            return cls(model, stored, config.step, config.sequences, config.sequence_tokens, head=True)
        clips = isinstance(config, AwqConfig) and config.clip
        head = config.coding_of("lm_head") != DENSE
        return cls(model, stored, config.step, config.sequences, config.sequence_tokens, config.formats, head, clips)

    @property
    def tokens(self) -> int:
        """Of all text."""
        return self.sequences * self.sequence_tokens

    @property
    def at_once(self) -> int:
        """Tokens of a batch."""
        return min(self.sequences, rows_at_once(self.sequence_tokens)) * self.sequence_tokens

    @property
    def item(self) -> int:
        """Bytes of a number as it is stored."""
        return ITEM[self.stored.dtype]

    @property
    def coded(self) -> Stored:
        """As weights come to be stored, in the largest of the formats."""
        forms = [replace(self.stored, format=name, in_files=None, skips_head=not self.head) for name in self.formats]
        return max(forms, key=lambda form: form.total(self.model), default=self.stored)


@dataclass(frozen=True)
class _Part:
    """What belongs to a part of the walk (calibrate/parts.py)."""

    linears: list[Product]
    readings: list[Product]
    """One for each different input."""
    layer: int | None = None
    """Its number; None for the head."""

    @property
    def weights(self) -> int:
        """In its linear layers."""
        return sum(item.count * item.size for item in self.linears)


def _parts(given: Calibrating) -> dict[str, _Part]:
    """One of each kind that the model has."""
    config, found = given.model, dict[str, _Part]()
    for layer in range(config.all_layers):
        ahead = layer >= config.num_hidden_layers
        experts = config.moe is not None and config.is_moe_layer(layer)
        name = "a prediction layer" if ahead else "a layer of experts" if experts else "a layer"
        if name not in found:
            whole = prediction_part(config, layer) if ahead else layer_part(config, layer)
            linears = [item for item in whole.products if item.linear]
            found[name] = _Part(linears, linears[:1] * ahead + readings(config, layer), layer)
    if given.head and not config.tie_word_embeddings:
        head = [Product(config.hidden_size, config.vocab_size)]
        found["the head"] = _Part(head, head)
    return found


def calibrate_memory(given: Calibrating) -> Memory:
    """Each kind of part while its inputs are looked at, while it is changed, and run once more where that changes what later ones see;
    then the proof."""
    phases: dict[str, Terms] = {}
    parts = _parts(given)
    lasting = _lasting(given, max(_pass(given, part, given.stored) for part in parts.values()))
    for name, part in parts.items():
        held = {**lasting, "statistics of inputs": _statistics(given, part)}
        weights = {"the part's weights": given.item * part.weights}
        phases[f"looking at {name}"] = {**held, **weights, "a batch on its way": _pass(given, part, given.stored)}
        phases[f"changing {name}"] = {**held, **_CHANGING[given.step](given, part)}
        if METHODS[given.step].changes_outputs:
            codes = {"codes of the part": sum(item.count * given.coded.one(item) for item in part.linears)}
            phases[f"running {name} once more"] = {**lasting, **codes, "a batch on its way": _pass(given, part, given.coded)}
    return Memory(phases | _proof(given, parts))


def _lasting(given: Calibrating, largest_pass: int) -> Terms:
    """All along the walk."""
    config = given.model
    a_token = _A_TOKEN + 4 * config.rotary_dim + given.sequence_tokens * len(set(config.reach))  # the last: masks of short documents
    return {
        f"text of {given.tokens} tokens": given.tokens * a_token,
        "hidden states": given.tokens * config.hidden_size * given.item,
        "chances on the golden text": _golden(given),
        "holes in the heap": int(HOLES * largest_pass),
        **_compiled(given),
    }


def _compiled(given: Calibrating) -> Terms:
    """For experts in bfloat16, as in training: up and down for each number of tokens that comes to one, in each run of a batch."""
    config = given.model
    if config.moe is None or given.stored.dtype != "bfloat16" or not compiles_bfloat16():
        return {}
    mixtures = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)) + config.num_nextn_predict_layers
    runs = -(-given.tokens // given.at_once) * (2 if METHODS[given.step].changes_outputs else 1)
    shapes = min(COMPILED, 2 * runs * mixtures * config.moe.n_routed_experts)
    return {"products compiled for each number of rows": shapes * COMPILED_BYTES // COMPILED}


def _golden(given: Calibrating) -> int:
    return 4 * proof.GOLDEN_TOKENS * given.model.vocab_size


def _statistics(given: Calibrating, part: _Part) -> int:
    """Of all inputs of the part: magnitudes, and Hessians, samples or histograms."""
    wanted, total = METHODS[given.step].wanted, 0
    for item in part.readings:
        sample = min(SAMPLE, _met(given.tokens, item)) * wanted.sample
        total += item.count * (item.inputs * (12 + 4 * sample + 4 * item.inputs * wanted.gram) + 8 * BINS * wanted.histogram)
    return total


def _met(tokens: int, item: Product) -> int:
    """Of so many tokens those that come to one of these matrices."""
    return -(-tokens * item.used // item.count)


def _pass(given: Calibrating, part: _Part, stored: Stored) -> int:
    """A batch on its way through the part, or one of its inputs while it is looked at; and what came of the batch before."""
    result = given.at_once * given.model.hidden_size * given.item
    looked_at = max(_looked_at(given, item) for item in part.readings)
    if part.layer is None:
        return 2 * result + looked_at
    joined = 4 * result if part.layer >= given.model.num_hidden_layers else 0  # two norms, side by side, and their product
    going = PackedPass(given.model, stored, given.at_once, given.sequence_tokens).layer(part.layer)
    return result + joined + max(going, 2 * result + looked_at)


def _looked_at(given: Calibrating, item: Product) -> int:
    """An input and its magnitudes in float32; and it widened for the Hessian, or new tokens and a sample that is drawn anew, or magnitudes
    once more and the bin of each."""
    tokens, wanted, narrow = _met(given.at_once, item), METHODS[given.step].wanted, given.stored.dtype != "float32"
    old_and_new = min(max(SAMPLE + min(tokens, SAMPLE), tokens), _met(given.tokens, item)) * wanted.sample
    # What is in the sample already is among the statistics; both lie there twice, and half of it once more.
    drawn = max(5 * old_and_new // 2 - SAMPLE, 0)
    return item.inputs * (tokens * (given.item + 4 + 4 * (narrow and wanted.gram) + 12 * wanted.histogram) + 4 * drawn)


def _in_turn(given: Calibrating, part: _Part, work: Callable[[Product], int]) -> Terms:
    """The dearest moment while one layer after another gives its weight for codes; `work`: bytes that one takes meanwhile."""
    moments, done, left = [], 0, given.item * part.weights
    for item in part.linears:
        moments.append({"the part's weights": left, "codes of the part": done, "a layer while it is rounded": work(item)})
        left, done = left - given.item * item.count * item.size, done + item.count * given.coded.one(item)
    return max(moments, key=lambda terms: sum(terms.values()))


def _by_gptq(given: Calibrating, part: _Part) -> Terms:
    """A factor and the float64 matrices that it comes from, or a weight that is rounded by it."""
    wide = 0 if given.stored.dtype == "float32" else 4

    def work(item: Product) -> int:
        rounding = 4 * item.inputs**2 + _ROUNDED * item.size + 4 * gptq.BLOCK * item.outputs
        return wide * item.size + max(8 * gptq.COPIES * item.inputs**2, rounding)

    return _in_turn(given, part, work)


def _by_awq(given: Calibrating, part: _Part) -> Terms:
    """Readers of a junction while scales are tried, each with its sample, or a weight while it is scaled; then weights as they are rounded,
    some by products of their inputs."""
    clipped = [integer_of(name)[1] or 0 for name in given.formats if given.clips and name.startswith("int4")]

    def sample(item: Product) -> int:
        return 4 * item.inputs * min(SAMPLE, _met(given.tokens, item))

    def tiles(item: Product) -> int:
        return _TILES * 4 * min(awq.TILE, item.size)

    def work(item: Product) -> int:
        products = 4 * item.inputs * max((group or item.inputs for group in clipped), default=0)
        return max(_ENCODED * item.size, bool(clipped) * (3 * sample(item) + products + 2 * item.size + tiles(item)))

    trying = max(*(tiles(item) + item.count * sample(item) for item in part.linears), _scaling(given, part))
    before = {"the part's weights": given.item * part.weights, "readers and samples, or a layer while it is scaled": trying}
    return max(before, _in_turn(given, part, work), key=lambda terms: sum(terms.values()))


def _by_static(given: Calibrating, part: _Part) -> Terms:
    return _in_turn(given, part, lambda item: _ENCODED * item.size)


def _by_smooth(given: Calibrating, part: _Part) -> Terms:
    return {"the part's weights": given.item * part.weights, "a layer while it is scaled": _scaling(given, part)}


def _scaling(given: Calibrating, part: _Part) -> int:
    if part.layer is None and given.model.num_nextn_predict_layers:
        return 0  # prediction layers read the final norm as well, so it is no junction
    before = 0 if given.item == 4 or part.layer is None else given.item  # what became of the layer before is still held
    return (_SCALED[given.stored.dtype] + before) * max(item.size for item in part.linears)


_CHANGING: Mapping[str, Callable[[Calibrating, _Part], Terms]] = {
    "gptq": _by_gptq,
    "awq": _by_awq,
    "smooth": _by_smooth,
    "static": _by_static,
}


def _proof(given: Calibrating, parts: Mapping[str, _Part]) -> dict[str, Terms]:
    """A layer of the source, scaled as it was meant to be, beside rows of what was written; then the written model's answer."""
    linears = [item for part in parts.values() for item in part.linears]
    scaled = 0 if given.step in ("gptq", "static") else _SCALED[given.stored.dtype] * max(item.size for item in linears)
    rows = _PROVED * proof.ROWS_AT_ONCE * max(item.inputs for item in linears) if given.formats else 0
    unpacked = max(given.coded.unpacked(item, given.stored.dtype) for item in linears) if given.formats else 0
    return {
        "proof against the source": {"chances on the golden text": _golden(given), "a layer as it was meant": scaled + rows},
        "proof by an answer": {"chances on the golden text": 4 * _golden(given), "a weight while it is decoded": unpacked},
    }


def judge_calibrating(given: Calibrating, room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit."""
    return judge(given.step, given, (_fewer_rows, _shorter_rows), calibrate_memory, resident_memory_bytes() + CODE_BYTES, room)


def _fewer_rows(given: Calibrating) -> Iterator[Step[Calibrating]]:
    for count in halved(given.sequences, LEAST_SEQUENCES):
        yield f"sequences={count}", replace(given, sequences=count)


def _shorter_rows(given: Calibrating) -> Iterator[Step[Calibrating]]:
    for tokens in halved(given.sequence_tokens, LEAST_TOKENS):
        yield f"sequence_tokens={tokens}", replace(given, sequence_tokens=tokens)
