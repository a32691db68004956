"""What a technique is, how several stack, and how both attach to a model.

A technique is a frozen, validated config (a pydantic model) that answers the engine's questions, one per seam:

* :meth:`Technique.visual_policy` (attention policy): what visual rows still do in a layer;
* :meth:`Technique.keep` (token reducer): which rows enter a layer.

It holds no state: what happens in a forward lives in the :class:`~mllm.run.Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from torch import Tensor, nn

from mllm.cost import ModelSpec
from mllm.errors import ConfigError, ConflictError
from mllm.layout import TokenLayout

if TYPE_CHECKING:
    from mllm.engine import Handle
    from mllm.run import Run


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
class LayerView:
    """What a token reducer sees before a layer of one call.

    Attributes:
        layer: 0-based.
        spec: the decoder's shape.
        layout: the call's tokens.
        alive: (B, S) bool, rows that entered the layer before; False for padding.
        states: returns (B, S, D), the residual stream that enters the layer; rows that left are as they were then.
        spend: books FLOPs that the technique itself uses.
    """

    layer: int
    spec: ModelSpec
    layout: TokenLayout
    alive: Tensor
    states: Callable[[], Tensor]
    spend: Callable[[int], None]


def _parse_layers(value: Any) -> Any:
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
        raise ConfigError(
            f"{who}: layers={list(layers)} names layer {layers[-1]}, but this model has {spec.layers} layers "
            f"(0 to {spec.layers - 1})."
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

    def __init__(self, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            allowed = ", ".join(type(self).model_fields) or "none"
            raise ConfigError(f"{explain(error, type(self).name)} Arguments of {self.name}: {allowed}.") from None

    # --- what a technique may answer -------------------------------------------------------------------------------

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where the arguments do not fit a model of this shape."""

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

    def last_visual_layer(self, spec: ModelSpec) -> int:
        """Last layer that sees visual rows, where that is known before running; the model's last layer otherwise."""
        return spec.layers - 1

    def parameter_count(self) -> int:
        """Learned parameters that the technique adds."""
        return 0

    # --- using it --------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> Handle:
        """Attach to a stock model until :meth:`~mllm.engine.Handle.detach`."""
        return Stack(self).attach(model)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Run]:
        """Attach for the length of a ``with`` block; leaving it detaches exactly, also after an exception."""
        with Stack(self)(model) as run:
            yield run

    def describe(self) -> dict[str, Any]:
        """Name and arguments as plain data, as they stand in YAML."""
        return {"technique": self.name, **self.model_dump(mode="json")}


REGISTRY: dict[str, type[Technique]] = {}


def register(cls: type[Technique]) -> type[Technique]:
    """Class decorator that makes a technique known to YAML, the command line and the contract tests."""
    if cls.name in REGISTRY and REGISTRY[cls.name].__qualname__ != cls.__qualname__:
        raise ConfigError(f"Two techniques are named {cls.name!r}: {REGISTRY[cls.name]} and {cls}.")
    REGISTRY[cls.name] = cls
    return cls


def get_technique(name: str) -> type[Technique]:
    """Class of a registered technique; ConfigError names the known ones otherwise."""
    load_all()
    if name not in REGISTRY:
        raise ConfigError(f"Unknown technique {name!r}. Known: {', '.join(sorted(REGISTRY))}.")
    return REGISTRY[name]


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
        exits = [t for t in active if t.last_visual_layer(spec) < spec.layers - 1]
        if len(exits) > 1:
            raise ConflictError(
                f"{' and '.join(map(repr, exits))} both remove all visual tokens; the earlier one decides. Keep one."
            )
        last = self.last_visual_layer(spec)
        owner: dict[int, Technique] = {}
        for technique in active:
            layers = [n for n in range(spec.layers) if technique.visual_policy(n, spec) is not None]
            if layers and layers[0] > last:
                raise ConflictError(
                    f"{technique!r} acts from layer {layers[0]} on, but {exits[0]!r} leaves no visual tokens after "
                    f"layer {last}. Give it layers up to {last}, or let the visual tokens exit later."
                )
            for layer in layers:
                if layer in owner:
                    raise ConflictError(
                        f"{owner[layer]!r} and {technique!r} both decide what visual rows do in layer {layer}. "
                        "Give them different layers."
                    )
                owner[layer] = technique

    def visual_policy(self, layer: int, spec: ModelSpec) -> VisualPolicy | None:
        """The policy of the one technique that has one for ``layer``."""
        policies = (technique.visual_policy(layer, spec) for technique in self.techniques)
        return next((policy for policy in policies if policy is not None), None)

    def last_visual_layer(self, spec: ModelSpec) -> int:
        """Last layer that sees visual rows under all techniques together."""
        return min((t.last_visual_layer(spec) for t in self.techniques), default=spec.layers - 1)

    def parameter_count(self) -> int:
        """Learned parameters of all techniques."""
        return sum(technique.parameter_count() for technique in self.techniques)

    def attach(self, model: nn.Module) -> Handle:
        """Attach to a stock model until :meth:`~mllm.engine.Handle.detach`.

        Raises:
            UnsupportedModelError: the model, its layers or its attention backend cannot be served exactly.
            ConfigError: an argument does not fit the model.
            ConflictError: techniques exclude each other, or something is attached to the model already.
        """
        from mllm.engine import Handle

        return Handle(self, model)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Run]:
        """Attach for the length of a ``with`` block; leaving it detaches exactly, also after an exception."""
        handle = self.attach(model)
        try:
            yield handle.run
        finally:
            handle.detach()

    def describe(self) -> list[dict[str, Any]]:
        """The techniques as plain data, as they stand in YAML."""
        return [technique.describe() for technique in self.techniques]
