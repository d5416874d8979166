"""The target under tree attention, with its caches."""
