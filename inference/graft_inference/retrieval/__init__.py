"""Sources of draft tokens that run no model."""
