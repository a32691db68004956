"""The Gradio chat (not built yet)."""
