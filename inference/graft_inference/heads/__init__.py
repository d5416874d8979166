"""Draft heads, a folder a family."""
