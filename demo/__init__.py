"""The Gradio chat: two columns, full model and with techniques. ``mllm demo`` starts it."""
