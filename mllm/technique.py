"""What a technique is, how several stack, and how both attach to a model.

A technique is a frozen, validated config (a pydantic model) that answers the engine's questions, one per seam:

* :meth:`Technique.visual_policy` (attention policy): what visual rows still do in a layer;
* :meth:`Technique.opens` (attention policy): which later keys some rows may see;
* :meth:`Technique.keep` (token reducer): which rows enter a layer;
* :meth:`Technique.branch` (layer branch): what is added beside a layer's attention.

A :class:`TrainedTechnique` has learned parts besides. None of them holds state: what happens in a forward lives in the
engine's step, what happened in the :class:`~mllm.run.Run`, and what a conversation must remember with its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationError, ValidationInfo
from torch import Tensor, nn

from mllm.cost import ModelSpec
from mllm.errors import ConfigError, ConflictError
from mllm.layout import TokenLayout
from mllm.rows import Rows

if TYPE_CHECKING:
    from mllm.engine import Handle
    from mllm.ragged import Stash
    from mllm.run import Run
    from mllm.saving import LearnedWeights


@dataclass(frozen=True)
class VisualPolicy:
    """What visual rows do in a layer where they no longer attend; they always offer their keys and values.

    Attributes:
        own_value: each visual row adds the output projection of its own value (attention to itself alone).
        ffn: each visual row runs the FFN.
    """

    own_value: bool
    ffn: bool


@dataclass(frozen=True)
class Opened:
    """Later keys that some rows may see besides the earlier ones.

    Row q sees key k, wherever it stands, if ``low[q] <= group[k] <= high[q]`` and ``group[k] >= 0``; padding is never
    seen.

    Attributes:
        low, high: (B, S) long, per query row; ``low > high`` opens nothing.
        group: (B, S) long, per key; -1 for keys that are not opened to anybody.
    """

    low: Tensor
    high: Tensor
    group: Tensor

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, A, K) bool for the given tokens, (B, A) and (B, K) long; keys before this call are negative: never."""
        group = self.group.gather(1, keys.clamp(min=0)).masked_fill(keys < 0, -1)[:, None]  # (B, 1, K)
        low, high = (bound.gather(1, queries)[:, :, None] for bound in (self.low, self.high))  # (B, A, 1)
        return (group >= 0) & (low <= group) & (group <= high)


@dataclass(frozen=True)
class Revived:
    """Rows of an earlier call that enter this one again.

    Attributes:
        stash: the rows and their states.
        layer: first layer that they enter, (B,) long per batch row, or (B, R) for each of them.
    """

    stash: Stash
    layer: Tensor


@dataclass(frozen=True)
class LayerView:
    """What a token reducer sees before a layer of one call.

    Attributes:
        layer: 0-based.
        spec: the decoder's shape.
        layout: the call's tokens; rows of an earlier call that came back stand before them.
        alive: (B, S) bool, rows that entered the layer before; False for padding.
        states: returns (B, S, D), the residual stream that enters the layer; rows that left are as they were then.
        spend: books FLOPs that the technique itself uses.
        module: the technique's learned parts, where it has some.
        store: what the technique keeps for later calls on the same cache; empty at first.
        scratch: what the technique keeps within this call, for all of its layers.
        output: what the technique tells the :class:`~mllm.run.Run` about this call, by name.
        stash: keeps the rows where a (B, S) mask is True, as they enter this layer, for a later call.
        evict: forgets, once the call has ended, the keys that earlier layers hold of the rows where a (B, S) mask is
            True; layer 0 keeps them, since transformers reads the length of the sequence there.
    """

    layer: int
    spec: ModelSpec
    layout: TokenLayout
    alive: Tensor
    states: Callable[[], Tensor]
    spend: Callable[[int], None]
    module: nn.Module | None
    store: dict[str, Any]
    scratch: dict[str, Any]
    output: dict[str, Any]
    stash: Callable[[Tensor], Stash]
    evict: Callable[[Tensor], None]


