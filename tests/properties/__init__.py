"""Properties that hold for all inputs, each checked against a simple oracle with many of them.

``make test`` checks a few examples, always the same; ``make hunt`` many, others in each round.
"""
