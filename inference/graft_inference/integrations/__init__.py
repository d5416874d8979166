"""Graft inside other engines, which run the models themselves."""
