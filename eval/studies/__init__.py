"""Pairs x methods x seeds: what a study is, how its cells run, what they add up to."""
