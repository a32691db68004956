"""Techniques that change what attention sees, or add small trained parts (none yet)."""
