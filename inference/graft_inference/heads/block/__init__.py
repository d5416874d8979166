"""Heads that draft a whole block in one pass (DFlash, DSpark)."""
