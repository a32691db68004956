"""The page's theme and style sheet; fonts are the system's, nothing is fetched."""

from __future__ import annotations

import gradio as gr

_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Green for what stays, amber for what only offers keys, quiet greys for the rest."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.emerald,
        secondary_hue=gr.themes.colors.amber,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=_FONTS,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_label_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color_dark="white",
    )


CSS = """
:root { --mllm-kept: #047857; --mllm-passive: #d97706; --mllm-exit: #b91c1c; --mllm-grid: #d4d4d8; }
.dark { --mllm-kept: #34d399; --mllm-passive: #fbbf24; --mllm-exit: #fca5a5; --mllm-grid: #3f3f46; }
.gradio-container { max-width: 1500px !important; margin: 0 auto; }
.html-container { padding: 0 !important; }
footer .divider { display: none; }
#head h1 { margin: 0 0 4px; font-size: 1.5rem; }
#head p { margin: 0; opacity: .85; }
#full, #other { height: 420px !important; }
#full .message-wrap *, #other .message-wrap * { overflow-wrap: anywhere !important; }
#full .placeholder, #other .placeholder { padding: 0 16px; text-align: center; }
#notice:not(:has(.mllm-notice)), #saving:not(:has(.mllm-notice)), #evaluate-notice:not(:has(.mllm-notice)),
  #plot:not(:has(svg)) { display: none; }
.mllm-figures { display: flex; flex-wrap: wrap; gap: 12px; }
.mllm-figures figure { margin: 0; width: 150px; }
.mllm-figures figure:only-child { width: min(100%, 300px); }
.mllm-figures img { width: 100%; height: auto; display: block; border-radius: 4px; margin: 0; box-sizing: border-box; }
.mllm-figures figcaption { font-size: .82rem; padding-top: 3px; }
.mllm-figures .framed img { border: 5px solid var(--mllm-kept); }
.mllm-figures .left-out img { opacity: .45; }
.mllm-thumbs { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: 6px; }
.mllm-thumbs img { height: 76px; width: auto; max-width: 160px; border-radius: 4px; margin: 0;
  border: 1px solid var(--mllm-grid); }
.mllm-costs { font-size: .78rem; opacity: .8; margin-top: 6px; display: block; }
.mllm-error { color: var(--mllm-exit); }
.mllm-notice { padding: 9px 12px; border-radius: 6px; border-left: 4px solid var(--mllm-kept);
  background: var(--block-background-fill); overflow-wrap: anywhere; }
.mllm-notice progress { display: block; width: 100%; height: 8px; margin-top: 6px; accent-color: var(--mllm-kept); }
.mllm-notice.bad { border-left-color: var(--mllm-exit); }
.mllm-chart { width: 100%; max-width: 520px; height: auto; display: block; color: var(--body-text-color); }
.mllm-chart text { fill: currentColor; font-size: 12px; opacity: .8; }
.mllm-chart text.title { font-weight: 600; font-size: 13px; opacity: 1; }
.mllm-chart text.mark { font-weight: 600; opacity: 1; }
.mllm-chart .grid { stroke: var(--mllm-grid); stroke-width: 1; }
.mllm-chart .kept { fill: var(--mllm-kept); }
.mllm-chart .passive { fill: var(--mllm-passive); }
.mllm-chart .exit { stroke: var(--mllm-exit); stroke-width: 2; stroke-dasharray: 5 4; }
.mllm-chart .curve, .mllm-chart .front { fill: none; stroke: var(--mllm-kept); stroke-width: 1.6; }
.mllm-chart .front { stroke-dasharray: 3 3; }
.mllm-chart .dot { fill: var(--block-background-fill); stroke: var(--mllm-kept); stroke-width: 2; }
.mllm-chart .best { fill: var(--mllm-kept); }
.mllm-chart .interval { stroke: currentColor; opacity: .45; stroke-width: 1.2; }
.mllm-legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .85rem; }
.mllm-legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 4px; }
.mllm-legend .kept { background: var(--mllm-kept); }
.mllm-legend .passive { background: var(--mllm-passive); }
.mllm-table { overflow-x: auto; }
.mllm-table table { border-collapse: collapse; font-size: .88rem; width: 100%; max-width: 760px; border: 0 !important; }
.mllm-table th, .mllm-table td { text-align: left; padding: 4px 10px 4px 0 !important; overflow-wrap: anywhere;
  vertical-align: top; border: 0 solid var(--mllm-grid) !important; border-bottom-width: 1px !important; }
.mllm-table td:nth-child(n+3) { white-space: nowrap; }
.mllm-router { line-height: 1.9; max-height: 260px; overflow-y: auto; overflow-wrap: anywhere; }
.mllm-router .token { background: color-mix(in srgb, var(--mllm-kept) var(--share), transparent); border-radius: 3px; }
.mllm-router .picture { border: 1px dashed var(--mllm-grid); border-radius: 3px; padding: 0 6px; margin: 0 3px; }
#examples button { min-width: 0; }
#box .thumbnails { flex-wrap: wrap; }
@media (max-width: 640px) {
  #full, #other { height: 300px !important; min-height: 240px !important; }
  /* while nothing is asked, the question box and the examples are on the first screen */
  #full:has(.placeholder), #other:has(.placeholder) { height: 116px !important; min-height: 116px !important; }
  #full .placeholder, #other .placeholder { padding-top: 20px; }
  .mllm-thumbs img { height: 44px; }
  #head h1 { font-size: 1.25rem; }
}
"""
