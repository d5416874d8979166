"""Training side of Graft: from a target and some text to a bundle that graft_inference serves.

Shape suffixes of tensors: B batch, S sequence, V target vocabulary, H hidden size.
"""
