"""The stages of a run. Known without importing them, which takes seconds."""

STAGES = {
    "regenerate": "Have the target answer the training prompts, or take the data's own answers.",
    "distill": "Distil the draft head from the target.",
    "adopt": "Or take a published head (head.init_from) as it is; nothing is trained.",
    "build_corpus": "Build the successor matrix that tokens are retrieved from.",
    "calibrate": "Learn the policy from traces and this device's latencies.",
    "export": "Put head, corpus and policy into one bundle, and push it to the Hub if asked.",
    "evaluate": "Measure every method on held-out prompts, and check that output is unchanged.",
}
"""In the order in which they are run."""
WHOLE_ROAD = "quickstart"
ROAD = {"first_answer": "Answer a prompt by prompt lookup alone: nothing is trained yet."}
ROAD |= {name: line for name, line in STAGES.items() if name != "adopt"}
ROAD["demonstrate"] = "Answer a held-out prompt, each token coloured by where it came from."
"""What the whole road does."""
