"""The decode loop: a round, verification, sampling, what a request carries."""
