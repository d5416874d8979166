"""When to stop drafting, and which nodes make the tree."""
