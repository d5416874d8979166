"""The EAGLE-3 head: its module, its checkpoints, how it drafts."""