@dataclass(frozen=True, eq=False)
class Memory:
    """Keys and values that a layer branch attends to, and the tokens they belong to.

    Attributes:
        keys, values: (B, heads, N, head_dim).
        columns: (B, N) long, the column of the whole sequence that each belongs to, ascending; -1 for fillers, which
            nobody sees.
        whole: whether there are no fillers.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor
    whole: bool


@dataclass(frozen=True)
class BranchView:
    """What a layer branch sees beside one layer's attention; all rows of the call run it.

    Attributes:
        layer: 0-based.
        spec: the decoder's shape.
        layout: the call's tokens.
        columns: (1, S) long, their columns in the whole sequence.
        states: (B, S, D) residual stream after the layer's attention.
        embeddings: (B, S, D) what entered layer 0.
        rotary: (B or 1, S, head_dim) cosines and sines of the rows.
        rotate: the model's rotary embedding: ``queries, keys = rotate(queries, keys, cos, sin)``.
        mixed: (B, S, c) attention-weighted sums, over keys and heads, of the technique's :meth:`Technique.channels`.
        module: the technique's learned parts.
        scratch: what the technique keeps within this call, for all of its layers.
        spend: books FLOPs that the technique itself uses.
        extend: ``memory = extend(name, rows, keys, values)``: adds the keys and values, (B, heads, n, head_dim), of
            some rows of the call to the branch's own cache of this layer, under a name, and returns all that it holds;
            ``rows``, ``keys`` and ``values`` are None where there is nothing to add, the result where nothing is held.
        attend: ``attend(queries, memory, last)``: (B, S, heads, head_dim), the attention of all rows, (B, heads, S,
            head_dim), to a memory. A row sees keys up to its own column, or up to ``last`` (B or 1, S) long; one that
            sees none gets exactly 0. Runs without masks where rows allow it; its FLOPs are booked. Give the same
            ``last`` in all layers: what is derived from it is kept.
        report: ``report(name, layer, value)`` tells the :class:`~mllm.run.Run`, in ``outputs``.
    """

    layer: int
    spec: ModelSpec
    layout: TokenLayout
    columns: Tensor
    states: Tensor
    embeddings: Tensor
    rotary: tuple[Tensor, Tensor]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    mixed: Tensor | None
    module: nn.Module
    scratch: dict[str, Any]
    spend: Callable[[int], None]
    extend: Callable[[str, Rows | None, Tensor | None, Tensor | None], Memory | None]
    attend: Callable[[Tensor, Memory, Tensor | None], Tensor]
    report: Callable[[str, int, Tensor], None]


def _unquoted(number: int, name: str) -> str:
    """What to do where YAML, which takes ``4:12`` for minutes and seconds, made a number of a range."""
    text = f"{number // 60}:{number % 60}" if number >= 60 else "4:12"
    return f'Quote ranges: {name}: "{text}" (YAML reads {text} as a number)'


def _parse_layers(value: Any, info: ValidationInfo) -> Any:
    name = info.field_name or "layers"
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"layers are 'all', a list such as [{value}], or 'start:stop'. {_unquoted(value, name)}")
    if isinstance(value, range):
        return tuple(value)
    if isinstance(value, str) and value != "all":
        start, colon, stop = value.partition(":")
        if not colon or not start.strip().isdecimal() or not stop.strip().isdecimal():
            raise ValueError("layers are 'all', a list such as [0, 1], or 'start:stop' such as '2:12'")
        return tuple(range(int(start), int(stop)))
    if isinstance(value, (list, tuple, set, frozenset)):
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
            raise ValueError("layers are whole numbers of at least 0")
        return tuple(sorted(set(value)))
    return value


#: ``"all"``, a list of 0-based layer numbers, a ``range``, or ``"start:stop"`` (stop not included)
Layers = Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_parse_layers)]


def check_layers(layers: Layers, spec: ModelSpec, who: str) -> None:
    """Raise ConfigError where a chosen layer is not one of the model's."""
    if layers != "all" and layers and layers[-1] >= spec.layers:
        hint = f" {_unquoted(layers[-1], 'layers')}." if layers[-1] >= 60 and len(layers) == 1 else ""
        raise ConfigError(
            f"{who}: layers={list(layers)} names layer {layers[-1]}, but this model has {spec.layers} layers "
            f"(0 to {spec.layers - 1}).{hint}"
        )


def explain(error: ValidationError, who: str) -> str:
    """One line per wrong field: which, what was given, what is allowed."""
    reasons: dict[str, list[str]] = {}
    for item in error.errors():
        field = str(item["loc"][0]) if item["loc"] else "value"
        given = "" if item["type"] == "missing" else f"={item.get('input')!r}"
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        reasons.setdefault(field + given, []).append(text)
    return "\n".join(f"{who}: {field}: {', or '.join(texts)}." for field, texts in reasons.items())


