"""Numbers of an answer in words."""

from __future__ import annotations

from mllm.demo.answers import Answer


def big(value: float, unit: str) -> str:
    """A number with the prefix that fits: 29.3 GFLOPs, 5.1 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.0f} {prefix}{unit}" if scaled >= 100 else f"{scaled:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def costs(answer: Answer) -> str:
    """What one answer cost, in one line."""
    parts = []
    if answer.first_s is not None:
        parts.append(f"{answer.first_s:.2f} s to the first token")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.flops:
        parts.append(big(answer.flops, "FLOPs"))
    if answer.kv_bytes:
        parts.append(f"{big(answer.kv_bytes, 'B')} cache")
    return " · ".join(parts)


def _change(part: float, whole: float, what: str) -> str:
    """Such as "44 % less arithmetic"; the same tokens without techniques are the whole."""
    percent = round(100 * (part / whole - 1)) if whole else 0
    if percent == 0:
        return f"the same {what}"
    return f"{abs(percent)} % {'less' if percent < 0 else 'more'} {what}"


def saving(full: Answer, other: Answer) -> str:
    """What the techniques changed, in one or two sentences; empty while one of the answers is not there."""
    if not (full.new_tokens and other.new_tokens) or not (full.ended and other.ended):
        return ""
    arithmetic = _change(other.flops, other.dense_flops, "arithmetic in the decoder")
    memory = _change(other.kv_bytes, other.dense_kv_bytes, "memory for the cache")
    text = f"With {other.settings}: {arithmetic}, {memory}"
    if full.first_s and other.first_s:
        ratio = full.first_s / other.first_s
        if ratio >= 1.05:
            text += f"; the first token came {ratio:.1f} times sooner"
        elif ratio <= 1 / 1.05:
            text += f"; the first token took {1 / ratio:.1f} times as long"
        else:
            text += "; the first token took as long"
    same = full.text == other.text
    ends = "Both answers are the same." if same else "The answers differ."
    if "stopped" in (full.state, other.state):
        ends = "One answer was stopped." if full.state != other.state else "Both answers were stopped."
    return f"{text}. {ends}"
