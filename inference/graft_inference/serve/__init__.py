"""A small server for one machine, which speaks OpenAI's API."""