class Technique(BaseModel):
    """Base class of all techniques: arguments are fields, checked when made and checked again against the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    #: name in YAML and on the command line
    name: ClassVar[str]
    #: link to the paper
    paper: ClassVar[str]
    #: whether it has learned weights
    trained: ClassVar[bool] = False
    #: attention backends it is exact and tested on
    backends: ClassVar[tuple[str, ...]] = ("eager", "sdpa")
    #: whether it changes prompts without pictures too
    acts_on_text: ClassVar[bool] = False
    #: ``"module:function"`` that makes its training recipe, see :mod:`mllm.training`; None: nothing to train
    training: ClassVar[str | None] = None
    #: what it learns from where the user names no data, see :func:`mllm.chats.open_chats`
    training_data: ClassVar[str] = "scenes"
    #: whether it must be told questions from answers, for which it is attached with the processor
    needs_roles: ClassVar[bool] = False
    #: whether it makes use of that where the processor is given
    wants_roles: ClassVar[bool] = False

    def __init__(self, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            allowed = ", ".join(type(self).model_fields) or "none"
            raise ConfigError(f"{explain(error, type(self).name)} Arguments of {self.name}: {allowed}.") from None

    # --- what a technique may answer -------------------------------------------------------------------------------

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where the arguments do not fit a model of this shape."""

    @property
    def by_input(self) -> bool:
        """Whether which rows stay depends on what the rows hold, not on the arguments alone."""
        return False

    def is_neutral(self, spec: ModelSpec) -> bool:
        """Whether these arguments leave a model of this shape exactly as it is."""
        return False

    def visual_policy(self, layer: int, spec: ModelSpec) -> VisualPolicy | None:
        """What visual rows do in ``layer``; None: they run it like any other row."""
        return None

    def keep(self, view: LayerView) -> Tensor | None:
        """Rows that enter ``view.layer``, asked before each layer of a call with visual input.

        Returns:
            (B, S) bool; ``view.alive`` itself where the technique looked and drops nothing; None where it has no say
            in this layer. Rows that are not alive cannot come back.
        """
        return None

    def opens(self, layout: TokenLayout) -> tuple[Opened, ...]:
        """Which later keys rows of a call with visual input may see, in every layer."""
        return ()

    @property
    def crosses_turns(self) -> bool:
        """Whether what a turn does depends on other turns: it then needs all of them in one call, of one prompt."""
        return False

    def check_call(self, layout: TokenLayout, lengths: Callable[[], Tensor], cached: bool) -> None:
        """Raise InputError or CacheError where a call cannot be served, before anything of it is computed.

        Args:
            layout: the call's tokens.
            lengths: returns (B,) long, how many real tokens each row has with those of earlier calls.
            cached: whether the call has, or makes, a key/value cache.
        """

    def check_labels(self, labels: Tensor, layout: TokenLayout) -> None:
        """Raise where training on these labels, (B, S) with -100 for none, would let answers leak."""

    def branch_layers(self, spec: ModelSpec) -> tuple[int, ...]:
        """Layers that have a branch."""
        return ()

    def channels(self, layer: int, positions: Tensor, module: nn.Module) -> Tensor | None:
        """(B, K, c) numbers per key of the layer's own attention, at ``positions`` (B, K); mixed as values are."""
        return None

    def branch(self, view: BranchView) -> Tensor:
        """(B, S, D) what is added to the residual stream after the attention of a layer in :meth:`branch_layers`."""
        raise NotImplementedError(f"{type(self).__name__} names layers in branch_layers() and defines no branch().")

    def revive(self, layout: TokenLayout, store: dict[str, Any]) -> Revived | None:
        """Rows of earlier calls that enter a later one again, asked once at its start."""
        return None

    def excludes(self, other: Technique) -> str | None:
        """Why this technique cannot run together with ``other``; None where it can."""
        return None

    def last_visual_layer(self, spec: ModelSpec) -> int:
        """Last layer that sees visual rows, where that is known before running; the model's last layer otherwise."""
        return spec.layers - 1

    def first_visual_layer(self, spec: ModelSpec) -> int | None:
        """First layer in which it needs visual rows to be there still; None where it needs none."""
        return next((layer for layer in range(spec.layers) if self.visual_policy(layer, spec) is not None), None)

    def visual_left(self, layer: int, spec: ModelSpec, visual_tokens: int, images: int) -> int:
        """How many visual tokens of a prompt with ``images`` of one size enter ``layer`` at most, to predict costs."""
        return visual_tokens if layer <= self.last_visual_layer(spec) else 0

    def build(self, spec: ModelSpec) -> nn.Module | None:
        """Freshly initialised learned parts for a model of this shape; None where nothing is learned."""
        return None

    def extra_flops(self, spec: ModelSpec, text_tokens: int, visual_tokens: int) -> int:
        """FLOPs per prompt that the technique itself uses in a prefill."""
        return 0

    def extra_cache(self, spec: ModelSpec, text_tokens: int, visual_tokens: int) -> int:
        """Numbers per prompt that the technique itself keeps in the cache."""
        return 0

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Arguments that are not left at their defaults: what tells two of them apart in a message."""
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.default:
                yield name, getattr(self, name)

    # --- using it --------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, processor: Any = None, freeze: bool = True) -> Handle:
        """Attach to a stock model until :meth:`~mllm.engine.Handle.detach`; see :meth:`Stack.attach`."""
        return Stack(self).attach(model, processor, freeze)

    @contextmanager
    def __call__(self, model: nn.Module, processor: Any = None) -> Iterator[Run]:
        """Attach for the length of a ``with`` block; leaving it detaches exactly, also after an exception."""
        with Stack(self)(model, processor) as run:
            yield run

    def describe(self) -> dict[str, Any]:
        """Name and arguments as plain data, as they stand in YAML."""
        return {"technique": self.name, **self.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """What results depend on: the description, and a hash of learned weights instead of their folder."""
        return self.describe()


class TrainedTechnique(Technique):
    """Base class of techniques with learned parts.

    Args:
        weights: folder with trained weights, as ``Handle.save_pretrained`` writes it, or the name of a part that comes
            with this package, such as ``"default/gates"``; its arguments hold where none are given here. None: freshly
            initialised parts, to be trained.
    """

    trained: ClassVar[bool] = True

    weights: str | None = None

    _learned: LearnedWeights | None = PrivateAttr(default=None)

    def __init__(self, **arguments: Any) -> None:
        learned, folder = None, None
        if arguments.get("weights") is not None:
            from mllm.saving import no_weights, read_learned

            folder = str(arguments["weights"])
            saved, learned = read_learned(folder, type(self).name)
            arguments = {**saved, **arguments, "weights": folder}
            if learned is None:
                del arguments["weights"]
        super().__init__(**arguments)
        if learned is None and folder is not None and self.learns:
            raise no_weights(folder)
        self._learned = learned

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> TrainedTechnique:
        """The technique that was saved in ``folder``, with ``arguments`` instead of the saved ones.

        Raises:
            LoadError: no such folder, a broken or pickled file, or another technique in it. Whether it was trained for
                the model at hand is checked when it is attached.
        """
        return cls(**{**arguments, "weights": str(folder)})

    @property
    def learns(self) -> bool:
        """Whether it has learned parts with these arguments."""
        return True

    @property
    def learned(self) -> LearnedWeights | None:
        """The trained weights and what they were trained for; None: to be trained."""
        return self._learned

    def with_learned(self, learned: LearnedWeights) -> TrainedTechnique:
        """The same technique with these weights."""
        copy = self.model_copy()
        copy._learned = learned
        return copy

    def identity(self) -> dict[str, Any]:
        weights = None if self._learned is None else self._learned.digest
        return {**self.describe(), "weights": weights}


REGISTRY: dict[str, type[Technique]] = {}


def register(cls: type[Technique]) -> type[Technique]:
    """Class decorator that makes a technique known to YAML, the command line and the contract tests."""
    if cls.name in REGISTRY and REGISTRY[cls.name].__qualname__ != cls.__qualname__:
        raise ConfigError(f"Two techniques are named {cls.name!r}: {REGISTRY[cls.name]} and {cls}.")
    REGISTRY[cls.name] = cls
    return cls


def get_technique(name: str) -> type[Technique]:
    """The technique with this name, or whose class has it, in any case; ConfigError lists the names otherwise."""
    load_all()
    asked = name.lower()
    by_class = {cls.__name__.lower(): cls for cls in REGISTRY.values()}
    found = by_class | {known.lower(): cls for known, cls in REGISTRY.items()}
    if asked not in found:
        raise ConfigError(f"Unknown technique {name!r}. Known: {', '.join(sorted(REGISTRY))}.")
    return found[asked]


def load_all() -> dict[str, type[Technique]]:
    """Import the technique folders, which registers everything in them."""
    import mllm.adapters
    import mllm.token_pruning  # noqa: F401

    return REGISTRY


class Stack:
    """Several techniques in order, checked against each other before a model is touched.

    Args:
        techniques: any number; none at all leaves the model as it is and only counts its cost.
    """

    def __init__(self, *techniques: Technique) -> None:
        for technique in techniques:
            if not isinstance(technique, Technique):
                raise ConfigError(f"Stack takes techniques, not {technique!r}.")
        self.techniques = techniques

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.techniques))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self.techniques == other.techniques

    def __hash__(self) -> int:
        return hash(self.techniques)

    def active(self, spec: ModelSpec) -> tuple[Technique, ...]:
        """The techniques that change a model of this shape."""
        return tuple(technique for technique in self.techniques if not technique.is_neutral(spec))

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError or ConflictError where the stack cannot run on a model of this shape."""
        for technique in self.techniques:
            technique.check(spec)
        active = self.active(spec)
        for first in active:
            for second in active:
                if first is not second and (reason := first.excludes(second)) is not None:
                    raise ConflictError(f"{first!r} and {second!r} cannot run together: {reason}")
        exits = [t for t in active if t.last_visual_layer(spec) < spec.layers - 1]
        if len(exits) > 1:
            raise ConflictError(
                f"{' and '.join(map(repr, exits))} both remove all visual tokens; the earlier one decides. Keep one."
            )
        beside: dict[int, Technique] = {}
        for technique in active:
            for layer in technique.branch_layers(spec):
                if beside.setdefault(layer, technique) is not technique:
                    raise ConflictError(
                        f"{beside[layer]!r} and {technique!r} both add something beside the attention of layer "
                        f"{layer}. Give them different layers."
                    )
        last = self.last_visual_layer(spec)
        owner: dict[int, Technique] = {}
        for technique in active:
            layers = [n for n in range(spec.layers) if technique.visual_policy(n, spec) is not None]
            first = technique.first_visual_layer(spec)
            if first is not None and first > last:
                raise ConflictError(
                    f"{technique!r} acts from layer {first} on, but {exits[0]!r} leaves no visual tokens after "
                    f"layer {last}. Give it layers up to {last}, or let the visual tokens exit later."
                )
            for layer in layers:
                if layer in owner:
                    raise ConflictError(
                        f"{owner[layer]!r} and {technique!r} both decide what visual rows do in layer {layer}. "
                        "Give them different layers."
                    )
                owner[layer] = technique
        if all(layer in owner for layer in range(last + 1)):
            for technique in active:
                if type(technique).opens is not Technique.opens:
                    raise ConflictError(
                        f"{technique!r} opens keys to image rows, but {owner[0]!r} and what stands beside it let them "
                        "attend in no layer. Leave a layer free."
                    )

    def visual_policy(self, layer: int, spec: ModelSpec) -> VisualPolicy | None:
        """The policy of the one technique that has one for ``layer``."""
        policies = (technique.visual_policy(layer, spec) for technique in self.techniques)
        return next((policy for policy in policies if policy is not None), None)

    def last_visual_layer(self, spec: ModelSpec) -> int:
        """Last layer that sees visual rows under all techniques together."""
        return min((t.last_visual_layer(spec) for t in self.techniques), default=spec.layers - 1)

    def visual_left(self, layer: int, spec: ModelSpec, visual_tokens: int, images: int) -> int:
        """How many visual tokens of a prompt enter ``layer`` at most under all techniques together."""
        left = (t.visual_left(layer, spec, visual_tokens, images) for t in self.active(spec))
        return min(left, default=visual_tokens)

    def parameter_count(self, spec: ModelSpec) -> int:
        """Learned parameters of all techniques on a model of this shape."""
        with torch.device("meta"):
            modules = [technique.build(spec) for technique in self.techniques]
        return sum(p.numel() for module in modules if module is not None for p in module.parameters())

    def attach(self, model: nn.Module, processor: Any = None, freeze: bool = True) -> Handle:
        """Attach to a stock model until :meth:`~mllm.engine.Handle.detach`.

        Args:
            model: from :func:`mllm.load`, or any stock model of a supported family.
            processor: its processor, for techniques that must tell questions from answers; or the
                :class:`~mllm.roles.ChatFormat` that was read off it before.
            freeze: while techniques with learned parts are attached, the model's own parameters get no gradients.

        Raises:
            UnsupportedModelError: the model, its layers or its attention backend cannot be served exactly.
            ConfigError: an argument does not fit the model, or the processor is missing.
            ConflictError: techniques exclude each other, or something is attached to the model already.
            LoadError: learned weights belong to another model.
        """
        from mllm.engine import Handle

        return Handle(self, model, processor, freeze)

    @contextmanager
    def __call__(self, model: nn.Module, processor: Any = None) -> Iterator[Run]:
        """Attach for the length of a ``with`` block; leaving it detaches exactly, also after an exception."""
        handle = self.attach(model, processor)
        try:
            yield handle.run
        finally:
            handle.detach()

    def describe(self) -> list[dict[str, Any]]:
        """The techniques as plain data, as they stand in YAML."""
        return [technique.describe() for technique in self.techniques]
